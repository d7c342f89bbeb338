"""MoCo v3's ViTs, on timm's VisionTransformer; moco/backbones.py creates them by name.

vit = VisionTransformer(img_size=224, stop_grad_conv1=True, **VITS["vit_small"])
vit.forward_head(vit.forward_features(x), pre_logits=True)         # class token, [N, 384]
"""

import math
from functools import partial

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from moco import UserError

# ViT-S has 12 heads, as the paper has it; timm's and DeiT's has 6, and the weights' shapes agree.
VITS = {
    "vit_nano": dict(embed_dim=128, depth=4, num_heads=4),  # ours, for small images on a CPU
    "vit_conv_nano": dict(embed_dim=128, depth=3, num_heads=4, conv_stem=True),
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=12),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
    # The stem takes the place of one block (paper Sec. 5, after Xiao et al., "Early Convolutions").
    "vit_conv_small": dict(embed_dim=384, depth=11, num_heads=12, conv_stem=True),
    "vit_conv_base": dict(embed_dim=768, depth=11, num_heads=12, conv_stem=True),
}


class VisionTransformer(TimmViT):
    """timm's ViT with MoCo v3's position embedding and initialisation (paper Sec. 4.4, Appendix).

    x: [N, in_chans, H, W], (H, W) = img_size, each a multiple of patch_size. `stop_grad_conv1`
    leaves the patch projection at its random initialisation: the cure for instability, Sec. 4.3.
    """

    classifier_name = "head"

    def __init__(
        self, img_size=224, patch_size=16, stop_grad_conv1=False, conv_stem=False, **kwargs
    ):
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            embed_layer=ConvStem if conv_stem else PatchEmbed,
            weight_init="skip",
            **kwargs,
        )
        grid, dim = self.patch_embed.grid_size, self.embed_dim
        self.pos_embed = nn.Parameter(sincos_position_embedding(*grid, dim), requires_grad=False)

        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                init_linear(module, matrices=3 if name.endswith("qkv") else 1)
        if not conv_stem:  # Xavier-uniform, the projection seen as one Linear(3·p², d)
            projection = self.patch_embed.proj
            fan_in = projection.weight[0].numel()
            bound = math.sqrt(6 / (fan_in + dim))
            nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(projection.bias)
        if stop_grad_conv1:
            self.patch_embed.proj.requires_grad_(False)


class ConvStem(nn.Module):
    """3×3 stride-2 convolutions with BN and ReLU, then 1×1: [N, C, H, W] → [N, H/p·W/p, d].

    A patch of p = 2ⁿ takes n of them; p = 16 has the widths d/8, d/4, d/2, d.
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **_):
        super().__init__()
        self.patch_size = patch_size  # timm reads these three
        self.grid_size = tuple(side // p for side, p in zip(img_size, patch_size))
        self.num_patches = self.grid_size[0] * self.grid_size[1]

        layers, chans = [], in_chans
        for halvings_left in reversed(range(int(math.log2(patch_size[0])))):
            out = embed_dim // 2**halvings_left
            conv = nn.Conv2d(chans, out, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            chans = out
        self.proj = nn.Sequential(*layers, nn.Conv2d(chans, embed_dim, 1))

    def feat_ratio(self):
        return self.patch_size

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def sincos_position_embedding(rows, columns, dim):
    """Fixed 2-D sine-cosine position embedding → [1, 1 + rows·columns, dim], class token first.

    Cell (r, c) holds [sin rω, cos rω, sin cω, cos cω], ω_i = 10000^(−4i/dim), cells row-major; the
    class token's row is zero. That is the layout in published MoCo v3 checkpoints.
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    r = torch.arange(rows, dtype=torch.float64).outer(omega)  # [rows, dim/4]
    c = torch.arange(columns, dtype=torch.float64).outer(omega)  # [columns, dim/4]
    r = torch.cat([r.sin(), r.cos()], 1)[:, None].expand(-1, columns, -1)
    c = torch.cat([c.sin(), c.cos()], 1)[None].expand(rows, -1, -1)
    cells = torch.cat([r, c], dim=2).flatten(0, 1)  # [rows·columns, dim]
    return torch.cat([torch.zeros(1, dim), cells.float()])[None]


def init_linear(linear, matrices=1):
    """Xavier-uniform, bias 0. matrices=3: a fused qkv weight counts as three square matrices."""
    bound = math.sqrt(6 / (linear.out_features / matrices + linear.in_features))
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def create_vit(arch, img_size, patch_size, stop_grad_conv1, drop_path, in_chans):
    """A VisionTransformer by its name in VITS; arguments as in moco.backbones.create_backbone."""
    config = dict(VITS[arch])
    conv_stem = config.get("conv_stem", False)
    if conv_stem and stop_grad_conv1:
        raise UserError(f"--stop-grad-conv1 has no patch projection to fix in {arch}: drop it")
    config["patch_size"] = patch = pair(patch_size or config.get("patch_size", 16))
    if conv_stem and patch not in ((2, 2), (4, 4), (8, 8), (16, 16), (32, 32)):
        raise UserError(f"each layer of {arch}'s stem halves: --patch-size 2, 4, 8, 16 or 32")
    check_patches(img_size, patch)
    return VisionTransformer(
        pair(img_size),
        stop_grad_conv1=stop_grad_conv1,
        drop_path_rate=drop_path,
        in_chans=in_chans,
        **config,
    )


def check_patches(img_size, patch_size):
    """UserError unless whole patches make up the image."""
    if any(side % p for side, p in zip(pair(img_size), patch_size)):
        raise UserError(
            f"an image of {size_text(img_size)} can't be cut into patches of "
            f"{size_text(patch_size)}: --img-size must be a multiple of --patch-size"
        )


def pair(size):
    """int or (height, width) → (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def size_text(size):
    return "{}×{}".format(*pair(size))
