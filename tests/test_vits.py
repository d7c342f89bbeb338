"""The backbones against FACTS of the paper: position table, initialisation, sizes, refusals."""

import math

import pytest
import torch

from moco import UserError
from moco.backbones import create_backbone
from moco.builder import MoCo, features
from vits import sincos_position_embedding


@pytest.mark.parametrize("rows, columns, dim", [(14, 14, 384), (3, 5, 32)])
def test_sincos_table_matches_the_formula(rows, columns, dim):
    table = sincos_position_embedding(rows, columns, dim)
    assert table.shape == (1, 1 + rows * columns, dim)
    assert (table[0, 0] == 0).all()
    quarter = dim // 4
    for r in range(rows):
        for c in range(columns):
            cell = table[0, 1 + r * columns + c]
            for i in range(quarter):
                omega = 10000 ** (-i / quarter)
                expected = [f(p * omega) for p in (r, c) for f in (math.sin, math.cos)]
                found = [cell[block * quarter + i].item() for block in range(4)]
                assert found == pytest.approx(expected, abs=1e-6)


def test_init_is_within_its_bounds_and_fills_them():
    vit = create_backbone("vit_small")
    block = vit.blocks[3]
    for weight, bound in (
        (block.attn.qkv.weight, math.sqrt(6 / (384 + 384))),  # Q, K, V as three matrices
        (block.attn.proj.weight, math.sqrt(6 / (384 + 384))),
        (block.mlp.fc1.weight, math.sqrt(6 / (384 + 1536))),
        (block.mlp.fc2.weight, math.sqrt(6 / (384 + 1536))),
        (vit.patch_embed.proj.weight, math.sqrt(6 / (3 * 16**2 + 384))),
    ):
        assert 0.999 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
    assert 0 < vit.cls_token.abs().max() < 1e-5
    assert vit.norm.eps == block.norm1.eps == 1e-6


@pytest.mark.parametrize(
    "arch, expected",
    [
        ("resnet50", 68_012_160),
        ("vit_small", 84_266_752),
        ("vit_base", 215_678_464),
        ("vit_large", 652_781_568),
    ],
)
def test_parameter_counts_of_the_whole_model(arch, expected):
    model = MoCo(create_backbone(arch))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    "arch, heads, patch",
    [
        ("vit_small", 12, 16),
        ("vit_base", 12, 16),
        ("vit_large", 16, 16),
        ("vit_huge", 16, 14),
        ("vit_conv_small", 12, 16),
    ],
)
def test_heads_and_patches(arch, heads, patch):
    vit = create_backbone(arch)
    assert vit.blocks[0].attn.num_heads == heads
    assert vit.patch_embed.patch_size == (patch, patch)


@pytest.mark.parametrize(
    "arch, size, patch, shape",
    [
        ("vit_nano", 16, 4, (2, 128)),
        ("vit_tiny", (32, 48), 8, (2, 192)),
        ("vit_conv_small", (64, 32), None, (2, 384)),
        ("vit_conv_nano", (16, 24), 4, (2, 128)),
        ("resnet18", 32, None, (2, 512)),
        ("resnet50", (32, 40), None, (2, 2048)),
    ],
)
def test_any_size_gives_features(arch, size, patch, shape):
    backbone = create_backbone(arch, size, patch).eval()
    height, width = (size, size) if isinstance(size, int) else size
    assert features(backbone, torch.rand(2, 3, height, width)).shape == shape
    assert backbone.num_features == shape[1]


def test_stop_grad_conv1_fixes_the_patch_projection_alone():
    vit = create_backbone("vit_nano", 16, 4, stop_grad_conv1=True)
    fixed = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert fixed == {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}


def test_conv_stem_has_the_published_keys_and_one_block_less():
    vit = create_backbone("vit_conv_small")
    found = {int(key.split(".")[2]) for key in vit.state_dict() if key.startswith("patch_embed")}
    assert found == {0, 1, 3, 4, 6, 7, 9, 10, 12}
    assert len(vit.blocks) == 11
    assert vit.patch_embed.proj[0].bias is None and vit.patch_embed.proj[12].bias is not None


def test_resnet_residual_branches_start_at_zero():
    resnet = create_backbone("resnet50")
    assert (resnet.layer1[0].bn3.weight == 0).all()


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(arch="vit_smal"), "did you mean 'vit_small'"),
        (dict(arch="resnet50", stop_grad_conv1=True), "--stop-grad-conv1 is for ViTs"),
        (dict(arch="vit_conv_small", stop_grad_conv1=True), "no patch projection"),
        (dict(arch="resnet50", patch_size=8), "--patch-size is for ViTs"),
        (dict(arch="vit_conv_base", patch_size=12), "--patch-size 2, 4, 8, 16 or 32"),
        (dict(arch="vit_base", img_size=100), "100×100 can't be cut into patches of 16×16"),
    ],
)
def test_what_a_flag_cannot_act_on_is_refused(kwargs, words):
    with pytest.raises(UserError, match=words):
        create_backbone(**kwargs)
