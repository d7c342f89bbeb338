"""Every backbone by its `-a` name: our ViTs, torchvision's ResNets, and timm/NAME.

    from moco.backbones import create_backbone
    backbone = create_backbone("timm/convnext_tiny", img_size=(96, 160))
    moco.builder.features(backbone, x)                         # [N, backbone.num_features]

It comes without a classifier: an Identity stands at `backbone.classifier_name`, `head` in a ViT,
`fc` in a ResNet, what timm calls it in timm's. A projector or a classifier takes that place.
"""

import difflib

import timm
import torch
import torchvision
from timm.layers import DropPath, PatchEmbed
from torch import nn

from moco import UserError, reason
from moco.builder import features
from vits import VITS, check_patches, create_vit, pair, size_text

RESNETS = tuple(
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if name.startswith(("resnet", "resnext", "wide_resnet"))
)


def create_backbone(
    arch, img_size=224, patch_size=None, stop_grad_conv1=False, drop_path=0.0, in_chans=3,
    small_stem=False,
):  # fmt: skip
    """A backbone without classifier by its `-a` name; what a flag can't act on is refused.

    img_size, patch_size: an int or (height, width), in pixels; patch_size None: the arch's own.
    drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
    small_stem: a ResNet for small images, see create_resnet.
    """
    if small_stem and arch not in RESNETS:
        raise UserError(f"--small-stem is for torchvision's ResNets, and {arch} is none: drop it")
    if arch in VITS:
        return create_vit(arch, img_size, patch_size, stop_grad_conv1, drop_path, in_chans)
    if arch in RESNETS:
        if stop_grad_conv1:
            raise UserError(f"--stop-grad-conv1 is for ViTs, and {arch} is none: drop it")
        if patch_size:
            raise UserError(f"--patch-size is for ViTs, and {arch} is none: drop it")
        if drop_path:
            raise UserError(f"--drop-path is for ViTs, and {arch} is none: --drop-path 0")
        return create_resnet(arch, in_chans, small_stem)
    if arch.startswith("timm/") and timm.is_model(arch[5:]):
        return create_timm(arch, img_size, patch_size, stop_grad_conv1, drop_path, in_chans)
    raise unknown(arch)


def create_resnet(arch, in_chans=3, small_stem=False):
    """torchvision's; the last BatchNorm of each residual branch begins at zero.

    small_stem: 3×3 with stride 1 for the first 7×7 with stride 2, and no max-pooling, as is usual
    for images of 32 pixels (He et al. 2015, Sec. 4.2).
    """
    resnet = torchvision.models.get_model(arch, weights=None, zero_init_residual=True)
    kernel, stride = (3, 1) if small_stem else (7, 2)
    if small_stem or in_chans != 3:
        resnet.conv1 = nn.Conv2d(in_chans, 64, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small_stem:
        resnet.maxpool = nn.Identity()
    resnet.num_features, resnet.classifier_name = resnet.fc.in_features, "fc"
    resnet.fc = nn.Identity()
    if torch.backends.mps.is_available():
        return resnet  # not tried there
    return resnet.to(memory_format=torch.channels_last)  # faster (benchmarks/step.py)


def create_timm(arch, img_size, patch_size, stop_grad_conv1, drop_path, in_chans):
    """timm's model with random weights, as timm initialises them, and without dropout.

    Its timm_args are what timm.create_model takes to make it again.
    """
    if "." in arch:
        raise UserError(f"{arch} names weights, but they begin at random: -a {arch.split('.')[0]}")
    options = dict(img_size=pair(img_size), drop_rate=0.0, drop_path_rate=drop_path)
    if patch_size:
        height, width = pair(patch_size)  # convnets take one number
        options["patch_size"] = height if height == width else (height, width)
    backbone, taken = _build(arch, in_chans, options)

    kernels = [m.kernel_size for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    # Older releases of timm take what they ignore.
    if patch_size and not ("patch_size" in taken and pair(patch_size) in kernels):
        raise UserError(f"--patch-size does not act on {arch}: drop it")
    if drop_path and not any(isinstance(m, DropPath) and m.drop_prob for m in backbone.modules()):
        raise UserError(f"--drop-path does not act on {arch}: --drop-path 0")
    patches = getattr(backbone, "patch_embed", None)
    if isinstance(patches, PatchEmbed):  # it would leave out the last rows and columns
        check_patches(img_size, patches.patch_size)
    if stop_grad_conv1:
        conv1 = getattr(patches, "proj", None)
        if not isinstance(conv1, nn.Conv2d) or conv1.in_channels != in_chans:
            raise UserError(f"--stop-grad-conv1 has no patch projection to fix in {arch}: drop it")
        conv1.requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):  # a few have some that drop_rate does not reach
            module.p = 0.0

    backbone.timm_args = taken
    backbone.classifier_name = _classifier_name(backbone, arch)
    try:
        h = dry_run(backbone, img_size, in_chans)
        if h.ndim != 2 or not h.isfinite().all():
            raise ValueError("they are not finite" if h.ndim == 2 else "they are no vectors")
    except Exception as error:  # each has its own way to fail at a size
        size = size_text(img_size)
        raise UserError(f"{arch} makes no features of {size} pixels: {reason(error)}") from None
    backbone.num_features = h.shape[1]  # timm's own is the width before the head's hidden layer
    return backbone


def _build(arch, in_chans, options):
    """timm's model, those of the options that it takes.

    timm does not say which ones a model takes: it raises a TypeError that names another.
    """
    try:
        while True:
            try:
                backbone = timm.create_model(
                    arch[5:], pretrained=False, num_classes=0, in_chans=in_chans, **options
                )
                return backbone, options
            except TypeError as error:
                taken = {k: v for k, v in options.items() if f"'{k}'" not in str(error)}
                if len(taken) == len(options):
                    raise
                options = taken
    except Exception as error:
        given = ", ".join(f"{name} {value}" for name, value in options.items())
        raise UserError(f"timm can't build {arch} with {given}: {reason(error)}") from None


def _classifier_name(backbone, arch):
    """Where num_classes=0 left an Identity: timm's name of the classifier, or of what held it."""
    name = (backbone.pretrained_cfg or {}).get("classifier")
    if isinstance(name, str):
        parts, place = [], backbone
        for part in name.split("."):
            if not hasattr(place, part):
                break
            parts, place = [*parts, part], getattr(place, part)
        if isinstance(place, nn.Identity):
            return ".".join(parts)
    what = "several classifiers" if isinstance(name, (list, tuple)) else "none that timm removes"
    raise UserError(f"the projector takes the place of the classifier, and {arch} has {what}")


class Classifier(nn.Linear):
    """A linear classifier at `classifier_name`, of [N, d] or what a 1×1 one saw, [N, d, 1, 1]."""

    def forward(self, x):
        return super().forward(x.flatten(1))


@torch.no_grad()
def dry_run(backbone, img_size, in_chans=3):
    """Features of a black image, [1, d]; leaves no trace in BatchNorm."""
    training = backbone.training
    h = features(backbone.eval(), torch.zeros(1, in_chans, *pair(img_size)))
    backbone.train(training)
    return h


def check_precision(backbone, img_size, device, amp, in_chans=3):
    """UserError where torch's gradients are wrong: maps narrower than a stride, on a CPU, in bf16.

    Taps of a dense kernel that lie on padding alone (in a ResNet of 16 pixels the last stage's
    first input is 1 pixel wide) get uninitialised memory as gradient, in torch 2.6 as in 2.15.
    """
    if not amp or device.type != "cpu":
        return
    narrow = []

    def look(conv, inputs, _):
        if conv.groups == 1 and any(conv.padding) and min(inputs[0].shape[2:]) < max(conv.stride):
            narrow.append(conv)

    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    hooks = [conv.register_forward_hook(look) for conv in convolutions]
    dry_run(backbone, img_size, in_chans)
    for hook in hooks:
        hook.remove()
    if narrow:
        raise UserError(
            f"torch's bf16 gradients on a CPU are wrong for this backbone at {size_text(img_size)} "
            "pixels: --amp off, or a larger --img-size"
        )


def unknown(arch):
    """The error for a name that is none, with the nearest one."""
    names = {f"timm/{name}": name for name in timm.list_models()}
    if not arch.startswith("timm/"):
        names |= {name: name for name in (*VITS, *RESNETS)}
    bare = {short: name for name, short in names.items()}  # ours, where timm has the same
    near = bare[difflib.get_close_matches(arch.removeprefix("timm/"), bare, n=1, cutoff=0)[0]]
    known = " ".join([*VITS, *RESNETS, "timm/NAME"])
    return UserError(f"unknown arch {arch!r}, did you mean {near!r}? Known: {known}")
