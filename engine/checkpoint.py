"""Checkpoint files: written atomically, read without running code, in the published layout."""

import argparse
import os
import shutil
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from engine.errors import UserError, cant_read, first_line, is_machine_failure, join_some
from engine.files import atomic_write, exists, open_regular

NAMES = LAST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"

# Entries whose wrong type would not fail clearly elsewhere. Checksums let an edited file pass.
ENTRY_TYPES = {
    "epoch": int,
    "iteration": int,
    "args": dict,
    "img_size": list | tuple,
    "patch_size": list | tuple,
    "in_chans": int,
    "mean": list | tuple,
    "std": list | tuple,
    "value_range": list | tuple,
    "class_names": list,
}


class DamagedCheckpoint(UserError):
    """A checkpoint whose content is not what it should be."""


def save(folder, state, keep_as=None, name=LAST, keep_previous=False):
    """Writes folder/name; keep_as: a second name for the same checkpoint.

    keep_previous: the file that it replaces stays as PREVIOUS. OSError if the disk is full, with
    the old file intact.
    """
    path = Path(folder, name)
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            if keep_as:
                _link(file.name, Path(folder, keep_as))
            if keep_previous and exists(path):
                _link(path, Path(folder, PREVIOUS))
    except RuntimeError as error:  # torch's own for a failed write
        reason = first_line(error)
        if "unexpected pos" in reason:  # the writer's word for a file that stopped growing
            reason = "the disk took only a part of the file"
        raise OSError(reason) from None


def _link(path, second_name):
    temporary = second_name.with_name(second_name.name + ".tmp2")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)  # no second copy on disk
    except OSError:
        with open(path, "rb") as source, atomic_write(second_name) as copy:
            shutil.copyfileobj(source, copy)
        return
    os.replace(temporary, second_name)


def load(path):
    """A checkpoint's dict, tensors on the CPU.

    UserError if it is missing or the machine fails; DamagedCheckpoint if its content is wrong.
    """
    checkpoint = read(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise DamagedCheckpoint(f"{path} is not a checkpoint: it has no 'state_dict'")
    validate(checkpoint, path)
    return checkpoint


def read(path):
    """As load, whatever torch.save wrote there."""
    file = None
    try:
        # Opened here: by torch, an OSError would become a RuntimeError.
        with open_regular(path) as file:
            # torch ignores the checksums that it writes: flipped bits would become weights.
            is_zip = file.read(4) == b"PK\3\4"
            if is_zip and zipfile.ZipFile(file).testzip() is not None:
                raise zipfile.BadZipFile
            file.seek(0)
            # weights_only: a file from elsewhere can't run code; nor does a Namespace of flags.
            with warnings.catch_warnings(), safe_globals([argparse.Namespace]):
                warnings.simplefilter("ignore")  # about old formats, which damage looks like
                content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as error:  # anything, for a damaged or foreign file
        # zipfile takes a failure of the disk for damage.
        failure = error if file is None else file.raw.failure or error
        if is_machine_failure(failure):
            raise cant_read(path, failure) from None
        reason = _why_unreadable(path)
        raise DamagedCheckpoint(f"{path} can't be read as a checkpoint: {reason}") from None
    if isinstance(content, dict) and isinstance(content.get("args"), argparse.Namespace):
        content["args"] = vars(content["args"])
    return content


def _why_unreadable(path):
    names = []
    with suppress(Exception), safe_globals([argparse.Namespace]):
        names = sorted(get_unsafe_globals_in_checkpoint(path))
    if not names:
        return "torch.save did not write it, or it is damaged"
    return (
        f"it holds {join_some(names)}, which could run code; if you trust it, load it with "
        "weights_only=False and torch.save its weights alone"
    )


def validate(checkpoint, path):
    """DamagedCheckpoint if an entry that our code uses is of another type than it should be."""
    for key, value in checkpoint.items():
        is_valid = isinstance(value, ENTRY_TYPES.get(key, object))
        if key in ("state_dict", "ema"):
            is_valid = is_state_dict(value)
        if value is not None and not is_valid:
            kind = type(value).__name__
            raise DamagedCheckpoint(f"{path} is damaged: {key!r} is no valid {kind}")


def is_state_dict(value):
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(v, torch.Tensor) for key, v in value.items()
    )


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
            # In the memory format of the weights: fused AdamW on a CPU trusts that they agree, and
            # computes wrong numbers if not (torch 2.6 as 2.15).
            if value.ndim:
                values[name] = torch.empty_like(params[i], dtype=value.dtype).copy_(value)
    hyper_parameters = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": hyper_parameters})
