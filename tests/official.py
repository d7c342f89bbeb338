"""Checkpoints in the official layout, from the published key names alone; MMPretrain's names."""

import torch

HEADS = {"head": ([0, 3, 6], [1, 4], 7), "fc": ([0, 3], [1], 4)}  # Linear, BN, BN without affine


WIDTHS = dict(vit_small=384, vit_base=768, vit_conv_small=384, resnet18=512, resnet50=2048)


def backbone_shapes(arch):
    if not arch.startswith("vit"):
        return dict(resnet_shapes((3, 4, 6, 3) if arch == "resnet50" else (2, 2, 2, 2)))
    conv_stem = arch.startswith("vit_conv")
    return dict(vit_shapes(WIDTHS[arch], 11 if conv_stem else 12, 16, 197, conv_stem))


def vit_shapes(dim, depth, patch, tokens, conv_stem=False):
    yield from {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, tokens, dim),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }.items()
    if conv_stem:
        widths = [3, dim // 8, dim // 4, dim // 2, dim]
        for n, (before, after) in enumerate(zip(widths, widths[1:])):
            yield f"patch_embed.proj.{3 * n}.weight", (after, before, 3, 3)
            yield from batchnorm_shapes(f"patch_embed.proj.{3 * n + 1}", after)
        yield "patch_embed.proj.12.weight", (dim, dim, 1, 1)
        yield "patch_embed.proj.12.bias", (dim,)
    else:
        yield "patch_embed.proj.weight", (dim, 3, patch, patch)
        yield "patch_embed.proj.bias", (dim,)
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim),
              "mlp.fc2": (dim, 4 * dim)}  # fmt: skip
    for n in range(depth):
        for norm in ("norm1", "norm2"):
            yield f"blocks.{n}.{norm}.weight", (dim,)
            yield f"blocks.{n}.{norm}.bias", (dim,)
        for layer, shape in layers.items():
            yield f"blocks.{n}.{layer}.weight", shape
            yield f"blocks.{n}.{layer}.bias", shape[:1]


def batchnorm_shapes(name, width):
    for key in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{key}", (width,)
    yield f"{name}.num_batches_tracked", ()


def resnet_shapes(depths):
    """Of two 3×3 convolutions in a block, or where 50 layers want them, 1×1, 3×3, 1×1."""
    bottleneck = sum(depths) > 8
    yield "conv1.weight", (64, 3, 7, 7)
    yield from batchnorm_shapes("bn1", 64)
    before = 64
    for layer, (width, depth) in enumerate(zip((64, 128, 256, 512), depths), 1):
        out = 4 * width if bottleneck else width
        convs = [(width, 1), (width, 3), (out, 1)] if bottleneck else [(width, 3), (out, 3)]
        for block in range(depth):
            name, inside = f"layer{layer}.{block}", before
            for n, (after, kernel) in enumerate(convs, 1):
                yield f"{name}.conv{n}.weight", (after, inside, kernel, kernel)
                yield from batchnorm_shapes(f"{name}.bn{n}", after)
                inside = after
            if before != out:
                yield f"{name}.downsample.0.weight", (out, before, 1, 1)
                yield from batchnorm_shapes(f"{name}.downsample.1", out)
            before = out


def head_shapes(name, widths, numbers):
    """A head's keys: Linear and BatchNorm in turn, the last BatchNorm without weight and bias."""
    linears, norms, last = numbers
    for number, (before, after) in zip(linears, zip(widths, widths[1:])):
        yield f"{name}.{number}.weight", (after, before)
    for number, width in [*zip(norms, widths[1:]), (last, widths[-1])]:
        if number is None:
            continue
        affine = ("weight", "bias") if number != last else ()
        for key in (*affine, "running_mean", "running_var"):
            yield f"{name}.{number}.{key}", (width,)
        yield f"{name}.{number}.num_batches_tracked", ()


def pretraining(arch, dim=256, mlp=4096):
    """A pre-training checkpoint; arch: one of WIDTHS, at 224 pixels."""
    if arch.startswith("vit"):
        name, widths, predictor = "head", [WIDTHS[arch], mlp, mlp, dim], ([0, 3], [1], 4)
    else:
        name, widths, predictor = "fc", [WIDTHS[arch], mlp, dim], ([0, 3], [1], None)
    shapes = {}
    for encoder in ("base_encoder", "momentum_encoder"):
        encoder_shapes = backbone_shapes(arch) | dict(head_shapes(name, widths, HEADS[name]))
        shapes |= {f"module.{encoder}.{key}": shape for key, shape in encoder_shapes.items()}
    shapes |= dict(head_shapes("module.predictor", [dim, mlp, dim], predictor))
    return _file(arch, shapes)


def linear(arch, classes):
    name, width = "head" if arch.startswith("vit") else "fc", WIDTHS[arch]
    head = {f"{name}.weight": (classes, width), f"{name}.bias": (classes,)}
    shapes = backbone_shapes(arch) | head
    return _file(arch, {f"module.{key}": shape for key, shape in shapes.items()}) | {"best_acc1": 7}


def _file(arch, shapes):
    generator = torch.Generator().manual_seed(0)

    def tensor(key, shape):
        if key.endswith("num_batches_tracked"):
            return torch.tensor(3)
        values = 0.02 * torch.randn(shape, generator=generator)
        scales = key.endswith(("running_var", "weight")) and len(shape) == 1
        return values.abs() + 1 if scales else values

    state = {key: tensor(key, shape) for key, shape in shapes.items()}
    return dict(epoch=300, arch=arch, state_dict=state, optimizer={}, scaler={})


def mmpretrain_names(weights):
    """timm's names of a ViT → those of MMPretrain."""
    names = {"patch_embed.proj": "patch_embed.projection", "blocks": "layers", "norm1": "ln1",
             "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}  # fmt: skip
    state = {}
    for key, value in weights.items():
        key = key.replace("norm.", "ln1.") if key.startswith("norm.") else key
        for ours, mm in names.items():
            key = key.replace(ours, mm)
        state[f"backbone.{key}"] = value
    return state
