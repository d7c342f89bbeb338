"""Metrics of a run: log.jsonl, TensorBoard, the progress bar; rank 0 alone writes."""

import json
import math
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from engine.errors import failure_reason, print_line
from engine.files import atomic_write, exists
from engine.launch import all_reduce_max, all_reduce_mean
from moco.distributed import is_main

# What depends on the machine and the moment; all else is the same in each run of the same flags.
MEASURED = ("images_per_s", "data_wait", "mfu", "peak_gib", "seconds_left")


class MetricLogger:
    """Collects scalars on the device and reads them once per line: one wait, not many.

    log.jsonl has two kinds of lines: training, averaged since the line before, and what an
    evaluation measured. A checkpoint does not hold the steps since the last line: after a resume,
    the next line and the line of the epoch average the steps since the resume.
    peak_images_per_s: of engine/flops.py, for the MFU.
    """

    def __init__(
        self, folder, epochs, steps_per_epoch, batch_size, tensorboard=False, peak_images_per_s=None
    ):
        self.path, self.tensorboard = Path(folder, "log.jsonl"), tensorboard
        self.peak_images_per_s = peak_images_per_s
        self.epochs, self.steps_per_epoch, self.batch_size = epochs, steps_per_epoch, batch_size
        self.step = 0  # finished steps
        self.names, self.pending = (), []  # of the scalars; [scalars] of each step, on the device
        self.numbers = {}  # of the last step: what is written as it is
        self.latest = {}  # the last training line
        self.epoch_sums = Counter()  # over the steps of the epoch that have a line
        self.last_eval = ""  # of the last evaluation, for the bar and the line of an epoch
        self.timed_from = None  # time and step of the first training line
        self.file = self.writer = self.bar = None
        self.unwritten = b""
        self.start_timer()

    # Opening and closing

    def open(self, step=0, evaluated=False):
        """Opens the files; lines after the checkpoint are dropped, for they will come again.

        step: finished steps. evaluated: whether the evaluation that follows them is finished, too.
        """
        self.step = step
        if not is_main():
            return
        lines, saved = read_log(self.path), (self._fractional_epoch(), evaluated)
        # By epoch: steps may be those of another batch size. Training lines have a loss; they come
        # before the evaluation.
        while lines and (lines[-1]["epoch"], "loss" not in lines[-1]) > saved:
            lines.pop()
        with atomic_write(self.path, "w") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.file = open(self.path, "ab", buffering=0)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with self._tensorboard_may_fail():
                self.writer = SummaryWriter(self.path.parent, purge_step=step + 1 if step else None)
        if sys.stderr.isatty():
            # Its monitor thread prints, and could be taken for a decoder's warning.
            tqdm.monitor_interval = 0
            total = self.epochs * self.steps_per_epoch
            self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    @contextmanager
    def _tensorboard_may_fail(self):
        """A full disk, for example, ends TensorBoard's file alone: log.jsonl has the same."""
        try:
            yield
        except OSError as error:
            self.writer = None
            text = f"TensorBoard's file ends here: {failure_reason(error)}; training continues"
            print_line(text, sys.stderr)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            with self._tensorboard_may_fail():
                self.writer.close()
        if self.file is not None:
            self._write_pending()
            self.file.close()
        if self.unwritten:
            num_lines = self.unwritten.count(b"\n")
            print_line(f"{self.path} lacks its last {num_lines} lines: a full disk?", sys.stderr)

    def print(self, text):
        """A line of text, above the bar if there is one."""
        if self.bar is not None:
            with self.bar.external_write_mode():  # clears the bar, and draws it again
                print_line(text)
        elif is_main():
            print_line(text)

    # Training

    def start_timer(self):
        self.since, self.waited = time.perf_counter(), 0.0

    def add_step(self, step, **metrics):
        """After `step` steps in all. Tensors, `loss` among them, are 0-d, on the device, and are
        averaged over the steps since the last line; numbers, such as lr, are written as they are.
        """
        tensors = {k: v.detach().float() for k, v in metrics.items() if torch.is_tensor(v)}
        self.numbers = {k: v for k, v in metrics.items() if k not in tensors}
        self.step, self.names = step, tuple(tensors)
        self.pending.append(torch.stack(list(tensors.values())))
        if self.bar is not None:
            self.bar.update()

    def read_steps(self):
        """The tensors since the last line, averaged over the ranks → {name: [steps]} on the CPU.

        Waits for the device; a collective.
        """
        values = all_reduce_mean(torch.stack(self.pending)).cpu()
        self.pending = []
        return dict(zip(self.names, values.unbind(1)))

    def log_steps(self, values):
        """A training line from what read_steps returned; of gradients, grad_…, the maximum is
        written, too, as grad_…_max. A collective.
        """
        num_steps = len(values["loss"])
        images = num_steps * self.batch_size
        seconds = time.perf_counter() - self.since
        waited, peak_bytes = all_reduce_max(self.waited, float(torch.cuda.max_memory_allocated()))
        self.epoch_sums.update(steps=num_steps, images=images, seconds=seconds, waited=waited)
        self.epoch_sums.update({name: float(value.sum()) for name, value in values.items()})
        means = {name: float(value.mean()) for name, value in values.items()}
        maxima = {f"{k}_max": float(v.max()) for k, v in values.items() if k.startswith("grad_")}
        self.latest = means | maxima | self.numbers
        self.latest |= dict(images_per_s=images / seconds, data_wait=waited / seconds)
        if self.peak_images_per_s:
            self.latest["mfu"] = images / seconds / self.peak_images_per_s
        if peak_bytes > 0:  # of the run so far, its evaluations included
            self.latest["peak_gib"] = peak_bytes / 2**30
        if self.timed_from is not None:
            self.latest["seconds_left"] = self._seconds_left()
        self._write_line(self.latest)
        self.start_timer()
        self.timed_from = self.timed_from or (time.perf_counter(), self.step)
        self._update_bar()

    def _seconds_left(self):
        """By the steps since the first line, and the evaluations between them.

        Those before it were slower: the workers started, and the model was compiled.
        """
        since, step = self.timed_from
        steps_left = self.epochs * self.steps_per_epoch - self.step
        return (time.perf_counter() - since) / (self.step - step) * steps_left

    # Evaluation

    def log_eval(self, text, **values):
        """A line of log.jsonl with what an evaluation measured; text: the same for other lines."""
        self.last_eval = text
        self._write_line(values)
        self._update_bar()

    def print_epoch(self, epoch, evaluated=True):
        """The line after `epoch` epochs, means over the last of them.

        Beside a bar only an evaluation is worth a line.
        """
        sums, self.epoch_sums = self.epoch_sums, Counter()
        if self.bar is not None and not evaluated:
            return
        if not sums:  # resumed after its last step: only the evaluation was left
            self.print(f"epoch {epoch}/{self.epochs}  {self.last_eval}")
            return
        images_per_s = sums["images"] / sums["seconds"]
        speed = [f"{images_per_s:,.0f} images/s"]
        if self.peak_images_per_s:
            speed.append(f"MFU {100 * images_per_s / self.peak_images_per_s:.0f} %")
        if "peak_gib" in self.latest:
            speed.append(f"{self.latest['peak_gib']:.1f} GiB")
        speed.append(f"{100 * sums['waited'] / sums['seconds']:.0f} % of the time waiting for data")
        if "seconds_left" in self.latest and epoch < self.epochs:
            speed.append(f"{tqdm.format_interval(self._seconds_left())} left")
        summary = self._summary(sums["loss"] / sums["steps"], evaluated)
        self.print(f"epoch {epoch}/{self.epochs}  {summary}  {', '.join(speed)}")

    def _update_bar(self):
        if self.bar is not None and self.latest:
            self.bar.set_postfix_str(self._summary(self.latest["loss"]))

    def _summary(self, loss, with_eval=True):
        chance = f" (chance {self.latest['chance']:.2f})" if "chance" in self.latest else ""
        last_eval = f", {self.last_eval}" if self.last_eval and with_eval else ""
        lowest = "lowest " if is_sweep(self.latest) else ""
        return f"{lowest}loss {loss:.3f}{chance}{last_eval}"

    def _fractional_epoch(self):
        return round(self.step / self.steps_per_epoch, 6)

    def _write_line(self, values):
        if not is_main():
            return
        # fp16's loss scaler skips steps with infinite gradients; JSON has no such numbers.
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        values = {key: float(f"{value:.6g}") for key, value in finite.items()}
        line = dict(epoch=self._fractional_epoch(), step=self.step) | values
        self.unwritten += json.dumps(line).encode() + b"\n"
        self._write_pending()
        if self.writer is not None:
            with self._tensorboard_may_fail():
                for key, value in values.items():
                    self.writer.add_scalar(key, value, self.step)

    def _write_pending(self):
        with suppress(OSError):  # a full disk: the next line brings these along
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]


def is_sweep(line):
    """Whether a line is of several learning rates: its loss is the lowest of theirs."""
    return sum(key.startswith("lr/") for key in line) > 1


def read_log(path):
    """log.jsonl → list of dicts of numbers, with `epoch` and `step`.

    Any other line is dropped: one that a crash truncated, or that somebody else wrote.
    """
    path, lines = Path(path), []
    if not exists(path):
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            is_ours = isinstance(line, dict) and {"epoch", "step"} <= line.keys()
            if is_ours and all(type(value) in (int, float) for value in line.values()):
                lines.append(line)
    return lines
