"""The backbones and the facts of the paper: position embedding, initialization, sizes, errors."""

import math

import pytest
import torch

import vits
from engine.backbones import BackboneConfig, create_backbone
from engine.errors import UserError
from moco import MoCo
from vits import sincos_position_embedding


@pytest.mark.parametrize("grid_h, grid_w, dim", [(14, 14, 384), (3, 5, 32)])
def test_sincos_position_embedding_matches_the_formula(grid_h, grid_w, dim):
    embedding = sincos_position_embedding(grid_h, grid_w, dim)
    assert embedding.shape == (1, 1 + grid_h * grid_w, dim)
    assert (embedding[0, 0] == 0).all()
    quarter = dim // 4
    for r in range(grid_h):
        for c in range(grid_w):
            cell = embedding[0, 1 + r * grid_w + c]
            for i in range(quarter):
                omega = 10000 ** (-i / quarter)
                expected = [f(p * omega) for p in (r, c) for f in (math.sin, math.cos)]
                values = [cell[block * quarter + i].item() for block in range(4)]
                assert values == pytest.approx(expected, abs=1e-6)


def test_patch_projection_is_the_convolution():
    """In float64, with all gradients, for patches and images that aren't square."""
    conv = torch.nn.Conv2d(2, 24, (4, 8), (4, 8), dtype=torch.float64)
    x = torch.randn(3, 2, 12, 32, dtype=torch.float64, requires_grad=True)
    results = []
    for projection in (conv, vits.PatchProjection(conv)):
        y = projection(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, conv.weight, conv.bias])])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_init_is_within_its_bounds_and_fills_them():
    vit = create_backbone(BackboneConfig("vit_small"))
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
    with torch.device("meta"):  # shapes without values
        model = MoCo(create_backbone(BackboneConfig(arch)))
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
    with torch.device("meta"):
        vit = create_backbone(BackboneConfig(arch))
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
    backbone = create_backbone(BackboneConfig(arch, size, patch)).eval()
    height, width = (size, size) if isinstance(size, int) else size
    assert backbone(torch.rand(2, 3, height, width)).shape == shape
    assert backbone.num_features == shape[1]


def test_stop_grad_conv1_fixes_the_patch_projection_alone():
    vit = create_backbone(BackboneConfig("vit_nano", 16, 4), stop_grad_conv1=True)
    fixed = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert fixed == {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}


def test_conv_stem_has_the_published_keys_and_one_block_less():
    with torch.device("meta"):
        vit = create_backbone(BackboneConfig("vit_conv_small"))
    layers = {int(key.split(".")[2]) for key in vit.state_dict() if key.startswith("patch_embed")}
    assert layers == {0, 1, 3, 4, 6, 7, 9, 10, 12}
    assert len(vit.blocks) == 11
    assert vit.patch_embed.proj[0].bias is None and vit.patch_embed.proj[12].bias is not None


def test_resnet_residual_branches_start_at_zero():
    resnet = create_backbone(BackboneConfig("resnet50"))
    assert (resnet.layer1[0].bn3.weight == 0).all()


@pytest.mark.parametrize(
    "config, stop_grad_conv1, words",
    [
        (BackboneConfig("vit_smal"), False, "did you mean 'vit_small'"),
        (BackboneConfig("resnet50"), True, "--stop-grad-conv1 is for ViTs"),
        (BackboneConfig("vit_conv_small"), True, "no patch projection"),
        (BackboneConfig("resnet50", patch_size=8), False, "--patch-size is for ViTs"),
        (BackboneConfig("vit_conv_base", patch_size=12), False, "patch_size 2, 4, 8, 16 or 32"),
        (
            BackboneConfig("vit_base", img_size=100),
            False,
            "img_size 100×100 is not a multiple of patch_size 16×16",
        ),
    ],
)
def test_a_flag_that_cannot_act_is_refused(config, stop_grad_conv1, words):
    with pytest.raises(UserError, match=words):
        create_backbone(config, stop_grad_conv1)


@pytest.mark.parametrize("name", vits.VITS)
def test_each_vit_is_a_function_that_takes_the_arguments_of_its_class(name):
    size = 28 if name == "vit_huge" else 32
    with torch.device("meta"):
        vit = getattr(vits, name)(img_size=size, num_classes=0, in_chans=1, depth=2)
        assert len(vit.blocks) == 2
        assert vit(torch.rand(2, 1, size, size)).shape == (2, vits.VITS[name]["embed_dim"])
        assert getattr(vits, name)(img_size=size, depth=1).head.out_features == 1000


def test_the_classes_raise_value_errors_in_terms_of_their_parameters():
    for kwargs, words in (
        (dict(img_size=100), "img_size 100×100 is not a multiple of patch_size 16×16"),
        (dict(conv_stem=True, stop_grad_conv1=True), "stop_grad_conv1 has no patch projection"),
        (dict(conv_stem=True, patch_size=12), "patch_size 2, 4, 8, 16 or 32"),
    ):
        with pytest.raises(ValueError, match=words):
            vits.VisionTransformer(**kwargs)


@pytest.mark.parametrize("options", [dict(pos_embed="learn"), dict(pool="cls")])
def test_unknown_variants_are_refused(options):
    with pytest.raises(ValueError, match=r"unknown (pos_embed|pool)"):
        vits.vit_nano(img_size=32, **options)
