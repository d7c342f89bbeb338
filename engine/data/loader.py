"""The DataLoader over datasets that make whole batches, and what its workers report."""

import signal

import torch
from torch.utils.data import DataLoader

from engine.data.crops import PREFETCH_FACTOR
from engine.errors import UserError


def create_loader(dataset, batch_sampler, workers, device, persistent=False):
    """A DataLoader over a BatchDataset, which makes the batches itself."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=torch.nn.Identity(),
        pin_memory=device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        prefetch_factor=PREFETCH_FACTOR if workers else None,
        worker_init_fn=_outlive_signals,
        # Its own: the workers' seed would be drawn from the generator that drop path uses.
        generator=torch.Generator(),
    )


def stop_workers(loader):
    """Ends the persistent workers of a DataLoader at once.

    Left to the garbage collector, they may miss the message, and end 30 seconds after SIGTERM.
    """
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


def _outlive_signals(worker):
    """Signals reach the whole process group. Workers must outlive them by one step, so they ignore
    all but SIGTERM, and exit 30 seconds after that."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def unpack_batches(batches, unreadable=None):
    """Yields the data of each batch; raises a worker's UserError.

    Images that could not be read go to `unreadable`, an UnreadableImages; without, they are errors.
    """
    for data, reasons in batches:
        if isinstance(data, UserError):
            raise data
        if unreadable is not None:
            unreadable.add(reasons)
        elif reasons:
            path, reason = next(iter(reasons.items()))
            raise UserError(f"unreadable image {path}: {reason}", exit_code=1, rank_local=True)
        yield data
