"""Images in, batches of two crops out: sampler, crops, loader; all on the CPU, all uint8.

The crop and the augmentation of image i in epoch e under seed s are a pure function of (s, e, i):
the sampler hands out (epoch, index) pairs, so neither workers, nor ranks, nor a restart matter.
"""

import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torchvision.transforms.v2 import functional as tv

from moco import UserError, distributed
from moco.augment import COLUMNS, draw
from moco.sources import Unreadable

PREFETCH = 2  # batches that each worker prepares ahead
ATTEMPTS = 32  # at an image that can be read, before a run gives up


class EpochBatches(Sampler):
    """Batches of (epoch, index) for this rank: shuffled by (seed, epoch), without repetition.

    The global batch is cut into `world` pieces in rank order, so the ranks' batches together are
    the same for any number of ranks. What doesn't fill a batch sits this epoch out (`left_out`).
    `repeats`: repeated augmentation, an epoch of as many views of fewer images, each that often.
    Iterating gives epoch `epoch` from its batch `first` on.
    """

    def __init__(self, images, batch_size, seed, repeats=1):
        if batch_size % distributed.world():
            raise UserError(
                f"--batch-size {batch_size} (of all processes together) does not divide by "
                f"{distributed.world()} processes"
            )
        if batch_size < 2 * distributed.world():
            raise UserError(f"--batch-size {batch_size}: BatchNorm needs 2 images in each process")
        if images < batch_size:
            raise UserError(f"{images} images don't fill one --batch-size {batch_size}: lower it")
        self.images, self.batch_size, self.seed, self.repeats = images, batch_size, seed, repeats
        self.epoch = self.first = 0
        shown = len(self) * batch_size
        self.left_out = images - -(-shown // repeats)  # rounded up

    def __len__(self):
        return self.images // self.batch_size

    def __str__(self):
        return f"{self.batch_size}: {len(self)} steps an epoch, {self.left_out} images left over"

    def start(self, epoch, iteration):
        """Next comes what is left of `epoch` after that many steps of the whole run."""
        self.epoch, self.first = epoch, iteration - epoch * len(self)

    def state_dict(self):
        return {"images": self.images}

    def load_state_dict(self, state):
        if not isinstance(state["images"], int):
            raise TypeError("'images' is no number")
        if state["images"] != self.images:
            raise UserError(f"the run has {state['images']} images, DIR holds {self.images} now")

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch, 0, 1))  # unlike that of any image
        order = rng.permutation(self.images).repeat(self.repeats)[: len(self) * self.batch_size]
        # Each view of an image has its own number to draw from: epoch·repeats, and 1 more, …
        epochs = self.epoch * self.repeats + np.arange(len(order)) % self.repeats
        keys = np.stack([epochs, order], 1).reshape(len(self), distributed.world(), -1, 2)
        for batch in keys[self.first :, distributed.rank()].tolist():
            yield [tuple(key) for key in batch]


class TwoCrops:
    """A batch of (epoch, index) → crops uint8 [2, N, C, H, W], parameters float32 [2, N, COLUMNS].

    size: (H, W) in pixels; crop_min: the smallest share of the area that a crop keeps. `checked`
    unpacks what is returned: Flawed where images could not be read; a UserError, because raised
    here it would reach the user inside two tracebacks.
    A worker's batch is overwritten two steps after it was asked for: clone what must stay longer.
    """

    def __init__(self, source, size, crop_min, seed):
        self.source, self.size, self.crop_min, self.seed = source, size, crop_min, seed
        self.ring = []

    def __getitems__(self, keys):
        channels = self.source.pixels.in_chans
        crops = self._memory(2, len(keys), *self.size, channels).permute(0, 1, 4, 2, 3)
        rows, bad = np.empty((2, len(keys), COLUMNS), np.float32), {}
        for n, (epoch, index) in enumerate(keys):
            rng = np.random.default_rng((self.seed, epoch, index))
            try:
                image, _ = readable(self.source, (self.seed, epoch, index), bad)
            except UserError as error:
                return error
            for view in range(2):
                box = crop_box(rng, *image.shape[1:], self.crop_min)
                crops[view, n] = resized_crop(image, box, self.size)
                rows[view, n] = draw(rng, view)
        batch = crops, torch.from_numpy(rows)
        return Flawed(batch, bad) if bad else batch

    def _memory(self, *shape):
        """uint8 of that shape. In a worker it is shared and used in turns: fresh pages for every
        batch, and a copy into them, would cost time."""
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        # PREFETCH batches wait for the main process, which holds one and may be handed the next.
        if len(self.ring) < PREFETCH + 2:
            memory = torch.empty(shape, dtype=torch.uint8).share_memory_()
        else:
            memory = self.ring.pop(0)
        self.ring.append(memory)
        return memory

    def __len__(self):
        return len(self.source)


def readable(source, key, bad):
    """The image of key = (seed, epoch, index), and its index; or another one and its index in place
    of one that can't be read, which goes into `bad`: path → reason.

    The other one is a pure function of the key. UserError if one after the other can't be read.
    """
    index, first = key[-1], None
    for attempt in range(ATTEMPTS):
        if attempt:
            rng = np.random.default_rng((*key, 1 + attempt))  # from 2: 1 is the epoch's order
            index = int(rng.integers(len(source)))
        try:
            return source.read(index), index
        except Unreadable as error:
            bad[error.path] = error.reason
            first = first or error
    raise UserError(
        f"unreadable image {first.path}: {first.reason}; and so was each of {ATTEMPTS - 1} that "
        "were drawn in its place",
        code=1,
        everywhere=True,
    )


def crop_box(rng, height, width, crop_min):
    """RandomResizedCrop's box: area U(crop_min, 1), ratio 3/4 … 4/3 → top, left, height, width."""
    for _ in range(10):
        area = height * width * rng.uniform(crop_min, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # An image too long for it: the largest centre box of an allowed ratio.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image, box, size):
    """uint8 [C, H, W] → [C, *size]; box: top, left, height, width."""
    top, left, height, width = box
    cut = image[None, :, top : top + height, left : left + width]
    # torch's fastest kernel wants the colours of a pixel side by side, and no gap between rows.
    cut = cut.contiguous(memory_format=torch.channels_last)
    return F.interpolate(cut, size, mode="bilinear", antialias=True)[0]


class LabelledCrop:
    """A batch of (epoch, index) → uint8 [N, C, H, W], labels [N]: random crop and flip.

    The training views of the linear protocol; arguments and errors as TwoCrops has them.
    """

    def __init__(self, source, size, crop_min, seed):
        self.source, self.size, self.crop_min, self.seed = source, size, crop_min, seed

    def __getitems__(self, keys):
        bad = {}
        try:
            crops, shown = zip(*(self._crop(epoch, index, bad) for epoch, index in keys))
        except UserError as error:
            return error
        batch = torch.stack(crops), self.source.labels[list(shown)]
        return Flawed(batch, bad) if bad else batch

    def _crop(self, epoch, index, bad):
        rng = np.random.default_rng((self.seed, epoch, index))
        image, shown = readable(self.source, (self.seed, epoch, index), bad)
        crop = resized_crop(image, crop_box(rng, *image.shape[1:], self.crop_min), self.size)
        return crop.flip(-1) if rng.random() < 0.5 else crop, shown

    def __len__(self):
        return len(self.source)


class CentreCrop:
    """A batch of indices → uint8 [N, C, H, W], without augmentation; which of the indices, [N].

    As in the linear protocol, resized to 256/224 of `size` and cut; an image of `size` stays as is.
    Nothing takes the place of what can't be read: N is smaller, and what is returned is Flawed.
    """

    def __init__(self, source, size, interpolation="bilinear"):
        self.source, self.size = source, size
        self.interpolation = tv.InterpolationMode(interpolation)

    def __getitems__(self, indices):
        views, shown, bad = [], [], {}
        for n, i in enumerate(indices):
            try:
                views.append(self._view(self.source.read(i)))
                shown.append(n)
            except Unreadable as error:
                bad[error.path] = error.reason
        none = torch.empty(0, self.source.pixels.in_chans, *self.size, dtype=torch.uint8)
        batch = torch.stack(views) if views else none, torch.tensor(shown, dtype=torch.long)
        return Flawed(batch, bad) if bad else batch

    def _view(self, image):
        if image.shape[1:] == self.size:
            return image
        # Of a strip the middle: the rest would be enlarged first, to gigabytes maybe, and cut then.
        (height, width), (h, w) = image.shape[1:], self.size
        most = max(1, 16 * width * h // w), max(1, 16 * height * w // h)
        image = tv.center_crop(image, [min(height, most[0]), min(width, most[1])])
        scale = max(s * 256 / 224 / side for s, side in zip(self.size, image.shape[1:]))
        # Down, as torchvision's Resize has it; 1e-6 for 255.999….
        resized = [max(s, int(side * scale + 1e-6)) for s, side in zip(self.size, image.shape[1:])]
        return tv.center_crop(
            tv.resize(image, resized, self.interpolation, antialias=True), self.size
        )

    def __len__(self):
        return len(self.source)


def create_loader(dataset, batches, workers, device, persistent=False):
    """DataLoader over a dataset that makes its own batches."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_outlive_signals,
        # Its own: the seed of the workers would be drawn from the generator that drop path uses.
        generator=torch.Generator(),
    )


def _as_is(batch):
    return batch


def _outlive_signals(worker):
    """What ends a run reaches a worker, too, which is needed for one step more: later, it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))  # seconds


class Flawed(NamedTuple):
    """A batch, and what could not be read for it: path → reason."""

    batch: object
    bad: dict


def checked(batches, bad=None):
    """Yields them. What could not be read goes to `bad`, BadImages, and is an error without it; a
    UserError that a worker sent in place of a batch is raised."""
    for batch in batches:
        if isinstance(batch, Flawed):
            if bad is None:
                path, why = next(iter(batch.bad.items()))
                raise UserError(f"unreadable image {path}: {why}", code=1, everywhere=True)
            bad.news |= batch.bad
            batch = batch.batch
        if isinstance(batch, UserError):
            raise batch
        yield batch


class BadImages:
    """The images that can't be read, each once: a count, a limit, a list in folder/bad_images.txt.

    share: so much of `images`, a number, may be bad. A resumed run goes on with the list that it
    finds. Without a folder each is told on stderr.
    """

    def __init__(self, share, images, folder=None, resumed=False):
        self.share, self.images = share, images
        self.path = None if folder is None else Path(folder, "bad_images.txt")
        self.say = print  # on rank 0
        self.found, self.news = {}, {}  # path → reason: of all ranks; of this one, not told yet
        if self.path and distributed.rank() == 0:
            if resumed and self.path.exists():
                lines = self.path.read_text(encoding="utf-8").splitlines()
                self.news = dict(line.split("\t", 1) for line in lines if "\t" in line)
            elif self.path.exists():
                self.path.unlink()

    def meet(self):
        """All ranks together: what each has found since is told. UserError if that is too much."""
        everyone = [self.news]
        if distributed.world() > 1:
            everyone = [None] * distributed.world()
            dist.all_gather_object(everyone, self.news)
        new = {
            path: why for news in everyone for path, why in news.items() if path not in self.found
        }
        first = not self.found
        self.found, self.news = self.found | new, {}
        if not new:
            return
        if distributed.rank() == 0:
            self._tell(new, first)
        allowed = int(self.share * self.images + 1e-6)  # .29 · 100 is 28.999…
        if len(self.found) > allowed:
            some = ", ".join(f"{path} ({why})" for path, why in list(self.found.items())[:3])
            raise UserError(
                f"{self._count()}, --max-bad-images {self.share:g} allows {allowed} of "
                f"{self.images:,}: {some}{', …' * (len(self.found) > 3)}"
                + (f"; all are listed in {self.path}" if self.path else ""),
                code=1,
            )

    def _tell(self, new, first):
        if not self.path:
            for path, why in new.items():
                print(f"unreadable image {path}: {why}", file=sys.stderr, flush=True)
            return
        temporary = self.path.with_suffix(".tmp")
        lines = (f"{path}\t{why}\n" for path, why in self.found.items())
        with suppress(OSError):  # a full disk is told when the run is saved
            temporary.write_text("".join(lines), encoding="utf-8")
            temporary.replace(self.path)
        if first:
            path, why = next(iter(new.items()))
            self.say(f"unreadable image {path}: {why}; such are left out and listed in {self.path}")

    def __str__(self):
        return f"{self._count()} left out: {self.path}"

    def _count(self):
        return f"{len(self.found):,} unreadable image{'s' * (len(self.found) > 1)}"
