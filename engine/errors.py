"""Errors that the user can mend, those of the machine, and text that is safe to print."""

import errno
from contextlib import suppress


class UserError(ValueError):
    """An error that the user can mend: printed as one line without a traceback.

    exit_code: 2 before training, 1 during it. rank_local: the cause lies on one rank (a broken
    file, for example), and that rank prints it; otherwise one rank of each host does.
    """

    def __init__(self, message, exit_code=2, rank_local=False):
        super().__init__(message)
        self.exit_code, self.rank_local = exit_code, rank_local


# Words in a RuntimeError of torch, of CUDA and of its libraries.
OUT_OF_GPU_MEMORY = ("CUDA error: out of memory", "CUDA out of memory", "ALLOC_FAILED")
MACHINE_FAILURES = (*OUT_OF_GPU_MEMORY, "DefaultCPUAllocator", "CUDA error")


def is_of_machine(error):
    """Whether memory, a disk or a GPU failed, whatever a file holds: it says nothing of a file."""
    if isinstance(error, OSError):  # EINVAL: of a position that a damaged file states
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, MemoryError) or any(w in str(error) for w in MACHINE_FAILURES)


def machine_reason(error):
    """What failed, in words."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory"
    return getattr(error, "strerror", None) or first_line(error)


def printable(text):
    """Escapes what would break a line or a terminal: file names may contain anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_line(text, file=None):
    """One line, whatever is in the text; nothing if nobody can read it: closed, or a full disk."""
    with suppress(OSError):
        print(printable(str(text)), file=file, flush=True)


def first_line(error):
    """The first line of an exception's message, or its type's name if it has no message."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def join_some(names, most=5):
    """The names, separated by commas; where they are more than `most`, the first ones and "…"."""
    names = list(names)
    if len(names) > most:
        names = [*names[:most], "…"]
    return ", ".join(names)
