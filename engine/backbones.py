"""Every backbone by its `-a` name: our ViTs, torchvision's ResNets, and timm/NAME.

    from engine.backbones import BackboneConfig, create_backbone
    backbone = create_backbone(BackboneConfig("timm/convnext_tiny", img_size=(96, 160)))
    backbone(x)                                                  # [N, backbone.num_features]

It comes without a classifier: an Identity stands at `backbone.classifier_name`, `head` in a ViT,
`fc` in a ResNet, timm's own name in timm's. A projector or a classifier takes that place.
"""

import difflib
import math
from contextlib import contextmanager
from dataclasses import dataclass

import timm
import torch
import torchvision
from timm.layers import PatchEmbed
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import vits
from engine.data.decode import MAX_PIXELS, RGB, PixelFormat
from engine.errors import UserError, first_line
from engine.launch import print_rank0
from moco.augmentation import IMAGENET_MEAN, IMAGENET_STD
from moco.batchnorm import at_least_fp32
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

    img_size, patch_size: one side or (height, width), in pixels; patch_size None: the arch's own.
    small_stem: of a ResNet, see create_resnet. pos_embed, pool: of our ViTs.
    interpolation: of the images that are measured, when they are resized.
    """

    arch: str
    img_size: tuple = (224, 224)
    patch_size: tuple | None = None
    small_stem: bool = False
    pos_embed: str = "sincos"
    pool: str = "token"
    pixel_format: PixelFormat = RGB
    interpolation: str = "bilinear"

    def to_dict(self):
        """Flat, as checkpoints and args.json hold it."""
        entries = vars(self) | self.pixel_format._asdict()
        return {n: v for n, v in entries.items() if n not in ("pixel_format", "max_pixels")}


def choose_config(options, stated=None, path=None):
    """By the options, else as the file at `path` states it, else the defaults → BackboneConfig.

    options: arch, img_size, patch_size, small_stem, in_chans, mean, std, value_range, max_pixels,
    pos_embed, pool, as the flags of these names; None or missing: not given. stated: by the keys of
    BackboneConfig.to_dict. Prints which of the file's mean, std and value_range are replaced.
    UserError where options contradict the file, or mean and std the channels.
    """
    stated = stated or {}
    arch, in_chans = options.get("arch"), options.get("in_chans")
    if arch not in (None, stated.get("arch", arch)):
        raise UserError(f"{path} holds {stated['arch']}, not {arch}: drop -a {arch}")
    if stated.get("in_chans") and in_chans not in (None, stated["in_chans"]):
        raise UserError(
            f"{path} is for {stated['in_chans']} channel(s): drop --in-chans {in_chans}"
        )
    chosen = {name: value for name, value in (*stated.items(), *options.items()) if value}
    n, patch_size = chosen.get("in_chans", 3), chosen.get("patch_size")
    # The averages of ImageNet's where there are not three channels.
    mean = chosen.get("mean", IMAGENET_MEAN if n == 3 else (GRAY_MEAN,) * n)
    std = chosen.get("std", IMAGENET_STD if n == 3 else (GRAY_STD,) * n)
    where = f": {path} states it" if path else ""
    for flag, values in (("--mean", mean), ("--std", std)):
        if len(values) != n:
            raise UserError(f"{flag} takes one number per channel: {n}, not {len(values)}")
        if not all(map(math.isfinite, values)) or (flag == "--std" and min(values) <= 0):
            raise UserError(f"{flag} {' '.join(map(str, values))} can't normalize{where}")
    value_range, max_pixels = chosen.get("value_range"), chosen.get("max_pixels", MAX_PIXELS)
    if value_range is not None:
        low, high = value_range = tuple(value_range)
        if not low < high:
            raise UserError(f"--value-range {low:g} {high:g}: the first must be the lower one")
    for name in ("mean", "std", "value_range"):
        new, old = (" ".join(f"{v:g}" for v in d.get(name) or ()) for d in (options, stated))
        if new and old and new != old:
            flag = f"--{name.replace('_', '-')}"
            print_rank0(f"weights {flag} {new} in place of {old}, which {path} states")
    return BackboneConfig(
        arch=chosen["arch"],
        img_size=to_pair(chosen.get("img_size") or default_img_size(chosen["arch"])),
        patch_size=to_pair(patch_size) if patch_size else None,
        pixel_format=PixelFormat(n, tuple(mean), tuple(std), value_range, max_pixels),
        **{name: chosen[name] for name in ("small_stem", "pos_embed", "pool") if name in chosen},
    )


def default_img_size(arch):
    """(height, width) that timm states for its model; 224 for all others."""
    pretrained_cfg = timm.get_pretrained_cfg(arch[5:]) if arch.startswith("timm/") else None
    return (224, 224) if pretrained_cfg is None else pretrained_cfg.input_size[1:]


def create_backbone(config, stop_grad_conv1=False, drop_path=0.0):
    """A backbone without classifier; UserError for an option that can't act on it.

    drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
    """
    arch = config.arch
    _check_arch(arch)
    if arch not in VITS and (config.pos_embed, config.pool) != ("sincos", "token"):
        raise UserError(f"--pos-embed and --pool are for the ViTs of vits.py, not for {arch}")
    if arch not in RESNETS and config.small_stem:
        raise UserError(f"--small-stem is for torchvision's ResNets, not for {arch}: drop it")
    if arch in VITS:
        return create_vit(config, stop_grad_conv1, drop_path)
    if arch.startswith("timm/"):
        return create_timm(config, stop_grad_conv1, drop_path)
    for_vits = {
        "--stop-grad-conv1": stop_grad_conv1,
        "--patch-size": config.patch_size,
        "--drop-path": drop_path,
    }
    for flag, value in for_vits.items():
        if value:
            raise UserError(f"{flag} is for ViTs, not for {arch}: turn it off")
    return create_resnet(config)


def create_vit(config, stop_grad_conv1, drop_path):
    own_patch_size = dict(patch_size=config.patch_size) if config.patch_size else {}
    try:
        return getattr(vits, config.arch)(
            img_size=config.img_size,
            stop_grad_conv1=stop_grad_conv1,
            drop_path_rate=drop_path,
            in_chans=config.pixel_format.in_chans,
            num_classes=0,
            pos_embed=config.pos_embed,
            pool=config.pool,
            **own_patch_size,
        )
    except ValueError as error:
        raise UserError(f"{config.arch}: {error}") from None


def create_resnet(config):
    """torchvision's; the last BatchNorm of each residual branch is initialized to zero.

    small_stem: a 3×3 convolution with stride 1 in place of the 7×7 with stride 2, and no
    max-pooling, as is usual for images of 32 pixels (He et al. 2015, Sec. 4.2).
    """
    resnet = torchvision.models.get_model(config.arch, weights=None, zero_init_residual=True)
    in_chans = config.pixel_format.in_chans
    kernel, stride = (3, 1) if config.small_stem else (7, 2)
    if config.small_stem or in_chans != 3:
        resnet.conv1 = nn.Conv2d(in_chans, 64, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    if config.small_stem:
        resnet.maxpool = nn.Identity()
    resnet.num_features, resnet.classifier_name = resnet.fc.in_features, "fc"
    resnet.fc = nn.Identity()
    if torch.backends.mps.is_available():
        return resnet  # not tried there
    return resnet.to(memory_format=torch.channels_last)  # faster (benchmarks/step.py)


def create_timm(config, stop_grad_conv1, drop_path):
    """timm's model with random weights, as timm initializes them, and without dropout.

    Its timm_args are what timm.create_model takes to make it again.
    """
    arch, img_size, in_chans = config.arch, to_pair(config.img_size), config.pixel_format.in_chans
    if "." in arch:
        raise UserError(f"{arch} names weights, but they begin at random: -a {arch.split('.')[0]}")
    options = dict(img_size=img_size, drop_rate=0.0, drop_path_rate=drop_path)
    if config.patch_size:
        height, width = to_pair(config.patch_size)  # convnets take one number
        options["patch_size"] = height if height == width else (height, width)
    backbone, accepted = _create_model_dropping_unknown_options(arch, in_chans, options)
    if config.patch_size and "patch_size" not in accepted:
        raise UserError(f"--patch-size does not act on {arch}: drop it")
    if drop_path and "drop_path_rate" not in accepted:
        raise UserError(f"--drop-path does not act on {arch}: --drop-path 0")
    patch_embed = getattr(backbone, "patch_embed", None)
    if stop_grad_conv1:
        projection = getattr(patch_embed, "proj", None)
        if not isinstance(projection, nn.Conv2d) or projection.in_channels != in_chans:
            raise UserError(f"--stop-grad-conv1 has no patch projection to fix in {arch}: drop it")
        projection.requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):  # a few have some that drop_rate does not reach
            module.p = 0.0

    backbone.timm_args = accepted
    backbone.classifier_name = _classifier_name(backbone, arch)
    try:
        if isinstance(patch_embed, PatchEmbed):  # it would ignore the last rows and columns
            check_patches(img_size, patch_embed.patch_size)
        h = dry_run(backbone, img_size, in_chans)
        if h.ndim != 2 or not h.isfinite().all():
            raise ValueError("they are not finite vectors")
    except Exception as error:  # each has its own way to fail at a size
        size = size_to_str(img_size)
        raise UserError(f"{arch} has no features at {size} pixels: {first_line(error)}") from None
    # timm's num_features is the width before a hidden layer of the head.
    backbone.num_features = backbone.head_hidden_size = h.shape[1]
    return backbone


def _create_model_dropping_unknown_options(arch, in_chans, options):
    """timm's model → backbone, those of the options that it takes.

    timm raises a TypeError for another: "… got an unexpected keyword argument 'img_size'".
    """
    while True:
        try:
            return timm.create_model(arch[5:], num_classes=0, in_chans=in_chans, **options), options
        except Exception as error:
            kept = {k: v for k, v in options.items() if f"'{k}'" not in str(error)}
            if not isinstance(error, TypeError) or len(kept) == len(options):
                reason = f"with {options}: {first_line(error)}"
                raise UserError(f"timm can't build {arch} {reason}") from None
            options = kept


def _classifier_name(backbone, arch):
    """Where num_classes=0 left an Identity: timm's name of the classifier, or of what held it."""
    name = (backbone.pretrained_cfg or {}).get("classifier")
    modules = dict(backbone.named_modules())
    if isinstance(name, str):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if isinstance(modules[name], nn.Identity):
            return name
    what = "several classifiers" if isinstance(name, tuple) else "none that timm removes"
    raise UserError(f"the projector replaces the classifier, and {arch} has {what}")


class Classifier(nn.Linear):
    """A linear classifier of [N, d], or of [N, d, 1, 1] where timm has a 1×1 convolution.

    In eval mode it computes in fp32 under any autocast, as the probe does: bf16 logits have ties.
    """

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(at_least_fp32(x))


@torch.no_grad()
def dry_run(backbone, img_size, in_chans=3):
    """Features of a black image, [1, d]; leaves no trace in BatchNorm."""
    with eval_mode(backbone):
        return backbone(torch.zeros(1, in_chans, *to_pair(img_size)))


@contextmanager
def eval_mode(module):
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def check_bf16_conv_gradients(backbone, config, env):
    """UserError where torch's bf16 gradients are wrong: maps narrower than a stride, on a CPU.

    Taps of a dense kernel that lie on padding alone (in a ResNet of 16 pixels the last stage's
    first input is 1 pixel wide) get uninitialized memory as gradient, in torch 2.6 as in 2.15.
    """
    if env.amp_dtype is None or env.device.type != "cpu":
        return

    def check(module, inputs, _):
        is_dense = isinstance(module, nn.Conv2d) and module.groups == 1 and any(module.padding)
        if is_dense and min(inputs[0].shape[2:]) < max(module.stride):
            raise UserError(
                "torch's bf16 gradients on a CPU are wrong for this backbone at "
                f"{size_to_str(config.img_size)} pixels: --amp off, or a larger --img-size"
            )

    with register_module_forward_hook(check):
        dry_run(backbone, config.img_size, config.pixel_format.in_chans)


def _check_arch(arch):
    """UserError, with the nearest known name, for an unknown one."""
    if arch in (*VITS, *RESNETS) or (arch.startswith("timm/") and timm.is_model(arch[5:])):
        return
    names = [*VITS, *RESNETS, *(f"timm/{name}" for name in timm.list_models())]
    [near] = difflib.get_close_matches(arch, names, n=1, cutoff=0)
    known = " ".join([*VITS, *RESNETS, "timm/NAME"])
    raise UserError(f"unknown arch {arch!r}, did you mean {near!r}? Known: {known}")
