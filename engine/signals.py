"""Signals that stop a run after its step: it saves, and exits with a code that says "continue"."""

import os
import signal
import sys
from contextlib import contextmanager, suppress

from engine.launch import all_reduce_max
from moco.distributed import is_main

# Exit codes: 130 for Ctrl-C, as in shells; 75 for a scheduler's warning or a closed terminal,
# EX_TEMPFAIL of sysexits.h, "try again".
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75}

_exit_code = 0  # set by the handler; in the module, for handlers belong to the process


class Interrupted(Exception):
    """A signal came: every rank leaves its run at the same step."""

    def __init__(self, exit_code):
        super().__init__(exit_code)
        self.exit_code = exit_code


def check_signals():
    """Raises Interrupted if a signal came to any rank; all ranks call it equally often."""
    exit_code = all_reduce_max(pending_exit_code())
    if exit_code:
        raise Interrupted(exit_code)


def pending_exit_code():
    """The exit code of a signal that came to this rank, else 0."""
    return _exit_code


@contextmanager
def catch_signals():
    """Within the context a signal is remembered for check_signals; a second Ctrl-C interrupts."""
    global _exit_code
    _exit_code = 0

    def remember(number, frame):
        global _exit_code
        if number == signal.SIGINT and _exit_code == EXIT_CODES[signal.SIGINT]:
            raise KeyboardInterrupt
        _exit_code = EXIT_CODES[number]
        hint = ", a second time stops at once" if number == signal.SIGINT else ""
        text = f"{signal.Signals(number).name}: stopping after this step{hint}\n"
        if is_main():  # not print(), which the signal could have interrupted
            with suppress(OSError):  # a terminal or a pipe that nobody reads any more
                os.write(sys.stderr.fileno(), text.encode())

    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    caught = [s for s in EXIT_CODES if not (s == signal.SIGHUP and under_nohup)]
    previous = {number: signal.signal(number, remember) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
