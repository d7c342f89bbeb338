"""Whether a script compiles its backbone, and where the compiler keeps what it made."""

import atexit
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch


def should_compile(asked, backbone, device):
    """--compile, True or False; None: on CUDA for what is made of blocks, a ViT.

    Others take minutes to compile, and were not measured yet. Prepares the compiler if it is True.
    """
    if asked is None:
        asked = device.type == "cuda" and hasattr(backbone, "blocks")
    if asked:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private_cache()))
        if "TORCH_LOGS" not in os.environ:
            torch._logging.set_logs(all=logging.ERROR)
    return asked


def private_cache():
    """A folder for compiled code that no other user can write to → Path.

    What it holds is unpickled, and torch's default lies in the shared temporary directory.
    """
    folder = Path(torch.hub.get_dir()).parent / "inductor"  # beside torch.hub's, in ~/.cache/torch
    with suppress(OSError):  # no home, as in some containers, or a read-only one
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        is_private = status.st_uid == os.getuid() and not status.st_mode & 0o022
        if is_private and os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.mkdtemp(prefix="inductor_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
