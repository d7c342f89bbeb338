"""The DataLoader over datasets that make whole batches, and what its workers report."""

import multiprocessing.queues
import os
import resource
import signal
import warnings

import torch
from torch.utils.data import DataLoader

from engine.data.crops import PREFETCH_FACTOR
from engine.errors import UserError

FILES_PER_WORKER = 16  # pipes, and the tensors of its batches; of two loaders


def create_loader(dataset, batch_sampler, workers, device, persistent=False):
    """A DataLoader over a BatchDataset, which makes the batches itself.

    UserError for more workers than there may be open files.
    """
    _allow_open_files(32 + FILES_PER_WORKER * workers, workers)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=torch.nn.Identity(),
        pin_memory=device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        prefetch_factor=PREFETCH_FACTOR if workers else None,
        worker_init_fn=_prepare_worker,
        # Its own: the workers' seed would be drawn from the generator that drop path uses.
        generator=torch.Generator(),
    )


def _allow_open_files(needed, workers):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"--workers {workers} need {needed} open files, and ulimit -n allows {hard}: raise it, "
            "or fewer --workers"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def stop_workers(loader):
    """Ends the persistent workers of a DataLoader at once.

    Left to the garbage collector, they may miss the message, and end 30 seconds after SIGTERM.
    """
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


def _prepare_worker(worker):
    """Signals reach the whole process group. Workers must outlive them by one step, so they ignore
    all but SIGTERM, and exit 30 seconds after that.

    A batch that can't be handed over, for want of shared memory or of open files, ends a worker,
    which the main process notices; by default it would wait for that batch forever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *args: os._exit(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def unpack_batches(batches, unreadable=None, dataset=None):
    """Yields the data of each batch; raises a worker's UserError.

    Images of `dataset` that could not be read go to `unreadable`, an UnreadableImages; without it
    they are errors.
    """
    for data, reasons in batches:
        if isinstance(data, UserError):
            raise data
        if unreadable is not None:
            unreadable.add(reasons, dataset)
        elif reasons:
            path, reason = next(iter(reasons.items()))
            raise UserError(f"unreadable image {path}: {reason}", exit_code=1, rank_local=True)
        yield data
