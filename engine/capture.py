"""What image libraries print, caught: the terminal shows our own lines alone."""

import functools
import logging
import os
import select
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, suppress

from PIL import Image

PIPE_SIZE = 2**16  # bytes


@contextmanager
def captured_stderr():
    """Yields a function: → lines that C libraries have written to stderr since its last call.

    They write to file descriptor 2, whatever sys.stderr is; Python's own lines reach the terminal.
    The descriptor belongs to the whole process, all threads.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # closed: nothing can be printed
        yield lambda: []
        return
    reader, writer = _pipe(os.getpid())

    waiting = select.poll()  # faster than to try to read
    waiting.register(reader, select.POLLIN)

    def read_lines():
        if not waiting.poll(0):
            return []
        return os.read(reader, PIPE_SIZE).decode(errors="replace").splitlines()

    with open(terminal, "w", buffering=1, errors="backslashreplace") as python_stderr:
        if not _writes_to_descriptor_2(sys.stderr):
            python_stderr = sys.stderr
        os.dup2(writer, 2)
        try:
            with redirect_stderr(python_stderr):
                yield read_lines
        finally:
            os.dup2(terminal, 2)
            read_lines()


@functools.lru_cache(maxsize=1)
def _pipe(process_id):
    """A pipe for each process, as a forked one must not read its parent's → reader, writer."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # what doesn't fit into the pipe is lost, not waited for
    return reader, writer


def _writes_to_descriptor_2(stream):
    with suppress(AttributeError, OSError, ValueError):  # None, a notebook's, closed
        return stream.fileno() == 2
    return False


@contextmanager
def captured_warnings():
    """Yields a list that receives Python's warnings and what PIL and tifffile log."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("PIL", "tifffile")]
    propagated = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency")  # a hint
            warnings.showwarning = lambda message, *args, **kwargs: messages.append(str(message))
            yield messages
    finally:
        for logger, propagate in zip(loggers, propagated):
            logger.removeHandler(handler)
            logger.propagate = propagate
