"""Where images come from, and how they are read: as uint8 [C, H, W], on the CPU.

A source has images, `read(i)`, as many as its length, `labels` [n] or None, and Pixels. `load_data`
finds those of a folder, a list, a Hugging Face data set or a named one.
"""

import io
import logging
import math
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

from moco import UserError, distributed, one_line, reason
from moco.augment import RGB, luminance

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated in torchvision 0.29; PIL reads everything, more slowly
    decode_jpeg = None
else:
    JPEG_MODES = {3: ImageReadMode.RGB, 1: ImageReadMode.GRAY}

NAMES = ("digits", "cifar10", "cifar100", "stl10", "flowers102", "pets")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such a file begins
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # PIL refuses more: a few bytes could fill the memory


class Data(NamedTuple):
    """What a name or a folder holds. bank and val, both labelled, are for the kNN; or None."""

    train: object
    bank: object
    val: object
    classes: int
    note: str = ""
    names: list = ()  # of the classes, where they are known

    def __str__(self):
        labels = f"{len(self.val):,} to validate" if self.val else self.note
        return f"{len(self.train):,} images to train on, {labels}"

    def labelled_in_words(self):
        return (
            f"{len(self.bank):,} images to train on, {len(self.val):,} to validate, "
            f"{self.classes} classes"
        )


class Arrays:
    """Images in memory: uint8 [n, C, H, W], labels [n] or None; as one channel, their luminance."""

    pixels = RGB

    def __init__(self, images, labels=None):
        self.images = torch.as_tensor(images)
        self.labels = None if labels is None else torch.as_tensor(labels).long()

    def __len__(self):
        return len(self.images)

    def read(self, i):
        image = self.images[i]
        if len(image) > self.pixels.in_chans == 1:
            image = luminance(image.float()).round().to(torch.uint8)
        return image


class Files:
    """Image files, decoded when read: paths below `root`, labels [n] or None."""

    pixels = RGB

    def __init__(self, root, paths, labels=None):
        self.root = str(root)
        # One array of bytes: a million str objects would be copied, page by page, into each
        # forked worker as their reference counts change.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = None if labels is None else torch.as_tensor(labels)

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        return decode(os.path.join(self.root, os.fsdecode(self.paths[i])), self.pixels)


class Rows:
    """Images of a Hugging Face data set, read from its Arrow files one by one; labels as above."""

    pixels, labels = RGB, None

    def __init__(self, rows, column, name):
        self.rows, self.column, self.name = rows, column, name

    def __len__(self):
        return len(self.rows)

    def read(self, i):
        name = f"{self.name}, row {int(i)}"
        try:
            image = self.rows[int(i)][self.column]
            data, path = image["bytes"], image["path"]
        except Exception as error:  # damaged files, rows without an image
            raise Unreadable(name, reason(error)) from None
        return decode(path, self.pixels) if data is None else decode(name, self.pixels, data)


class Unreadable(Exception):
    """An image that can't be read: its path, printable and on one line, and the reason."""

    def __init__(self, path, reason):
        super().__init__(path, reason)
        self.path, self.reason = one_line(path), one_line(reason)


def decode(path, pixels=RGB, data=None):
    """An image file, or its bytes → uint8 [C, H, W], upright, of several images the first.

    RGB and gray become each other, alpha is dropped; any other number of channels must be that of
    the file: a TIFF, its pages or its samples, or a .npy of [H, W, C]. More than 8 bits a channel
    are scaled by pixels.max_value. Unreadable: damaged, cut short, of more than MOST_PIXELS, of
    another number of channels, or of unknown range.
    """
    try:
        if data is None:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe blocks, a device may never end
                raise ValueError("no regular file")
            data = Path(path).read_bytes()
        data = bytearray(data)
        if data.startswith(b"\xff\xd8"):
            frame, count = _jpeg_frame(data)
            # Zeros at the end, as an interrupted copy leaves them, would come out gray.
            if data.rfind(b"\xff\xd9") < frame:
                raise ValueError("the end of the JPEG is missing")
            if decode_jpeg and count <= MOST_PIXELS and pixels.in_chans in JPEG_MODES:
                mode = JPEG_MODES[pixels.in_chans]
                try:
                    view = torch.frombuffer(data, dtype=torch.uint8)
                    return decode_jpeg(view, mode, apply_exif_orientation=True)
                except RuntimeError:
                    pass  # PIL says better what is wrong
        if data.startswith(b"\x93NUMPY"):
            return _as_image(np.load(io.BytesIO(data)), pixels)
        if data.startswith(TIFF) and (pixels.in_chans not in (1, 3) or pixels.max_value):
            return _as_image(_read_tiff(data), pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PIL merely warns about, it reads
            return _decode_by_pil(data, pixels)
    except UnidentifiedImageError:
        raise Unreadable(path, "no image of a known format") from None
    except Exception as error:  # PIL raises nearly anything on a broken file
        raise Unreadable(path, getattr(error, "strerror", None) or reason(error)) from None


def _decode_by_pil(data, pixels):
    # From its bytes: from a path, PIL misreads uncompressed TIFFs that are to be turned.
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG" and data[24] == 16 and image.mode[0] != "I" and pixels.max_value:
            raise ValueError("PIL reads 8 of its 16 bits: --max-value can't act")
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip at 255
            image = Image.fromarray(_eight_bits(np.asarray(image), pixels.max_value))
        if pixels.in_chans not in (1, 3):
            return _as_image(np.asarray(image), pixels)
        return tv.pil_to_tensor(image.convert("RGB" if pixels.in_chans == 3 else "L"))


def _read_tiff(data):
    """Its pages or its samples, which PIL reads three of at most → [H, W] or [H, W, C]."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # the reason is told without it
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        axes = [series.axes.index("Y"), series.axes.index("X")]
        if math.prod(series.shape[axis] for axis in axes) > MOST_PIXELS:
            raise ValueError(f"its size, {series.shape}, exceeds limit of {MOST_PIXELS} pixels")
        return np.moveaxis(series.asarray(), axes, (0, 1))


def _as_image(array, pixels):
    """Numbers of any type, [H, W] or [H, W, C] → uint8 [C, H, W], C as in `pixels`."""
    n, found = pixels.in_chans, array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"its shape is {array.shape}, not height, width, {n}")
    if found != n and not (n in (1, 3) and found <= 4):
        raise ValueError(f"it has {found} channel(s), not --in-chans {n}: {array.shape}")
    array = _eight_bits(array.reshape(*array.shape[:2], found), pixels.max_value)
    if found != n:
        image = Image.fromarray(array.squeeze(2) if found == 1 else array)
        array = np.asarray(image.convert("RGB" if n == 3 else "L")).reshape(*array.shape[:2], n)
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def _eight_bits(array, max_value):
    """Numbers of any type → uint8; of more than 8 bits, max_value becomes 255."""
    if array.dtype in (np.uint8, bool):
        return array.astype(np.uint8) * (255 if array.dtype == bool else 1)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"pixels are {array.dtype}")
    if max_value is None:
        if array.dtype.kind == "f" or array.min() < 0 or array.max() > 65535:
            raise ValueError(f"pixels are {array.dtype}, whose range is unknown: --max-value V")
        max_value = 65535
    return (np.nan_to_num(array).clip(0, max_value) / (max_value / 255)).astype(np.uint8)


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


def load_data(where, data_root="data", pixels=RGB, hf_columns=None, hf_splits=None):
    """What DIR names → Data: a folder, a list in a .txt, hf:NAME, or one of NAMES.

    A folder with train/ and val/ holds classes, one with train.txt and val.txt lists; any other is
    taken as images without labels, at any depth. hf_columns: of the image and of the label;
    hf_splits: to train on and to validate. UserError for what is missing, empty, or can't be
    downloaded.
    """
    if where.startswith("hf:"):
        data = _in_turns(lambda _: _hugging_face(where, hf_columns, hf_splits))
    elif hf_columns or hf_splits:
        raise UserError(f"--hf-columns and --hf-splits are for hf:NAME, not for {where}")
    elif where in NAMES:
        if pixels.in_chans not in (1, 3) or pixels.max_value:
            raise UserError(f"{where} is of 8-bit RGB: --in-chans 3 or 1, without --max-value")
        if where == "digits":
            data = _digits()
        else:
            data = _in_turns(lambda download: _torchvision(where, data_root, download))
    else:
        extensions = EXTENSIONS + (".npy",) * (pixels.in_chans != 3)
        data = distributed.once_per_host(lambda: _files(where, extensions))
    for source in data[:3]:
        if source:
            source.pixels = pixels
    return data


def _in_turns(load):
    """load(download) of one process, then of one of each host that doesn't see its files; then the
    rest find them in place."""
    turn = 0 if distributed.rank() == 0 else 1 if distributed.local_rank() == 0 else 2
    for now in range(3):
        if now == turn:
            data = load(turn < 2)
        distributed.barrier()
    return data


def _files(where, extensions):
    root = Path(where)
    lists = root / "train.txt", root / "val.txt"
    if root.suffix == ".txt" and root.is_file():
        train, val = _read_list(root, extensions), None
        return _labelled(where, train, val, no_val="a single list has no images to validate")
    if not root.is_dir():
        what = "is a file, not a folder or a .txt" if root.exists() else "does not exist"
        raise UserError(
            f"{where} {what}: give a folder of images, a list.txt, hf:NAME, or one of: "
            f"{' '.join(NAMES)}"
        )
    if (root / "train").is_dir():
        train = _class_folders(root / "train", extensions)
        val = _class_folders(root / "val", extensions) if (root / "val").is_dir() else None
        names = train[1] and sorted(set(train[1]))
        return _labelled(where, train, val, "class folders", "no val/ beside train/", names)
    if all(path.is_file() for path in lists):
        return _labelled(where, *(_read_list(path, extensions) for path in lists))
    paths, _ = _list(root, extensions)
    note = "no train/ below it: all images, without labels; kNN is off"
    return Data(Files(root, sorted(paths)), None, None, 0, note)


def _labelled(where, train, val, kind="labels", no_val="", names=None):
    """Two pairs of a source and its labels, a list of names or None → Data; val may be None.

    kind: what labels are called; no_val: what is missing without val; names: of the classes in
    order; None: that of numbers if all are, else of the alphabet.
    """
    source, labels = train
    if labels is None:
        return Data(source, None, None, 0, f"the training images have no {kind}; kNN is off")
    if names is None:
        numbers = all(name.isdecimal() for name in labels)
        names = sorted(set(labels), key=int if numbers else None)
    number = {name: i for i, name in enumerate(names)}
    source.labels = torch.tensor([number[name] for name in labels])
    if val is None:
        return Data(source, None, None, len(names), f"{no_val}; kNN is off", names)
    held_out, labels = val
    if labels is None:
        raise UserError(f"{where}: val has no {kind}, while train has {len(names)} classes")
    if strange := sorted(set(labels) - set(names)):
        raise UserError(f"{where}: val has classes that train lacks: {' '.join(strange[:5])}")
    held_out.labels = torch.tensor([number[name] for name in labels])
    return Data(source, source, held_out, len(names), names=names)


def _class_folders(root, extensions):
    """root/CLASS/…/image → Files, a class for each; no class folders: Files, None."""
    paths, folders = _list(root, extensions)
    if not folders:
        return Files(root, sorted(paths)), None
    if loose := [path for path in paths if os.sep not in path]:
        raise UserError(f"{root} has class folders and {len(loose)} images beside them: {loose[0]}")
    paths.sort(key=lambda path: path.replace(os.sep, "\0", 1))  # by the class, then by the rest
    labels = [path[: path.index(os.sep)] for path in paths]
    if empty := sorted(folders - set(labels)):
        raise UserError(f"{root}/{empty[0]} holds no images (looked for {' '.join(extensions)})")
    return Files(root, paths), labels


def _list(root, extensions):
    """Paths of all images at any depth, relative to root; names of the folders in root itself.

    One pass, and a line about it when that takes long. UserError if there are no images.
    """
    found, folders = [], [""]
    bar = tqdm(
        desc=f"listing {root}", unit=" images", delay=2, mininterval=1, leave=False,
        disable=distributed.rank() != 0,
    )  # fmt: skip
    with bar:
        while folders:
            folder = folders.pop()
            try:
                for entry in os.scandir(os.path.join(root, folder)):
                    path = os.path.join(folder, entry.name)
                    if entry.is_dir():
                        folders.append(path)
                    elif entry.name.lower().endswith(extensions):
                        found.append(path)
                        bar.update()
            except OSError as error:
                raise UserError(f"can't list {root}/{folder}: {error.strerror}") from None
            if not folder:
                top = set(folders)
    if not found:
        raise UserError(f"{root} holds no images (looked for {' '.join(extensions)})")
    return found, top


def _read_list(path, extensions):
    """A .txt → Files, a label for each, or None: lines of a path below its folder, or of that, a
    tab and a label. UserError, naming the line, for a path that leads out of the folder."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    paths, labels = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        entry, _, label = line.partition("\t")
        entry = os.path.normpath(entry)
        if os.path.isabs(entry) or entry.split(os.sep)[0] == os.pardir:
            raise UserError(f"{path}, line {number}: {entry} leads out of the folder of the list")
        if not entry.lower().endswith(extensions):
            raise UserError(
                f"{path}, line {number}: {entry} is no name of an image (known: "
                f"{' '.join(extensions)}); a label goes after a tab"
            )
        paths.append(entry)
        labels.append(label.strip())
        if bool(labels[-1]) != bool(labels[0]):
            raise UserError(f"{path}, line {number}: either each line has a label, or none has")
    if not paths:
        raise UserError(f"{path} names no images")
    return Files(path.parent, paths), labels if labels[0] else None


def _hugging_face(where, columns, splits):
    """hf:DIR, which save_to_disk wrote, or hf: and what load_dataset takes → Data."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{where} needs Hugging Face's datasets: pip install datasets") from None
    name = where.removeprefix("hf:")
    saved = any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # as many kinds as there are ways to keep data
        raise UserError(f"can't load {where}: {reason(error)}") from None
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    if not splits:
        splits = ["train", *[name for name in ("validation", "val", "test") if name in found][:1]]
    if strange := [name for name in splits if name not in found]:
        has = " ".join(map(str, found))
        raise UserError(f"{where} has no {strange[0]}, but {has}: choose by --hf-splits TRAIN VAL")

    features = found[splits[0]].features
    if not columns:
        images, labels = (
            [name for name, feature in features.items() if isinstance(feature, kind)]
            for kind in (datasets.Image, datasets.ClassLabel)
        )
        if len(images) != 1 or len(labels) > 1:
            has = f"{len(images)} columns of images and {len(labels)} of labels"
            has += f" among {' '.join(features)}"
            raise UserError(f"{where} has {has}: choose by --hf-columns IMAGE LABEL")
        columns = images + labels
    parts = [_rows(found[split], columns, f"{where} {split}") for split in splits]
    names = getattr(features[columns[-1]], "names", None)  # of a ClassLabel
    train, val = (*parts, None)[:2]
    return _labelled(where, train, val, no_val="no split to validate", names=names)


def _rows(rows, columns, name):
    """A split and the columns of its image and its label → Rows, their labels by name, or None."""
    import datasets

    if strange := [column for column in columns if column not in rows.features]:
        raise UserError(f"{name} has no column {strange[0]}, but {' '.join(rows.features)}")
    image, *label = columns
    kind = rows.features[label[0]] if label else None
    if label and not isinstance(kind, datasets.ClassLabel | datasets.Value):
        raise UserError(f"{name}: column {label[0]} holds no labels")
    try:
        images = rows.select_columns(image).cast_column(image, datasets.Image(decode=False))
        labels = rows.with_format("numpy")[label[0]][:].tolist() if label else None
    except Exception as error:  # columns of another type
        raise UserError(f"{name}: column {image} holds no images: {reason(error)}") from None
    if labels and isinstance(kind, datasets.ClassLabel):
        # -1: test sets whose labels are kept secret.
        labels = None if min(labels) < 0 else [kind.names[i] for i in labels]
    elif labels:
        labels = [str(value) for value in labels]
    return Rows(images, image, name), labels


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
        raise UserError(f"{where} needs labelled images to train on and to validate: {data.note}")
    if data.classes < 2:
        raise UserError(f"{where} holds a single class: there is nothing to tell apart")
    return data
