"""Every backbone by its `-a` name: our ViTs, torchvision's ResNets, and timm/NAME.

    from engine.backbones import create_backbone
    backbone = create_backbone("timm/convnext_tiny", img_size=(96, 160))
    backbone(x)                                                  # [N, backbone.num_features]

It comes without a classifier: an Identity stands at `backbone.classifier_name`, `head` in a ViT,
`fc` in a ResNet, timm's own name in timm's. A projector or a classifier takes that place.
"""

import difflib
from dataclasses import dataclass, field

import timm
import torch
import torchvision
from timm.layers import DropPath, PatchEmbed
from torch import nn

import vits
from engine.decode import PixelFormat
from engine.errors import UserError, first_line
from moco.augmentation import IMAGENET_MEAN, IMAGENET_STD
from vits import VITS, check_patches, size_to_str, to_pair

RESNETS = tuple(
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if name.startswith(("resnet", "resnext", "wide_resnet"))
)
GRAY_MEAN, GRAY_STD = 0.449, 0.226  # averages of ImageNet's


@dataclass(frozen=True)
class BackboneConfig:
    """What a checkpoint states so that its backbone can be created again.

    img_size, patch_size: (height, width) in pixels; patch_size None: the arch's own.
    interpolation: of the images that are measured, when they are resized.
    """

    arch: str
    img_size: tuple = (224, 224)
    patch_size: tuple | None = None
    small_stem: bool = False
    pos_embed: str = "sincos"
    pool: str = "token"
    pixel_format: PixelFormat = field(default_factory=PixelFormat)
    interpolation: str = "bilinear"

    @classmethod
    def from_args(cls, args, checkpoint=None):
        """By the flags, else as `checkpoint` states it, else the defaults.

        UserError where flags contradict the checkpoint, or --mean and --std the channels.
        """
        checkpoint, path = checkpoint or {}, getattr(args, "pretrained", None)
        arch = checkpoint.get("arch") or args.arch
        if args.arch not in (None, arch):
            raise UserError(f"{path} holds {arch}, not {args.arch}: drop -a {args.arch}")
        stored_chans = checkpoint.get("in_chans")
        if stored_chans and args.in_chans not in (None, stored_chans):
            raise UserError(
                f"{path} is for {stored_chans} channel(s): drop --in-chans {args.in_chans}"
            )
        return cls(
            arch=arch,
            img_size=args.img_size or checkpoint.get("img_size") or (224, 224),
            patch_size=args.patch_size or checkpoint.get("patch_size"),
            small_stem=args.small_stem or checkpoint.get("small_stem", False),
            pos_embed=getattr(args, "pos_embed", None) or checkpoint.get("vit_pos_embed", "sincos"),
            pool=getattr(args, "pool", None) or checkpoint.get("vit_pool", "token"),
            pixel_format=pixel_format_from_args(args, checkpoint),
        )

    def create_backbone(self, stop_grad_conv1=False, drop_path=0.0):
        return create_backbone(
            self.arch,
            self.img_size,
            self.patch_size,
            stop_grad_conv1,
            drop_path,
            self.pixel_format.in_chans,
            self.small_stem,
            self.pos_embed,
            self.pool,
        )

    def to_dict(self):
        """Flat, as checkpoints and args.json hold it."""
        return dict(
            arch=self.arch,
            img_size=self.img_size,
            patch_size=self.patch_size,
            small_stem=self.small_stem,
            vit_pos_embed=self.pos_embed,  # "pos_embed" is a weight
            vit_pool=self.pool,
            in_chans=self.pixel_format.in_chans,
            mean=self.pixel_format.mean,
            std=self.pixel_format.std,
            max_value=self.pixel_format.max_value,
            interpolation=self.interpolation,
        )


def pixel_format_from_args(args, checkpoint):
    """ImageNet's mean and std by default; their averages where there are not three channels."""
    n = args.in_chans or checkpoint.get("in_chans") or 3
    is_rgb = n == 3
    mean = args.mean or checkpoint.get("mean") or (IMAGENET_MEAN if is_rgb else (GRAY_MEAN,) * n)
    std = args.std or checkpoint.get("std") or (IMAGENET_STD if is_rgb else (GRAY_STD,) * n)
    for flag, values in (("--mean", mean), ("--std", std)):
        if len(values) != n:
            raise UserError(f"{flag} takes one number per channel: {n}, not {len(values)}")
    max_value = args.max_value or checkpoint.get("max_value")
    return PixelFormat(n, tuple(mean), tuple(std), max_value, args.max_pixels)


def create_backbone(
    arch,
    img_size=224,
    patch_size=None,
    stop_grad_conv1=False,
    drop_path=0.0,
    in_chans=3,
    small_stem=False,
    pos_embed="sincos",
    pool="token",
):
    """A backbone without classifier by its `-a` name; ValueError for what can't act on it.

    img_size, patch_size: an int or (height, width), in pixels; patch_size None: the arch's own.
    drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
    small_stem: a ResNet for small images, see create_resnet. pos_embed, pool: of our ViTs.
    """
    is_default = pos_embed == "sincos" and pool == "token"
    if arch not in VITS and not is_default:
        raise UserError(f"--pos-embed and --pool are for the ViTs of vits.py, not for {arch}")
    if small_stem and arch not in RESNETS:
        raise UserError(f"--small-stem is for torchvision's ResNets, not for {arch}: drop it")
    if arch in VITS:
        options = dict(pos_embed=pos_embed, pool=pool)
        return create_vit(
            arch, img_size, patch_size, stop_grad_conv1, drop_path, in_chans, **options
        )
    if arch in RESNETS:
        if stop_grad_conv1:
            raise UserError(f"--stop-grad-conv1 is for ViTs, not for {arch}: drop it")
        if patch_size:
            raise UserError(f"--patch-size is for ViTs, not for {arch}: drop it")
        if drop_path:
            raise UserError(f"--drop-path is for ViTs, not for {arch}: --drop-path 0")
        return create_resnet(arch, in_chans, small_stem)
    if arch.startswith("timm/") and timm.is_model(arch[5:]):
        return create_timm(arch, img_size, patch_size, stop_grad_conv1, drop_path, in_chans)
    raise unknown_arch(arch)


def create_vit(arch, img_size, patch_size, stop_grad_conv1, drop_path, in_chans, **options):
    options |= dict(
        img_size=img_size,
        stop_grad_conv1=stop_grad_conv1,
        drop_path_rate=drop_path,
        in_chans=in_chans,
        num_classes=0,
    )
    if patch_size:
        options["patch_size"] = patch_size
    try:
        return getattr(vits, arch)(**options)
    except ValueError as error:
        raise UserError(f"{arch}: {error}") from None


def create_resnet(arch, in_chans=3, small_stem=False):
    """torchvision's; the last BatchNorm of each residual branch is initialized to zero.

    small_stem: a 3×3 convolution with stride 1 in place of the 7×7 with stride 2, and no
    max-pooling, as is usual for images of 32 pixels (He et al. 2015, Sec. 4.2).
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
    """timm's model with random weights, as timm initializes them, and without dropout.

    Its timm_args are what timm.create_model takes to make it again.
    """
    if "." in arch:
        raise UserError(f"{arch} names weights, but they begin at random: -a {arch.split('.')[0]}")
    options = dict(img_size=to_pair(img_size), drop_rate=0.0, drop_path_rate=drop_path)
    if patch_size:
        height, width = to_pair(patch_size)  # convnets take one number
        options["patch_size"] = height if height == width else (height, width)
    backbone, accepted = _create_model_dropping_unknown_options(arch, in_chans, options)
    _check_options_act(backbone, arch, img_size, patch_size, drop_path, accepted)
    if stop_grad_conv1:
        _freeze_patch_projection(backbone, arch, in_chans)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):  # a few have some that drop_rate does not reach
            module.p = 0.0

    backbone.timm_args = accepted
    backbone.classifier_name = _classifier_name(backbone, arch)
    try:
        h = dry_run(backbone, img_size, in_chans)
        if h.ndim != 2:
            raise ValueError("they are not vectors")
        if not h.isfinite().all():
            raise ValueError("they are not finite")
    except Exception as error:  # each has its own way to fail at a size
        size = size_to_str(img_size)
        raise UserError(f"{arch} has no features at {size} pixels: {first_line(error)}") from None
    # timm's num_features is the width before a hidden layer of the head.
    backbone.num_features = backbone.head_hidden_size = h.shape[1]
    return backbone


def _create_model_dropping_unknown_options(arch, in_chans, options):
    """timm's model → backbone, those of the options that it takes.

    timm does not say which ones a model takes: it raises a TypeError that names one it does not,
    such as "__init__() got an unexpected keyword argument 'img_size'".
    """
    try:
        while True:
            try:
                backbone = timm.create_model(
                    arch[5:], pretrained=False, num_classes=0, in_chans=in_chans, **options
                )
                return backbone, options
            except TypeError as error:
                kept = {k: v for k, v in options.items() if f"'{k}'" not in str(error)}
                if len(kept) == len(options):
                    raise
                options = kept
    except Exception as error:
        given = ", ".join(f"{name} {value}" for name, value in options.items())
        raise UserError(f"timm can't build {arch} with {given}: {first_line(error)}") from None


def _check_options_act(backbone, arch, img_size, patch_size, drop_path, accepted):
    """UserError for an option without effect: older releases of timm accept what they ignore."""
    kernels = [m.kernel_size for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    if patch_size and not ("patch_size" in accepted and to_pair(patch_size) in kernels):
        raise UserError(f"--patch-size does not act on {arch}: drop it")
    if drop_path and not any(isinstance(m, DropPath) and m.drop_prob for m in backbone.modules()):
        raise UserError(f"--drop-path does not act on {arch}: --drop-path 0")
    patch_embed = getattr(backbone, "patch_embed", None)
    if isinstance(patch_embed, PatchEmbed):  # it would ignore the last rows and columns
        try:
            check_patches(to_pair(img_size), patch_embed.patch_size)
        except ValueError as error:
            raise UserError(f"{arch}: {error}") from None


def _freeze_patch_projection(backbone, arch, in_chans):
    projection = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.in_channels != in_chans:
        raise UserError(f"--stop-grad-conv1 has no patch projection to fix in {arch}: drop it")
    projection.requires_grad_(False)


def _classifier_name(backbone, arch):
    """Where num_classes=0 left an Identity: timm's name of the classifier, or of what held it."""
    name = (backbone.pretrained_cfg or {}).get("classifier")
    if not isinstance(name, str):
        what = "several classifiers" if name else "none that timm removes"
        raise UserError(f"the projector replaces the classifier, and {arch} has {what}")
    parts = name.split(".")
    for length in range(len(parts), 0, -1):  # the longest existing prefix
        prefix = ".".join(parts[:length])
        try:
            module = backbone.get_submodule(prefix)
        except AttributeError:
            continue
        if isinstance(module, nn.Identity):
            return prefix
        break
    raise UserError(f"the projector replaces the classifier, and {arch} has none that timm removes")


class Classifier(nn.Linear):
    """A linear classifier of [N, d], or of [N, d, 1, 1] where timm has a 1×1 convolution."""

    def forward(self, x):
        return super().forward(x.flatten(1))


@torch.no_grad()
def dry_run(backbone, img_size, in_chans=3):
    """Features of a black image, [1, d]; leaves no trace in BatchNorm."""
    training = backbone.training
    h = backbone.eval()(torch.zeros(1, in_chans, *to_pair(img_size)))
    backbone.train(training)
    return h


def check_bf16_conv_gradients(backbone, config, env):
    """UserError where torch's bf16 gradients are wrong: maps narrower than a stride, on a CPU.

    Taps of a dense kernel that lie on padding alone (in a ResNet of 16 pixels the last stage's
    first input is 1 pixel wide) get uninitialized memory as gradient, in torch 2.6 as in 2.15.
    """
    if env.amp_dtype is None or env.device.type != "cpu":
        return
    narrow = []

    def check(conv, inputs, _):
        if conv.groups == 1 and any(conv.padding) and min(inputs[0].shape[2:]) < max(conv.stride):
            narrow.append(conv)

    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    hooks = [conv.register_forward_hook(check) for conv in convolutions]
    dry_run(backbone, config.img_size, config.pixel_format.in_chans)
    for hook in hooks:
        hook.remove()
    if narrow:
        raise UserError(
            "torch's bf16 gradients on a CPU are wrong for this backbone at "
            f"{size_to_str(config.img_size)} pixels: --amp off, or a larger --img-size"
        )


def unknown_arch(arch):
    """The error for an unknown name, with the nearest known one."""
    names = {f"timm/{name}": name for name in timm.list_models()}
    if not arch.startswith("timm/"):
        names |= {name: name for name in (*VITS, *RESNETS)}
    bare = {short: name for name, short in names.items()}  # ours, where timm has the same
    near = bare[difflib.get_close_matches(arch.removeprefix("timm/"), bare, n=1, cutoff=0)[0]]
    known = " ".join([*VITS, *RESNETS, "timm/NAME"])
    return UserError(f"unknown arch {arch!r}, did you mean {near!r}? Known: {known}")
