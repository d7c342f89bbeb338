"""Weights of checkpoints, ours and other projects', into models: everything must fit."""

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from engine import checkpoint as checkpoints
from engine.backbones import RESNETS, BackboneConfig, Classifier, choose_config, create_backbone
from engine.checkpoint import is_state_dict, without_module_prefix
from engine.data.crops import CenterCrops
from engine.data.decode import convert_pil_image
from engine.data.images import read_image
from engine.data.quiet import quiet_libraries
from engine.errors import UserError, cant_read, is_machine_failure, join_some
from engine.files import exists, open_regular
from engine.launch import print_rank0
from moco.augmentation import normalize
from vits import VITS, VisionTransformer, sincos_position_embedding, size_to_str, to_pair


def load_model(model, checkpoint, path):
    """Puts the weights of a run, ours or the official release's, into a model of the same kind."""
    state, own = without_module_prefix(checkpoint["state_dict"]), model.state_dict()
    for key in ("base_encoder.pos_embed", "momentum_encoder.pos_embed"):  # of a MoCo
        if key in state and key in own:
            backbone = model.base_encoder
            is_fixed = not backbone.pos_embed.requires_grad
            if is_fixed and _is_sincos(state[key], backbone, checkpoint):
                state[key] = own[key]  # the table of the model's own image size
            else:  # learned here, or by the model that this one was started from
                state[key] = _resample_pos_embed(state[key], backbone, checkpoint)
    load_state_dict_strict(model, state, checkpoint, path)


def initialize_moco(model, path, options, pixel_format):
    """Starts a MoCo from the weights at `path` → a line on what stays random, or None.

    Takes all of a pre-training checkpoint. Where the heads are missing or of other widths, its
    backbone starts both encoders. options: as of choose_config. UserError if the weights were
    trained with another pixel_format, and no option chooses this one.
    """
    # -a vit_small is the model that the user wants: the file's may have another number of heads.
    arch = options["arch"] if options["arch"] != "vit_small" else None
    weights = read_weights(path, arch)
    _check_pixel_format(weights, options, pixel_format)
    encoders, name = ("base_encoder", "momentum_encoder"), model.base_encoder.classifier_name
    prefixes = ("predictor.", *(f"{encoder}.{name}." for encoder in encoders))
    backbone, heads = weights.split(name)
    own_heads = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    stored_shapes = {k: v.shape for k, v in heads.items() if k.startswith(prefixes)}
    heads_fit = stored_shapes == {k: v.shape for k, v in own_heads.items()}
    if heads_fit:
        state = {f"base_encoder.{k}": v for k, v in backbone.items()} | heads
    else:
        state = {f"{e}.{k}": v for e in encoders for k, v in backbone.items()} | own_heads
    load_model(model, weights.config | dict(state_dict=state), path)
    if heads_fit:
        return None
    return f"{path} ({weights}) in both encoders; it has no heads that fit: they start at random"


def _check_pixel_format(weights, options, pixel_format):
    own, stated = pixel_format._asdict(), weights.config
    others = {n: stated[n] for n in own if n in stated and options.get(n) is None}
    others = [f"{name} {value}" for name, value in others.items() if value != own[name]]
    if others:
        raise UserError(
            f"{weights.path} was trained with {', '.join(others)}: add flags of these names, or "
            "others for your images"
        )


def create_pretrained_backbone(path, options, from_scratch=False, drop_path=0.0):
    """The backbone in a file that read_weights takes → model, its BackboneConfig.

    The config is the file's own unless options, as of choose_config, say otherwise; a ViT's
    position embedding is interpolated to fit. from_scratch: the same backbone with random weights;
    path may be None then.
    """
    weights = read_weights(path, options.get("arch")) if path else None
    config = choose_config(options, weights.config if path else None, path)
    model = create_backbone(config, drop_path=drop_path)
    if not from_scratch:
        backbone, _ = weights.split(model.classifier_name)
        _load_backbone(model, backbone, weights.config, path)
        if weights.kind != PRETRAINING:
            print_rank0(f"weights {path} ({weights})")
    return model, config


def load_backbone(path, arch=None, img_size=None, mean=None, std=None):
    """The backbone in a file that --pretrained takes → model, frozen and in eval mode; transform.

    transform: what evaluation does to an image, see EvalTransform. arch, img_size, mean, std: as
    the flags of these names, by default as the file states them.
    """
    options = dict(arch=arch, img_size=img_size, mean=mean, std=std)
    model, config = create_pretrained_backbone(path, options)
    return model.requires_grad_(False).eval(), EvalTransform(config.img_size, config.pixel_format)


class EvalTransform:
    """A PIL image, a path or uint8 [C, H, W] → float32 [C, *img_size], cropped and normalized."""

    def __init__(self, img_size, pixel_format):
        self.crops, self.pixel_format = CenterCrops(None, img_size), pixel_format

    def __call__(self, image):
        with quiet_libraries():
            if isinstance(image, str | Path):
                image = read_image(image, self.pixel_format)
            elif isinstance(image, Image.Image):
                image = convert_pil_image(image, self.pixel_format)
        in_chans, mean, std = self.pixel_format[:3]
        is_uint8 = isinstance(image, torch.Tensor) and image.dtype == torch.uint8
        if not is_uint8 or image.shape[:-2] != (in_chans,):
            raise ValueError(f"an image is a path, PIL's, or a uint8 tensor [{in_chans}, H, W]")
        return normalize(self.crops.crop(image)[None].float() / 255, mean, std)[0]


def create_classifier(path, options, use_ema=None, interpolation="bilinear"):
    """The backbone and classifier in a file → model, its BackboneConfig, class names or None.

    options: as of choose_config. use_ema: whether to take the moving average that fine-tuning left;
    None: if its run measured it. interpolation: where the file does not state it.
    """
    weights = read_weights(path, options.get("arch"))
    if use_ema is None and weights.config["evaluate_ema"]:
        use_ema = True
        print_rank0(f"weights {path}: the moving average, which its run measured")
    config = choose_config(options, weights.config, path)
    config = replace(config, interpolation=weights.config.get("interpolation", interpolation))
    model = create_backbone(config)
    backbone, heads = weights.split(model.classifier_name, use_ema)
    weight, bias = f"{model.classifier_name}.weight", f"{model.classifier_name}.bias"
    if heads.keys() != {weight, bias}:
        raise UserError(
            f"{path} has no classifier: train one with main_lincls.py or main_finetune.py"
        )
    classifier = Classifier(model.num_features, len(heads[weight]))
    model.set_submodule(model.classifier_name, classifier)
    _load_backbone(model, backbone | heads, weights.config, path)
    return model, config, weights.config.get("class_names")


def _load_backbone(model, state, stated, path):
    if "pos_embed" in state:
        state["pos_embed"] = _resample_pos_embed(state["pos_embed"], model, stated)
    load_state_dict_strict(model, state, stated, path)


def load_state_dict_strict(model, state, stated, path):
    """model.load_state_dict(state); UserError in one line where something does not match.

    Checks the number of heads where the file states it: weights of another number fit silently.
    """
    stored_heads, own_heads = stated.get("num_heads"), num_heads(model)
    if stored_heads is not None and stored_heads != own_heads:
        raise UserError(f"{path} was trained with {stored_heads} heads, this model has {own_heads}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        if is_machine_failure(error):
            raise
        _, _, problems = str(error).partition("\n")
        raise UserError(
            f"{path} (arch {stated.get('arch', 'unknown')}) does not fit this model: "
            f"{shorten(problems, 300, placeholder=' …')}"
        ) from None


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


def _resample_pos_embed(pos_embed, backbone, stated):
    """A ViT's position embedding, [1, prefix + cells, d], interpolated to the backbone's grid.

    Embeddings of other forms are returned as they are: they fit at the same size only.
    """
    own, patch_embed = getattr(backbone, "pos_embed", None), getattr(backbone, "patch_embed", None)
    if pos_embed.ndim != 3 or own is None or not hasattr(patch_embed, "grid_size"):
        return pos_embed
    old_grid, grid = _stored_grid(pos_embed, backbone, stated), patch_embed.grid_size
    # timm's ViTs with registers have no entry for any prefix token, ours one for the class token.
    num_prefix = own.shape[1] - math.prod(grid)
    if old_grid == grid or pos_embed.shape[1] != num_prefix + math.prod(old_grid):
        return pos_embed
    return resample_abs_pos_embed(pos_embed, grid, old_grid, num_prefix_tokens=num_prefix)


def _stored_grid(pos_embed, backbone, stated):
    """(rows, columns) of a checkpoint's position embedding: a square where it states no size."""
    patch_embed = backbone.patch_embed
    if stated.get("img_size"):
        sizes = zip(stated["img_size"], patch_embed.patch_size)
        return tuple(side // patch for side, patch in sizes)
    num_prefix = backbone.pos_embed.shape[1] - math.prod(patch_embed.grid_size)
    side = math.isqrt(max(0, pos_embed.shape[1] - num_prefix))
    return side, side


def _is_sincos(pos_embed, backbone, stated):
    """Whether a position embedding is MoCo v3's table for the checkpoint's own image size."""
    if not isinstance(backbone, VisionTransformer) or pos_embed.ndim != 3:
        return False
    grid = _stored_grid(pos_embed, backbone, stated)
    table = sincos_position_embedding(*grid, backbone.embed_dim)
    table = table[:, 1 - backbone.num_prefix_tokens :]  # without a class token, no entry for it
    return pos_embed.shape == table.shape and torch.allclose(pos_embed.float(), table, atol=1e-5)


# Weights of other projects

# What timm's config.json may give to the model: backbones.py, or tools/convert.py, knows them.
TIMM_OPTIONS = set(
    "img_size patch_size in_chans num_classes drop_rate drop_path_rate embed_dim depth "
    "num_heads".split()
)


RUN_KEYS = ("epoch", "args", "versions", "precision", "best_acc1")


class Format(NamedTuple):
    """How a project names its weights.

    prefix: how the names of the backbone's weights begin; a file is of the first format whose
    prefix one of its names has. renames: (pattern, replacement), one after another, from the rest
    of such a name to ours, which is timm's for a ViT and torchvision's for a ResNet.
    """

    name: str
    prefix: str
    renames: tuple = ()


PRETRAINING = Format("MoCo v3 pre-training", r"(module\.)?base_encoder\.")
FORMATS = (
    PRETRAINING,  # ours or the official release's
    Format(
        "MMSelfSup, MMPretrain or DINO",
        r"(module\.)?backbone\.",
        (
            (r"^patch_embed\.projection\.", "patch_embed.proj."),
            (r"^layers\.(\d+)\.ln", r"layers.\1.norm"),
            (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"layers.\1.mlp.fc1."),
            (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"layers.\1.mlp.fc2."),
            (r"^layers\.", "blocks."),
            (r"^ln1\.", "norm."),
        ),
    ),
    Format("MoCo v3 with a classifier", r"module\."),
    Format("timm, torchvision, DeiT, MAE or DINO", r""),
)


class Weights(NamedTuple):
    """What a file holds, whichever project wrote it.

    kind: one of FORMATS. state, ema: tensors by their names in the file; ema, the moving average
    of fine-tuning, or None. config: arch, num_heads (None: not known), evaluate_ema, and what else
    the file states, by the keys of our checkpoints: img_size, mean, class_names, …. run: the same
    of the run that left it, RUN_KEYS.
    """

    path: str
    kind: Format
    state: dict
    ema: dict | None
    config: dict
    run: dict

    def split(self, classifier_name, use_ema=False):
        """→ the backbone's tensors by our names; all other tensors, by their names in the file.

        The second are a classifier, or projectors, predictor and momentum encoder, or a decoder.
        UserError for weights that are not finite: whatever was measured with them is no accuracy.
        """
        if use_ema and self.ema is None:
            raise UserError(f"{self.path} holds no 'ema'")
        # mask_token and decoder_…: what MAE pre-trains with and then drops.
        others = (f"{classifier_name}.", "mask_token", "decoder_")
        backbone, heads = {}, {}
        for key, value in (self.ema if use_ema else self.state).items():
            if value.is_floating_point() and not value.float().isfinite().all():
                raise UserError(
                    f"{self.path} holds weights that are not finite, in {key}: its run diverged"
                )
            prefix = re.match(self.kind.prefix, key)
            name = key[prefix.end() :] if prefix else ""
            if name == "" or name.startswith(others):
                heads[key.removeprefix("module.")] = value
                continue
            for pattern, replacement in self.kind.renames:
                name = re.sub(pattern, replacement, name)
            backbone[name] = value
        return backbone, heads

    def __str__(self):
        config = self.config
        heads = f", {config['num_heads']} heads" if config["num_heads"] else ""
        size = f", {size_to_str(config['img_size'])} pixels" if "img_size" in config else ""
        return f"{self.kind.name}: {config['arch']}{heads}{size}"


def read_weights(path, arch=None):
    """A .pth, a .safetensors or a folder of timm's → Weights.

    Its names tell which of FORMATS it is. arch: a `-a` name, for a file that states none.
    UserError for a file that can't be read, or whose arch is not known.
    """
    content, state = _read_state_dict(path)
    if any(re.match(r"(module\.)?linears\.", key) for key in state):
        raise UserError(f"{path} has a probe's classifiers alone: take linear_lr….pth beside it")
    kind = next(f for f in FORMATS if any(re.match(f.prefix, key) for key in state))
    arch = _find_stated_arch(content) or arch
    if arch is None:
        raise UserError(
            f"{path} states no architecture: name it, for example -a resnet50 or -a timm/NAME; a "
            "ViT-S has 12 heads as -a vit_small (MoCo v3's) and 6 as -a "
            "timm/vit_small_patch16_224 (timm's, DeiT's, DINO's). For --init-from, "
            "tools/convert.py -a states it in a file"
        )
    keys = (*BackboneConfig(arch).to_dict(), "class_names")
    config = {key: content[key] for key in keys if content.get(key)}
    _check_class_names(config.get("class_names", []), path)
    config["arch"] = arch
    config["num_heads"] = content.get("num_heads") or VITS.get(arch, {}).get("num_heads")
    ema, args = content.get("ema"), content.get("args") or {}
    config["evaluate_ema"] = ema is not None and bool(args.get("evaluate_ema"))
    run = {key: content[key] for key in RUN_KEYS if content.get(key)}
    return Weights(str(path), kind, state, ema, config, run)


def _check_class_names(names, path):
    """UserError for names by which labels can't be told apart."""
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UserError(
            f"{path} states class names that are not distinct texts: {join_some(map(str, names))}"
        )


def _read_state_dict(path):
    """A file, or a folder of timm's → what it states beside the weights, the weights by name."""
    file = Path(path)
    if file.is_dir():
        if exists(Path(file, checkpoints.LAST)):
            raise UserError(f"{path} is the folder of a run: name {Path(file, checkpoints.LAST)}")
        file = Path(file, "model.safetensors")
    content = _read_timm(file) if file.suffix == ".safetensors" else checkpoints.read(file)
    content = content if isinstance(content, dict) else {}
    keys = ("state_dict", "model", "teacher", "student")  # the last two are DINO's
    state = next((content[key] for key in keys if key in content), None)
    if state is None:  # the weights alone
        content, state = {}, content
    checkpoints.validate(content, file)
    if not is_state_dict(state) or not state:
        raise UserError(f"{file} holds no weights by name")
    return content, state


def _read_timm(file):
    """A .safetensors, config.json beside it or not → the same as a checkpoint of ours."""
    try:
        open_regular(file).close()
        content, path = dict(state_dict=load_file(file)), file.with_name("config.json")
        if exists(path):
            content |= _read_timm_config(json.loads(path.read_text()), path)
        return content
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {file}") from None
    except Exception as error:  # whatever a damaged or foreign file provokes
        if is_machine_failure(error):
            raise cant_read(file, error) from None
        raise UserError(f"{file} can't be read as timm's: {type(error).__name__}") from None


def _read_timm_config(config, path):
    """config.json of timm's → the same by the keys of our checkpoints."""
    options, images = config.get("model_args") or {}, config.get("pretrained_cfg", config)
    unknown = options.keys() - TIMM_OPTIONS
    if unknown:
        raise UserError(f"{path} has model_args that can't be built: {join_some(sorted(unknown))}")
    in_chans, *size = images["input_size"]
    patch_size, interpolation = options.get("patch_size"), images.get("interpolation")
    return dict(
        # tools/convert.py names our ViTs, which timm builds by another name and model_args.
        arch=config.get("arch") or config["architecture"],
        num_heads=options.get("num_heads"),
        in_chans=options.get("in_chans") or in_chans,
        img_size=to_pair(options.get("img_size") or size),
        patch_size=to_pair(patch_size) if patch_size else None,
        mean=tuple(images.get("mean", ())),
        std=tuple(images.get("std", ())),
        value_range=tuple(config.get("value_range") or ()) or None,
        interpolation=interpolation if interpolation in ("bilinear", "bicubic") else None,
        class_names=config.get("label_names"),
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
