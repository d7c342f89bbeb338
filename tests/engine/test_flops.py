"""Operations of a backbone beside a formula, and the peaks of GPUs."""

import pytest
import torch
from conftest import ENV
from torch import nn

from engine import flops
from engine.backbones import BackboneConfig, create_backbone
from engine.flops import forward_flops, peak_flops, peak_images_per_s
from engine.launch import Env

CUDA = torch.device("cuda", 0)


def refuse(graph, inputs):
    raise AssertionError("compiled, only to count")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_operations_of_a_vit_are_those_of_the_formula(compiled):
    config = BackboneConfig("vit_tiny", img_size=(96, 64))
    backbone, d, tokens, depth = create_backbone(config), 192, 6 * 4 + 1, 12
    if compiled:
        for block in backbone.blocks:
            block.compile(backend=refuse)
    block = tokens * 12 * d**2 + 2 * tokens**2 * d  # multiplications
    patches = (tokens - 1) * 3 * 16**2 * d
    assert forward_flops(backbone, config.img_size) == 2 * (patches + depth * block)
    assert next(backbone.parameters()).device.type == "cpu" and backbone.training


def test_the_operations_of_resnet50_are_the_published_ones():
    backbone = create_backbone(BackboneConfig("resnet50"))
    assert forward_flops(backbone, (224, 224)) / 2 == pytest.approx(4.09e9, rel=1e-2)


def test_a_model_that_needs_data_has_no_count():
    class Conditional(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    assert forward_flops(Conditional(8, 8), (8, 8)) is None


@pytest.mark.parametrize(
    "name, dtype, tflops",
    [
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA A100-SXM4-80GB", torch.float16, 312),
        ("NVIDIA A100 80GB PCIe", torch.bfloat16, 312),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("NVIDIA H200", None, None),  # float32
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, None),  # a part of one
        ("NVIDIA H100 PCIe", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
    ],
)
def test_the_peak_is_that_of_a_known_gpu_or_none(monkeypatch, name, dtype, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(CUDA, dtype) == (tflops and tflops * 1e12)
    assert peak_flops(ENV.device, dtype) is None


def test_the_peak_in_images_is_of_all_gpus_and_passes(monkeypatch):
    monkeypatch.setattr(flops, "peak_flops", lambda *_: 1e12)
    monkeypatch.setattr(flops, "world_size", lambda: 4)
    config = BackboneConfig("vit_nano", img_size=(32, 32))
    backbone, env = create_backbone(config), Env(CUDA, torch.bfloat16)
    expected = 4e12 / (8 * forward_flops(backbone, (32, 32)))
    assert peak_images_per_s(backbone, config, env, passes=8) == pytest.approx(expected)
