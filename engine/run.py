"""One run and its folder: metadata, log, checkpoints, resume, signals; the same in all scripts."""

import atexit
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine import checkpoint as checkpoints
from engine import plots
from engine.checkpoint import LAST, PREVIOUS, DamagedCheckpoint, atomic_write
from engine.cli import MAY_CHANGE
from engine.datasets import dataset_digest
from engine.errors import UserError, first_line
from engine.launch import all_gather_object, all_reduce_max, check_same_on_all_ranks, print_rank0
from engine.loader import UnreadableImages, stop_workers, unpack_batches
from engine.log import MetricLogger
from engine.signals import Interrupted, catch_signals, pending_exit_code
from engine.spikes import SpikeDetector
from engine.weights import load_model, num_heads, weights_digest
from moco.distributed import is_main, world_size

LOCK = "run.lock"
KNN_FLAGS = ("val", "knn_data", "knn_bank")
KEPT_NAMES = re.compile(r"best\.pth|checkpoint_\d+\.pth|linear_lr.*\.pth")
PLOT_SECONDS = 60  # between two drawings of curves.png
MIN_LOSS_SCALE = 2.0**-10  # fp16 whose gradients overflow even at this scale won't recover


class Run:
    """Claims its folder for one run at a time and counts what is done there.

    In order: Run(…), run.restore(…), run.print_config(…), then in `with run:` the training loop
    with run.batches, run.end_step, run.log_eval and run.end_epoch.
    epoch, step: finished epochs (their evaluation included) and finished optimizer steps.
    resuming: whether a checkpoint will be loaded. unreadable: the run's UnreadableImages.
    """

    def __init__(self, args, env, folder):
        self.args, self.env, self.folder = args, env, Path(folder)
        self.epoch = self.step = 0
        self.failed_saves = 0  # in a row
        self.saved_at = time.monotonic()
        self.plotted_at = 0.0
        self.lock = claim_folder(self.folder)
        self.candidates = find_checkpoints(args, self.folder)  # newest first
        self.resuming = bool(self.candidates)

    def restore(
        self,
        loader,
        config,
        splits,
        frozen=None,
        same_world_size=False,
        allow_divergence=False,
        **stateful,
    ):
        """Registers what a checkpoint holds: `model` and whatever else has a state_dict, or None.

        When resuming, loads it, and sets epoch and step. config: BackboneConfig. splits: the
        origin of the loader's images. frozen: a module that the result depends on and no checkpoint
        holds. same_world_size: the number of processes changes the result.
        allow_divergence: weights may become non-finite, for one of several classifiers may fail.
        UserError if the arguments, the data or the classes are not those of the run.
        """
        self.loader, sampler, dataset = loader, loader.batch_sampler, loader.dataset.dataset
        self.steps_per_epoch = len(sampler)
        self.unreadable = UnreadableImages(
            self.args.max_bad_images, len(dataset), self.folder, resumed=self.resuming
        )
        self.logger = MetricLogger(self.folder, self.args, self.steps_per_epoch)
        self.unreadable.print_fn = self.logger.print
        self.model, self.allow_divergence = stateful.pop("model"), allow_divergence
        self.scaler = stateful.get("scaler") or torch.amp.GradScaler(enabled=False)
        self.spikes = SpikeDetector()
        stateful |= dict(sampler=sampler, logger=self.logger, spikes=self.spikes)
        self.stateful = {name: part for name, part in stateful.items() if part is not None}
        self.class_names, self.was_numeric = splits.class_names, splits.was_numeric
        digest = dataset_digest(dataset, splits.class_names)
        self.metadata = config.to_dict() | dict(
            args=vars(self.args),
            class_names=splits.class_names,
            data_digest=digest,
            val_digest=None,
            frozen_digest=None if frozen is None else weights_digest(frozen),
            world_size=world_size(),
            device=str(self.env.device),
            precision=self.env.precision(),
            versions=versions(),
        )
        if splits.val is not None and "results" in self.stateful:  # best accuracies refer to it
            self.metadata["val_digest"] = dataset_digest(splits.val, splits.class_names)
        self._load_newest(same_world_size)
        check_same_on_all_ranks(
            self.env,
            number_of_images=len(dataset),
            images=int(digest, 16) >> 2,  # fits int64
            steps=self.step,
        )

    # Resume

    def _load_newest(self, same_world_size):
        """The newest checkpoint that is whole; without one nothing changes."""
        for path, older in zip(self.candidates, [*self.candidates[1:], None]):
            try:
                self._load(path, same_world_size)
                return
            except DamagedCheckpoint as damage:
                if older is None:
                    raise
                print_rank0(f"{damage}; going back to {older}", sys.stderr)

    def _load(self, path, same_world_size):
        state = checkpoints.load(path)
        if "args" not in state:
            raise UserError(
                f"{path} has weights but no arguments of a run to resume: start one with "
                "--init-from"
            )
        has_momentum_encoder = any("momentum_encoder." in key for key in state["state_dict"])
        if has_momentum_encoder != hasattr(self.model, "momentum_encoder"):
            raise UserError(f"{path} was written by another script: resume it with that one")
        self._check_same_run(path, state, same_world_size)
        try:
            load_model(self.model, state, path)
            for name, part in self.stateful.items():
                if name != "spikes" or name in state:  # older checkpoints have none
                    _load_state(part, state[name])
            self.epoch, self.step = state["epoch"], self._find_step(path, state)
            if any(state["args"].get(n) != getattr(self.args, n, None) for n in KNN_FLAGS):
                self.spikes.best_knn = 0.0  # another measurement
            self.logger.step = self.step
        # What missing, mistyped or mis-shaped entries can raise.
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DamagedCheckpoint(f"{path} can't be resumed: {reason}") from None

    def _check_same_run(self, path, state, same_world_size):
        """UserError if what changes the mathematics is not as in the checkpoint."""
        self._check_classes(path, state.get("class_names"))
        old_args, defaults = state["args"], getattr(self.args, "defaults", {})
        optimizer, old_optimizer = getattr(self.args, "optimizer", None), old_args.get("optimizer")
        if old_optimizer not in (None, optimizer):
            raise UserError(
                f"{path} holds the state of {old_optimizer}, which --optimizer {optimizer} can't "
                f"continue: start another run with --init-from {path}"
            )
        changes = []
        for name, value in vars(self.args).items():
            old = old_args.get(name, defaults.get(name))
            if value != old and name not in MAY_CHANGE:
                changes.append(f"--{name.replace('_', '-')} {old} → {value}")
        if state.get("data_digest") not in (None, self.metadata["data_digest"]):
            changes.append(f"other images or labels in {self.args.data}")
        if state.get("val_digest") not in (None, self.metadata["val_digest"]):
            changes.append("other images to validate")
        if same_world_size and state.get("world_size") != world_size():
            changes.append(
                f"{state.get('world_size')} → {world_size()} processes, each of which draws its "
                "own random numbers"
            )
        if state.get("frozen_digest") not in (None, self.metadata["frozen_digest"]):
            pretrained = self.args.pretrained or "the random backbone"
            changes.append(f"other weights in {pretrained}")
        if changes and not self.args.allow_changed_args:
            raise UserError(
                f"{path} was trained with other arguments: {', '.join(changes)}; "
                "--allow-changed-args resumes anyway"
            )
        if changes:
            print_rank0(f"resuming with other arguments: {', '.join(changes)}")

    def _check_classes(self, path, known):
        """known: class names of the checkpoint; None in those written before they were stored."""
        if known is None and self.was_numeric and "results" in self.stateful:
            raise UserError(
                f"{path} does not state the order of its classes, and classes that are numbers "
                "were ordered by value then, as text now: train the classifier again"
            )
        if known not in (None, self.class_names):
            names = _first_few(self.class_names) if self.class_names else "have no classes"
            raise UserError(
                f"{path} was trained on other classes, or the same in another order: it has "
                f"{_first_few(known)}, the images {names}"
            )

    def _find_step(self, path, state):
        """The step of this run at which as many images of the epoch have been seen.

        It is the checkpoint's own unless --batch-size has changed.
        """
        sampler, step = self.stateful["sampler"], state["iteration"]
        old_batch_size = state["args"].get("batch_size", sampler.batch_size)
        if old_batch_size == sampler.batch_size:
            return step
        old_steps_per_epoch = sampler.num_images // old_batch_size
        seen = (step - state["epoch"] * old_steps_per_epoch) * old_batch_size
        first_step = state["epoch"] * self.steps_per_epoch
        if seen == old_steps_per_epoch * old_batch_size:  # only the evaluation was left
            return first_step + self.steps_per_epoch
        if seen % sampler.batch_size:
            raise UserError(
                f"{path} was saved after {seen:,} images of an epoch, which --batch-size "
                f"{sampler.batch_size} does not divide: resume from the end of an epoch"
            )
        return first_step + seen // sampler.batch_size

    # Start

    def print_config(self, **lines):
        """Prints what is about to run, once, and writes it to args.json."""
        if not is_main():
            return
        try:
            with atomic_write(self.folder / "args.json", "w") as file:
                file.write(json.dumps(self.metadata, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"can't write to --output-dir {self.folder}: {error.strerror}"
            ) from None
        run = self.metadata
        lines |= {
            "device": f"{run['device']}, {run['world_size']} process(es), {run['precision']}",
            "with": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
            "args": " ".join(f"{name}={value}" for name, value in run["args"].items()),
            "folder": self.folder,
        }
        for name, text in lines.items():
            print(f"{name:<7} {text}", flush=True)

    def __enter__(self):
        self.contexts = contextlib.ExitStack()
        self.contexts.callback(stop_workers, self.loader)
        self.contexts.callback(self.logger.close)
        self.logger.open()
        self.contexts.enter_context(catch_signals())
        if self.step:
            total = self.args.epochs * self.steps_per_epoch
            nothing_left = "" if self.step < total else ": nothing left to do"
            self.print(f"resumed after step {self.step:,} of {total:,}{nothing_left}")
        return self

    def __exit__(self, kind, error, trace):
        with self.contexts:
            if kind is Interrupted:
                self.save()
                outcome = "not saved" if self.failed_saves else "saved"
                hint = "" if self.failed_saves else "; --resume auto continues"
                print_rank0(f"stopped: {outcome} after step {self.step}{hint}", sys.stderr)
            if any(self.spikes.counts.values()) or self.spikes.num_dips:
                self.print(self.spikes)
            if self.unreadable.all:
                self.print(self.unreadable)

    # Training

    def print(self, text):
        """A line of text from rank 0, above the progress bar if there is one."""
        self.logger.print(text)

    def batches(self, loader):
        """Yields the batches left in the current epoch; the time spent waiting is logged."""
        first_batch = self.step - self.epoch * self.steps_per_epoch
        loader.batch_sampler.set_epoch(self.epoch, first_batch)
        self.logger.start_timer()
        requested = time.perf_counter()
        for batch in unpack_batches(loader, self.unreadable):
            self.logger.waited += time.perf_counter() - requested
            yield batch
            requested = time.perf_counter()

    def end_step(self, **metrics):
        """After an optimizer step: logs; saves when it is time; raises Interrupted after a signal.

        metrics: `loss` and others. Tensors, 0-d on the device, are averaged in the log; numbers
        are written as they are. UserError if the loss is not finite, or if fp16 skips every step.
        """
        self.step += 1
        if self.scaler.is_enabled():  # read from the device with the metrics
            metrics["loss_scale"] = self.scaler.scale(torch.ones((), device=self.env.device))
        values = self.logger.log_step(self.step, **metrics)
        if values is not None:
            self._check_losses(values["loss"])
            self._check_loss_scale(values)
            self._check_gradients(values)
            self.unreadable.sync()
        interval = 60 * self.args.save_minutes
        save_due = is_main() and 0 < interval < time.monotonic() - self.saved_at
        # One all-reduce per step: all ranks must stop and save at the same step.
        exit_code, save_due = all_reduce_max(pending_exit_code(), int(save_due))
        if exit_code:
            raise Interrupted(exit_code)
        if save_due:
            self.save()

    def log_eval(self, text, **values):
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
        is_last = self.epoch == self.args.epochs
        if is_main() and (is_last or time.monotonic() - self.plotted_at > PLOT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk is reported when the run is saved
                plots.plot_curves(self.folder)
            self.plotted_at = time.monotonic()

    # Checkpoints

    def save(self, keep_as=None):
        """Writes the checkpoint. A failed write is reported; two in a row are a UserError."""
        self.unreadable.sync()
        self.logger.sync()
        state = self._state()
        if is_main():
            try:
                checkpoints.save(self.folder, state, keep_as)
                self.failed_saves = 0
            except OSError as error:
                self.failed_saves += 1
                message = (
                    f"can't save to {self.folder} after step {self.step}: {first_line(error)}; "
                    "the checkpoint before is intact"
                )
                if keep_as:
                    message += f", {keep_as} is not written"
                if self.failed_saves == 1:
                    message += ", and training continues until the next save"
                print_rank0(message, sys.stderr)
        self.saved_at = time.monotonic()
        # The all-reduce is a barrier, too: no rank continues or exits while rank 0 writes.
        if all_reduce_max(self.failed_saves) > 1:
            raise UserError(
                "two saves in a row failed: free some disk space, then --resume auto", exit_code=1
            )

    def _state(self):
        """The published layout, and beside it what exact resumption needs; plain types only."""
        if not self.allow_divergence:
            self._check_weights()
        return dict(
            epoch=self.epoch,
            iteration=self.step,
            num_heads=num_heads(self.model),
            state_dict=checkpoints.published_state_dict(self.model),
            **{n: checkpoints.contiguous(p.state_dict()) for n, p in self.stateful.items()},
            **self.metadata,
        )

    def save_model(self, name, model, **extra):
        """A model's weights and the run's metadata, without what resumption needs."""
        if is_main():
            state = dict(
                epoch=self.epoch,
                iteration=self.step,
                num_heads=num_heads(model),
                state_dict=checkpoints.published_state_dict(model),
                **self.metadata,
                **extra,
            )
            checkpoints.save(self.folder, state, name=name)

    # Instability and divergence

    def _check_gradients(self, values):
        """values: {name: [steps]} since the last line of the log."""
        if "grad_linf/first" not in values:
            return
        first_step = self.step - len(values["loss"])
        pairs = zip(values["grad_linf/first"].tolist(), values["grad_linf/last"].tolist())
        for i, (first, last) in enumerate(pairs):
            message = self.spikes.update(first_step + i, first, last)
            if message:
                self.print(message)

    def _check_losses(self, losses):
        finite = losses.isfinite()
        if not finite.all():
            first = self.step - len(losses) + int((~finite).int().argmax())
            self._diverged(f"loss became {losses[~finite][0]:f}", first)

    def _check_loss_scale(self, values):
        """The scaler skips a step whose gradients overflow, and halves the scale."""
        scale = float(values["loss_scale"][-1]) if "loss_scale" in values else 1
        if scale < MIN_LOSS_SCALE:
            self._diverged(
                f"gradients overflow in fp16 at a loss scale of {scale:g}", self.step - 1
            )

    def _check_weights(self):
        """Stops the run if a weight is not finite: the last step shows in no loss yet."""
        norms = torch.stack(torch._foreach_norm(list(self.model.parameters())))
        if not norms.isfinite().all():
            self._diverged("weights are no longer finite", self.step - 1)

    def _diverged(self, what, step):
        last = self.folder / LAST
        raise UserError(
            f"the {what} in step {step} (epoch {step // self.steps_per_epoch}; both from 0); last "
            f"good checkpoint: {last if last.exists() else 'none yet'}; what helps: a lower --lr, "
            "--amp bf16 or off, and more in docs/troubleshooting.md",
            exit_code=1,
        )


def claim_folder(folder):
    """Makes the folder and locks it on rank 0, until this process ends → the open lock file.

    The lock is POSIX's: it dies with its process, even after kill -9, is not inherited by workers,
    and holds between hosts on NFS. UserError, on all ranks, if another run has it.
    """
    lock = error = None
    if is_main():
        try:
            lock = _lock(folder)
        except UserError as refusal:
            error = str(refusal)
    errors = [e for e in all_gather_object(error) if e is not None]
    if errors:
        raise UserError(errors[0])
    return lock


def _lock(folder):
    path = folder / LOCK
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise UserError(f"can't write to --output-dir {folder}: {error.strerror}") from None
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(
            f"another run is using {folder} ({file.read().strip()}): --output-dir starts one "
            "elsewhere"
        ) from None
    except (ImportError, OSError) as error:
        print(f"{folder} can't be locked ({error}): start no second run in it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    if is_new:
        atexit.register(_remove_if_unused, folder, os.getpid())
    return file


def _remove_if_unused(folder, pid):
    """A run that was refused before it wrote anything leaves no folder behind."""
    with contextlib.suppress(OSError):
        if os.getpid() == pid and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def find_checkpoints(args, folder):
    """Checkpoints to resume, the newest first; [] for a new run. All ranks call it.

    Processes that torchrun has restarted resume what the first ones left. UserError if a run would
    be overwritten.
    """
    existing = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    # The hosts count for themselves: one that was replaced begins at 0.
    num_restarts = all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    path = None if args.resume in (None, "auto") else Path(args.resume)
    resumes_here = path is not None and path.resolve().parent == folder.resolve()
    names = sorted(file.name for file in folder.glob("*.pth"))
    kept = [name for name in names if KEPT_NAMES.fullmatch(name)]
    crashed = (folder / f"{LAST}.tmp").exists()  # in the first save
    if kept and not existing and not resumes_here and not crashed:  # of a run that was cleared
        raise UserError(f"{folder} holds {_first_few(kept)} of a run: --output-dir starts another")
    if args.resume == "auto" or (num_restarts > 0 and existing):
        return existing
    if existing and not resumes_here:
        raise UserError(
            f"{folder} holds a run: --resume auto continues it, --output-dir starts another"
        )
    if path is not None and not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    return [args.resume] if args.resume else []


def _load_state(part, state):
    if isinstance(part, torch.optim.Optimizer):
        checkpoints.load_optimizer(part, state)
    elif state or not isinstance(part, torch.amp.GradScaler):  # empty unless the run was in fp16
        part.load_state_dict(state)


def _first_few(names, max_names=3):
    more = ", …" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more


def versions():
    """Package versions and the git revision; `+`: files were changed since."""
    import timm
    import torchvision

    result = dict(
        python=platform.python_version(),
        torch=str(torch.__version__),  # a plain str: the checkpoint holds it
        torchvision=torchvision.__version__,
        timm=timm.__version__,
    )
    command = ("git", "describe", "--always", "--dirty=+")
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        result["git"] = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        result["git"] = "none"
    return result
