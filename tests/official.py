"""Checkpoints in the official layout, made from the published key names alone."""

import torch

HEADS = {"head": ([0, 3, 6], [1, 4], 7), "fc": ([0, 3], [1], 4)}  # Linear, BN, BN without affine


def vit_shapes(dim, depth, patch, tokens):
    yield from {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, tokens, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }.items()
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim),
              "mlp.fc2": (dim, 4 * dim)}  # fmt: skip
    for n in range(depth):
        for norm in ("norm1", "norm2"):
            yield f"blocks.{n}.{norm}.weight", (dim,)
            yield f"blocks.{n}.{norm}.bias", (dim,)
        for layer, shape in layers.items():
            yield f"blocks.{n}.{layer}.weight", shape
            yield f"blocks.{n}.{layer}.bias", shape[:1]


def resnet18_shapes():
    def batchnorm(name, width):
        for key in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{key}", (width,)
        yield f"{name}.num_batches_tracked", ()

    yield "conv1.weight", (64, 3, 7, 7)
    yield from batchnorm("bn1", 64)
    before = 64
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{layer}.{block}"
            yield f"{name}.conv1.weight", (width, before, 3, 3)
            yield from batchnorm(f"{name}.bn1", width)
            yield f"{name}.conv2.weight", (width, width, 3, 3)
            yield from batchnorm(f"{name}.bn2", width)
            if before != width:
                yield f"{name}.downsample.0.weight", (width, before, 1, 1)
                yield from batchnorm(f"{name}.downsample.1", width)
            before = width


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
    """A pre-training checkpoint; arch: vit_small at 224 pixels, or resnet18."""
    if arch == "vit_small":
        backbone, name, widths = dict(vit_shapes(384, 12, 16, 197)), "head", [384, mlp, mlp, dim]
        predictor = ([0, 3], [1], 4)
    else:
        backbone, name, widths = dict(resnet18_shapes()), "fc", [512, mlp, dim]
        predictor = ([0, 3], [1], None)
    shapes = {}
    for encoder in ("base_encoder", "momentum_encoder"):
        encoder_shapes = backbone | dict(head_shapes(name, widths, HEADS[name]))
        shapes |= {f"module.{encoder}.{key}": shape for key, shape in encoder_shapes.items()}
    shapes |= dict(head_shapes("module.predictor", [dim, mlp, dim], predictor))
    return _file(arch, shapes)


def linear(arch, classes):
    backbone = vit_shapes(384, 12, 16, 197) if arch == "vit_small" else resnet18_shapes()
    name, width = ("head", 384) if arch == "vit_small" else ("fc", 512)
    shapes = dict(backbone) | {f"{name}.weight": (classes, width), f"{name}.bias": (classes,)}
    return _file(arch, {f"module.{key}": shape for key, shape in shapes.items()}) | {"best_acc1": 7}


def _file(arch, shapes):
    generator = torch.Generator().manual_seed(0)

    def tensor(key, shape):
        if key.endswith("num_batches_tracked"):
            return torch.tensor(3)
        values = 0.02 * torch.randn(shape, generator=generator)
        return values.abs() + 1 if key.endswith("running_var") else values

    state = {key: tensor(key, shape) for key, shape in shapes.items()}
    return dict(epoch=300, arch=arch, state_dict=state, optimizer={}, scaler={})
