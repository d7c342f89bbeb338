"""Images in, batches of two crops out: data sets, sampler, crops; all on the CPU, all uint8.

The crop and the augmentation of image i in epoch e under seed s are a pure function of (s, e, i):
the sampler hands out (epoch, index) pairs, so neither workers, nor ranks, nor a restart matter.
"""

import io
import os
import signal
import stat
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torchvision.transforms.v2 import functional as tv

from moco import UserError, distributed, one_line, reason
from moco.augment import COLUMNS, draw

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated in torchvision 0.29; PIL reads everything, more slowly
    decode_jpeg = None

NAMES = ("digits", "cifar10", "cifar100", "stl10", "flowers102", "pets")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

PREFETCH = 2  # batches that each worker prepares ahead
ATTEMPTS = 32  # at an image that can be read, before a run gives up
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # PIL refuses more: a few bytes could fill the memory


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


class Unreadable(Exception):
    """An image that can't be read: its path, printable and on one line, and the reason."""

    def __init__(self, path, reason):
        super().__init__(path, reason)
        self.path, self.reason = one_line(path), one_line(reason)


def decode(path):
    """An image file → uint8 [3, H, W], RGB, upright, alpha dropped, of several images the first.

    Unreadable: damaged, cut short, of more than MOST_PIXELS, or with pixels of unknown range.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe blocks, a device may never end
            raise ValueError("no regular file")
        data = bytearray(Path(path).read_bytes())
        if data.startswith(b"\xff\xd8"):
            frame, pixels = _jpeg_frame(data)
            # Zeros at the end, as an interrupted copy leaves them, would come out gray.
            if data.rfind(b"\xff\xd9") < frame:
                raise ValueError("the end of the JPEG is missing")
            if decode_jpeg and pixels <= MOST_PIXELS:
                try:
                    view = torch.frombuffer(data, dtype=torch.uint8)
                    return decode_jpeg(view, ImageReadMode.RGB, apply_exif_orientation=True)
                except RuntimeError:
                    pass  # PIL says better what is wrong
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PIL merely warns about, it reads
            return _decode_by_pil(data)
    except UnidentifiedImageError:
        raise Unreadable(path, "no image of a known format") from None
    except Exception as error:  # PIL raises nearly anything on a broken file
        raise Unreadable(path, getattr(error, "strerror", None) or reason(error)) from None


def _decode_by_pil(data):
    # From its bytes: from a path, PIL misreads uncompressed TIFFs that are to be turned.
    with Image.open(io.BytesIO(data)) as image:
        if image.mode == "F":
            raise ValueError("pixels are floats, whose range is unknown")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            pixels = np.asarray(image)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError("pixels are 32-bit integers, whose range is unknown")
            image = Image.fromarray((pixels / 257).astype(np.uint8))
        return tv.pil_to_tensor(image.convert("RGB"))


def _jpeg_frame(data):
    """A JPEG's bytes → where its frame header is, pixels that it announces (ITU T.81, B.1, B.2.2).

    Without a frame header that can be found: 0, infinitely many.
    """
    data, at = memoryview(data), 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[at + 5 : at + 7], data[at + 7 : at + 9]
            return at, int.from_bytes(height, "big") * int.from_bytes(width, "big")
        else:
            at += 2 + length
    return 0, float("inf")


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
            paths = train._image_files + more._image_files
            train = Files("", paths, train._labels + more._labels)
            val, classes = Files("", val._image_files, val._labels), 102
        elif name == "pets":
            train, val = (
                Files("", dataset._images, dataset._labels)
                for dataset in (
                    datasets.OxfordIIITPet(data_root, split, download=download)
                    for split in ("trainval", "test")
                )
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
    """A batch of (epoch, index) → crops uint8 [2, N, 3, H, W], parameters float32 [2, N, COLUMNS].

    size: (H, W) in pixels; crop_min: the smallest share of the area that a crop keeps. `checked`
    unpacks what is returned: Flawed where images could not be read; a UserError, because raised
    here it would reach the user inside two tracebacks.
    A worker's batch is overwritten two steps after it was asked for: clone what must stay longer.
    """

    def __init__(self, source, size, crop_min, seed):
        self.source, self.size, self.crop_min, self.seed = source, size, crop_min, seed
        self.ring = []

    def __getitems__(self, keys):
        crops = self._memory(2, len(keys), *self.size, 3).permute(0, 1, 4, 2, 3)
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
    """A batch of indices → uint8 [N, 3, H, W], without augmentation; which of the indices, [N].

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
        views = torch.stack(views) if views else torch.empty(0, 3, *self.size, dtype=torch.uint8)
        batch = views, torch.tensor(shown, dtype=torch.long)
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
