"""When a run is saved, and how it stops: the clock, signals, a full disk."""

import os
import signal
import sys
import time

from moco import UserError, checkpoint, reason
from moco.distributed import largest, rank, say

# After one of these a run finishes its step, saves, and exits with this code: 130 for Ctrl-C, as
# shells have it; 75 for a scheduler's warning, EX_TEMPFAIL of sysexits.h, "try again".
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}

_asked = 0  # the code of a signal that came: like signals, it is the process's


class Stop(Exception):
    """Every rank leaves its run at the same point; `code`: what the process exits with."""

    def __init__(self, code):
        super().__init__(code)
        self.code = code


def check_signals():
    """Stop if a signal came to any rank; all ranks call it equally often."""
    [code] = largest(_asked)
    if code:
        raise Stop(code)


class Keeper:
    """Counts what is done and saves it: every `minutes` (0: never), and when a signal stops it.

    get_state: () → the checkpoint's dict, called on all ranks; rank 0 writes. As a context it
    listens to signals. `epoch`: epochs that are over, evaluation included; `iteration`: steps.
    """

    def __init__(self, folder, minutes, get_state, epoch=0, iteration=0):
        self.folder, self.seconds, self.get_state = folder, 60 * minutes, get_state
        self.epoch, self.iteration = epoch, iteration
        self.failed = 0  # saves in a row
        self.saved_at = time.monotonic()

    def __enter__(self):
        global _asked
        _asked = 0
        self.before = {number: signal.signal(number, self._hear) for number in CODES}
        return self

    def __exit__(self, kind, stop, trace):
        try:
            if kind is Stop:
                self.save()
                where = f"after step {self.iteration}"
                what = (
                    f"not saved {where}" if self.failed else f"saved {where}; --resume auto goes on"
                )
                say(f"stopped: {what}", sys.stderr)
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    @staticmethod
    def _hear(number, frame):
        global _asked
        if _asked == CODES[signal.SIGINT] and number == signal.SIGINT:
            raise KeyboardInterrupt  # for the second time
        _asked = CODES[number]
        again = ", a second time stops at once" if number == signal.SIGINT else ""
        if rank() == 0:  # print() could be what the signal interrupts
            text = f"{signal.Signals(number).name}: stopping after this step{again}\n"
            os.write(sys.stderr.fileno(), text.encode())

    def step(self, iteration):
        """After that many steps: saves if it is time to, stops if a signal came."""
        self.iteration = iteration
        late = rank() == 0 and self.seconds and time.monotonic() - self.saved_at > self.seconds
        code, due = largest(_asked, int(late))
        if code:
            raise Stop(code)
        if due:
            self.save()

    def end_epoch(self, keep_as=None):
        """After an epoch and its evaluation; `keep_as`: a second name for this checkpoint."""
        self.epoch += 1
        self.save(keep_as)

    def save(self, keep_as=None):
        """Writes the checkpoint. A disk that doesn't take it is told; UserError the second time."""
        state = self.get_state()
        if rank() == 0:
            try:
                checkpoint.save(self.folder, state, keep_as)
                self.failed = 0
            except OSError as error:
                self.failed += 1
                say(
                    f"can't save to {self.folder} after step {self.iteration}: {reason(error)}; "
                    "what was saved before is whole"
                    + ("" if self.failed > 1 else ", and training goes on until the next save"),
                    sys.stderr,
                )
        self.saved_at = time.monotonic()
        [failed] = largest(self.failed)  # and nobody goes on, or leaves, while rank 0 writes
        if failed > 1:
            raise UserError(
                "nothing could be saved, twice in a row: make room, then --resume auto",
                code=1,
            )
