"""Checkpoints: written atomically, read without running code, in the published layout."""

import os
import shutil
from pathlib import Path

import torch

from moco import UserError

LAST = "checkpoint.pth"


def save(folder, state, keep_as=None):
    """Writes folder/checkpoint.pth by way of a temporary name; `keep_as`: a second name for it.

    A crash at any moment leaves the old file or the new one, whole.
    """
    last = Path(folder, LAST)
    temporary = last.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if keep_as:
        kept = Path(folder, keep_as)
        kept.unlink(missing_ok=True)
        try:
            os.link(temporary, kept)  # no second copy on disk
        except OSError:
            shutil.copyfile(temporary, kept)
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


def model_state(model):
    """state_dict under the published names, which begin with `module.`."""
    return {f"module.{key}": value for key, value in model.state_dict().items()}


def load_model(model, checkpoint, path):
    """Puts checkpoint["state_dict"] into a MoCo; every key must match, in name and shape.

    Checks the number of heads where the file states it: weights of another number fit silently.
    """
    state = {key.removeprefix("module."): v for key, v in checkpoint["state_dict"].items()}
    if not any(key.startswith("momentum_encoder.") for key in state):
        raise UserError(f"{path} holds no pre-training weights: it has no momentum_encoder")
    heads, own = checkpoint.get("num_heads"), num_heads(model)
    if heads is not None and heads != own:
        raise UserError(f"{path} was trained with {heads} heads, this model has {own}")

    expected = model.state_dict()
    for key in state.keys() & expected.keys():
        # The position table is fixed, and another image size has its own.
        if key.endswith(".pos_embed") and state[key].shape != expected[key].shape:
            state[key] = expected[key]
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


def num_heads(model):
    """Attention heads of the encoders; None for a ResNet."""
    blocks = getattr(model.base_encoder, "blocks", None)
    return blocks[0].attn.num_heads if blocks else None


def listing(keys, most=4):
    """The first few of them, and how many more."""
    keys = sorted(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
