"""Metrics of a run: log.jsonl, TensorBoard, the progress bar; rank 0 alone writes."""

import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.checkpoint import atomic_write
from engine.launch import all_reduce_max, all_reduce_mean
from moco.distributed import is_main

RENAMED_METRICS = {"spread": "feature_std"}  # in runs that were written before


class MetricLogger:
    """Collects scalars on the device and reads them every `print_freq` steps: one wait, not many.

    log.jsonl has two kinds of lines: training, averaged since the line before, and what an
    evaluation measured.
    Its state is part of the checkpoint, so that a resumed run writes the same lines.
    """

    def __init__(self, folder, args, steps_per_epoch):
        self.path, self.args = Path(folder, "log.jsonl"), args
        self.steps_per_epoch, self.epochs = steps_per_epoch, args.epochs
        self.print_freq, self.batch_size = args.print_freq, args.batch_size
        self.step = self.num_lines = 0  # finished steps; lines of log.jsonl about them
        self.pending, self.names = [], ()  # [scalars] of each step, on the device; their names
        self.latest = {}  # the last training line
        self.epoch_sums = {}  # over the steps of the epoch that have a line
        self.last_eval = ""  # of the last evaluation, for the bar and the line of an epoch
        self.synced = torch.zeros(0, 0)
        self.file = self.writer = self.bar = None
        self.unwritten = b""
        self.start_timer()

    # State

    def sync(self):
        """Averages what is pending over the ranks, for state_dict; all ranks call it."""
        self.synced = self._average_pending() if self.pending else torch.zeros(0, 0)

    def state_dict(self):
        return dict(
            steps=self.step,
            rows=self.num_lines,
            names=self.names,
            pending=self.synced,
            latest=self.latest,
            epoch_sums=self.epoch_sums,
            measured=self.last_eval,
        )

    def load_state_dict(self, state):
        self.step, self.num_lines = int(state["steps"]), int(state["rows"])
        if not isinstance(state["names"], tuple):
            raise TypeError("'names' is not a tuple")
        self.names = tuple(RENAMED_METRICS.get(name, name) for name in state["names"])
        self.pending = list(state["pending"].unbind())
        self.latest = {
            RENAMED_METRICS.get(name, str(name)): float(value)
            for name, value in state["latest"].items()
        }
        images, waited = (self.latest.get(name, 0) for name in ("images_per_s", "data_wait"))
        last_line = self.latest | dict(steps=1, seconds=1, images=images, waited=waited)
        sums = state.get("epoch_sums", last_line)  # older checkpoints have none
        self.epoch_sums = {str(name): float(value) for name, value in sums.items()}
        self.last_eval = str(state["measured"])

    # Opening and closing

    def open(self):
        """Opens the files; lines after the checkpoint are dropped, for they will come again."""
        if not is_main():
            return
        lines = read_log(self.path)[: self.num_lines]
        self.num_lines = len(lines)
        with atomic_write(self.path, "w") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.file = open(self.path, "ab", buffering=0)
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = self.step + 1 if self.step else None
            self.writer = SummaryWriter(self.path.parent, purge_step=purge_step)
            if not self.step:
                self._describe_run()
        if sys.stderr.isatty():
            from tqdm import tqdm

            # Its monitor thread prints, and could be taken for a decoder's warning.
            tqdm.monitor_interval = 0
            total = self.epochs * self.steps_per_epoch
            self.bar = tqdm(total=total, initial=self.step, unit="step", dynamic_ncols=True)

    def _describe_run(self):
        """Hyperparameters and views.png, for TensorBoard."""
        plain = (bool, int, float, str)
        hparams = {k: v if isinstance(v, plain) else str(v) for k, v in vars(self.args).items()}
        self.writer.add_hparams(hparams, {}, run_name=".")
        # Without it, or where a full disk cut it short, the scalars are logged all the same.
        with suppress(OSError), Image.open(self.path.with_name("views.png")) as image:
            self.writer.add_image("views", np.array(image.convert("RGB")), dataformats="HWC")

    def close(self):
        for sink in (self.bar, self.writer, self.file):
            if sink is not None:
                sink.close()

    def print(self, text):
        """A line of text, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(str(text))
        elif is_main():
            print(text, flush=True)

    # Training

    def start_timer(self):
        self.since, self.waited, self.timed_steps = time.perf_counter(), 0.0, 0

    def log_step(self, step, **metrics):
        """After `step` steps in all. Tensors, `loss` among them, are 0-d, on the device, and are
        averaged over the steps since the last line; of gradients, grad_…, the maximum is written,
        too, as grad_…_max. Numbers, such as lr, are written as they are.

        Returns the tensors' values since the last line, {name: [steps]} on the CPU, when a line
        was due; else None.
        """
        tensors = {k: v for k, v in metrics.items() if isinstance(v, torch.Tensor)}
        numbers = {k: v for k, v in metrics.items() if k not in tensors}
        values = {name: value.detach().float() for name, value in tensors.items()}
        if self.names != tuple(values):
            self._fit_pending(values)
        self.names, self.step = tuple(values), step
        self.timed_steps += 1
        self.pending.append(torch.stack(list(values.values())))
        if self.bar is not None:
            self.bar.update()
        if step % self.print_freq and step % self.steps_per_epoch:
            return None

        values = self._average_pending()
        seconds, waited = time.perf_counter() - self.since, all_reduce_max(self.waited)
        images = self.timed_steps * self.batch_size
        sums = dict(steps=len(values), images=images, seconds=seconds, waited=waited)
        sums |= zip(self.names, values.sum(0).tolist())
        epoch_start = (step - 1) // self.steps_per_epoch * self.steps_per_epoch
        if step - len(values) > epoch_start:  # not the first line of this epoch
            sums = {name: self.epoch_sums.get(name, 0) + value for name, value in sums.items()}
        self.epoch_sums = sums
        self.latest = dict(zip(self.names, values.mean(0).tolist()))
        for name, value in zip(self.names, values.amax(0).tolist()):
            if name.startswith("grad_"):
                self.latest[f"{name}_max"] = value
        self.latest |= numbers | dict(
            images_per_s=images / seconds,
            data_wait=waited / seconds,  # of the slowest rank
        )
        values = dict(zip(self.names, values.unbind(1)))
        if values["loss"].isfinite().all():
            self._write_line(self.latest)
        self.pending = []
        self.start_timer()
        if self.bar is not None:
            self.bar.set_postfix_str(self._summary(self.latest["loss"]))
        return values

    def _fit_pending(self, values):
        """Gives the pending steps the scalars of this one: {name: 0-d}.

        They come from another version's checkpoint; what it lacks takes the value of this step.
        """
        for i, scalars in enumerate(self.pending):
            known = dict(zip(self.names, scalars))
            fitted = [known.get(name, value).to(value.device) for name, value in values.items()]
            self.pending[i] = torch.stack(fitted)

    def _average_pending(self):
        """Over the ranks → [steps, scalars] on the CPU. Waits for the device; a collective."""
        device = self.pending[-1].device  # those from a checkpoint are on the CPU
        return all_reduce_mean(torch.stack([v.to(device) for v in self.pending])).cpu()

    # Evaluation

    def log_eval(self, text, **values):
        """A line of log.jsonl with what an evaluation measured; text: the same for other lines."""
        self.last_eval = text
        self._write_line(values)
        if self.bar is not None and self.latest:
            self.bar.set_postfix_str(self._summary(self.latest["loss"]))

    def print_epoch(self, epoch, evaluated=True):
        """The line after `epoch` epochs, means over the last of them.

        Beside a bar only an evaluation is worth a line.
        """
        if not is_main() or (self.bar is not None and not evaluated):
            return
        sums = self.epoch_sums
        means = {name: sums[name] / sums["steps"] for name in self.names}
        shown = [n for n in self.names if n != "loss" and not n.startswith("grad_")]
        metrics = "".join(f"  {name} {means[name]:.2f}" for name in shown)
        self.print(
            f"epoch {epoch}/{self.epochs}  {self._summary(means['loss'], evaluated)}{metrics}  "
            f"{sums['images'] / sums['seconds']:,.0f} images/s, "
            f"{100 * sums['waited'] / sums['seconds']:.0f} % of the time waiting for data"
        )

    def _summary(self, loss, with_eval=True):
        chance = f" (chance {self.latest['chance']:.2f})" if "chance" in self.latest else ""
        last_eval = f", {self.last_eval}" if self.last_eval and with_eval else ""
        return f"loss {loss:.3f}{chance}{last_eval}"

    def _write_line(self, values):
        if not is_main():
            return
        # fp16's loss scaler skips steps with infinite gradients; JSON has no such numbers.
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        values = {key: float(f"{value:.6g}") for key, value in finite.items()}
        line = dict(epoch=round(self.step / self.steps_per_epoch, 4), step=self.step) | values
        self.num_lines += 1
        self.unwritten += json.dumps(line).encode() + b"\n"
        with suppress(OSError):  # a full disk: the next line brings these along
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, self.step)


def read_log(path):
    """log.jsonl → list of dicts; a last line that a crash truncated is dropped."""
    path, lines = Path(path), []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
