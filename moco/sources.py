"""Where images come from: folders of files and named sets, each image read as uint8 [3, H, W]."""

import io
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tv

from moco import UserError, distributed, reason

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated in torchvision 0.29; PIL reads everything, more slowly
    decode_jpeg = None

NAMES = ("digits", "cifar10", "cifar100", "stl10", "flowers102", "pets")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

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
        self.path, self.reason = (
            "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
            for text in (path, reason)
        )


def decode(path):
    """An image file → uint8 [3, H, W], RGB, upright, alpha dropped, of several images the first.

    Unreadable: damaged, cut short, of more than MOST_PIXELS, or with pixels of unknown range.
    """
    try:
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
