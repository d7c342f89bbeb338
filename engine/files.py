"""Files that are whole or not there, and folders that belong to one process at a time."""

import fcntl
import os
import platform
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import UserError


@contextmanager
def atomic_write(path, mode="wb"):
    """A temporary file that replaces `path` when all of it is on disk.

    After an error `path` is as it was. A crash at any moment leaves the old file or the new one.
    """
    temporary = Path(f"{path}.tmp")
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


def lock_folder(folder):
    """Makes the folder and locks it until the file that this returns is closed.

    The lock is POSIX's: it dies with its process, even after kill -9, is not inherited by workers,
    and holds between hosts on NFS. UserError if another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "run.lock", "a+")
    except OSError as error:
        raise UserError(f"can't write to --output-dir {folder}: {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip()
        raise UserError(
            f"another run is using {folder} ({owner}): --output-dir starts one elsewhere"
        ) from None
    except OSError as error:
        print(f"{folder} can't be locked ({error}): start no second run in it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
