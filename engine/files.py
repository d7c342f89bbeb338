"""Files that are whole or not there, and folders that belong to one process at a time."""

import errno
import fcntl
import io
import os
import platform
import stat
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import UserError, print_line


def exists(path):
    """Whether `path` is there; OSError if that can't be told.

    Path.exists() and its like say no to any error (Python 3.14), of a file server for example:
    what is there would be overwritten.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def open_regular(path):
    """A file to read, and no other thing: a pipe would block, a device may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
    return io.BufferedReader(WatchedFile(path))


class WatchedFile(io.FileIO):
    """failure: of the disk; a library may take it for wrong content."""

    failure = None

    def readinto(self, buffer):
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def atomic_write(path, mode="wb"):
    """A temporary file that replaces `path` when all of it is on disk.

    After an error `path` is as it was. A crash at any moment leaves the old file or the new one.
    """
    temporary = Path(f"{path}.tmp")
    try:
        # A crash may have left it, linked to a file that is kept.
        temporary.unlink(missing_ok=True)
        new = mode.replace("w", "x")  # follows no link that somebody has put there
        with open(temporary, new, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def lock_folder(folder):
    """Makes the folder, if it is missing, and locks it until the file that this returns is closed.

    The lock is POSIX's: it dies with its process, even after kill -9, is not inherited by workers,
    and holds between hosts on NFS. UserError if another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not through a link, and without truncating what it may be.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        file = open(os.open(folder / "run.lock", flags, 0o666), "r+")
    except OSError as error:
        name = error.filename or folder
        raise UserError(f"can't write to --output-dir: {error.strerror}: {name}") from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise UserError(f"{folder}/run.lock is no file of a run: remove it")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = file.read().strip()
        raise UserError(
            f"another run is using {folder} ({owner}): --output-dir starts one elsewhere"
        ) from None
    except OSError as error:
        print_line(f"{folder} can't be locked ({error}): start no second run in it", sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
