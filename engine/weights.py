"""Weights of checkpoints into models: everything must fit, and what does not is listed.

The second half, read_weights, reads what we and other projects have written, for all scripts.
"""

import hashlib
import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import nn

from engine import checkpoint as checkpoints
from engine import cli
from engine.backbones import RESNETS, BackboneConfig, Classifier, create_backbone
from engine.checkpoint import without_module_prefix
from engine.decode import convert_pil_image, decode_image
from engine.errors import UserError
from engine.launch import print_rank0
from engine.loader import CenterCrops
from moco.augmentation import normalize
from vits import VITS, VisionTransformer, sincos_position_embedding, size_to_str, to_pair

SIX_HEADS = "timm/vit_small_patch16_224"  # the ViT-S of timm, DeiT and DINO


def load_moco(model, checkpoint, path):
    """Puts a pre-training checkpoint, ours or the official release's, into a MoCo."""
    state = without_module_prefix(checkpoint["state_dict"])
    if not any(key.startswith("momentum_encoder.") for key in state):
        raise UserError(f"{path} holds no pre-training weights: it has no momentum_encoder")
    expected, backbone = model.state_dict(), model.base_encoder
    for key in ("base_encoder.pos_embed", "momentum_encoder.pos_embed"):
        if key not in state or key not in expected:
            continue
        is_fixed = not backbone.pos_embed.requires_grad
        if is_fixed and _is_sincos(state[key], backbone, checkpoint):
            state[key] = expected[key]  # the table of the model's own image size
        else:  # learned here, or by the model that this one was started from
            state[key] = _resample_pos_embed(state[key], backbone, checkpoint)
    load_state_dict_strict(model, state, checkpoint, path)


def initialize_moco(model, args, pixel_format):
    """Starts a MoCo from the weights in --init-from → a line on what stays random, or None.

    Takes all of a pre-training checkpoint. Where the heads are missing or of other widths, its
    backbone starts both encoders. UserError if it was trained with another pixel_format, and no
    flag chooses this one.
    """
    path = args.init_from
    # Of a ViT-S, -a vit_small tells what the user wants, not how many heads the file's has.
    weights = read_weights(path, arch=args.arch if args.arch.startswith("timm/") else None)
    _check_pixel_format(args, weights.config, pixel_format)
    encoders, name = ("base_encoder", "momentum_encoder"), model.base_encoder.classifier_name
    prefixes = ("predictor.", *(f"{encoder}.{name}." for encoder in encoders))
    own_heads = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    heads = {k: v for k, v in weights.heads.items() if k.startswith(prefixes)}
    heads_fit = {k: v.shape for k, v in heads.items()} == {k: v.shape for k, v in own_heads.items()}
    if heads_fit:
        state = {f"base_encoder.{k}": v for k, v in weights.backbone.items()} | weights.heads
    else:
        state = {f"{e}.{k}": v for e in encoders for k, v in weights.backbone.items()} | own_heads
    load_moco(model, weights.config | dict(state_dict=state), path)
    if heads_fit:
        return None
    reason = "are of other widths there" if heads else "are not in it"
    return f"{path} ({weights}) in both encoders; the heads {reason} and start at random"


def _check_pixel_format(args, stated, pixel_format):
    if stated["in_chans"] != pixel_format.in_chans:
        raise UserError(
            f"{args.init_from} is for {stated['in_chans']} channel(s), not {pixel_format.in_chans}"
        )
    missing = []
    for name in ("mean", "std", "max_value"):
        value, own = stated.get(name), getattr(pixel_format, name)
        if value is not None and getattr(args, name) is None and value != own:
            values = value if isinstance(value, tuple | list) else (value,)
            missing.append(" ".join([f"--{name.replace('_', '-')}", *(f"{v:g}" for v in values)]))
    if missing:
        raise UserError(
            f"{args.init_from} was trained with {' '.join(missing)}: add these flags, or others "
            "for your images"
        )


def load_model(model, checkpoint, path):
    """Puts checkpoint["state_dict"] into a model of the same kind; every key must match."""
    if hasattr(model, "momentum_encoder"):
        load_moco(model, checkpoint, path)
    else:
        state = without_module_prefix(checkpoint["state_dict"])
        load_state_dict_strict(model, state, checkpoint, path)


def create_pretrained_backbone(args, drop_path=0.0):
    """The backbone in --pretrained, which read_weights takes → model, its config.

    The config is the file's own unless flags say otherwise; a ViT's position embedding is
    interpolated to fit. --from-scratch: the same backbone with random weights.
    """
    path = args.pretrained
    weights = read_weights(path, arch=args.arch) if path else None
    config = BackboneConfig.from_args(args, weights.config if path else None)
    model = config.create_backbone(drop_path=drop_path)
    if not args.from_scratch:
        _load_backbone(model, weights.backbone, weights.config, path)
        if weights.kind != PRETRAINING:
            print_rank0(f"weights {path} ({weights}){weights.without()}")
    return model, config


def load_backbone(path, arch=None, img_size=None, mean=None, std=None):
    """The backbone in a file that --pretrained takes → model, frozen and in eval mode; transform.

    transform: what evaluation does to an image, see EvalTransform. arch, img_size, mean, std: as
    the flags of these names, by default as the file states them.
    """
    parser = cli.Parser(parents=[cli.pretrained_flags()])
    args = parser.parse_args(["images", "--pretrained", "path"])  # defaults of all others
    args.pretrained, args.arch, args.mean, args.std = path, arch, mean, std
    args.img_size = None if img_size is None else to_pair(img_size)
    model, config = create_pretrained_backbone(args)
    return model.requires_grad_(False).eval(), EvalTransform(config.img_size, config.pixel_format)


class EvalTransform:
    """A PIL image, a path or uint8 [C, H, W] → float32 [C, *img_size], cropped and normalized."""

    def __init__(self, img_size, pixel_format):
        self.crops, self.pixel_format = CenterCrops(None, img_size), pixel_format

    def __call__(self, image):
        if isinstance(image, str | Path):
            image = decode_image(image, self.pixel_format)
        elif isinstance(image, Image.Image):
            image = convert_pil_image(image, self.pixel_format)
        in_chans, mean, std = self.pixel_format[:3]
        is_uint8 = isinstance(image, torch.Tensor) and image.dtype == torch.uint8
        if not is_uint8 or image.shape[:-2] != (in_chans,):
            raise ValueError(f"an image is a path, PIL's, or a uint8 tensor [{in_chans}, H, W]")
        return normalize(self.crops.crop(image)[None].float() / 255, mean, std)[0]


def create_classifier(args, weights_key=None, interpolation="bilinear"):
    """The backbone and classifier in --pretrained → model, its config, class names or None.

    weights_key: "ema" for the moving average that fine-tuning left; None for what it measured.
    interpolation: where the file does not state it.
    """
    path = args.pretrained
    weights = read_weights(path, arch=args.arch, weights_key=weights_key)
    if weights_key is None and weights.config["evaluate_ema"]:
        weights = read_weights(path, arch=args.arch, weights_key="ema")
        print_rank0(f"weights {path}: the moving average, which its run measured")
    interpolation = weights.config.get("interpolation", interpolation)
    config = replace(BackboneConfig.from_args(args, weights.config), interpolation=interpolation)
    model = config.create_backbone()
    classifier = {f"{model.classifier_name}.{name}" for name in ("weight", "bias")}
    if weights.heads.keys() != classifier:
        raise UserError(f"{path} has no classifier to evaluate: train one without --evaluate")
    num_classes = len(weights.heads[f"{model.classifier_name}.weight"])
    model.set_submodule(model.classifier_name, Classifier(model.num_features, num_classes))
    _load_backbone(model, weights.backbone | weights.heads, weights.config, path)
    return model, config, weights.config.get("class_names")


def _load_backbone(model, state, checkpoint, path):
    if "pos_embed" in state:
        state["pos_embed"] = _resample_pos_embed(state["pos_embed"], model, checkpoint)
    load_state_dict_strict(model, state, checkpoint, path)


def load_state_dict_strict(model, state, checkpoint, path):
    """model.load_state_dict(state), with a readable list of what does not match.

    Checks the number of heads where the file states it: weights of another number fit silently.
    """
    stored_heads, own_heads = checkpoint.get("num_heads"), num_heads(model)
    if stored_heads is not None and stored_heads != own_heads:
        raise UserError(f"{path} was trained with {stored_heads} heads, this model has {own_heads}")
    expected = model.state_dict()
    shared = expected.keys() & state.keys()
    for problem, keys in (
        ("lacks", expected.keys() - state.keys()),
        ("has unknown", state.keys() - expected.keys()),
        ("has in other shapes", {k for k in shared if expected[k].shape != state[k].shape}),
    ):
        if keys:
            raise UserError(
                f"{path} (arch {checkpoint.get('arch', 'unknown')}) does not fit this model: it "
                f"{problem} {shorten(keys)}"
            )
    model.load_state_dict(state)


def detach_classifier(model):
    """Takes the classifier out of the model, which then returns features → the classifier."""
    classifier = model.get_submodule(model.classifier_name)
    model.set_submodule(model.classifier_name, nn.Identity())
    return classifier


def check_num_classes(classifier, num_classes, path):
    """UserError unless the classifier in `path` has as many outputs as the images have classes."""
    outputs = classifier.out_features
    if outputs != num_classes:
        raise UserError(f"{path} has {outputs} classes, the images have {num_classes}")


def num_heads(model):
    """Attention heads of a backbone, in its first block, or of a MoCo's; None without attention."""
    modules = getattr(model, "base_encoder", model).modules()
    return next((m.num_heads for m in modules if hasattr(m, "num_heads")), None)


def weights_digest(model):
    """16 hex digits that tell these weights from others."""
    hasher = hashlib.sha256()
    for value in model.state_dict().values():
        hasher.update(np.ascontiguousarray(value.cpu().numpy()).tobytes())
    return hasher.hexdigest()[:16]


def _resample_pos_embed(pos_embed, backbone, checkpoint):
    """A ViT's position embedding, [1, prefix + cells, d], interpolated to the backbone's grid.

    Embeddings of other forms are returned as they are: they fit at the same size only.
    """
    own, patch_embed = getattr(backbone, "pos_embed", None), getattr(backbone, "patch_embed", None)
    if pos_embed.ndim != 3 or own is None or not hasattr(patch_embed, "grid_size"):
        return pos_embed
    grid, old_grid = patch_embed.grid_size, None  # None: timm assumes a square
    if checkpoint.get("img_size"):
        sizes = zip(checkpoint["img_size"], patch_embed.patch_size)
        old_grid = tuple(side // patch for side, patch in sizes)
    if old_grid in (None, grid) and pos_embed.shape == own.shape:
        return pos_embed
    # timm's ViTs with registers have no entry for any prefix token, ours one for the class token.
    num_prefix = own.shape[1] - math.prod(grid)
    if old_grid and pos_embed.shape[1] != num_prefix + math.prod(old_grid):
        return pos_embed
    return resample_abs_pos_embed(pos_embed, grid, old_grid, num_prefix_tokens=num_prefix)


def _is_sincos(pos_embed, backbone, checkpoint):
    """Whether a position embedding is MoCo v3's table for the checkpoint's own image size."""
    if not isinstance(backbone, VisionTransformer) or pos_embed.ndim != 3:
        return False
    size, grid = checkpoint.get("img_size"), backbone.patch_embed.grid_size
    if size:
        grid = [side // patch for side, patch in zip(size, backbone.patch_embed.patch_size)]
    elif pos_embed.shape != backbone.pos_embed.shape:
        grid = [math.isqrt(pos_embed.shape[1] - backbone.num_prefix_tokens)] * 2
    table = sincos_position_embedding(*grid, backbone.embed_dim)
    table = table[:, 1 - backbone.num_prefix_tokens :]  # without a class token, no entry for it
    return pos_embed.shape == table.shape and torch.allclose(pos_embed.float(), table, atol=1e-5)


def shorten(keys, max_keys=4):
    """The first few of the keys in order, and how many more there are."""
    keys = sorted(keys)
    more = f" and {len(keys) - max_keys} more" if len(keys) > max_keys else ""
    return ", ".join(keys[:max_keys]) + more


# Weights of other projects

PRETRAINING = "MoCo v3 pre-training"  # ours or the official release's
CLASSIFIER = "MoCo v3 with a classifier"
PREFIXED = "MMSelfSup, MMPretrain or DINO"
PLAIN = "timm, torchvision, DeiT, MAE or DINO"

# Beginnings of the names in MMPretrain's ViT, and timm's; the first that matches is replaced.
MM_TO_TIMM = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.ln", r"blocks.\1.norm"),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^ln1\.", "norm."),
)


# What timm's config.json may give to the model: backbones.py, or tools/convert.py, knows them.
TIMM_OPTIONS = set(
    "img_size patch_size in_chans num_classes drop_rate drop_path_rate embed_dim depth "
    "num_heads".split()
)


class Weights(NamedTuple):
    """A backbone's weights by our names, whichever project wrote them.

    kind: one of the four above. backbone: tensors by name, without the classifier. heads: all other
    tensors, by their names in the file: a classifier, or projectors, predictor and momentum
    encoder, or a decoder. config: what the file states or its shapes tell, by the keys of our
    checkpoints: arch, img_size, patch_size, small_stem, in_chans, num_heads (None: not known),
    evaluate_ema, and where the file has them mean, std, max_value, interpolation, class_names.
    """

    path: str
    kind: str
    backbone: dict
    heads: dict
    config: dict

    def create_backbone(self):
        """The backbone with these weights; UserError unless every one fits."""
        model = _create_backbone(self.config)
        load_state_dict_strict(model, self.backbone, self.config, self.path)
        return model

    def __str__(self):
        heads = f", {self.config['num_heads']} heads" if self.config["num_heads"] else ""
        size = size_to_str(self.config["img_size"])
        return f"{self.kind}: {self.config['arch']}{heads}, {size} pixels"

    def without(self, kept=()):
        """Names what is not taken: ", without …", or nothing. kept: names of heads that are."""
        prefix = "base_encoder." if self.kind == PRETRAINING else ""
        dropped = {k.removeprefix(prefix).split(".")[0] for k in self.heads if k not in kept}
        return f", without {', '.join(sorted(dropped))}" if dropped else ""


def read_weights(path, num_heads=None, arch=None, weights_key=None):
    """A .pth, a .safetensors or a folder of timm's → Weights.

    Its names tell who wrote it: MoCo v3 (ours or the official release's, from pre-training or with
    a classifier), MMSelfSup and MMPretrain 1.x (ViT and ResNet), timm, torchvision, DeiT, MAE,
    DINO. arch: a `-a` name, where the file states none; num_heads: only those of its ViT-S.
    weights_key: "ema" for the moving average in a checkpoint of ours.
    UserError for a file that can't be read or is none of these, and where the heads are not known.
    """
    content, state = _read_state_dict(path, weights_key)
    kind = _recognize(state)
    state = without_module_prefix(state)
    if any(key.startswith("linears.") for key in state):
        raise UserError(f"{path} has a probe's classifiers alone: take linear_lr….pth beside it")
    prefix = {PRETRAINING: "base_encoder.", PREFIXED: "backbone."}.get(kind, "")
    encoder = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    if kind == PREFIXED:
        encoder = {_mm_to_timm(key): value for key, value in encoder.items()}
    config = _find_config(path, kind, content, encoder, num_heads, arch)
    # mask_token and decoder_…: what MAE pre-trains with and then drops.
    unused = (f"{_classifier_name(config)}.", "mask_token", "decoder_")
    backbone = {key: value for key, value in encoder.items() if not key.startswith(unused)}
    heads = {
        key: value
        for key, value in state.items()
        if not key.startswith(prefix) or key.removeprefix(prefix).startswith(unused)
    }
    return Weights(str(path), kind, backbone, heads, config)


def _read_state_dict(path, weights_key=None):
    """A file, or a folder of timm's → what it states beside the weights, the weights by name."""
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    if file != Path(path) and Path(path, checkpoints.LAST).exists():
        raise UserError(f"{path} is the folder of a run: name {Path(path, checkpoints.LAST)}")
    content = _read_timm(file) if file.suffix == ".safetensors" else checkpoints.read(file)
    content = content if isinstance(content, dict) else {}
    if weights_key is not None and weights_key not in content:
        raise UserError(f"{file} holds no {weights_key!r}")
    keys = [weights_key] if weights_key else ["state_dict", "model", "teacher", "student"]  # DINO's
    state = next((content[key] for key in keys if key in content), None)
    if state is None:  # the weights alone
        content, state = {}, content
    checkpoints.validate(content, file)
    items = state.items() if isinstance(state, dict) else ()
    if not items or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in items):
        raise UserError(f"{file} holds no weights by name")
    return content, state


def _read_timm(file):
    """A .safetensors, config.json beside it or not → the same as a checkpoint of ours."""
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    try:
        content, path = dict(state_dict=load_file(file)), file.with_name("config.json")
        if path.is_file():
            content |= _read_timm_config(json.loads(path.read_text()), path)
        return content
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign file provokes
        raise UserError(f"{file} can't be read as timm's: {type(error).__name__}") from None


def _read_timm_config(config, path):
    """config.json of timm's → the same by the keys of our checkpoints."""
    options, images = config.get("model_args") or {}, config.get("pretrained_cfg", config)
    unknown = options.keys() - TIMM_OPTIONS
    if unknown:
        raise UserError(f"{path} has model_args that can't be built: {shorten(unknown)}")
    in_chans, *size = images["input_size"]
    stated = {key: tuple(images[key]) for key in ("mean", "std") if key in images}
    stated["in_chans"] = options.get("in_chans") or in_chans
    stated["img_size"] = to_pair(options.get("img_size") or size)
    stated["patch_size"] = to_pair(options["patch_size"]) if options.get("patch_size") else None
    if images.get("interpolation") in ("bilinear", "bicubic"):
        stated["interpolation"] = images["interpolation"]
    if config.get("max_value"):
        stated["max_value"] = config["max_value"]
    if isinstance(config.get("label_names"), list):
        stated["class_names"] = config["label_names"]
    arch = config["architecture"]
    if "embed_dim" in options:  # a ViT of ours, exported by tools/convert.py
        stated["num_heads"] = options["num_heads"]
    else:
        stated["arch"] = arch if arch in RESNETS else f"timm/{arch}"
    return stated


def _recognize(state):
    """Which kind of weights they are, by how their names begin."""
    keys = without_module_prefix(state).keys()
    if any(key.startswith("base_encoder.") for key in keys):
        return PRETRAINING
    if any(key.startswith("backbone.") for key in keys):
        return PREFIXED
    if any(key.startswith("module.") for key in state):
        return CLASSIFIER
    return PLAIN


def _mm_to_timm(name):
    for pattern, replacement in MM_TO_TIMM:
        name = re.sub(pattern, replacement, name)
    return name


def _find_config(path, kind, content, encoder, num_heads, arch):
    """Weights.config: what the file states, or the shapes of its weights tell, or arch does."""
    stated_heads, arch = content.get("num_heads"), _find_stated_arch(content) or arch
    if arch is None:
        arch = _find_arch(path, encoder)
        if arch == "vit_small" and kind != PRETRAINING:
            heads = stated_heads or num_heads
            if heads is None:
                raise UserError(
                    f"{path} does not say how many attention heads it has, 12 (MoCo v3's ViT-S) or "
                    f"6 (timm's, DeiT's, DINO's): -a vit_small or -a {SIX_HEADS} beside "
                    "--pretrained; for --init-from, tools/convert.py --num-heads 12 or 6"
                )
            arch = SIX_HEADS if heads == 6 else arch
    if arch in VITS:
        stated_heads = stated_heads or VITS[arch]["num_heads"]

    img_size, patch_size = content.get("img_size"), content.get("patch_size")
    if "cls_token" in encoder and not img_size:
        img_size, patch_size = _find_size(encoder)
        if img_size is None and arch in VITS:
            raise UserError(
                f"{path} states no image size, and has no patches that make up a square"
            )
    if img_size is None and arch.startswith("timm/"):
        img_size = getattr(timm.get_pretrained_cfg(arch[5:]), "input_size", (3, 224, 224))[1:]
    stem = _find_stem(encoder)
    keys = (*BackboneConfig(arch).to_dict(), "class_names")
    return {key: content[key] for key in keys if content.get(key)} | dict(
        arch=arch,
        evaluate_ema="ema" in content and bool(content.get("args", {}).get("evaluate_ema")),
        img_size=to_pair(img_size or 224),
        patch_size=to_pair(patch_size) if patch_size else None,
        small_stem=arch in RESNETS and stem[2:] == (3, 3),
        in_chans=content.get("in_chans") or stem[1],
        num_heads=stated_heads,
    )


def _find_stated_arch(content):
    """The `-a` name that a file states, as ours, timm's or DeiT's do; else None."""
    for name in (content.get("arch"), (content.get("args") or {}).get("model")):
        if not isinstance(name, str):
            continue
        if name in (*VITS, *RESNETS) or name.startswith("timm/"):
            return name
        name = name.split(".")[0]  # without timm's tag of the weights
        if timm.is_model(name):
            return f"timm/{name}"
    return None


def _find_arch(path, encoder):
    """A ViT's width, depth and stem name it, a ResNet's shapes."""
    hint = "name it with -a, for example -a timm/NAME"
    if "cls_token" in encoder:
        dim = encoder["cls_token"].numel()
        depth = len({key.split(".")[1] for key in encoder if key.startswith("blocks.")})
        shape = dim, depth, "patch_embed.proj.0.weight" in encoder
        for arch, vit in VITS.items():
            if shape == (vit["embed_dim"], vit["depth"], vit.get("conv_stem", False)):
                return arch
        size = f"{dim} wide, {depth} blocks"
        raise UserError(f"{path} is none of the ViTs of vits.py ({size}): {hint}")
    shapes = {key: v.shape for key, v in encoder.items() if not key.startswith("fc.")}
    stem = _find_stem(encoder)
    for arch in RESNETS:
        with torch.device("meta"):
            model = create_backbone(arch, in_chans=stem[1], small_stem=stem[2:] == (3, 3))
        if {key: v.shape for key, v in model.state_dict().items()} == shapes:
            return arch
    raise UserError(f"{path} is by its keys neither a ViT nor a ResNet: {hint}")


def _find_stem(encoder):
    """Shape of the first convolution of a ViT or ResNet: [out, in_chans, height, width]."""
    for key in ("patch_embed.proj.weight", "patch_embed.proj.0.weight", "conv1.weight"):
        if key in encoder and encoder[key].ndim == 4:
            return tuple(encoder[key].shape)
    return 64, 3, 7, 7


def _find_size(vit):
    """img_size, taken as a square, and patch_size, by the shapes of a ViT's weights; or None."""
    stem = [v for k, v in vit.items() if k.startswith("patch_embed.proj.") and v.ndim == 4]
    pos_embed = vit.get("pos_embed", torch.empty(0))
    num_cells = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    side = math.isqrt(max(0, num_cells))
    if not stem or not num_cells or side**2 != num_cells:
        return None, None
    # The last layer of a convolutional stem is 1×1; each other one halves.
    patch = tuple(stem[0].shape[2:]) if len(stem) == 1 else to_pair(2 ** (len(stem) - 1))
    return (side * patch[0], side * patch[1]), patch


def _classifier_name(config):
    if config["arch"] in VITS:
        return "head"
    if config["arch"] in RESNETS:
        return "fc"
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay what they were
        return _create_backbone(config).classifier_name


def _create_backbone(config):
    names = inspect.signature(create_backbone).parameters
    return create_backbone(**{name: config[name] for name in names if name in config})
