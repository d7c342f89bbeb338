"""Checkpoints: written atomically, read without running code, in the published layout."""

import math
import os
import shutil
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed

from moco import UserError
from moco.backbones import Classifier, create_backbone

LAST = "checkpoint.pth"

# What may differ when a run continues; anything else would change its mathematics.
MAY_CHANGE = set(
    "data data_root workers amp device encode_chunk compile output_dir resume init_from print_freq "
    "tensorboard save_every knn_every knn_bank knn".split()
)


def save(folder, state, keep_as=None, name=LAST):
    """Writes folder/name by way of a temporary name; `keep_as`: a second name for it.

    A crash at any moment leaves the old file or the new one, whole.
    """
    last = Path(folder, name)
    temporary = last.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # a crash may have left it linked to a file that is kept
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if keep_as:
        second = last.with_suffix(".tmp2")
        second.unlink(missing_ok=True)
        try:
            os.link(temporary, second)  # no second copy on disk
        except OSError:
            shutil.copyfile(temporary, second)
        os.replace(second, Path(folder, keep_as))
    os.replace(temporary, last)


def load(path):
    """A checkpoint's dict, tensors on the CPU; UserError if it is missing, damaged or none."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        # weights_only: a file from elsewhere can't run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file provokes
        raise UserError(f"{path} can't be read as a checkpoint: {type(error).__name__}") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is no checkpoint: it has no 'state_dict'")
    return checkpoint


# A run and its continuation.


def training_state(about, epoch, iteration, model, **parts):
    """The published layout, and beside it what an exact continuation needs; plain types alone.

    about: as log.describe makes it; parts: optimizer and whatever else has a state_dict.
    """
    return dict(
        epoch=epoch,
        iteration=iteration,
        num_heads=num_heads(model),
        state_dict={f"module.{key}": value for key, value in model.state_dict().items()},
        **{name: part.state_dict() for name, part in parts.items()},
        **about,
    )


def find_previous(args, folder):
    """Path of the checkpoint to continue, or None. UserError if a run would be overwritten."""
    last = folder / LAST
    if args.resume == "auto":
        return last if last.exists() else None
    if last.exists() and not (
        args.resume and Path(args.resume).resolve().parent == last.resolve().parent
    ):
        raise UserError(
            f"{folder} holds a run: --resume auto continues it, --output-dir starts another"
        )
    if args.resume and not Path(args.resume).is_file():
        raise UserError(f"no checkpoint at {args.resume}")
    return args.resume


def resume(path, args, epoch_steps, model, **parts):
    """Loads a training checkpoint into model and parts → its dict. UserError if `args` differ."""
    state = load(path)
    if "args" not in state:
        raise UserError(
            f"{path} has weights, but no arguments of a run to continue: begin with --init-from"
        )
    changed = [
        f"--{name.replace('_', '-')} {state['args'].get(name)} → {value}"
        for name, value in vars(args).items()
        if name not in MAY_CHANGE and value != state["args"].get(name)
    ]
    if changed:
        raise UserError(f"{path} was trained with other arguments: {', '.join(changed)}")
    if state["iteration"] != state["epoch"] * epoch_steps:
        raise UserError(f"{path} was trained on another number of images than DIR holds now")
    load_model(model, state, path)
    for name, part in parts.items():
        if state[name]:  # a GradScaler's is empty unless the run was in fp16
            part.load_state_dict(state[name])
    return state


# Weights into models.


def load_model(model, checkpoint, path):
    """Puts checkpoint["state_dict"] into a model of the same kind; every key must match."""
    state = _without_prefix(checkpoint["state_dict"])
    expected = model.state_dict()
    if hasattr(model, "momentum_encoder"):
        _refuse_without(state, "momentum_encoder", path)
        backbone = model.base_encoder
        for key in ("base_encoder.pos_embed", "momentum_encoder.pos_embed"):
            if key not in state or key not in expected:
                continue
            if backbone.pos_embed.requires_grad:  # learned
                state[key] = _resample_position(state[key], backbone, checkpoint)
            else:  # another image size has its own, of equal length or not
                state[key] = expected[key]
    _fit(model, state, checkpoint, path)


def create_downstream(args, classes=None, weights="state_dict", **kwargs):
    """The backbone in --pretrained, ours or the official release's → model, its setting.

    `classes` None: base_encoder of a pre-training checkpoint, without a classifier. A number: the
    backbone and classifier that a linear probe or fine-tuning left, under the key `weights`. The
    setting is a dict of arch, img_size, patch_size and small_stem: the checkpoint's own, unless
    args say otherwise; a ViT's position table is interpolated to fit. --from-scratch: random
    weights in the same backbone. kwargs go to create_backbone.
    """
    path = args.pretrained
    checkpoint = load(path) if path else {"arch": args.arch}
    arch = checkpoint.get("arch", args.arch)
    if arch is None:
        raise UserError(f"{path} does not say what backbone it holds: name it with -a")
    if args.arch not in (None, arch):
        raise UserError(f"{path} holds {arch}, not {args.arch}: drop -a {args.arch}")
    setting = dict(
        arch=arch,
        img_size=args.img_size or checkpoint.get("img_size", (224, 224)),
        patch_size=args.patch_size or checkpoint.get("patch_size"),
        small_stem=args.small_stem or checkpoint.get("small_stem", False),
    )
    model = create_backbone(**setting, **kwargs)
    if args.from_scratch:
        return model, setting
    if weights not in checkpoint:
        raise UserError(f"{path} holds no {weights!r}")

    state, name = _without_prefix(checkpoint[weights]), model.classifier_name
    pretraining = {
        key.removeprefix("base_encoder."): value
        for key, value in state.items()
        if key.startswith("base_encoder.") and not key.startswith(f"base_encoder.{name}.")
    }
    if classes is None:
        _refuse_without(state, "base_encoder", path)
        state = pretraining
    else:
        weight = state.get(f"{name}.weight")
        if pretraining or weight is None:
            raise UserError(f"{path} has no classifier to evaluate: train one without --evaluate")
        if len(weight) != classes:
            raise UserError(f"{path} knows {len(weight)} classes, the images have {classes}")
        model.set_submodule(name, Classifier(model.num_features, classes))

    if "pos_embed" in state:
        state["pos_embed"] = _resample_position(state["pos_embed"], model, checkpoint)
    _fit(model, state, checkpoint, path)
    return model, setting


def num_heads(model):
    """Attention heads of a backbone, in its first block, or of a MoCo's; None without attention."""
    modules = getattr(model, "base_encoder", model).modules()
    return next((m.num_heads for m in modules if hasattr(m, "num_heads")), None)


def _resample_position(table, backbone, checkpoint):
    """A ViT's position table, [1, cells, d] or more with prefix tokens, made for another grid.

    Tables of other forms stay as they are: they fit at the same size alone.
    """
    own, patches = getattr(backbone, "pos_embed", None), getattr(backbone, "patch_embed", None)
    if table.ndim != 3 or own is None or not hasattr(patches, "grid_size"):
        return table
    patch, grid = patches.patch_size, patches.grid_size
    old = checkpoint.get("img_size")  # None: timm takes a square
    old = old and tuple(side // p for side, p in zip(old, patch))
    if old in (None, grid) and table.shape == own.shape:
        return table
    # timm's ViTs with registers have no row for any prefix token, ours one for the class token.
    prefix = own.shape[1] - math.prod(grid)
    return resample_abs_pos_embed(table, grid, old, num_prefix_tokens=prefix)


def _without_prefix(state):
    return {key.removeprefix("module."): value for key, value in state.items()}


def _refuse_without(state, encoder, path):
    if not any(key.startswith(f"{encoder}.") for key in state):
        probe = "head.weight" in state or "fc.weight" in state
        hint = "; with a classifier it is for --evaluate" if probe else ""
        raise UserError(f"{path} holds no pre-training weights: it has no {encoder}{hint}")


def _fit(model, state, checkpoint, path):
    """load_state_dict, with a readable list of what does not match.

    Checks the number of heads where the file states it: weights of another number fit silently.
    """
    heads, own = checkpoint.get("num_heads"), num_heads(model)
    if heads is not None and heads != own:
        raise UserError(f"{path} was trained with {heads} heads, this model has {own}")
    expected = model.state_dict()
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    shared = expected.keys() & state.keys()
    reshaped = [key for key in shared if expected[key].shape != state[key].shape]
    for problem, keys in (
        ("lacks", missing),
        ("has unknown", unexpected),
        ("has in other shapes", reshaped),
    ):
        if keys:
            raise UserError(
                f"{path} (arch {checkpoint.get('arch', 'unknown')}) does not fit this model: it "
                f"{problem} {listing(keys)}"
            )
    model.load_state_dict(state)


def listing(keys, most=4):
    """The first few of them, and how many more."""
    keys = sorted(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
