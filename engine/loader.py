"""From images to batches: sampler, crops and DataLoader, all on the CPU, all uint8.

The crop and the augmentation of image i in epoch e under seed s are a pure function of (s, e, i):
the sampler hands out keys (epoch, index), so workers, ranks and restarts make no difference.
"""

import math
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torchvision.transforms.v2 import functional as tv

from engine.checkpoint import atomic_write
from engine.decode import UnreadableImage, collect_warnings
from engine.errors import UserError
from engine.launch import all_gather_object
from moco.augmentation import NUM_PARAMS, sample_params
from moco.distributed import is_main, rank, world_size

PREFETCH_FACTOR = 2  # batches that each worker prepares ahead, if they take less than
PREFETCH_BYTES = 2**30  # in all workers of a process; else each prepares one
MAX_ATTEMPTS = 32  # to find an image that can be read, before the run gives up
MAX_WARNED = 10_000  # images that decode with warnings; of more, the names are not kept
MAX_ASPECT = 16  # what is more elongated is cut before it is resized

# Generators are seeded by (seed, epoch, index) for an image, and by one number more for:
ORDER_STREAM = 1  # the order of an epoch, at index 0
SUBSTITUTE_STREAM = 2  # the first image in place of one that can't be read; 3: the second, …


class EpochBatchSampler(Sampler):
    """Batches of keys (epoch, index) for this rank: shuffled by (seed, epoch), no image twice.

    The global batch is cut into world_size pieces in rank order, so that all ranks' batches
    together are the same for any number of ranks. The `num_dropped` images that don't fill a batch
    are not shown in this epoch. repeats: repeated augmentation; an epoch has as many views, of
    fewer images, each shown that often. UserError for an impossible batch size.
    """

    def __init__(self, num_images, batch_size, seed, repeats=1):
        if batch_size % world_size():
            raise UserError(
                f"--batch-size {batch_size} (of all processes together) does not divide by "
                f"{world_size()} processes"
            )
        if batch_size < 2 * world_size():
            raise UserError(f"--batch-size {batch_size}: BatchNorm needs 2 images in each process")
        if num_images < batch_size:
            raise UserError(
                f"{num_images} images don't fill one --batch-size {batch_size}: lower it"
            )
        self.num_images, self.batch_size = num_images, batch_size
        self.rank_batch_size = batch_size // world_size()
        self.seed, self.repeats = seed, repeats
        self.epoch = self.first_batch = 0
        num_shown = math.ceil(len(self) * batch_size / repeats)
        self.num_dropped = num_images - num_shown

    def __len__(self):
        """Steps per epoch."""
        return self.num_images // self.batch_size

    def __str__(self):
        return (
            f"{self.batch_size}; {len(self)} steps per epoch, {self.num_dropped} images of each "
            "epoch dropped"
        )

    def set_epoch(self, epoch, first_batch=0):
        """The next iteration is that of `epoch`, from its batch `first_batch` on."""
        self.epoch, self.first_batch = epoch, first_batch

    def state_dict(self):
        return {"images": self.num_images}

    def load_state_dict(self, state):
        if not isinstance(state["images"], int):
            raise TypeError("'images' is not a number")
        if state["images"] != self.num_images:
            raise UserError(
                f"the run has {state['images']} images, DIR holds {self.num_images} now"
            )

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch, 0, ORDER_STREAM))
        order = rng.permutation(self.num_images).repeat(self.repeats)
        order = order[: len(self) * self.batch_size]
        # Each view of an image needs an epoch of its own to draw from: epoch · repeats, + 1, …
        epochs = self.epoch * self.repeats + np.arange(len(order)) % self.repeats
        keys = np.stack([epochs, order], 1)
        # [steps, world_size, batch per rank, (epoch, index)]
        keys = keys.reshape(len(self), world_size(), -1, 2)
        for batch in keys[self.first_batch :, rank()]:
            yield [tuple(key) for key in batch.tolist()]


class Batch(NamedTuple):
    """What a worker hands over.

    data: the tensors. unreadable: path → reason of images that could not be read. error: in place
    of the data, the message of a UserError; raised, it would come out of the worker as a traceback.
    warned: path → message of images that are flawed, but could be decoded.
    """

    data: object
    unreadable: dict
    error: str | None = None
    warned: dict | None = None


class BatchDataset:
    """Makes whole batches, for DataLoader: a subclass defines make_batch(keys, unreadable) → data.

    dataset: images to read. unpack_batches unpacks the Batch that each call returns.
    """

    bytes_per_image = 0  # of what make_batch returns, if it may be large
    prefetch_factor = PREFETCH_FACTOR  # create_loader sets 1 for large batches

    def __init__(self, dataset, seed=0):
        self.dataset, self.seed = dataset, seed

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, keys):
        unreadable = {}
        with collect_warnings() as warned:
            try:
                return Batch(self.make_batch(keys, unreadable), unreadable, None, warned)
            except UserError as error:
                return Batch(None, unreadable, str(error), warned)

    def read(self, epoch, index, unreadable):
        """The image of a key, or a substitute if it can't be read → image, its index."""
        return read_or_substitute(self.dataset, self.seed, epoch, index, unreadable)


def read_or_substitute(dataset, seed, epoch, index, unreadable):
    """Reads image `index`, or another one in its place if it can't be read → image, its index.

    Which other one is a pure function of (seed, epoch, index). What can't be read goes into
    `unreadable`: path → reason. UserError after MAX_ATTEMPTS images in a row.
    """
    first_error, read_index = None, index
    for attempt in range(MAX_ATTEMPTS):
        if attempt > 0:
            stream = SUBSTITUTE_STREAM + attempt - 1
            rng = np.random.default_rng((seed, epoch, index, stream))
            read_index = int(rng.integers(len(dataset)))
        try:
            return dataset.read(read_index), read_index
        except UnreadableImage as error:
            unreadable[error.path] = error.reason
            if first_error is None:
                first_error = error
    raise UserError(
        f"unreadable image {first_error.path}: {first_error.reason}; and so was each of "
        f"{MAX_ATTEMPTS - 1} that were drawn in its place",
        exit_code=1,
        rank_local=True,
    )


class TwoCrops(BatchDataset):
    """Keys (epoch, index) → crops uint8 [2, N, C, H, W], params float32 [2, N, NUM_PARAMS].

    size: (H, W) in pixels; crop_min: smallest fraction of the area that a crop keeps.
    Buffer reuse: a worker's crops are overwritten two steps after they were handed over; clone what
    is needed for longer.
    """

    def __init__(self, dataset, size, crop_min, seed):
        super().__init__(dataset, seed)
        self.size, self.crop_min = size, crop_min
        self.bytes_per_image = 2 * dataset.pixel_format.in_chans * math.prod(size)
        self._buffers = []

    def make_batch(self, keys, unreadable):
        channels = self.dataset.pixel_format.in_chans
        crops = self._next_buffer(2, len(keys), *self.size, channels).permute(0, 1, 4, 2, 3)
        params = np.empty((2, len(keys), NUM_PARAMS), np.float32)
        for n, (epoch, index) in enumerate(keys):
            rng = np.random.default_rng((self.seed, epoch, index))
            image, _ = self.read(epoch, index, unreadable)
            for view in range(2):
                box = random_crop_box(rng, *image.shape[1:], self.crop_min)
                crops[view, n] = resized_crop(image, box, self.size)
                params[view, n] = sample_params(rng, view)
        return crops, torch.from_numpy(params)

    def _next_buffer(self, *shape):
        """A uint8 tensor. In a worker: shared memory, reused in turn. New pages and a copy for
        every batch would take longer."""
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        # prefetch_factor batches wait for the main process, which holds one and may be handed the
        # next.
        if len(self._buffers) < self.prefetch_factor + 2:
            buffer = torch.empty(shape, dtype=torch.uint8).share_memory_()
        else:
            buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        return buffer


def random_crop_box(rng, height, width, crop_min):
    """RandomResizedCrop's box: area U(crop_min, 1), ratio 3/4 … 4/3 → top, left, height, width."""
    for _ in range(10):
        area = height * width * rng.uniform(crop_min, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # An image too elongated for that: the largest center box of an allowed ratio.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image, box, size):
    """uint8 [C, H, W] → [C, *size]; box: top, left, height, width."""
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    # torch's fastest kernel needs the channels of a pixel side by side, and no gap between lines.
    crop = crop.contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, size, mode="bilinear", antialias=True)[0]


class LabelledCrops(BatchDataset):
    """Keys (epoch, index) → uint8 [N, C, H, W], labels [N]: random crop and horizontal flip.

    The training views of the linear protocol; arguments as TwoCrops has them.
    """

    def __init__(self, dataset, size, crop_min, seed):
        super().__init__(dataset, seed)
        self.size, self.crop_min = size, crop_min

    def make_batch(self, keys, unreadable):
        crops, indices = [], []
        for epoch, index in keys:
            rng = np.random.default_rng((self.seed, epoch, index))
            image, read_index = self.read(epoch, index, unreadable)
            box = random_crop_box(rng, *image.shape[1:], self.crop_min)
            crop = resized_crop(image, box, self.size)
            crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
            indices.append(read_index)  # the label is that of the image that is shown
        return torch.stack(crops), self.dataset.labels[indices]


class CenterCrops(BatchDataset):
    """Indices → uint8 [N, C, H, W], without augmentation; positions [N] in the list of indices.

    As in the linear protocol, resized to 256/224 of `size` and cropped; an image of `size` stays as
    it is. An unreadable image has no substitute: N is smaller.
    """

    def __init__(self, dataset, size, interpolation="bilinear"):
        super().__init__(dataset)
        self.size, self.interpolation = size, tv.InterpolationMode(interpolation)

    def make_batch(self, keys, unreadable):
        crops, positions = [], []
        for n, index in enumerate(keys):
            try:
                crops.append(self.crop(self.dataset.read(index)))
                positions.append(n)
            except UnreadableImage as error:
                unreadable[error.path] = error.reason
        if crops:
            crops = torch.stack(crops)
        else:
            crops = torch.empty(0, self.dataset.pixel_format.in_chans, *self.size).to(torch.uint8)
        return crops, torch.tensor(positions, dtype=torch.long)

    def crop(self, image):
        """uint8 [C, H, W] → uint8 [C, *size]."""
        if image.shape[1:] == self.size:
            return image
        # Crop very elongated images first: resizing them whole could allocate gigabytes.
        (height, width), (h, w) = image.shape[1:], self.size
        max_height = max(1, MAX_ASPECT * width * h // w)
        max_width = max(1, MAX_ASPECT * height * w // h)
        image = tv.center_crop(image, [min(height, max_height), min(width, max_width)])
        scale = max(s * 256 / 224 / side for s, side in zip(self.size, image.shape[1:]))
        # Rounded down, as torchvision's Resize does it; 1e-6 for 255.999….
        resized = [max(s, int(side * scale + 1e-6)) for s, side in zip(self.size, image.shape[1:])]
        image = tv.resize(image, resized, self.interpolation, antialias=True)
        return tv.center_crop(image, self.size)


def create_loader(dataset, batch_sampler, workers, device, persistent=False):
    """A DataLoader over a BatchDataset, which makes the batches itself."""
    batch_bytes = dataset.bytes_per_image * getattr(batch_sampler, "rank_batch_size", 0)
    if workers * PREFETCH_FACTOR * batch_bytes > PREFETCH_BYTES:
        dataset.prefetch_factor = 1
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        prefetch_factor=dataset.prefetch_factor if workers else None,
        worker_init_fn=_outlive_signals,
        # Its own: the workers' seed would be drawn from the generator that drop path uses.
        generator=torch.Generator(),
    )


def stop_workers(loader):
    """Ends the persistent workers of a DataLoader, at once rather than when it is deleted.

    Left to the garbage collector, the queue that tells them to end may be closed first; they would
    then end 30 seconds after SIGTERM, and Python waits for them.
    """
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


def _identity(batch):
    return batch


def _outlive_signals(worker):
    """Signals reach the whole process group. Workers must outlive them by one step, so they ignore
    all but SIGTERM, and exit 30 seconds after that."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def unpack_batches(batches, unreadable=None):
    """Yields the data of each Batch.

    Images that could not be read go to `unreadable`, an UnreadableImages; without it they are a
    UserError. A worker's error is raised as a UserError.
    """
    for batch in batches:
        if batch.error is not None:
            raise UserError(batch.error, exit_code=1, rank_local=True)
        if batch.unreadable and unreadable is None:
            path, reason = next(iter(batch.unreadable.items()))
            raise UserError(f"unreadable image {path}: {reason}", exit_code=1, rank_local=True)
        if unreadable is not None:
            unreadable.add(batch.unreadable, batch.warned)
        yield batch.data


class UnreadableImages:
    """The images that can't be read, each once: counted, limited, listed in folder/bad_images.txt.

    max_fraction: of num_images may be unreadable. A resumed run continues the list that it finds.
    Flawed images that can be decoded are used, and listed in folder/image_warnings.txt.
    Without a folder each unreadable image is reported on stderr, and the first flawed one.
    print_fn: prints on rank 0.
    """

    def __init__(self, max_fraction, num_images, folder=None, resumed=False, print_fn=print):
        self.max_fraction, self.num_images = max_fraction, num_images
        self.print_fn = print_fn
        self.path = None if folder is None else Path(folder, "bad_images.txt")
        warnings_path = None if folder is None else Path(folder, "image_warnings.txt")
        self._unreadable = _ImageList(self.path, resumed)
        self._warned = _ImageList(warnings_path, resumed)

    @property
    def all(self):
        """path → reason, of all ranks, as of the last sync."""
        return self._unreadable.all

    def add(self, unreadable, warned=None):
        """unreadable: path → reason; warned: path → message."""
        self._unreadable.add(unreadable)
        if warned and len(self._warned.all) < MAX_WARNED:
            self._warned.add(warned)

    def sync(self):
        """Collects and reports what all ranks have found since the last call; all ranks call it.

        UserError if there are more than max_fraction allows.
        """
        gathered = all_gather_object((self._unreadable.new, self._warned.new))
        new_unreadable = self._unreadable.merge([unreadable for unreadable, _ in gathered])
        new_warned = self._warned.merge([warned for _, warned in gathered])
        if is_main() and new_unreadable:
            self._report_unreadable(new_unreadable)
        if is_main() and new_warned:
            self._report_warned(new_warned)
        num_allowed = int(self.max_fraction * self.num_images + 1e-6)  # .29 · 100 is 28.999…
        if new_unreadable and len(self.all) > num_allowed:
            examples = [f"{path} ({reason})" for path, reason in list(self.all.items())[:3]]
            more = ", …" if len(self.all) > 3 else ""
            listed = f"; all are listed in {self.path}" if self.path else ""
            raise UserError(
                f"{self._count()}, --max-bad-images {self.max_fraction:g} allows {num_allowed} of "
                f"{self.num_images:,}: {', '.join(examples)}{more}{listed}",
                exit_code=1,
            )

    def _report_unreadable(self, new):
        if self.path is None:
            for path, reason in new.items():
                print(f"unreadable image {path}: {reason}", file=sys.stderr, flush=True)
        elif len(new) == len(self.all):  # the first
            path, reason = next(iter(new.items()))
            self.print_fn(
                f"unreadable image {path}: {reason}; unreadable images are skipped and listed in "
                f"{self.path}"
            )

    def _report_warned(self, new):
        if len(new) < len(self._warned.all):
            return
        path, message = next(iter(new.items()))
        text = f"image {path} is flawed: {message}; it is used nevertheless"
        if self._warned.path is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.print_fn(f"{text}, and such images are listed in {self._warned.path}")

    def __str__(self):
        return f"{self._count()} skipped: {self.path}"

    def _count(self):
        return f"{len(self.all):,} unreadable image{'' if len(self.all) == 1 else 's'}"


class _ImageList:
    """Images and what is wrong with them: `all`, path → reason, of all ranks; `new`, of this rank
    since the last merge. Rank 0 keeps it in the file `path`, or nowhere for None."""

    def __init__(self, path, resumed):
        self.path, self.all, self.new = path, {}, {}
        if path is None or not is_main() or not path.exists():
            return
        if not resumed:
            path.unlink()
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, tab, reason = line.partition("\t")
            if tab:
                self.new[name] = reason

    def add(self, images):
        self.new |= {name: reason for name, reason in images.items() if name not in self.all}

    def merge(self, gathered):
        """gathered: `new` of every rank → what is new to all of them."""
        new = {}
        for images in gathered:
            new |= {name: reason for name, reason in images.items() if name not in self.all}
        self.all, self.new = self.all | new, {}
        if new and self.path is not None and is_main():
            lines = [f"{name}\t{reason}\n" for name, reason in self.all.items()]
            # A full disk is reported when the run is saved.
            with suppress(OSError), atomic_write(self.path) as file:
                file.write("".join(lines).encode())
        return new
