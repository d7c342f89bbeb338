"""The messages of image libraries, dropped: the terminal shows our own lines alone."""

import logging
import os
import sys
import threading
import warnings
from contextlib import contextmanager, redirect_stderr

for _name in ("PIL", "tifffile"):  # records go only where the user sends them
    logging.getLogger(_name).addHandler(logging.NullHandler())


@contextmanager
def quiet_libraries():
    """Within it libjpeg, libtiff, PIL, tifffile and Python's warnings print nothing.

    Enter it once for a batch. What Python writes to sys.stderr still reaches the terminal, a signal
    handler's line, too. It acts in the main thread alone: descriptor 2 is that of all threads.
    """
    is_closed = sys.__stderr__ is None
    if is_closed or threading.current_thread() is not threading.main_thread():
        yield
        return
    with (
        warnings.catch_warnings(),
        open(os.dup(2), "w", buffering=1, errors="backslashreplace") as terminal,
        open(os.devnull, "w") as null,
        # In this order a line of Python reaches the terminal at any time.
        redirect_stderr(terminal if sys.stderr is sys.__stderr__ else sys.stderr),
    ):
        warnings.simplefilter("ignore")
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal.fileno(), 2)
