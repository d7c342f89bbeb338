"""One run and its folder: metadata, log, checkpoints, resume, signals; the same in all scripts."""

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from engine import checkpoint as checkpoints
from engine import plots
from engine.checkpoint import LAST, DamagedCheckpoint
from engine.data.decode import JPEG_DECODER
from engine.data.images import dataset_digest
from engine.data.loader import stop_workers, unpack_batches
from engine.data.unreadable import UnreadableImages
from engine.errors import (
    MachineFailure,
    UserError,
    first_line,
    is_machine_failure,
    join_some,
    print_line,
)
from engine.files import atomic_write, exists, lock_folder
from engine.launch import all_reduce_max, check_same_on_all_ranks, on_rank0, print_rank0
from engine.log import MetricLogger, read_log
from engine.signals import Interrupted, catch_signals, pending_exit_code
from engine.spikes import SpikeDetector
from engine.weights import load_model, num_heads, weights_digest
from moco.distributed import is_main, world_size

KEPT_NAMES = re.compile(r"best\.pth|checkpoint_\d+\.pth|linear_lr.*\.pth")
NEVER_ALLOWED = {"class_names", "optimizer"}  # differences, even if others may be
# Arguments that may differ between hosts: what they lead to is compared, where it matters.
MAY_DIFFER = set(
    "data data_root val knn_data pretrained init_from output_dir resume workers".split()
)
PLOT_SECONDS = 60  # between two drawings of curves.png
SYNC_SECONDS = 1  # between the steps after which ranks agree on stopping and saving
MIN_LOSS_SCALE = 2.0**-10  # fp16 whose gradients overflow even at this scale won't recover


def find_checkpoints(folder, resume):
    """Checkpoints to resume, the newest first; [] for a new run. All ranks call it.

    resume: None, "auto" or a path. Processes that torchrun has restarted resume what the first ones
    left. UserError if a run would be overwritten.
    """
    folder, path = Path(folder), None if resume in (None, "auto") else Path(resume)
    existing = [folder / name for name in checkpoints.NAMES if exists(folder / name)]
    # The hosts count for themselves: one that was replaced begins at 0.
    num_restarts = all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    if existing and (resume == "auto" or num_restarts > 0):
        return existing
    if path is not None and not exists(path):
        raise UserError(f"no checkpoint at {path}")
    names = os.listdir(folder) if exists(folder) and folder.is_dir() else []
    kept = any(map(KEPT_NAMES.fullmatch, names))
    crashed = f"{LAST}.tmp" in names  # in its first save
    resumes_here = path is not None and path.resolve().parent == folder.resolve()
    if (existing or (kept and not crashed)) and not resumes_here:
        hint = "--resume auto continues it, " if existing else ""
        raise UserError(f"{folder} holds a run: {hint}--output-dir starts another")
    if existing and resumes_here and path.name not in checkpoints.NAMES:
        # If it was killed before its first save, --resume auto would take the later one.
        raise UserError(f"{folder} holds a later checkpoint than {path.name}: another --output-dir")
    return [] if path is None else [path]


def run_metadata(config, args, env, dataset, class_names, val=None, frozen=None):
    """What a checkpoint states about its run, beside the state; plain types → dict.

    config: BackboneConfig. args: a plain dict. dataset: the images to train on. val: those that the
    best accuracy refers to. frozen: a module that the result depends on and no checkpoint holds.
    """
    return config.to_dict() | dict(
        args=args,
        class_names=class_names,
        data_digest=dataset_digest(dataset, class_names),
        val_digest=None if val is None else dataset_digest(val, class_names),
        frozen_digest=None if frozen is None else weights_digest(frozen),
        world_size=world_size(),
        device=str(env.device),
        precision=env.precision(),
        versions=versions(),
    )


class Run:
    """A training run: it locks its folder and counts the finished epochs and steps.

    In order: Run(…), run.resume(), then in `with run:` run.print_config(…) and the training loop
    with run.batches, run.end_step, run.log_eval and run.end_epoch.
    epoch, step: finished epochs (their evaluation included) and finished optimizer steps.
    resuming: whether there is a checkpoint to load. unreadable: the run's UnreadableImages.
    """

    def __init__(
        self,
        folder,
        env,
        loader,
        metadata,
        state,
        *,
        epochs,
        defaults,
        resume_from=(),
        may_change=(),
        allow_changed_args=False,
        allow_divergence=False,
        same_world_size=False,
        save_minutes=30,
        print_freq=10,
        max_bad_images=0.001,
        tensorboard=False,
        peak_images_per_s=None,
    ):
        """metadata: of run_metadata. state: {"model": …, "optimizer": …, …}, what a checkpoint
        holds: each has a state_dict, or is None. resume_from: of find_checkpoints. may_change:
        arguments that may differ when resuming; defaults: of all arguments. same_world_size: the
        number of processes changes the result. allow_divergence: weights may become non-finite, for
        one of several classifiers may fail. peak_images_per_s: of engine/flops.py, for the MFU in
        the log.
        """
        self.folder, self.env, self.loader = Path(folder), env, loader
        self.metadata, self.model, self.epochs = metadata, state["model"], epochs
        self.scaler = state.get("scaler") or torch.amp.GradScaler(enabled=False)
        self.sampler, self.spikes = loader.batch_sampler, SpikeDetector()
        parts = state | dict(sampler=self.sampler, spikes=self.spikes)
        self.stateful = {k: v for k, v in parts.items() if k != "model" and v is not None}
        self.resume_from, self.resuming = list(resume_from), bool(resume_from)
        self.may_change = {*may_change} if same_world_size else {*may_change, "world_size"}
        self.defaults = defaults
        self.allow_changed_args, self.allow_divergence = allow_changed_args, allow_divergence
        self.print_freq, self.save_minutes = print_freq, save_minutes

        self.steps_per_epoch = len(self.sampler)
        self.epoch = self.step = 0
        self.failed_saves = 0  # in a row
        self.newest = None  # the checkpoint that this run has loaded or written last
        self.saved_at, self.plotted_at = time.monotonic(), 0.0
        self.logger = MetricLogger(
            self.folder,
            epochs,
            self.steps_per_epoch,
            self.sampler.batch_size,
            tensorboard,
            peak_images_per_s,
        )
        self.unreadable = UnreadableImages(max_bad_images, self.folder, self.resuming, self.print)

    # Resume

    def resume(self):
        """Loads the newest checkpoint that is whole, and sets epoch and step; all ranks call it.

        Without one nothing changes. UserError if the arguments, the images or the classes are not
        those of the run, or not the same on all ranks.
        """
        args = self.metadata["args"]
        flags = {_flag(name): args[name] for name in args if name not in MAY_DIFFER}
        precision = {"the precision": self.metadata["precision"]}
        check_same_on_all_ranks(flags | precision, "start all processes with the same flags")
        for path, older in zip(self.resume_from, [*self.resume_from[1:], None]):
            try:
                self._load(path)
                self.newest = path
                break
            except DamagedCheckpoint as damage:
                if older is None:
                    raise
                print_rank0(f"{damage}; going back to {older}", sys.stderr)
        facts = {
            "the images": self.metadata["data_digest"],
            "the images to validate": self.metadata["val_digest"],
            "the frozen weights": self.metadata["frozen_digest"],
            "the step": self.step,
        }
        check_same_on_all_ranks(facts, "do all hosts see the same data, weights and --output-dir?")

    def _load(self, path):
        checkpoint = checkpoints.load(path)
        self._check_same_run(path, checkpoint)
        try:
            load_model(self.model, checkpoint, path)
            for name, part in self.stateful.items():
                if isinstance(part, torch.optim.Optimizer):
                    checkpoints.load_optimizer(part, checkpoint[name])
                elif checkpoint[name] or part is not self.scaler:  # empty unless in fp16
                    part.load_state_dict(checkpoint[name])
            self.epoch = int(checkpoint["epoch"])
            self.step = self._convert_step(path, checkpoint)
        except Exception as error:  # of missing, mistyped or mis-shaped entries
            if isinstance(error, UserError) or is_machine_failure(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DamagedCheckpoint(f"{path} can't be resumed: {reason}") from None

    def _convert_step(self, path, checkpoint):
        """The checkpoint's step in steps of this run's batch size.

        UserError if the batch size changes within an epoch.
        """
        step, old_batch_size = int(checkpoint["iteration"]), checkpoint["args"]["batch_size"]
        if old_batch_size == self.sampler.batch_size:
            return step
        if step != self.epoch * (self.sampler.num_images // old_batch_size):
            hint = f"--batch-size {old_batch_size}, or a checkpoint of the end of an epoch"
            raise UserError(f"{path} was saved within an epoch: resume it with {hint}")
        return self.epoch * self.steps_per_epoch

    def _check_same_run(self, path, checkpoint):
        """UserError if what changes the mathematics is not as in the checkpoint."""
        if "args" not in checkpoint:
            raise UserError(f"{path} holds no run to resume: --init-from takes its weights")
        old_names, names = checkpoint["args"].keys(), self.metadata["args"].keys()
        if old_names - names and names - old_names:  # each has flags that the other lacks
            raise UserError(f"{path} was written by another script: resume it with that one")
        changes = differences(checkpoint, self.metadata, self.may_change)
        text = ", ".join(changes.values())
        if changes.keys() & NEVER_ALLOWED:
            raise UserError(f"{path} can't be resumed with {text}: --output-dir starts another run")
        if text and not self.allow_changed_args:
            hint = "--allow-changed-args resumes anyway"
            raise UserError(f"{path} was trained with other arguments: {text}; {hint}")
        if text:
            print_rank0(f"resuming with other arguments: {text}")

    # Beginning and end

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.callback(stop_workers, self.loader)
            on_rank0(lambda: self._lock(stack))
            if not self.resuming:
                find_checkpoints(self.folder, None)  # another run may have been quicker
                if is_main():  # the files of a run that was cleared, or killed before it saved
                    self.unreadable.path.unlink(missing_ok=True)
                    log = read_log(self.logger.path)
                    if log:
                        text = f"log.jsonl of {log[-1]['step']:,} steps"
                        self.print(f"no checkpoint in {self.folder}: its {text} is begun anew")
            evaluated = 0 < self.step == self.epoch * self.steps_per_epoch
            stack.callback(self.logger.close)
            self.logger.open(self.step, evaluated)
            stack.enter_context(catch_signals())
            self.contexts = stack.pop_all()
        return self

    def _lock(self, stack):  # returns nothing: on_rank0 would broadcast it
        stack.enter_context(lock_folder(self.folder))
        self.folder_stat = os.stat(self.folder)

    def print_config(self, **lines):
        """What this run is, on the terminal and in args.json; lines: about the script."""
        if not is_main():
            return
        try:
            with atomic_write(self.folder / "args.json", "w") as file:
                file.write(json.dumps(self.metadata, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"can't write to {self.folder}: {error.strerror}") from None
        run, args = self.metadata, self.metadata["args"]
        packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines |= {
            "device": f"{run['device']}, {run['world_size']} process(es), {run['precision']}",
            "with": f"{packages}; JPEGs decoded by {JPEG_DECODER}",
            "args": " ".join(f"{n}={v}" for n, v in args.items() if v != self.defaults[n]),
            "folder": self.folder,
        }
        for name, text in lines.items():
            self.print(f"{name:<7} {text}")
        if self.step:
            total = self.epochs * self.steps_per_epoch
            nothing_left = "" if self.step < total else ": nothing left to do"
            self.print(f"resumed after step {self.step:,} of {total:,}{nothing_left}")

    def __exit__(self, kind, error, trace):
        with self.contexts:
            if kind is Interrupted:
                self.save()
                text = f"stopped: saved after step {self.step}; --resume auto continues"
                if self.failed_saves:
                    text = f"stopped: not saved after step {self.step}"
                print_rank0(text, sys.stderr)
            if any(self.spikes.counts.values()) or self.spikes.num_dips:
                self.print(self.spikes)
            if self.unreadable.all:
                self.print(self.unreadable)
            if kind is MachineFailure and os.path.exists(self.folder / LAST):
                text = f"{error}; --resume auto continues"
                raise UserError(text, error.exit_code, error.rank_local) from None

    # Training

    def print(self, text):
        """A line of text from rank 0, above the progress bar if there is one."""
        self.logger.print(text)

    def batches(self, loader):
        """Yields the batches left in the current epoch; the time spent waiting is logged."""
        first_batch = self.step - self.epoch * self.steps_per_epoch
        loader.batch_sampler.set_epoch(self.epoch, first_batch)
        self.logger.start_timer()
        self.next_sync = self.step + 1
        self.last_sync = time.monotonic(), self.step
        requested = time.perf_counter()
        for batch in unpack_batches(loader, self.unreadable, loader.dataset):
            self.logger.waited += time.perf_counter() - requested
            yield batch
            requested = time.perf_counter()

    def end_step(self, **metrics):
        """After an optimizer step: logs; saves when it is time; raises Interrupted after a signal.

        Several ranks do so after the first and the last step of an epoch, and about once a second.

        metrics: `loss` and others. Tensors, 0-d on the device, are averaged in the log; numbers
        are written as they are. UserError if the loss is not finite, or if fp16 skips every step.
        """
        self.step += 1
        if self.scaler.is_enabled():  # read from the device with the metrics
            metrics["loss_scale"] = self.scaler.scale(torch.ones((), device=self.env.device))
        self.logger.add_step(self.step, **metrics)
        if self._is_line_due():
            values = self.logger.read_steps()
            self._check_steps(values)
            self.logger.log_steps(values)
            self.unreadable.sync(self.loader.dataset)
        is_last = self.step % self.steps_per_epoch == 0
        if world_size() == 1 or is_last or self.step >= self.next_sync:
            self._stop_or_save()

    def _is_line_due(self):
        """About every print_freq steps: lines split an epoch evenly, so all average as much."""
        lines = max(1, round(self.steps_per_epoch / self.print_freq))  # of an epoch
        step = (self.step - 1) % self.steps_per_epoch + 1
        return step * lines % self.steps_per_epoch < lines

    def _stop_or_save(self):
        """All ranks at the same step. They wait for each other, and so agree when to meet next."""
        now, (then, step) = time.monotonic(), self.last_sync
        interval = 60 * self.save_minutes
        save_due = is_main() and 0 < interval < now - self.saved_at
        step_seconds = max(1e-6, now - then) / (self.step - step)
        exit_code, save_due, step_seconds = all_reduce_max(
            pending_exit_code(), int(save_due), step_seconds
        )
        self.next_sync = self.step + max(1, int(SYNC_SECONDS / step_seconds))
        self.last_sync = now, self.step
        if exit_code:
            raise Interrupted(int(exit_code))
        if save_due:
            self.save()

    def log_eval(self, text, val=None, **values):
        """What an evaluation measured; val: the images that it measured on."""
        if val is not None:
            text += self.unreadable.remark(val)
            values["unreadable"] = self.unreadable.count(val)
        self.logger.log_eval(text, **values)
        if "knn" in values and self.step > 0:
            message = self.spikes.update_knn(values["knn"])
            if message:
                self.print(message)

    def end_epoch(self, keep_as=None, evaluated=True):
        """After an epoch and its evaluation; keep_as: a second name for its checkpoint."""
        self.epoch += 1
        self.save(keep_as)
        self.logger.print_epoch(self.epoch, evaluated)
        on_rank0(self._plot)  # no rank's --timeout passes while matplotlib is imported

    def _plot(self):
        is_last = self.epoch == self.epochs
        if is_last or time.monotonic() - self.plotted_at > PLOT_SECONDS:
            with contextlib.suppress(OSError):  # a full disk is reported when the run is saved
                plots.plot_curves(self.folder)
            self.plotted_at = time.monotonic()

    # Checkpoints

    def save(self, keep_as=None):
        """Writes the checkpoint. A failed write is reported; two in a row are a UserError.

        One that the next save would not replace, for it is the last or kept, is tried twice.
        """
        self.unreadable.sync(self.loader.dataset)
        state, last = self._state(), self.folder / LAST
        num_attempts = 2 if keep_as or self.epoch == self.epochs else 1

        def write():
            for attempt in range(num_attempts):
                time.sleep(attempt)  # seconds
                try:
                    # A file that this run has not read may be damaged: it displaces no checkpoint.
                    self._save_file(state, keep_as=keep_as, keep_previous=self.newest == last)
                    self.newest = last
                    return 0
                except OSError as error:
                    text = f"can't save to {self.folder} after step {self.step}"
                    text = f"{text}: {first_line(error)}; the checkpoint before is intact"
                    print_line(text, sys.stderr)
            return self.failed_saves + num_attempts

        self.failed_saves = on_rank0(write)  # no rank continues or exits while rank 0 writes
        self.saved_at = time.monotonic()
        if self.failed_saves > 1:
            text = "two saves in a row failed: free some disk space, then --resume auto"
            raise UserError(text, exit_code=1)

    def save_model(self, name, model, **extra):
        """A model's weights and the run's metadata, without what resumption needs.

        All ranks call it. UserError if rank 0 can't write.
        """

        def write():
            try:
                self._save_file(self._weights(model) | extra, name=name)
            except OSError as error:
                text = f"can't save {self.folder / name}: {first_line(error)}"
                raise UserError(f"{text}; --resume auto tries again", exit_code=1) from None

        on_rank0(write)

    def _save_file(self, state, **options):
        """checkpoint.save; OSError, too, if the folder's name leads to another folder by now."""
        if not os.path.samestat(os.stat(self.folder), self.folder_stat):
            raise OSError("another folder has its name now")
        checkpoints.save(self.folder, state, **options)

    def _state(self):
        """The published layout, and beside it what exact resumption needs; plain types only."""
        if not self.allow_divergence:
            norms = torch.stack(torch._foreach_norm(list(self.model.parameters())))
            if not norms.isfinite().all():  # the last step shows in no loss yet
                self._diverged("weights are no longer finite", self.step)
        parts = {n: checkpoints.contiguous(p.state_dict()) for n, p in self.stateful.items()}
        return self._weights(self.model) | parts

    def _weights(self, model):
        return dict(
            epoch=self.epoch,
            iteration=self.step,
            num_heads=num_heads(model),
            state_dict=checkpoints.published_state_dict(model),
            **self.metadata,
        )

    # Instability and divergence

    def _check_steps(self, values):
        """Reports spikes, and stops a run that diverges; values: of MetricLogger.read_steps."""
        first_step = self.step - len(values["loss"]) + 1
        for step, loss in enumerate(values["loss"].tolist(), first_step):
            if not math.isfinite(loss):
                self._diverged(f"loss became {loss:f}", step)
        if "loss_scale" in values:  # halved after each step that was skipped, for it overflowed
            scale = values["loss_scale"][-1].item()
            if scale < MIN_LOSS_SCALE:
                what = f"gradients overflow in fp16 at a loss scale of {scale:g}"
                self._diverged(what, self.step)
        if "grad_linf/first" in values:
            pairs = zip(values["grad_linf/first"].tolist(), values["grad_linf/last"].tolist())
            for step, (first, last) in enumerate(pairs, first_step):
                message = self.spikes.update(step, first=first, last=last)
                if message:
                    self.print(message)

    def _diverged(self, what, step):
        last = self.folder / LAST
        raise UserError(
            f"the {what} in step {step} (epoch {(step - 1) // self.steps_per_epoch + 1}); last "
            f"good checkpoint: {last if last.exists() else 'none yet'}; what helps: a lower --lr, "
            "--amp bf16 or off, and more in docs/troubleshooting.md",
            exit_code=1,
        )


def differences(old, new, ignored=()):
    """What differs between the metadata of two runs of a script → {name: in words}.

    ignored: names of arguments and of entries.
    """
    old_args, args = old["args"], new["args"]
    classes = [join_some(run.get("class_names") or ["none"], 3) for run in (old, new)]
    words = {
        "class_names": f"other classes, or in another order, {' → '.join(classes)}",
        "data_digest": f"other images or labels in {args['data']}",
        "val_digest": "other images to validate",
        "frozen_digest": f"other weights in {args.get('pretrained') or 'the random backbone'}",
        "world_size": f"{old.get('world_size')} → {new['world_size']} processes, which draw other "
        "random numbers",
    }
    changes = {name: text for name, text in words.items() if old.get(name) != new[name]}
    for name in dict.fromkeys([*args, *old_args]):  # a flag may be new
        if name not in old_args or old_args[name] != args.get(name):
            changes[name] = f"{_flag(name)} {old_args.get(name)} → {args.get(name)}"
    return {name: text for name, text in changes.items() if name not in ignored}


def _flag(name):
    return f"--{name.replace('_', '-')}"


def versions():
    """Package versions and the git revision; `+`: files were changed since."""
    packages = dict(python=platform.python_version())
    packages |= {name: version(name) for name in ("torch", "torchvision", "timm")}
    command = ("git", "describe", "--always", "--dirty=+")
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # git is not installed
        return packages | dict(git="none")
    return packages | dict(git=done.stdout.strip() or "none")
