"""MoCo v3's ViTs, on timm's VisionTransformer.

vits.vit_small(num_classes=0)(x)                            # [N, 3, 224, 224] → [N, 384]
moco.MoCo(vits.vit_base(stop_grad_conv1=True), T=0.2)       # the projector replaces the classifier
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

# ViT-S has 12 heads, as in the paper; timm's and DeiT's has 6, and the shapes of the weights agree.
VITS = {
    "vit_nano": dict(embed_dim=128, depth=4, num_heads=4),  # ours, for small images on a CPU
    "vit_conv_nano": dict(embed_dim=128, depth=3, num_heads=4, conv_stem=True),
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=12),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
    # The stem takes the place of one block (Xiao et al. 2021, "Early Convolutions").
    "vit_conv_small": dict(embed_dim=384, depth=11, num_heads=12, conv_stem=True),
    "vit_conv_base": dict(embed_dim=768, depth=11, num_heads=12, conv_stem=True),
}


# Pooling of the last block's tokens into features; those without a class token are of the study in
# Sec. 6.2.
POOLING = {
    "token": dict(global_pool="token"),  # the class token after the last LayerNorm
    "norm_avg": dict(global_pool="avg", class_token=False, fc_norm=False),
    "avg": dict(global_pool="avg", class_token=False, fc_norm=False),  # without a last LayerNorm
}


# kwargs: those of VisionTransformer below.
def vit_nano(**kwargs):
    return VisionTransformer(**VITS["vit_nano"] | kwargs)


def vit_conv_nano(**kwargs):
    return VisionTransformer(**VITS["vit_conv_nano"] | kwargs)


def vit_tiny(**kwargs):
    return VisionTransformer(**VITS["vit_tiny"] | kwargs)


def vit_small(**kwargs):
    return VisionTransformer(**VITS["vit_small"] | kwargs)


def vit_base(**kwargs):
    return VisionTransformer(**VITS["vit_base"] | kwargs)


def vit_large(**kwargs):
    return VisionTransformer(**VITS["vit_large"] | kwargs)


def vit_huge(**kwargs):
    return VisionTransformer(**VITS["vit_huge"] | kwargs)


def vit_conv_small(**kwargs):
    return VisionTransformer(**VITS["vit_conv_small"] | kwargs)


def vit_conv_base(**kwargs):
    return VisionTransformer(**VITS["vit_conv_base"] | kwargs)


class VisionTransformer(TimmVisionTransformer):
    """timm's ViT with MoCo v3's position embedding and initialization (Sec. 5).

    x: [N, in_chans, H, W] → [N, num_classes], or the class token [N, embed_dim] if num_classes = 0.
    img_size, patch_size: an int or (height, width) in pixels; img_size is a multiple of patch_size.
    stop_grad_conv1: the patch projection stays at its random initialization, the paper's cure for
        instability (Sec. 4.2).
    conv_stem: four convolutions in place of the patch projection; patch_size is a power of 2.
    pos_embed: "sincos" (fixed), "learned" or "none"; pool: one of POOLING. Both for the study.
    kwargs: as for timm's class, for example in_chans, drop_path_rate, num_classes (default 1000).
    """

    classifier_name = "head"

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        stop_grad_conv1=False,
        conv_stem=False,
        pos_embed="sincos",
        pool="token",
        **kwargs,
    ):
        img_size, patch_size = to_pair(img_size), to_pair(patch_size)
        if pos_embed not in ("sincos", "learned", "none"):
            raise ValueError(f"unknown pos_embed {pos_embed!r}: 'sincos', 'learned' or 'none'")
        if pool not in POOLING:
            raise ValueError(f"unknown pool {pool!r}: one of {', '.join(POOLING)}")
        if conv_stem and stop_grad_conv1:
            raise ValueError("stop_grad_conv1 has no patch projection to fix in a conv stem")
        if conv_stem and patch_size not in ((2, 2), (4, 4), (8, 8), (16, 16), (32, 32)):
            raise ValueError("each layer of a conv stem halves: patch_size 2, 4, 8, 16 or 32")
        check_patches(img_size, patch_size)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            embed_layer=ConvStem if conv_stem else PatchEmbed,
            weight_init="skip",
            pos_embed="none" if pos_embed == "none" else "learn",
            **POOLING[pool],
            **kwargs,
        )
        dim = self.embed_dim
        if pool == "avg":
            self.norm = nn.Identity()
        if pos_embed == "sincos":
            table = sincos_position_embedding(*self.patch_embed.grid_size, dim)
            if self.cls_token is None:
                table = table[:, 1:]  # the first entry is the class token's
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        elif pos_embed == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                xavier_uniform_(module, num_matrices=3 if name.endswith("qkv") else 1)
        if isinstance(self.head, nn.Linear):
            xavier_uniform_(self.head)
        if not conv_stem:  # Xavier-uniform, the projection seen as one Linear(3·p², d)
            self.patch_embed.proj = projection = PatchProjection(self.patch_embed.proj)
            fan_in = projection.weight[0].numel()
            bound = math.sqrt(6 / (fan_in + dim))
            nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(projection.bias)
        if stop_grad_conv1:
            self.patch_embed.proj.requires_grad_(False)


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel's size, as one matrix product over its weight.

    [N, C, H, W] → [N, d, H/p, W/p]. cuDNN's kernel for it took 3 to 4 % of a step on an H200
    (benchmarks/results/gpu_profile_h200.json).
    """

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias  # [d, C, p, p], [d]

    def forward(self, x):
        p_h, p_w = self.weight.shape[2:]
        x = x.unflatten(2, (-1, p_h)).unflatten(4, (-1, p_w))  # [N, C, H/p, p, W/p, p]
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [N, H/p, W/p, C·p·p]
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """3×3 stride-2 convolutions with BN and ReLU, then 1×1: [N, C, H, W] → [N, H/p·W/p, d].

    A patch of p = 2ⁿ takes n of them; p = 16 has the widths d/8, d/4, d/2, d.
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **_):
        super().__init__()
        self.patch_size = patch_size  # timm's VisionTransformer reads these three and feat_ratio
        self.grid_size = tuple(side // p for side, p in zip(img_size, patch_size))
        self.num_patches = self.grid_size[0] * self.grid_size[1]

        depth = int(math.log2(patch_size[0]))
        layers, d_in = [], in_chans
        for i in range(depth):
            d_out = embed_dim // 2 ** (depth - 1 - i)
            conv = nn.Conv2d(d_in, d_out, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(d_out), nn.ReLU(inplace=True)]
            d_in = d_out
        self.proj = nn.Sequential(*layers, nn.Conv2d(d_in, embed_dim, 1))

    def feat_ratio(self):
        """Stride of the feature map, for timm's feature_info."""
        return self.patch_size

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def sincos_position_embedding(grid_h, grid_w, dim):
    """Fixed 2-D sine-cosine position embedding → [1, 1 + grid_h·grid_w, dim], class token first.

    Cell (r, c) holds [sin rω, cos rω, sin cω, cos cω], ω_i = 10000^(−4i/dim), cells row-major; the
    class token's entry is zero. That is the layout in published MoCo v3 checkpoints.
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    r = torch.arange(grid_h, dtype=torch.float64).outer(omega)  # [grid_h, dim/4]
    c = torch.arange(grid_w, dtype=torch.float64).outer(omega)  # [grid_w, dim/4]
    r = torch.cat([r.sin(), r.cos()], 1)[:, None].expand(-1, grid_w, -1)
    c = torch.cat([c.sin(), c.cos()], 1)[None].expand(grid_h, -1, -1)
    cells = torch.cat([r, c], dim=2).flatten(0, 1)  # [grid_h·grid_w, dim]
    return torch.cat([torch.zeros(1, dim), cells.float()])[None]


def xavier_uniform_(linear, num_matrices=1):
    """Xavier-uniform, bias 0. num_matrices=3: a fused qkv weight counts as three square ones."""
    bound = math.sqrt(6 / (linear.out_features / num_matrices + linear.in_features))
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def check_patches(img_size, patch_size):
    """ValueError unless the image divides into whole patches; both are (height, width)."""
    if any(side % p for side, p in zip(img_size, patch_size)):
        raise ValueError(
            f"img_size {size_to_str(img_size)} is not a multiple of "
            f"patch_size {size_to_str(patch_size)}"
        )


def to_pair(size):
    """int or (height, width) → (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def size_to_str(size):
    return "{}×{}".format(*to_pair(size))
