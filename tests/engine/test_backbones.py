"""Every backbone by its name: families of timm, small stems, channels; with the real scripts."""

from contextlib import nullcontext

import pytest
import timm
import torch
from conftest import on_two_ranks
from timm.layers import BatchNormAct2d, resample_abs_pos_embed
from torch import nn
from torchvision.models import resnet18

from engine import checkpoint, launch, weights
from engine.backbones import (
    BackboneConfig,
    Classifier,
    check_bf16_conv_gradients,
    choose_config,
    create_backbone,
)
from engine.data.decode import MAX_PIXELS
from engine.errors import UserError
from engine.launch import Env, all_reduce_mean
from moco import MoCo
from moco.builder import ends_in_batchnorm

CPU = torch.device("cpu")

KINDS = {
    "resnet": "-a resnet18 --img-size 8 --small-stem",
    "convnext": "-a timm/convnext_atto --img-size 32 --encode-chunk 4",
    "swin": "-a timm/swin_tiny_patch4_window7_224 --img-size 16 --patch-size 2 --stop-grad-conv1",
    "registers": "-a timm/vit_wee_patch16_reg1_gap_256 --img-size 16 24 --patch-size 8",
    "mobilenet": "-a timm/mobilenetv3_small_050 --img-size 32",
}
HEADS = {  # name of the projector, its layers with weights, whether a BN follows the predictor
    "resnet": ("fc", {0, 1, 3}, False),
    "convnext": ("head.fc", {0, 1, 3, 4, 6}, True),
    "swin": ("head.fc", {0, 1, 3, 4, 6}, True),
    "registers": ("head", {0, 1, 3, 4, 6}, True),
    "mobilenet": ("classifier", {0, 1, 3}, False),
}
PRETRAIN = (
    "--batch-size 8 --optimizer adamw --lr 1e-2 --epochs 1 --warmup-epochs 0 --moco-dim 8 "
    "--moco-mlp-dim 16 --knn-every 1 --workers 0 --device cpu --amp off"
).split()
PROBE = "--batch-size 8 --epochs 1 --workers 0 --device cpu --amp off".split()


def others_slow(names, quick):
    """Parameters of a test: those that are not in `quick` are marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def run(script, name, *argv):
    code, out, err = script(name, *argv)
    assert code == 0, err
    return out


@pytest.mark.parametrize("kind", others_slow(KINDS, {"resnet"}))
def test_five_kinds_are_pretrained_and_probed(script, tmp_path, two_classes, kind):
    path, out = tmp_path / "pre" / "checkpoint.pth", tmp_path / "probe"
    args = [*PRETRAIN, *KINDS[kind].split(), "--output-dir", path.parent]
    run(script, "main_moco.py", two_classes, *args)
    content = checkpoint.load(path)
    state = content["state_dict"]
    assert content["iteration"] == 2 and content["arch"] == KINDS[kind].split()[1]
    assert all(value.isfinite().all() for value in state.values())

    name, layers, last_bn = HEADS[kind]
    prefix = f"module.base_encoder.{name}."
    keys = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    assert {int(key.split(".")[0]) for key in keys if key.endswith("weight")} == layers
    assert ("module.predictor.4.running_mean" in state) == last_bn

    assert "linear  top-1" in run(
        script, "main_lincls.py", two_classes, *PROBE, "--pretrained", path, "--output-dir", out
    )
    probed = checkpoint.load(out / "linear_lr0.1.pth")
    assert probed["state_dict"][f"module.{name}.weight"].shape[0] == 2
    for key, value in probed["state_dict"].items():
        if not key.startswith(f"module.{name}."):
            before = state[key.replace("module.", "module.base_encoder.")]
            assert torch.equal(value, before), f"{key} is not the pre-trained one"

    argv = ["--pretrained", out / "linear_lr0.1.pth", "--evaluate", "--device", "cpu"]
    assert "on 6 images" in run(script, "main_lincls.py", two_classes, *argv)


# Small members of their families.
TIMM_FAMILIES = """
    cait_xxs24_224 coat_tiny convit_tiny convnext_atto cs3darknet_focus_s deit_tiny_patch16_224
    densenet121 dpn48b edgenext_xx_small efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0
    fastvit_t8 gcvit_xxtiny ghostnet_050 gmlp_ti16_224 hgnetv2_b0 hrnet_w18_small
    mobilenetv3_small_050 mobilenetv4_conv_small mobilevit_xxs nest_tiny nf_regnet_b0 pit_ti_224
    poolformer_s12 pvt_v2_b0 regnetx_002 repvgg_a0 resnest14d resnet10t resnetv2_18 starnet_s050
    swinv2_cr_tiny_224 tf_efficientnet_b0 tiny_vit_5m_224 visformer_tiny vit_tiny_patch16_224
    vit_tiny_r_s16_p8_224 vit_wee_patch16_reg1_gap_256 xcit_nano_12_p8_224
""".split()
REFUSED = {
    "halonet_h1": "has no features at 64×64 pixels",
    "inception_v3": "has no features at 64×64 pixels",
    "levit_128s": "several classifiers",
}
OLD_REFUSED = {"efficientvit_m0"}  # timm 1.0.21 can't build it for an image size
QUICK_FAMILIES = (
    "convnext_atto deit_tiny_patch16_224 mobilenetv3_small_050 regnetx_002 resnet10t "
    "xcit_nano_12_p8_224 inception_v3 levit_128s"
).split()


@pytest.mark.parametrize("name", others_slow([*TIMM_FAMILIES, *REFUSED], QUICK_FAMILIES))
def test_families_of_timm_give_features_or_are_refused(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            create_backbone(BackboneConfig(f"timm/{name}", 64))
        return
    size = 56 if "patch14" in name else 64
    try:
        backbone = create_backbone(BackboneConfig(f"timm/{name}", size))
    except UserError:
        assert name in OLD_REFUSED
        return
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        h = backbone(x)
        assert h.shape == (2, backbone.num_features)
        assert torch.equal(h, backbone(x)), "something is random in training mode"
        h = backbone.eval()(x)
        classifier = Classifier(backbone.num_features, 5)
        backbone.set_submodule(backbone.classifier_name, classifier)
        torch.testing.assert_close(backbone(x), classifier(h))
        encoder = MoCo(backbone, dim=8, mlp_dim=8).base_encoder.eval()
        assert encoder.num_features == h.shape[1]
        torch.testing.assert_close(encoder(x), h)  # the projector passes its input through


@pytest.mark.parametrize(
    "arch, resnet_form",
    [
        ("resnet18", True),
        ("timm/gcresnet50t", True),  # LayerNorms inside its blocks
        ("vit_conv_nano", False),
        ("timm/resnet50_gn", False),
        ("timm/nf_regnet_b0", False),  # without any norm
    ],
)
def test_the_last_norm_decides_the_form_of_the_heads(arch, resnet_form):
    assert ends_in_batchnorm(create_backbone(BackboneConfig(arch, 64))) == resnet_form


def test_small_stem_is_torchvisions_resnet_with_another_first_layer():
    ours = create_backbone(BackboneConfig("resnet18", 32, small_stem=True)).eval()
    theirs = resnet18()
    theirs.conv1, theirs.maxpool, theirs.fc = (
        nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Sequential(), nn.Sequential(),
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs.eval()(x))
    # He et al.'s initialization, as torchvision's: N(0, 2/fan-out)
    assert ours.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("arch", ["resnet18", "vit_nano", "vit_conv_nano", "timm/convnext_atto"])
@pytest.mark.parametrize("in_chans", [1, 5])
def test_any_number_of_channels(arch, in_chans):
    config = choose_config(dict(arch=arch, img_size=32, in_chans=in_chans))
    model = MoCo(create_backbone(config), 8, 16)
    loss, _ = model(*torch.rand(2, 4, in_chans, 32, 32))
    loss.backward()
    assert loss.isfinite()


def test_a_learned_position_embedding_is_trained_and_loaded():
    def model(size):
        backbone = create_backbone(BackboneConfig("timm/vit_wee_patch16_reg1_gap_256", size, 8))
        return MoCo(backbone, 8, 16)

    small, same, large = model((16, 64)), model((16, 64)), model((32, 32))
    assert small.base_encoder.pos_embed.requires_grad
    content = dict(state_dict=small.state_dict(), img_size=(16, 64))
    weights.load_model(same, content, "x.pth")
    weights.load_model(large, content, "x.pth")
    for encoder in ("base_encoder", "momentum_encoder"):
        embedding, equal, other = (getattr(m, encoder).pos_embed for m in (small, same, large))
        assert torch.equal(equal, embedding)
        assert other.shape == embedding.shape  # 2×8 cells and 4×4, no entry for the class token
        expected = resample_abs_pos_embed(embedding, (4, 4), (2, 8), num_prefix_tokens=0)
        torch.testing.assert_close(other, expected, rtol=0, atol=0)


def test_flags_act_on_timms_models():
    config = BackboneConfig("timm/vit_wee_patch16_reg1_gap_256", 32, 8)
    vit = create_backbone(config, stop_grad_conv1=True)
    fixed = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert fixed == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert vit.patch_embed.grid_size == (4, 4)
    convnext = create_backbone(BackboneConfig("timm/convnext_atto", 32), drop_path=0.3)
    drop_rates = [m.drop_prob for m in convnext.modules() if hasattr(m, "drop_prob")]
    assert max(drop_rates) == pytest.approx(0.3) and min(drop_rates) < 0.3
    assert weights.num_heads(vit) == 4
    assert weights.num_heads(convnext) is None


@pytest.mark.parametrize(
    "arch, options, words",
    [
        ("timm/convnext_tinny", {}, "did you mean 'timm/convnext_tiny'"),
        ("convnext_tiny", {}, "did you mean 'timm/convnext_tiny'"),
        ("resnet5", {}, "did you mean 'resnet50'"),
        ("timm/resnet18.a1_in1k", {}, "names weights, but they begin at random: -a timm/resnet18"),
        ("timm/resnet10t", dict(patch_size=8), "--patch-size does not act on timm/resnet10t"),
        ("timm/densenet121", dict(drop_path=0.1), "densenet121"),
        ("timm/resnet10t", dict(stop_grad_conv1=True), "no patch projection to fix"),
        ("timm/resnet10t", dict(small_stem=True), "--small-stem is for torchvision's ResNets"),
        ("timm/vit_tiny_patch16_224", dict(img_size=100), "img_size 100×100 is not a multiple of"),
        ("timm/nest_tiny", dict(img_size=(96, 64)), "can't build timm/nest_tiny"),
        ("timm/convit_tiny", dict(img_size=(96, 64)), "has no features at 96×64 pixels"),
    ],
)
def test_options_that_do_not_act_are_refused_in_one_line(arch, options, words):
    with pytest.raises(UserError, match=words) as refused:
        sizes = {k: v for k, v in options.items() if k not in ("stop_grad_conv1", "drop_path")}
        others = {k: v for k, v in options.items() if k not in sizes}
        create_backbone(BackboneConfig(arch, **dict(img_size=64) | sizes), **others)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "arch, size, small_stem, refused",
    [
        ("resnet18", 16, False, True),
        ("resnet18", 32, False, False),
        ("resnet18", 16, True, False),
        ("resnet18", 4, True, True),
        ("timm/resnet10t", 16, False, True),
        ("timm/mobilenetv3_small_050", 32, False, False),
        ("vit_nano", 16, False, False),
    ],
)
def test_maps_narrower_than_a_stride_are_refused_in_bf16_on_a_cpu(arch, size, small_stem, refused):
    backbone = create_backbone(BackboneConfig(arch, size, small_stem=small_stem))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    config = BackboneConfig(arch, (size, size))
    check_bf16_conv_gradients(backbone, config, Env(CPU))
    check_bf16_conv_gradients(backbone, config, Env(torch.device("cuda"), torch.bfloat16))
    expectation = pytest.raises(UserError, match="bf16 gradients on a CPU are wrong")
    with expectation if refused else nullcontext():
        check_bf16_conv_gradients(backbone, config, Env(CPU, torch.bfloat16))
    assert backbone.training and not any(m._forward_hooks for m in backbone.modules())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def batchnorms():
    """BatchNorm2d with an activation inside, as timm has it, and BatchNorm1d of [N, C]."""
    conv = nn.Conv2d(2, 5, 3)
    act = BatchNormAct2d(5, act_layer=nn.PReLU, inplace=False)
    return nn.Sequential(conv, act, nn.Flatten(), nn.Linear(20, 3), nn.BatchNorm1d(3)).double()


def check_timms_batchnorm(rank):
    theirs = batchnorms()
    ours = batchnorms()
    ours.load_state_dict(theirs.state_dict())
    ours = Env(CPU).sync_batchnorm(ours).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    whole = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    for _ in range(2):
        expected, result = theirs(whole), ours(whole.chunk(2)[rank])
        torch.testing.assert_close(result, expected.chunk(2)[rank])
        result.square().sum().backward()
        expected.square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(all_reduce_mean(p.grad) * 2, q.grad, msg=name)
    for ours_buffer, theirs_buffer in zip(ours.buffers(), theirs.buffers()):
        torch.testing.assert_close(ours_buffer, theirs_buffer)


def test_batchnorms_of_timm_on_two_ranks_equal_the_whole_batch():
    on_two_ranks(check_timms_batchnorm)


def test_synchronized_on_cuda_they_keep_their_activations(monkeypatch):
    model = batchnorms().eval()
    x = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    expected = model(x)
    monkeypatch.setattr(launch, "world_size", lambda: 2)
    synced = Env(torch.device("cuda")).sync_batchnorm(model).eval()
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synced.modules()) == 2
    torch.testing.assert_close(synced(x), expected)


def test_options_win_over_what_a_file_states(capsys):
    stated = dict(arch="vit_nano", img_size=[32, 64], patch_size=8, pool="avg", in_chans=1,
                  mean=[0.2], std=[0.3])  # fmt: skip
    config = choose_config(dict(img_size=16, std=(0.4,), arch=None), stated, "x.pth")
    assert (config.img_size, config.patch_size, config.pool) == ((16, 16), (8, 8), "avg")
    assert config.pixel_format == (1, (0.2,), (0.4,), None, MAX_PIXELS)
    assert capsys.readouterr().out == "weights --std 0.4 in place of 0.3, which x.pth states\n"
    stated["value_range"] = [0, 4095]
    choose_config(dict(mean=(0.2,), value_range=(0.0, 65535.0)), stated, "x.pth")
    replaced = "weights --value-range 0 65535 in place of 0 4095, which x.pth states\n"
    assert capsys.readouterr().out == replaced
    assert choose_config(dict(arch="timm/vit_base_patch16_384")).img_size == (384, 384)
    assert choose_config(dict(arch="resnet18", in_chans=2)).pixel_format.mean == (0.449, 0.449)
    for options, words in (
        (dict(arch="vit_tiny"), "x.pth holds vit_nano, not vit_tiny: drop -a vit_tiny"),
        (dict(in_chans=3), r"x.pth is for 1 channel\(s\): drop --in-chans 3"),
        (dict(mean=(0.1, 0.2)), "--mean takes one number per channel: 1, not 2"),
    ):
        with pytest.raises(UserError, match=words):
            choose_config(options, stated, "x.pth")
