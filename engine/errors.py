"""Errors that the user can mend, and text that is safe to print."""


class UserError(ValueError):
    """An error that the user can mend: printed as one line without a traceback.

    exit_code: 2 before training, 1 during it. rank_local: the cause lies on one rank (a broken
    file, for example), and that rank prints it; otherwise one rank of each host does.
    """

    def __init__(self, message, exit_code=2, rank_local=False):
        super().__init__(message)
        self.exit_code, self.rank_local = exit_code, rank_local


def printable(text):
    """Escapes what would break a line or a terminal: file names may contain anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error):
    """The first line of an exception's message, or its type's name if it has no message."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def join_some(names, most=5):
    """The names, separated by commas; where they are more than `most`, the first ones and "…"."""
    names = list(names)
    if len(names) > most:
        names = [*names[:most], "…"]
    return ", ".join(names)
