"""MoCo v3 (Chen, Xie, He, 2021, arXiv 2104.02057): the parts that the scripts share."""


class UserError(Exception):
    """Something the user can mend: printed as one line, no traceback, exit code `code`.

    code 2: refused before training; code 1: stopped in it. `everywhere`: the cause lies on one
    rank (a broken file, say), so that rank prints it; otherwise one rank of each host does.
    """

    def __init__(self, message, code=2, everywhere=False):
        super().__init__(message)
        self.code, self.everywhere = code, everywhere


def one_line(text):
    """What would break a line or a terminal is escaped: names of files may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason(error):
    """The first line of an exception, or its type where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
