"""Images in, batches of two crops out: data sets, sampler, crops; all on the CPU, all uint8.

The crop and the augmentation of image i in epoch e under seed s are a pure function of (s, e, i):
the sampler hands out (epoch, index) pairs, so neither workers, nor ranks, nor a restart matter.
"""

import os
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import ConcatDataset, DataLoader, Sampler, get_worker_info
from torchvision.transforms.v2 import functional as tv

from moco import UserError, distributed, reason
from moco.augment import COLUMNS, draw

try:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
except ImportError:  # deprecated in torchvision 0.29; PIL reads everything, more slowly
    decode_jpeg = None

NAMES = ("digits", "cifar10", "cifar100", "stl10", "flowers102", "pets")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

PREFETCH = 2  # batches that each worker prepares ahead


class Data(NamedTuple):
    """What a name or a folder holds. bank and val, both labelled, are for the kNN; or None."""

    train: object
    bank: object
    val: object
    classes: int
    note: str = ""

    def __str__(self):
        labels = f"{len(self.val):,} to validate" if self.val else self.note
        return f"{len(self.train):,} images to train on, {labels}"

    def labelled_in_words(self):
        return (
            f"{len(self.bank):,} images to train on, {len(self.val):,} to validate, "
            f"{self.classes} classes"
        )


class Arrays:
    """Images in memory: uint8 [n, 3, H, W], labels [n] or None."""

    def __init__(self, images, labels=None):
        self.images = torch.as_tensor(images)
        self.labels = None if labels is None else torch.as_tensor(labels).long()

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return self.images[i]


class Files:
    """Image files, decoded when read: paths below `root`, labels [n] or None."""

    def __init__(self, root, paths, labels=None):
        self.root = str(root)
        # One array of bytes: a million str objects would be copied, page by page, into each
        # forked worker as their reference counts change.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = None if labels is None else torch.as_tensor(labels)

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        return decode(os.path.join(self.root, os.fsdecode(self.paths[i])))


class Wrapped:
    """torchvision data sets that decode when read, one after the other."""

    def __init__(self, *datasets):
        self.images = ConcatDataset(datasets)
        # Flowers102 and OxfordIIITPet show their labels nowhere but beside the decoded image.
        self.labels = torch.cat([torch.as_tensor(dataset._labels) for dataset in datasets])

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return tv.pil_to_tensor(self.images[i][0])


def decode(path):
    """An image file → uint8 [3, H, W], RGB, upright. UserError if it can't be read."""
    try:
        if decode_jpeg and path.lower().endswith((".jpg", ".jpeg")):
            try:
                data = read_file(path)
                return decode_jpeg(data, ImageReadMode.RGB, apply_exif_orientation=True)
            except RuntimeError:
                pass  # PIL reads some that it doesn't, and says better what is wrong
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("pixels are floats, whose range is unknown")
            return tv.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # PIL raises nearly anything on a broken file
        message = f"unreadable image {path}: {reason(error)}"
        raise UserError(message, code=1, everywhere=True) from None


def load_data(where, data_root="data"):
    """A name of NAMES, or a folder → Data.

    A folder with train/ and val/ holds classes; any other is taken as images without labels, at any
    depth. UserError for what is missing, empty, or can't be downloaded.
    """
    if where in NAMES:
        if where == "digits":
            return _digits()
        # One process downloads, then one of each host that doesn't see its files, then the rest
        # find them in place.
        turn = 0 if distributed.rank() == 0 else 1 if distributed.local_rank() == 0 else 2
        for now in range(3):
            if now == turn:
                data = _torchvision(where, data_root, download=turn < 2)
            distributed.barrier()
        return data

    root = Path(where)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"{where} {what}: give a folder of images or one of: {' '.join(NAMES)}")
    if not (root / "train").is_dir():
        note = "no train/ below it: all images, without labels; kNN is off"
        return Data(Files(root, _list(root)), None, None, 0, note)

    train, classes = _class_folder(root / "train")
    if not classes:
        return Data(train, None, None, 0, "train/ has no class folders; kNN is off")
    if not (root / "val").is_dir():
        return Data(train, None, None, len(classes), "no val/ beside train/; kNN is off")
    val, val_classes = _class_folder(root / "val")
    if not val_classes:
        raise UserError(f"{root}/val has no class folders, while train/ has {len(classes)}")
    if strange := sorted(set(val_classes) - set(classes)):
        raise UserError(f"{root}/val has classes that train/ lacks: {' '.join(strange[:5])}")
    renumber = torch.tensor([classes.index(name) for name in val_classes])
    val.labels = renumber[val.labels]
    return Data(train, train, val, len(classes))


def _class_folder(root):
    """root/CLASS/…/image → Files with labels, class names; no class folders: no labels, []."""
    entries = list(os.scandir(root))
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        return Files(root, _list(root)), []
    if loose := [e.name for e in entries if e.name.lower().endswith(EXTENSIONS) and e.is_file()]:
        raise UserError(f"{root} has class folders and {len(loose)} images beside them: {loose[0]}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = _list(root / name)
        paths += [os.path.join(name, path) for path in found]
        labels += [label] * len(found)
    return Files(root, paths, labels), classes


def _list(root):
    """Paths of all images at any depth, relative to root, sorted. UserError if there are none."""
    found, folders = [], [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as error:
            raise UserError(f"can't list {root}/{folder}: {error.strerror}") from None
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.is_dir():
                folders.append(path)
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append(path)
    if not found:
        raise UserError(f"{root} holds no images (looked for {' '.join(EXTENSIONS)})")
    return sorted(found)


def _digits():
    """scikit-learn's 1,797 handwritten digits, enlarged from 8×8 to 16×16; every fifth is val."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16 * 255).round().to(torch.uint8).view(-1, 1, 8, 8)
    images = tv.resize(images, [16, 16], antialias=True).expand(-1, 3, -1, -1).contiguous()
    val = torch.arange(len(images)) % 5 == 0
    labels = torch.tensor(labels)
    train = Arrays(images[~val], labels[~val])
    return Data(train, train, Arrays(images[val], labels[val]), 10)


def _torchvision(name, data_root, download):
    def arrays(dataset):
        images = np.asarray(dataset.data)  # CIFAR: [n, H, W, 3], STL: [n, 3, H, W]
        images = images if images.shape[1] == 3 else images.transpose(0, 3, 1, 2)
        labels = getattr(dataset, "targets", None)
        return Arrays(np.ascontiguousarray(images), dataset.labels if labels is None else labels)

    datasets = torchvision.datasets
    try:
        if name == "stl10":
            unlabelled, train, val = (
                arrays(datasets.STL10(data_root, split, download=download))
                for split in ("train+unlabeled", "train", "test")
            )
            return Data(unlabelled, train, val, 10)
        if name == "flowers102":  # train and val, 2,040 images, are what the protocols train on
            train, more, val = (
                datasets.Flowers102(data_root, split, download=download)
                for split in ("train", "val", "test")
            )
            train, val, classes = Wrapped(train, more), Wrapped(val), 102
        elif name == "pets":
            train, val = (
                Wrapped(datasets.OxfordIIITPet(data_root, split, download=download))
                for split in ("trainval", "test")
            )
            classes = 37
        else:
            dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            train, val = (
                arrays(dataset(data_root, train, download=download)) for train in (True, False)
            )
            classes = int(train.labels.max()) + 1
        return Data(train, train, val, classes)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no {name} under --data-root {data_root}, and no download: {reason(error)}"
        ) from None


def labelled(data, where):
    """`data` if a classifier can be trained and measured on it; UserError otherwise."""
    if not data.val:
        raise UserError(f"{where} needs train/ and val/ with a folder for each class: {data.note}")
    if data.classes < 2:
        raise UserError(f"{where} holds a single class: there is nothing to tell apart")
    return data


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
    """A batch of (epoch, index) → crops uint8 [2, N, 3, H, W], parameters float32 [2, N, COLUMNS].

    size: (H, W) in pixels; crop_min: the smallest share of the area that a crop keeps. Returns a
    UserError in place of the batch: raised here, it would reach the user inside two tracebacks.
    A worker's batch is overwritten two steps after it was asked for: clone what must stay longer.
    """

    def __init__(self, source, size, crop_min, seed):
        self.source, self.size, self.crop_min, self.seed = source, size, crop_min, seed
        self.ring = []

    def __getitems__(self, keys):
        crops = self._memory(2, len(keys), *self.size, 3).permute(0, 1, 4, 2, 3)
        rows = np.empty((2, len(keys), COLUMNS), np.float32)
        for n, (epoch, index) in enumerate(keys):
            rng = np.random.default_rng((self.seed, epoch, index))
            try:
                image = self.source.read(index)
            except UserError as error:
                return error
            for view in range(2):
                box = crop_box(rng, *image.shape[1:], self.crop_min)
                crops[view, n] = resized_crop(image, box, self.size)
                rows[view, n] = draw(rng, view)
        return crops, torch.from_numpy(rows)

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
    """uint8 [3, H, W] → [3, *size]; box: top, left, height, width."""
    top, left, height, width = box
    cut = image[None, :, top : top + height, left : left + width]
    # torch's fastest kernel wants the colours of a pixel side by side, and no gap between rows.
    cut = cut.contiguous(memory_format=torch.channels_last)
    return F.interpolate(cut, size, mode="bilinear", antialias=True)[0]


class LabelledCrop:
    """A batch of (epoch, index) → uint8 [N, 3, H, W], labels [N]: random crop and flip.

    The training views of the linear protocol; arguments and errors as TwoCrops has them.
    """

    def __init__(self, source, size, crop_min, seed):
        self.source, self.size, self.crop_min, self.seed = source, size, crop_min, seed

    def __getitems__(self, keys):
        try:
            crops = torch.stack([self._crop(*key) for key in keys])
        except UserError as error:
            return error
        return crops, self.source.labels[[index for _, index in keys]]

    def _crop(self, epoch, index):
        rng = np.random.default_rng((self.seed, epoch, index))
        image = self.source.read(index)
        crop = resized_crop(image, crop_box(rng, *image.shape[1:], self.crop_min), self.size)
        return crop.flip(-1) if rng.random() < 0.5 else crop

    def __len__(self):
        return len(self.source)


class CentreCrop:
    """A batch of indices → uint8 [N, 3, H, W], without augmentation.

    As in the linear protocol, resized to 256/224 of `size` and cut; an image of `size` stays as is.
    """

    def __init__(self, source, size, interpolation="bilinear"):
        self.source, self.size = source, size
        self.interpolation = tv.InterpolationMode(interpolation)

    def __getitems__(self, indices):
        try:
            return torch.stack([self._view(self.source.read(i)) for i in indices])
        except UserError as error:
            return error

    def _view(self, image):
        if image.shape[1:] == self.size:
            return image
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


def checked(batches):
    """Yields them; a UserError that a worker sent in place of one is raised."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch
