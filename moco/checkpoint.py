"""Checkpoints: written atomically, read without running code, in the published layout."""

import math
import os
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed

from moco import UserError, reason
from moco.augment import Pixels
from moco.backbones import Classifier, create_backbone
from moco.distributed import largest, say, world

LAST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"

# What may differ when a run continues; anything else would change its mathematics.
MAY_CHANGE = set(
    "data data_root workers amp device encode_chunk compile output_dir resume init_from print_freq "
    "tensorboard save_every save_minutes timeout allow_changed_args knn_every knn_bank knn "
    "max_bad_images".split()
)


class Damaged(UserError):
    """A checkpoint that can't be read, or that holds something other than it should."""


def save(folder, state, keep_as=None, name=LAST):
    """Writes folder/name by way of a temporary name; `keep_as`: a second name for it.

    The checkpoint before stays as PREVIOUS. A crash at any moment leaves the old file or the new
    one, whole; so does a disk that is full: OSError.
    """
    last = Path(folder, name)
    temporary = last.with_suffix(".tmp")
    try:
        temporary.unlink(missing_ok=True)  # a crash may have left it linked to a file that is kept
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_as:
            _second_name(temporary, Path(folder, keep_as))
        if name == LAST and last.exists():
            _second_name(last, Path(folder, PREVIOUS))
        os.replace(temporary, last)
    except (OSError, RuntimeError) as error:  # torch's own for a write that failed
        temporary.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else OSError(reason(error)) from None


def _second_name(path, second):
    temporary = second.with_suffix(".tmp2")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)  # no second copy on disk
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, second)


def load(path):
    """A checkpoint's dict, tensors on the CPU; UserError if it is missing, damaged or none."""
    checkpoint = read(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise Damaged(f"{path} is no checkpoint: it has no 'state_dict'")
    check_kinds(checkpoint, path)
    return checkpoint


def read(path):
    """What torch.save wrote, tensors on the CPU; UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        # torch doesn't look at the checksums that it writes: flipped bits would become weights.
        broken = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that damage looks like
            # weights_only: a file from elsewhere can't run code.
            content = None if broken else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file provokes
        raise Damaged(f"{path} can't be read as a checkpoint: {type(error).__name__}") from None
    if broken:
        raise Damaged(f"{path} is damaged: the checksum of {broken} is wrong")
    return content


def check_kinds(checkpoint, path):
    """Damaged if something that we read there is of another kind than it should be."""

    def is_weights(value):
        return isinstance(value, dict) and all(
            isinstance(key, str) and isinstance(v, torch.Tensor) for key, v in value.items()
        )

    def is_number(value):
        return isinstance(value, int) and value >= 0

    def is_size(value):
        sides = isinstance(value, tuple | list) and len(value) == 2
        return sides and all(map(is_count, value))

    def is_count(value):
        return is_number(value) and 0 < value < 2**16

    def is_numbers(value):  # one for each channel
        n = checkpoint.get("in_chans")
        return isinstance(value, tuple | list) and len(value) == n and all(map(is_float, value))

    def is_float(value):
        return isinstance(value, int | float) and math.isfinite(value)

    for is_kind, keys in (
        (is_weights, ("state_dict", "ema")),
        (is_number, ("epoch", "iteration", "num_heads", "world")),
        (is_count, ("in_chans",)),
        (is_numbers, ("mean", "std")),
        (is_float, ("max_value",)),
        (is_size, ("img_size", "patch_size")),
        (lambda value: isinstance(value, str), ("arch",)),
        (lambda value: isinstance(value, dict), ("args",)),
    ):
        for key in keys:
            if checkpoint.get(key) is not None and not is_kind(checkpoint[key]):
                raise Damaged(f"{path} is damaged: its {key!r} is no such thing")


# A run and its continuation.


def training_state(about, epoch, iteration, model, **parts):
    """The published layout, and beside it what an exact continuation needs; plain types alone.

    about: as log.describe makes it; parts: optimizer and whatever else has a state_dict.
    """
    return dict(
        epoch=epoch,
        iteration=iteration,
        num_heads=num_heads(model),
        state_dict={f"module.{k}": v for k, v in _contiguous(model.state_dict()).items()},
        **{name: _contiguous(part.state_dict()) for name, part in parts.items()},
        **about,
    )


def _contiguous(state):
    """Tensors of a dict of dicts in the published memory format: a ResNet's run is in another."""
    if isinstance(state, dict):
        return {key: _contiguous(value) for key, value in state.items()}
    return state.contiguous() if isinstance(state, torch.Tensor) else state


def find_previous(args, folder):
    """Checkpoints to continue, the newest first; none: []. UserError if a run would be overwritten.

    Processes that torchrun has started again continue whatever the first ones have left. All ranks
    call it.
    """
    found = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    [again] = largest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))  # of any host
    if args.resume == "auto" or (again and found):
        return found
    if found and not (args.resume and Path(args.resume).resolve().parent == folder.resolve()):
        raise UserError(
            f"{folder} holds a run: --resume auto continues it, --output-dir starts another"
        )
    if args.resume and not Path(args.resume).is_file():
        raise UserError(f"no checkpoint at {args.resume}")
    return [args.resume] if args.resume else []


def resume(paths, args, model, results=None, same_world=False, **parts):
    """Loads the first of the training checkpoints that is whole into model and parts → epochs and
    steps that are done, results; without a path it changes nothing.

    results: what else the script keeps there, by name, as it is before a run. UserError if `args`,
    or with `same_world` the number of processes, differ from the run's in what changes the
    mathematics, without --allow-changed-args.
    """
    start = dict(epoch=0, iteration=0) | (results or {})
    state = start
    for path, older in zip(paths, [*paths[1:], None]):
        try:
            state = _continue(path, args, model, start, same_world, parts)
            break
        except Damaged as damage:
            if not older:
                raise
            say(f"{damage}; going back to {older}", sys.stderr)
    return state["epoch"], state["iteration"], {name: state[name] for name in results or ()}


def _continue(path, args, model, start, same_world, parts):
    state = load(path)
    if "args" not in state:
        raise UserError(
            f"{path} has weights, but no arguments of a run to continue: begin with --init-from"
        )
    _compare(path, state, args, same_world)
    try:
        load_model(model, state, path)
        for name, part in parts.items():
            _load_part(part, state[name])
        for name, value in start.items():
            if not _alike(value, state[name]):
                raise TypeError(f"{name!r} is no such thing")
    # Whatever entries provoke that are missing, or of another kind or shape.
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise Damaged(f"{path} can't be continued: {what}") from None
    return state


def _compare(path, state, args, same_world):
    old = state["args"]
    changed = [
        f"--{name.replace('_', '-')} {old.get(name)} → {value}"
        for name, value in vars(args).items()
        if name not in MAY_CHANGE and value != old.get(name)
    ]
    if same_world and state.get("world") != world():
        changed.append(f"{state.get('world')} → {world()} processes, and each draws for itself")
    if changed and not args.allow_changed_args:
        raise UserError(
            f"{path} was trained with other arguments: {', '.join(changed)}; --allow-changed-args "
            "goes on all the same"
        )
    if changed:
        say(f"going on with other arguments: {', '.join(changed)}")


def _load_part(part, state):
    if isinstance(part, torch.optim.Optimizer):
        # Rates and the like come from the arguments; torch would take moments of any shape.
        params = [p for group in part.param_groups for p in group["params"]]
        moments = state["state"]
        if moments and moments.keys() != set(range(len(params))):
            raise ValueError("the optimizer's state is of other parameters")
        for i, values in moments.items():
            for name, value in values.items():
                if value.shape != (() if name == "step" else params[i].shape):
                    raise ValueError(f"the optimizer's {name} is of another shape")
        state = {"state": moments, "param_groups": part.state_dict()["param_groups"]}
    if state or not isinstance(part, torch.amp.GradScaler):  # empty unless the run was in fp16
        part.load_state_dict(state)
    if isinstance(part, torch.optim.Optimizer):
        _lay_out(part)


def _lay_out(optimizer):
    """Its state in the memory format of the weights: fused AdamW on a CPU trusts that they agree,
    and takes wrong numbers if not (torch 2.6 as 2.15)."""
    for p, values in optimizer.state.items():
        for name, value in values.items():
            if value.ndim:
                values[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def _alike(expected, found):
    """Numbers, or lists of them of the same shape."""
    if isinstance(expected, tuple | list):
        same = isinstance(found, tuple | list) and len(found) == len(expected)
        return same and all(map(_alike, expected, found))
    return isinstance(found, int | float)


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


def create_downstream(args, classifier=False, weights="state_dict", **kwargs):
    """The backbone in --pretrained, ours or the official release's → model, its setting.

    It is base_encoder of a pre-training checkpoint; or with its `classifier` what a linear probe or
    fine-tuning left, under the key `weights`. The setting is a dict of arch, img_size, patch_size,
    small_stem and the fields of Pixels: the checkpoint's own, unless args say otherwise; a ViT's
    position table is interpolated to fit. --from-scratch: random weights in the same backbone.
    kwargs go to create_backbone.
    """
    path = args.pretrained
    checkpoint = load(path) if path else {"arch": args.arch}
    arch = checkpoint.get("arch", args.arch)
    if arch is None:
        raise UserError(f"{path} does not say what backbone it holds: name it with -a")
    if args.arch not in (None, arch):
        raise UserError(f"{path} holds {arch}, not {args.arch}: drop -a {args.arch}")
    if args.in_chans not in (None, n := checkpoint.get("in_chans", args.in_chans)):
        raise UserError(f"{path} is for {n} channel(s): drop --in-chans {args.in_chans}")
    pixels = Pixels.chosen(args, checkpoint)
    setting = dict(
        arch=arch,
        img_size=args.img_size or checkpoint.get("img_size", (224, 224)),
        patch_size=args.patch_size or checkpoint.get("patch_size"),
        small_stem=args.small_stem or checkpoint.get("small_stem", False),
    )
    model = create_backbone(**setting, in_chans=pixels.in_chans, **kwargs)
    setting |= pixels._asdict()
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
    if not classifier:
        _refuse_without(state, "base_encoder", path)
        state = pretraining
    else:
        weight = state.get(f"{name}.weight")
        if pretraining or weight is None:
            raise UserError(f"{path} has no classifier to evaluate: train one without --evaluate")
        model.set_submodule(name, Classifier(model.num_features, len(weight)))

    if "pos_embed" in state:
        state["pos_embed"] = _resample_position(state["pos_embed"], model, checkpoint)
    _fit(model, state, checkpoint, path)
    return model, setting


def check_classes(model, classes, path):
    """UserError unless the classifier that was in `path` knows as many classes as the images."""
    known = model.get_submodule(model.classifier_name).out_features
    if known != classes:
        raise UserError(f"{path} knows {known} classes, the images have {classes}")


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
