"""The algorithm: loss, gradient, momentum update and heads, compared with formulas in float64."""

import math

import pytest
import torch
from torch import nn

from engine.backbones import BackboneConfig, create_backbone
from engine.data.crops import TwoCrops
from engine.data.decode import RGB
from engine.data.sampler import EpochBatchSampler
from engine.data.splits import load_splits, open_source
from main_moco import make_views
from moco import MoCo, augment, contrastive_loss, create_optimizer
from moco.batchnorm import ViewBatchNorm
from moco.builder import feature_std


def nano(arch="vit_nano", size=16, patch=4, T=0.2, **kwargs):
    backbone = create_backbone(BackboneConfig(arch, size, patch, **kwargs))
    return MoCo(backbone, dim=32, mlp_dim=64, T=T)


def digits(n, seed=0, size=16):
    """A batch of augmented views → x1, x2 [n, 3, size, size]."""
    crops, params = crops_of_digits(n, seed, size)
    return augment(crops.flatten(0, 1), params.flatten(0, 1)).chunk(2)


def dense_loss(q, k, T):
    """2T · mean of −log softmax over all keys, by hand."""
    q = q / q.pow(2).sum(1, keepdim=True).sqrt()
    logits = q @ k.T / T
    log_partition = logits.exp().sum(1).log()
    return 2 * T * (log_partition - logits.diagonal()).mean()


@pytest.mark.parametrize("T", [0.2, 1.0])
def test_loss_and_gradient_match_the_dense_formula(T):
    q = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    k = nn.functional.normalize(torch.randn(12, 8, dtype=torch.float64), dim=1)
    ours, top1 = contrastive_loss(q, k, T)
    expected = dense_loss(q, k, T)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    gradient, expected_gradient = (torch.autograd.grad(v, q)[0] for v in (ours, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    nearest = (nn.functional.normalize(q, dim=1) @ k.T).argmax(1)
    assert top1 == (nearest == torch.arange(12)).double().mean()


def crops_of_digits(n, seed=0, size=16):
    """A batch as a worker makes it: uint8 [2, n, 3, size, size], params [2, n, NUM_PARAMS]."""
    train = load_splits(open_source("digits")).train
    keys = next(iter(EpochBatchSampler(len(train), n, seed)))
    return TwoCrops(train, (size, size), 0.35, seed).__getitems__(keys)[0]


def gradients(model, *views):
    """One backward pass → the loss and all gradients in one vector."""
    loss, _ = model(*views)
    loss.backward()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_chunks_give_the_gradient_of_the_whole_batch(chunk):
    x1, x2 = torch.randn(2, 12, 3, 16, 16, dtype=torch.float64)
    results = []
    for encode_chunk in (0, chunk):
        torch.manual_seed(0)
        backbone = create_backbone(BackboneConfig("vit_nano", 16, 4))
        model = MoCo(backbone, 32, 64, 0.2, encode_chunk).double()
        results.append(gradients(model, x1, x2))
    (loss, grad), (chunked_loss, chunked_grad) = results
    assert chunked_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert ((chunked_grad - grad).norm() / grad.norm()).item() < 1e-10


@pytest.mark.parametrize("chunk", [5, 100])
def test_chunks_augment_as_the_whole_batch(chunk):
    batch = (*crops_of_digits(12), RGB)
    whole, chunked = (torch.cat(make_views(*batch, chunk=size)) for size in (0, chunk))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)
    rounded = torch.cat(make_views(*batch, torch.bfloat16, chunk))
    torch.testing.assert_close(rounded, chunked.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["resnet18", "vit_conv_nano"])
def test_chunks_refuse_a_backbone_with_batchnorm(arch):
    with pytest.raises(ValueError, match="encode_chunk needs a backbone without BatchNorm"):
        MoCo(create_backbone(BackboneConfig(arch, 32)), 8, 8, encode_chunk=4)


@pytest.mark.parametrize("arch, size, patch", [("vit_nano", 16, 4), ("resnet18", 32, None)])
def test_forward_is_the_symmetrized_loss_of_algorithm_1(arch, size, patch):
    model = nano(arch, size, patch).double()
    with torch.no_grad():  # unlike the base encoder, so that mixing them up shows
        for p in model.momentum_encoder.parameters():
            p.mul_(1.1)
    x1, x2 = torch.randn(2, 8, 3, size, size, dtype=torch.float64)

    def through(encoder, x):  # one view alone, with torch's own BatchNorm
        h = encoder(x)
        return plain(encoder.fc if hasattr(encoder, "fc") else encoder.head)(h)

    def plain(head):
        def swap(m):
            bn = nn.BatchNorm1d(m.num_features, affine=m.affine, dtype=torch.float64)
            bn.weight, bn.bias = m.weight, m.bias
            return bn

        return nn.Sequential(*[swap(m) if isinstance(m, ViewBatchNorm) else m for m in head])

    q1, q2 = (plain(model.predictor)(through(model.base_encoder, x)) for x in (x1, x2))
    k1, k2 = (
        nn.functional.normalize(through(model.momentum_encoder, x), dim=1).detach()
        for x in (x1, x2)
    )
    expected = dense_loss(q1, k2, 0.2) + dense_loss(q2, k1, 0.2)
    loss, _ = model(x1, x2)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_a_called_encoder_returns_the_features():
    """The projector in it passes its input through; `project` applies the layers."""
    backbone = create_backbone(BackboneConfig("vit_nano", 16, 4))
    x = torch.rand(3, 3, 16, 16)
    expected = backbone(x)
    model = MoCo(backbone, dim=32, mlp_dim=64)
    assert torch.equal(model.base_encoder(x), expected)
    assert torch.equal(model.momentum_encoder(x), expected)
    assert model.base_encoder.num_features == 128
    assert model.base_encoder.head.project(expected[None]).shape == (1, 3, 32)


def test_any_module_under_the_contract_is_a_backbone():
    class Volume(nn.Module):
        """Without a classifier; states the width of its features."""

        num_features = 6

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 6, 2, 2)

        def forward(self, x):
            return self.conv(x).mean((2, 3, 4))

    class Classifying(Volume):
        """With a classifier of its own name, which it calls."""

        classifier_name = "classify"

        def __init__(self):
            super().__init__()
            self.classify = nn.Linear(6, 10)

        def forward(self, x):
            return self.classify(super().forward(x))

    class Maps(Volume):
        def forward(self, x):
            return self.conv(x)

    class Unstated(Volume):
        num_features = None

    x1, x2 = torch.rand(2, 4, 1, 4, 4, 4)
    for backbone in (Volume(), Classifying()):
        model = MoCo(backbone, dim=8, mlp_dim=16)
        loss, _ = model(x1, x2)
        loss.backward()
        assert model.base_encoder(x1).shape == (4, 6)
    with pytest.raises(ValueError, match=r"returned \[4, 6, 2, 2, 2\] for a view"):
        MoCo(Maps(), dim=8, mlp_dim=16)(x1, x2)
    with pytest.raises(ValueError, match="num_features = d"):
        MoCo(Unstated(), dim=8, mlp_dim=16)


def test_forward_changes_no_weight_and_keys_get_no_gradient():
    model = nano()
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss, _ = model(*digits(16))
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert (p.grad is None) == (not p.requires_grad), name
    assert all(not p.requires_grad for p in model.momentum_encoder.parameters())


def test_momentum_update_matches_the_formula():
    model = nano().double()
    with torch.no_grad():
        for p in model.base_encoder.parameters():
            p.add_(torch.randn_like(p))
    before = [p.clone() for p in model.momentum_encoder.parameters()]
    model.update_momentum_encoder(0.97)
    for k, old, q in zip(
        model.momentum_encoder.parameters(), before, model.base_encoder.parameters()
    ):
        torch.testing.assert_close(k, 0.97 * old + 0.03 * q, rtol=1e-12, atol=1e-12)
    model.update_momentum_encoder(1.0)
    torch.testing.assert_close(k, 0.97 * old + 0.03 * q, rtol=1e-12, atol=1e-12)


def test_both_views_as_one_batch_equal_two_batches():
    model = nano().double()
    x1, x2 = (x.double() for x in digits(16))
    one, _ = model(x1, x2)
    model.concat_views = False
    two, _ = model(x1, x2)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_backbones_with_batchnorm_never_mix_views():
    assert nano().concat_views
    assert not nano("resnet18", 32, None).concat_views
    assert not nano("vit_conv_small", 32, None).concat_views


def test_head_batchnorm_is_batchnorm1d_of_each_view():
    ours, theirs = ViewBatchNorm(6), nn.BatchNorm1d(6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 10, 6)
    torch.testing.assert_close(ours(x), torch.stack([theirs(x[0]), theirs(x[1])]))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize(
    "arch, name, layers",
    [("vit_small", "head", {0, 1, 3, 4, 6, 7}), ("resnet50", "fc", {0, 1, 3, 4})],
)
def test_state_dict_has_the_published_keys(arch, name, layers):
    with torch.device("meta"):
        state = MoCo(create_backbone(BackboneConfig(arch))).state_dict()
    for encoder in ("base_encoder", "momentum_encoder"):
        prefix = f"{encoder}.{name}."
        keys = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
        assert {int(key.split(".")[0]) for key in keys} == layers
    predictor = {int(key.split(".")[1]) for key in state if key.startswith("predictor.")}
    assert predictor == ({0, 1, 3, 4} if arch == "vit_small" else {0, 1, 3})
    assert not any(key.endswith(".bias") and ".0." in key for key in state if "predictor" in key)
    last = max(layers)  # BN without affine
    assert f"base_encoder.{name}.{last}.running_mean" in state
    assert f"base_encoder.{name}.{last}.weight" not in state


def test_loss_at_init_is_near_chance_for_vit_small():
    model = MoCo(create_backbone(BackboneConfig("vit_small", 64, 16)), T=0.2)
    with torch.no_grad():
        loss, metrics = model(*digits(64, size=64))
    assert loss.item() == pytest.approx(4 * 0.2 * math.log(64), rel=0.03)
    assert 0 <= metrics["top1"] <= 1


def test_64_images_are_learned_within_100_steps():
    model = nano(patch=8)
    optimizer = create_optimizer("adamw", model, lr=1e-3, wd=0.0)
    x1, x2 = digits(64)
    losses = []
    while len(losses) < 100 and (not losses or losses[-1] > 0.5 * 4 * 0.2 * math.log(64)):
        loss, metrics = model(x1, x2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_momentum_encoder(0.9)
        losses.append(loss.item())
    assert len(losses) < 100
    assert metrics["top1"] > 0.5


def test_feature_std_is_one_on_the_sphere_and_zero_when_collapsed():
    assert feature_std(torch.randn(2, 4096, 64)).item() == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(2, 16, 64)).item() == pytest.approx(0, abs=1e-6)
