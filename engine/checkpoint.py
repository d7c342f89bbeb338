"""Checkpoint files: written atomically, read without running code, in the published layout."""

import argparse
import math
import os
import shutil
import warnings
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from engine.errors import UserError, first_line

LAST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"

# Keys of checkpoints that were written before their names changed.
RENAMED_KEYS = {"batches": "sampler", "log": "logger", "world": "world_size"}


class DamagedCheckpoint(UserError):
    """A checkpoint that can't be read, or that holds something other than it should."""


@contextmanager
def atomic_write(path, mode="wb"):
    """A file that takes the place of `path` when all of it is on disk; after an error, nothing has.

    A crash at any moment leaves the old file or the new one, whole.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        # A crash may have left it, linked to a file that is kept.
        temporary.unlink(missing_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def save(folder, state, keep_as=None, name=LAST):
    """Writes folder/name; keep_as: a second name for the same checkpoint.

    The checkpoint before stays as PREVIOUS. OSError if the disk is full, with the old file intact.
    """
    path = Path(folder, name)
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            if keep_as:
                _link(file.name, Path(folder, keep_as))
            if name == LAST and path.exists():
                _link(path, Path(folder, PREVIOUS))
    except RuntimeError as error:  # torch's own for a failed write
        raise OSError(first_line(error)) from None


def _link(path, second_name):
    temporary = second_name.with_name(second_name.name + ".tmp2")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)  # no second copy on disk
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, second_name)


def load(path):
    """A checkpoint's dict, tensors on the CPU; UserError if it is missing, damaged or another file.

    Keys have today's names, whenever it was written.
    """
    checkpoint = read(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise DamagedCheckpoint(f"{path} is not a checkpoint: it has no 'state_dict'")
    checkpoint = {RENAMED_KEYS.get(key, key): value for key, value in checkpoint.items()}
    if "found" in checkpoint and "best" in checkpoint:  # accuracies, before "results" held them
        results = dict(last=checkpoint.pop("found"), best=checkpoint.pop("best"))
        is_single = isinstance(results["last"], tuple)  # of fine-tuning
        checkpoint["results"] = {k: [v] if is_single else v for k, v in results.items()}
    validate(checkpoint, path)
    return checkpoint


def read(path):
    """What torch.save wrote, tensors on the CPU; UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        corrupt_member = None
        # torch ignores the checksums that it writes: flipped bits would become weights.
        if zipfile.is_zipfile(path):
            corrupt_member = zipfile.ZipFile(path).testzip()
        if corrupt_member is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old formats, which damage looks like
                # weights_only: a file from elsewhere can't run code; nor does a Namespace of flags.
                with safe_globals([argparse.Namespace]):
                    content = torch.load(path, map_location="cpu", weights_only=True)
                args = content.get("args") if isinstance(content, dict) else None
                if isinstance(args, argparse.Namespace):
                    content["args"] = vars(args)
                return content
    except MemoryError:
        raise
    except Exception:  # anything, for a damaged or foreign file
        reason = _foreign_content(path)
        # Which fails, too, for what torch.save did not write.
        with suppress(Exception), safe_globals([argparse.Namespace]):
            names = sorted(get_unsafe_globals_in_checkpoint(path))
            if names:
                reason = (
                    f"it holds {', '.join(names[:3])}, which could run code; if you trust it, load "
                    "it with weights_only=False and torch.save its weights alone"
                )
        raise DamagedCheckpoint(f"{path} can't be read as a checkpoint: {reason}") from None
    raise DamagedCheckpoint(f"{path} is damaged: the checksum of {corrupt_member} is wrong")


def _foreign_content(path):
    """What a file is that torch.load can't read; perhaps a web page in place of a download."""
    with open(path, "rb") as file:
        head = file.read(100)
    if not head:
        return "it is empty"
    with suppress(UnicodeDecodeError):
        text = head.decode().strip()
        if text and text.replace("\n", "").isprintable():
            return f"it is a text file that begins with {text.splitlines()[0][:60]!r}"
    return "torch.save did not write it, or it is damaged"


def _is_weights(value):
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(v, torch.Tensor) for key, v in value.items()
    )


def _is_count(value):
    return isinstance(value, int) and value >= 0


def _is_width(value):
    return _is_count(value) and 0 < value < 2**16


def _is_size(value):
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_width, value))


def _is_finite(value):
    return isinstance(value, int | float) and math.isfinite(value)


def _is_finite_list(value):
    return isinstance(value, tuple | list) and all(map(_is_finite, value))


def _is_text(value):
    return isinstance(value, str)


def _is_interpolation(value):
    return value in ("bilinear", "bicubic")


def _is_text_list(value):
    return isinstance(value, list) and all(map(_is_text, value))


def _is_dict(value):
    return isinstance(value, dict)


SCHEMA = {  # key: (predicate, what it should be)
    "state_dict": (_is_weights, "tensors by name"),
    "ema": (_is_weights, "tensors by name"),
    "epoch": (_is_count, "a whole number from 0"),
    "iteration": (_is_count, "a whole number from 0"),
    "num_heads": (_is_count, "a whole number from 0"),
    "world_size": (_is_count, "a whole number from 0"),
    "in_chans": (_is_width, "a number of channels"),
    "mean": (_is_finite_list, "one number per channel"),
    "std": (_is_finite_list, "one number per channel"),
    "max_value": (_is_finite, "a number"),
    "img_size": (_is_size, "height and width"),
    "patch_size": (_is_size, "height and width"),
    "arch": (_is_text, "a text"),
    "vit_pos_embed": (_is_text, "a text"),
    "vit_pool": (_is_text, "a text"),
    "args": (_is_dict, "a dict"),
    "class_names": (_is_text_list, "a list of texts"),
    "data_digest": (_is_text, "a text"),
    "val_digest": (_is_text, "a text"),
    "frozen_digest": (_is_text, "a text"),
    "interpolation": (_is_interpolation, "bilinear or bicubic"),
}


def validate(checkpoint, path):
    """DamagedCheckpoint if an entry that we read is of another kind than it should be."""
    for key, (is_valid, expected) in SCHEMA.items():
        value = checkpoint.get(key)
        if value is not None and not is_valid(value):
            kind = type(value).__name__
            raise DamagedCheckpoint(f"{path} is damaged: {key!r} should be {expected}, got {kind}")
    for key in ("mean", "std"):
        if checkpoint.get(key) is not None and len(checkpoint[key]) != checkpoint.get("in_chans"):
            raise DamagedCheckpoint(f"{path} is damaged: {key!r} should be one number per channel")


def published_state_dict(model):
    """The weights by their published names, in the published memory format."""
    return {f"module.{key}": value for key, value in contiguous(model.state_dict()).items()}


def without_module_prefix(state_dict):
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def contiguous(state):
    """Tensors of nested dicts, contiguous: a ResNet is trained in channels_last."""
    if isinstance(state, dict):
        return {key: contiguous(value) for key, value in state.items()}
    return state.contiguous() if isinstance(state, torch.Tensor) else state


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict with checks of shapes; the hyper-parameters stay the optimizer's.

    ValueError where torch would accept a state of other parameters.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = state["state"]
    if moments and moments.keys() != set(range(len(params))):
        raise ValueError("the optimizer's state is of other parameters")
    for i, values in moments.items():
        for name, value in values.items():
            expected = () if name == "step" else params[i].shape
            if value.shape != expected:
                raise ValueError(f"the optimizer's {name} has another shape")
    hyper_parameters = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": hyper_parameters})
    # The state in the memory format of the weights: fused AdamW on a CPU trusts that they agree,
    # and computes wrong numbers if not (torch 2.6 as 2.15).
    for p, values in optimizer.state.items():
        for name, value in values.items():
            if value.ndim:
                values[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
