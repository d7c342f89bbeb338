"""Datasets of images, and what is known of their classes.

A dataset has a length, `labels` [n] or None, `pixel_format`, and for image i read(i) → uint8
[C, H, W], name(i), which is printable, and raw_bytes(i) for the digest.
"""

import hashlib
import os
import stat
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from engine.data.decode import RGB, UnreadableImage, decode_image
from engine.errors import (
    UserError,
    cant_read,
    failure_reason,
    first_line,
    is_machine_failure,
    printable,
)
from moco.augmentation import luminance

DIGEST_IMAGES = 64  # images whose content is part of a digest
DIGEST_BYTES = 2**20  # at most so much of each file
MAX_FILE_BYTES = 2**30  # 100 megapixels of 16-bit RGB have 0.6 · 2³⁰
MAX_NAME = 4096  # characters of a path below DIR, and of a label; Linux has no longer paths
RETRY_SECONDS = (1, 2, 4, 8, 15)  # to wait before reading again, after a failure of the system


class ArrayDataset:
    """Images in memory: uint8 [n, C, H, W], labels [n] or None; gray and RGB become each other."""

    def __init__(self, images, labels=None, pixel_format=RGB):
        self.images = torch.as_tensor(images)
        self.labels = None if labels is None else torch.as_tensor(labels).long()
        self.pixel_format = pixel_format

    def __len__(self):
        return len(self.images)

    def read(self, i):
        image = self.images[i]
        if self.pixel_format.in_chans == 1 and len(image) > 1:
            image = luminance(image.float()).round().to(torch.uint8)
        if self.pixel_format.in_chans == 3 and len(image) == 1:
            image = image.repeat(3, 1, 1)
        return image

    def name(self, i):
        return str(int(i))

    def raw_bytes(self, i):
        return self.images[i].numpy().tobytes()


class EncodedDataset:
    """Images that are decoded when they are read.

    A subclass defines __len__, name(i) and get_bytes(i), the content of an image file.
    list_path: of the list that names the images, if there is one.
    """

    labels = list_path = None

    def read(self, i):
        """UnreadableImage for wrong content; UserError for a failure of the system that lasts."""
        return _read(
            lambda: decode_image(self.get_bytes(i), self.pixel_format), self.name(i), self.list_path
        )

    def raw_bytes(self, i):
        """What tells the image from others: its size and its first bytes; empty if unreadable."""
        try:
            data = _read(lambda: self.get_bytes(i), self.name(i), self.list_path)
        except UnreadableImage:
            return b""
        return b"%d " % len(data) + data[:DIGEST_BYTES]


class ImageFileDataset(EncodedDataset):
    """Image files: paths below `root`, labels [n] or None."""

    def __init__(self, root, paths, labels=None, pixel_format=RGB, list_path=None):
        self.root, self.paths, self.list_path = str(root), PathList(paths), list_path
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.pixel_format = pixel_format

    def __len__(self):
        return len(self.paths)

    def path(self, i):
        """Path of the file, with the root."""
        return os.path.join(self.root, self.paths[i])

    def name(self, i):
        return printable(self.path(i))

    def get_bytes(self, i):
        return read_file(self.path(i))


class PathList:
    """Paths in one array of bytes.

    A million str objects would be copied, page by page, into each forked worker as their reference
    counts change; np.array of them makes all as long as the longest.
    """

    def __init__(self, paths):
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.characters = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.characters[start : self.ends[i]].tobytes())


def read_image(path, pixel_format=RGB):
    """An image file → uint8 [C, H, W], upright; UnreadableImage if it can't be read."""
    return _read(lambda: decode_image(read_file(path), pixel_format), str(path))


def _read(read, name, list_path=None):
    """read(), of the image called `name`, repeated while the system fails.

    A file that is missing or locked is a failure of the system, too: a share may be gone.
    list_path: of the list that names the image.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # PIL raises nearly anything on a broken file
            if not is_machine_failure(error):
                raise UnreadableImage(name, first_line(error)) from None
            if _is_removed(error):
                hint = f": put it there, or remove it from {list_path}" if list_path else ""
                text = f"can't read {name}: {failure_reason(error)}{hint}"
                raise UserError(text, exit_code=1, rank_local=True) from None
            if seconds is None:
                raise cant_read(name, error, f" (tried for {sum(RETRY_SECONDS)} s)") from None
        time.sleep(seconds)


def _is_removed(error):
    """Whether a file is missing beside others: of a share that is gone, its folder is empty."""
    if not isinstance(error, FileNotFoundError) or error.filename is None:
        return False
    folder = os.path.dirname(os.path.realpath(error.filename))  # a link may lead to the share
    try:
        return bool(os.listdir(folder))
    except OSError:
        return False


def read_file(path):
    """The content of a regular file: a pipe would block, a device may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    check_file_size(status.st_size)
    with open(path, "rb") as file:
        return file.read(status.st_size)  # as much is allocated


def check_file_size(size):
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size:,} bytes are more than an image may have, {MAX_FILE_BYTES:,}")


class Listing(NamedTuple):
    """What lies in a place: plain facts, which rank 0 finds and broadcasts.

    names: of the images, below `root`. ignored: the number of other files by extension. labels:
    those that a list or an archive states, "" for an image without; None: folders are the labels.
    flaw: as in Part. list_path: as in EncodedDataset. empty: folders without images. index: a
    tar.TarIndex of images in archives.
    """

    root: str
    names: list[str]
    ignored: Counter
    labels: list[str] | None = None
    flaw: str = ""
    list_path: str | None = None
    empty: tuple[str, ...] = ()
    index: object = None


class Part(NamedTuple):
    """Images, and what is known of their classes.

    dataset: its labels [n] number class_names; both are None without labels. flaw: why labels that
    are there can't be used. shared_folders: those below the split that all images are in: no class
    here, but maybe one of another set's. remarks: on how the images were found, and what was left
    out.
    """

    dataset: object
    class_names: list[str] | None = None
    flaw: str = ""
    shared_folders: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def evenly_spaced(n, max_items):
    """At most max_items of the indices 0 … n − 1, evenly spaced: a tensor."""
    num_items = min(n, max_items)
    return torch.arange(num_items) * n // num_items


def dataset_digest(dataset, class_names=None):
    """16 hex digits that tell these images and their labels from others.

    They depend on the images' names below the dataset's root, on the name of each image's class,
    and on the content of DIGEST_IMAGES images; neither on where the root is nor on the order of
    the classes. class_names: of `labels`; without it classes are told apart by their numbers.
    """
    parts = [b"%d" % len(dataset)]
    if isinstance(dataset, ImageFileDataset):
        parts += [dataset.paths.ends, dataset.paths.characters]
    if dataset.labels is not None:
        labels = dataset.labels.tolist()
        names = [str(i) if class_names is None else class_names[i] for i in labels]
        parts.append("\0".join(names).encode(errors="surrogatepass"))
    parts += [dataset.raw_bytes(i) for i in evenly_spaced(len(dataset), DIGEST_IMAGES).tolist()]
    hasher = hashlib.sha256()
    for part in parts:  # each hashed for itself, so that none runs into the next
        hasher.update(hashlib.sha256(part).digest())
    return hasher.hexdigest()[:16]
