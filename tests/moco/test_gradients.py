"""The instability instrument: norms of gradients, spikes and dips."""

import math

import numpy as np
import pytest
import timm
import torch
import torchvision

import vits
from engine.spikes import SpikeDetector
from moco import MoCo, optimizer_step
from moco.gradients import GradientMonitor


def names_of(model):
    names = {id(p): name for name, p in model.base_encoder.named_parameters()}
    monitor = GradientMonitor(model.base_encoder)
    return {place: [names[id(p)] for p in params] for place, params in monitor.params.items()}


@pytest.mark.parametrize(
    ("backbone", "first", "last"),
    [
        (vits.vit_nano(img_size=32), "patch_embed.proj.weight", "blocks.3."),
        (vits.vit_nano(img_size=32, stop_grad_conv1=True), "blocks.0.attn.qkv.weight", "blocks.3."),
        (vits.vit_conv_nano(img_size=32), "patch_embed.proj.0.weight", "blocks.2."),
        (torchvision.models.resnet18(), "conv1.weight", "layer4.1."),
        (timm.create_model("test_convnext"), "stem.0.weight", "stages.3."),
    ],
    ids=["vit", "fixed patch projection", "conv stem", "resnet", "timm"],
)
def test_the_first_layer_and_the_last_block_are_monitored(backbone, first, last):
    names = names_of(MoCo(backbone, dim=8, mlp_dim=16))
    assert names["first"][0] == first
    assert names["last"] and all(name.startswith(last) for name in names["last"])


def test_norms_are_those_of_the_gradients_before_clipping():
    torch.manual_seed(0)
    model = MoCo(vits.vit_nano(img_size=32), dim=8, mlp_dim=16, T=0.2).double()
    x1, x2 = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    loss, _ = model(x1, x2)
    encoder = model.base_encoder
    params = dict(
        first=list(encoder.patch_embed.proj.parameters()), last=list(encoder.blocks[3].parameters())
    )
    expected = {}
    for place, group in params.items():
        grads = torch.autograd.grad(loss, group, retain_graph=True)
        flat = torch.cat([grad.flatten() for grad in grads])
        expected |= {f"grad_l2/{place}": flat.norm(), f"grad_linf/{place}": flat.abs().max()}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = optimizer_step(loss, optimizer, clip_grad=1e-3, grad_monitor=GradientMonitor(encoder))
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-12)
    clipped = torch.stack([p.grad.norm() for p in params["first"]]).norm().item()
    assert clipped < 1e-3 < metrics["grad_l2/first"]


def noisy(num_steps, seed=0):
    return np.exp(0.3 * np.random.default_rng(seed).standard_normal(num_steps))


def test_spikes_are_counted_once():
    first, last = noisy(400), noisy(400, seed=1)
    for start in (150, 250, 350):
        first[start : start + 3] *= 50
        last[start + 12 : start + 15] *= 50
    detector = SpikeDetector()
    messages = [detector.update(i, first=a, last=b) for i, (a, b) in enumerate(zip(first, last))]
    assert detector.counts == {"first": 3, "last": 3}
    assert [step for step, message in enumerate(messages) if message] == [
        *(150, 162, 250, 262, 350, 362)
    ]
    assert str(detector) == "3 gradient spikes in the first layer, 3 in the last block; 0 kNN dips"


def test_noise_and_a_slow_rise_are_no_spikes():
    detector = SpikeDetector()
    for step, value in enumerate(noisy(2000) * np.linspace(1, 100, 2000)):
        assert detector.update(step, first=value, last=value) is None


def test_a_loss_that_is_no_number_is_no_spike():
    detector = SpikeDetector()
    for step in range(100):
        detector.update(step, first=1.0, last=1.0)
    assert detector.update(100, first=math.nan, last=math.nan) is None
    assert detector.counts == {"first": 0, "last": 0}


def test_a_dip_is_a_point_below_the_best():
    detector = SpikeDetector()
    assert detector.update_knn(80.0) is None and detector.update_knn(79.5) is None
    assert "3.0 points below the best" in detector.update_knn(77.0)
    assert detector.num_dips == 1


def test_the_state_continues_at_the_very_step():
    values = noisy(300)
    values[200:203] *= 40
    whole, resumed = SpikeDetector(), SpikeDetector()
    for step, value in enumerate(values):
        if step == 201:  # within a spike
            state, resumed = resumed.state_dict(), SpikeDetector()
            resumed.load_state_dict(state)
        whole.update(step, first=value, last=value)
        resumed.update(step, first=value, last=value)
    assert whole.state_dict() == resumed.state_dict() and whole.counts["first"] == 1
