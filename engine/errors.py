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


class MachineFailure(UserError):
    """A UserError of the machine: when it works again, a run continues where it was saved."""


# Words in a RuntimeError of torch, of CUDA and of its libraries.
OUT_OF_GPU_MEMORY = ("CUDA error: out of memory", "CUDA out of memory", "ALLOC_FAILED")
GPU_FAILURES = (*OUT_OF_GPU_MEMORY, "CUDA error")


def is_machine_failure(error):
    """Whether memory, a disk or a GPU failed: then the content of a file is not to blame."""
    if isinstance(error, OSError):  # EINVAL: a damaged file states a wrong position
        return error.errno not in (None, errno.EINVAL)
    return is_out_of_memory(error) or any(w in str(error) for w in GPU_FAILURES)


def is_out_of_memory(error):
    """Whether the memory of the host is used up."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def cant_read(path, error, hint=""):
    """The error of a machine that failed while the file was read; its content may be good."""
    return MachineFailure(f"can't read {path}: {failure_reason(error)}{hint}", 1, rank_local=True)


def failure_reason(error):
    """What failed, in words."""
    if is_out_of_memory(error):
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
