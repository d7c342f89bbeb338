"""Weights of checkpoints into models: everything must fit, and what does not is listed.

The second half reads what other projects have written.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from engine import checkpoint as checkpoints
from engine.backbones import RESNETS, BackboneConfig, Classifier, create_backbone
from engine.checkpoint import without_module_prefix
from engine.errors import UserError
from vits import VITS, to_pair


def load_moco(model, checkpoint, path):
    """Puts a pre-training checkpoint, ours or the official release's, into a MoCo."""
    state = without_module_prefix(checkpoint["state_dict"])
    _require_encoder(state, "momentum_encoder", path)
    expected, backbone = model.state_dict(), model.base_encoder
    for key in ("base_encoder.pos_embed", "momentum_encoder.pos_embed"):
        if key not in state or key not in expected:
            continue
        if backbone.pos_embed.requires_grad:  # learned
            state[key] = _resample_pos_embed(state[key], backbone, checkpoint)
        else:  # a fixed table is that of the model's own image size
            state[key] = expected[key]
    load_state_dict_strict(model, state, checkpoint, path)


def load_model(model, checkpoint, path):
    """Puts checkpoint["state_dict"] into a model of the same kind; every key must match."""
    if hasattr(model, "momentum_encoder"):
        load_moco(model, checkpoint, path)
    else:
        state = without_module_prefix(checkpoint["state_dict"])
        load_state_dict_strict(model, state, checkpoint, path)


def create_pretrained_backbone(args, drop_path=0.0):
    """The backbone in --pretrained, base_encoder of a pre-training checkpoint → model, its config.

    The config is the checkpoint's own unless flags say otherwise; a ViT's position embedding is
    interpolated to fit. --from-scratch: the same backbone with random weights.
    """
    path = args.pretrained
    checkpoint = checkpoints.load(path) if path else {}
    config = BackboneConfig.from_args(args, checkpoint)
    model = config.create_backbone(drop_path=drop_path)
    if not args.from_scratch:
        state = without_module_prefix(checkpoint["state_dict"])
        _require_encoder(state, "base_encoder", path)
        _load_backbone(model, _base_encoder(state, model), checkpoint, path)
    return model, config


def create_classifier(args, weights_key="state_dict"):
    """The backbone and classifier in --pretrained → model, its config, class names or None.

    weights_key: where a linear probe or fine-tuning left them, "state_dict" or "ema".
    """
    path = args.pretrained
    checkpoint = checkpoints.load(path)
    config = BackboneConfig.from_args(args, checkpoint)
    model = config.create_backbone()
    if weights_key not in checkpoint:
        raise UserError(f"{path} holds no {weights_key!r}")
    state = without_module_prefix(checkpoint[weights_key])
    weight = state.get(f"{model.classifier_name}.weight")
    if weight is None or _base_encoder(state, model):
        raise UserError(f"{path} has no classifier to evaluate: train one without --evaluate")
    model.set_submodule(model.classifier_name, Classifier(model.num_features, len(weight)))
    _load_backbone(model, state, checkpoint, path)
    return model, config, checkpoint.get("class_names")


def _base_encoder(state, model):
    """The backbone's part of a pre-training state_dict; empty for any other."""
    head = f"base_encoder.{model.classifier_name}."
    return {
        key.removeprefix("base_encoder."): value
        for key, value in state.items()
        if key.startswith("base_encoder.") and not key.startswith(head)
    }


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
    return resample_abs_pos_embed(pos_embed, grid, old_grid, num_prefix_tokens=num_prefix)


def _require_encoder(state, encoder, path):
    if not any(key.startswith(f"{encoder}.") for key in state):
        has_classifier = "head.weight" in state or "fc.weight" in state
        hint = "; with a classifier it is for --evaluate" if has_classifier else ""
        raise UserError(f"{path} holds no pre-training weights: it has no {encoder}{hint}")


def shorten(keys, max_keys=4):
    """The first few of the keys in order, and how many more there are."""
    keys = sorted(keys)
    more = f" and {len(keys) - max_keys} more" if len(keys) > max_keys else ""
    return ", ".join(keys[:max_keys]) + more


# Weights of other projects

PRETRAINING = "MoCo v3 pre-training"  # ours or the official release's
CLASSIFIER = "MoCo v3 with a classifier"
MM = "MMSelfSup or MMPretrain"
PLAIN = "timm, DeiT or torchvision"

# Beginnings of the names in MMPretrain's ViT, and timm's; the first that matches is replaced.
MM_TO_TIMM = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.ln", r"blocks.\1.norm"),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^ln1\.", "norm."),
)


class Weights(NamedTuple):
    """A backbone's weights by our names, whichever project wrote them.

    kind: one of the four above. backbone: tensors by name, without the classifier. heads: all other
    tensors, by their names in the file: a classifier, or projectors, predictor and momentum
    encoder. config: what the file states or its shapes tell, by the keys of our checkpoints: arch,
    img_size, patch_size, small_stem, in_chans, num_heads (None: not stated), and where the file has
    them mean, std, max_value, class_names.
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


def read_weights(path, num_heads=None):
    """A .pth, a .safetensors or a folder of timm's → Weights.

    Its names tell who wrote it: MoCo v3 (ours or the official release's, from pre-training or with
    a classifier), MMSelfSup and MMPretrain 1.x (ViT and ResNet), timm, DeiT, torchvision.
    num_heads: of a ViT-S, where the file does not state them.
    UserError for a file that can't be read or is none of these, and where num_heads is missing.
    """
    content, state = _read_state_dict(path)
    kind = _recognize(state)
    state = without_module_prefix(state)
    prefix = {PRETRAINING: "base_encoder.", MM: "backbone."}.get(kind, "")
    encoder = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    if kind == MM:
        encoder = {_mm_to_timm(key): value for key, value in encoder.items()}
    config = _find_config(path, kind, content, encoder, num_heads)
    head = f"{_classifier_name(config)}."
    backbone = {key: value for key, value in encoder.items() if not key.startswith(head)}
    heads = {
        key: value
        for key, value in state.items()
        if not key.startswith(prefix) or key.startswith(prefix + head)
    }
    return Weights(str(path), kind, backbone, heads, config)


def _read_state_dict(path):
    """A file, or a folder of timm's → what it states beside the weights, the weights by name."""
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    content = _read_timm(file) if file.suffix == ".safetensors" else checkpoints.read(file)
    content = content if isinstance(content, dict) else {}
    checkpoints.validate(content, file)
    state = content.get("state_dict", content.get("model", content))
    items = state.items() if isinstance(state, dict) else ()
    if not items or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in items):
        raise UserError(f"{file} holds no weights by name")
    return content, state


def _read_timm(file):
    """A .safetensors, config.json beside it or not → the same as a checkpoint of ours."""
    from safetensors.torch import load_file

    try:
        content, path = dict(state_dict=load_file(file)), file.with_name("config.json")
        if path.is_file():
            content |= _read_timm_config(json.loads(path.read_text()))
        return content
    except Exception as error:  # whatever a damaged or foreign file provokes
        raise UserError(f"{file} can't be read as timm's: {type(error).__name__}") from None


def _read_timm_config(config):
    """config.json of timm's → the same by the keys of our checkpoints."""
    options, images = config.get("model_args") or {}, config["pretrained_cfg"]
    in_chans, *size = images["input_size"]
    stated = {key: tuple(images[key]) for key in ("mean", "std") if key in images}
    stated["in_chans"] = options.get("in_chans") or in_chans
    stated["img_size"] = to_pair(options.get("img_size") or size)
    stated["patch_size"] = to_pair(options["patch_size"]) if options.get("patch_size") else None
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
        return MM
    if any(key.startswith("module.") for key in state):
        return CLASSIFIER
    return PLAIN


def _mm_to_timm(name):
    for pattern, replacement in MM_TO_TIMM:
        name = re.sub(pattern, replacement, name)
    return name


def _find_config(path, kind, content, encoder, num_heads):
    """Weights.config: what the file states, or the shapes of its weights tell."""
    arch, num_heads = content.get("arch") or "", content.get("num_heads") or num_heads
    if arch not in (*VITS, *RESNETS) and not arch.startswith("timm/"):
        arch = _find_arch(path, encoder)
        if arch == "vit_small" and kind != PRETRAINING:
            if num_heads is None:
                raise UserError(
                    f"{path} does not say how many attention heads it has: --num-heads 12 if it is "
                    "MoCo v3's, 6 if it is timm's or DeiT's"
                )
            arch = "timm/vit_small_patch16_224" if num_heads == 6 else arch

    img_size, patch_size = content.get("img_size"), content.get("patch_size")
    if "cls_token" in encoder and not img_size:
        img_size, patch_size = _find_size(path, encoder)
    optional = ("mean", "std", "max_value", "class_names")
    return dict(
        arch=arch,
        img_size=to_pair(img_size or 224),
        patch_size=to_pair(patch_size) if patch_size else None,
        small_stem=bool(content.get("small_stem")),
        in_chans=content.get("in_chans") or 3,
        num_heads=content.get("num_heads"),
        **{key: content[key] for key in optional if content.get(key)},
    )


def _find_arch(path, encoder):
    """A ViT's width, depth and stem name it, a ResNet's shapes."""
    if "cls_token" in encoder:
        dim = encoder["cls_token"].numel()
        depth = len({key.split(".")[1] for key in encoder if key.startswith("blocks.")})
        shape = dim, depth, "patch_embed.proj.0.weight" in encoder
        for arch, vit in VITS.items():
            if shape == (vit["embed_dim"], vit["depth"], vit.get("conv_stem", False)):
                return arch
        raise UserError(f"{path} is none of the ViTs of vits.py: {dim} wide, {depth} blocks")
    shapes = {key: v.shape for key, v in encoder.items() if not key.startswith("fc.")}
    for arch in RESNETS:
        with torch.device("meta"):
            expected = create_backbone(arch).state_dict()
        if {key: v.shape for key, v in expected.items()} == shapes:
            return arch
    raise UserError(
        f"{path} is by its keys neither a ViT nor a ResNet: other backbones of timm are read from "
        "our checkpoints and from folders with timm's config.json"
    )


def _find_size(path, vit):
    """img_size, taken as a square, and patch_size, by the shapes of a ViT's weights."""
    stem = [v for k, v in vit.items() if k.startswith("patch_embed.proj.") and v.ndim == 4]
    pos_embed = vit.get("pos_embed", torch.empty(0))
    num_cells = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    side = math.isqrt(num_cells)
    if not stem or not num_cells or side**2 != num_cells:
        raise UserError(f"{path} states no image size, and has no patches that make up a square")
    # The last layer of a convolutional stem is 1×1; each other one halves.
    patch = tuple(stem[0].shape[2:]) if len(stem) == 1 else to_pair(2 ** (len(stem) - 1))
    return (side * patch[0], side * patch[1]), patch


def _classifier_name(config):
    if config["arch"] in VITS:
        return "head"
    if config["arch"] in RESNETS:
        return "fc"
    return _create_backbone(config).classifier_name


def _create_backbone(config):
    names = ("arch", "img_size", "patch_size", "small_stem", "in_chans")
    return create_backbone(**{name: config[name] for name in names})
