"""Datasets of images, their splits and classes; `load_splits` finds those of a path or a name.

A dataset has a length, `labels` [n] or None, `pixel_format`, and for image i read(i) → uint8
[C, H, W], name(i), which is printable, and raw_bytes(i) for the digest.

Class i is class_names[i]. Names are sorted as strings, as torchvision's ImageFolder sorts them, for
class folders, lists, archives and Hugging Face labels that are plain values; a ClassLabel of
Hugging Face and the named sets keep the order that they declare.
"""

import copy
import hashlib
import os
import stat
from typing import NamedTuple

import numpy as np
import torch

from engine.decode import RGB, UnreadableImage, decode_image
from engine.errors import UserError, first_line, printable
from engine.launch import barrier, local_rank, run_once_per_host
from moco.augmentation import luminance
from moco.distributed import rank

NAMED_SETS = tuple(
    "digits mnist fashion_mnist cifar10 cifar100 stl10 flowers102 pets imagenet".split()
)

DIGEST_IMAGES = 64  # images whose content is part of a digest
DIGEST_BYTES = 2**20  # at most so much of each file


class Splits(NamedTuple):
    """The datasets of a path or a name.

    train: all images, for pre-training. train_labelled: the labelled ones, for kNN, linear probe
    and fine-tuning; it differs from train for stl10 only, most of whose images have no labels.
    val: labelled images to measure on. Those that don't exist are None.
    note: why there is no val. remarks: sentences on how the images were found.
    was_numeric: earlier versions numbered these classes by value, not in the order of strings.
    """

    train: object
    train_labelled: object
    val: object
    class_names: list[str] | None = None  # None without labels
    note: str = ""
    remarks: tuple[str, ...] = ()
    was_numeric: bool = False

    @property
    def num_classes(self):
        return 0 if self.class_names is None else len(self.class_names)

    def __str__(self):
        return self._text(self.train, [f"{self.note}; kNN is off"] if self.note else [])

    def labelled_str(self):
        """The same for a classifier that is trained and measured."""
        return self._text(self.train_labelled, [f"{self.num_classes} classes"])

    def _text(self, train, more):
        parts = []
        if train is not None:
            parts.append(f"{len(train):,} images to train on")
        if self.val is not None:
            noun = " images" if train is None else ""
            parts.append(f"{len(self.val):,}{noun} to validate")
        return "; ".join([", ".join(parts + more), *self.remarks])


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


class ImageFileDataset:
    """Image files, decoded when read: paths below `root`, labels [n] or None."""

    def __init__(self, root, paths, labels=None, pixel_format=RGB):
        self.root = str(root)
        # One array of bytes: a million str objects would be copied, page by page, into each
        # forked worker as their reference counts change.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.pixel_format = pixel_format

    def __len__(self):
        return len(self.paths)

    def path(self, i):
        """Path of the file, with the root."""
        return os.path.join(self.root, os.fsdecode(self.paths[i]))

    def read(self, i):
        return decode_image(self.path(i), self.pixel_format)

    def name(self, i):
        return printable(os.fsdecode(self.paths[i]))

    def raw_bytes(self, i):
        return start_of_file(self.path(i))


class HuggingFaceDataset:
    """Images of a Hugging Face dataset, read from its Arrow files one by one.

    column: of the images; split_name: how messages name the split.
    """

    def __init__(self, records, column, split_name, labels=None, pixel_format=RGB):
        self.records, self.column, self.split_name = records, column, split_name
        self.labels, self.pixel_format = labels, pixel_format

    def __len__(self):
        return len(self.records)

    def read(self, i):
        try:
            data, path = self._bytes_and_path(i)
        except Exception as error:  # damaged files, records without an image
            raise UnreadableImage(self.name(i), first_line(error)) from None
        if data is None:
            return decode_image(path, self.pixel_format)
        return decode_image(self.name(i), self.pixel_format, data)

    def _bytes_and_path(self, i):
        image = self.records[int(i)][self.column]
        return image["bytes"], image["path"]

    def name(self, i):
        return printable(f"{self.split_name}, record {int(i)}")

    def raw_bytes(self, i):
        try:
            data, path = self._bytes_and_path(i)
        except Exception:  # as in read
            return b""
        return start_of_file(path) if data is None else data[:DIGEST_BYTES]


def start_of_file(path):
    """Size and first bytes of a file; empty for what can't be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            return b""
        with open(path, "rb") as file:
            return b"%d " % status.st_size + file.read(DIGEST_BYTES)
    except OSError:
        return b""


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
        parts += [dataset.paths.dtype.str.encode(), dataset.paths.view(np.uint8)]
    if dataset.labels is not None:
        present, labels = dataset.labels.unique(return_inverse=True)
        present = present.tolist()
        names = [str(i) if class_names is None else class_names[i] for i in present]
        sorted_names = sorted(names)
        sorted_index = torch.tensor([sorted_names.index(name) for name in names])
        parts.append("\0".join(sorted_names).encode(errors="surrogateescape"))
        parts.append(sorted_index[labels].numpy())
    parts += [dataset.raw_bytes(i) for i in evenly_spaced(len(dataset), DIGEST_IMAGES).tolist()]
    hasher = hashlib.sha256()
    for part in parts:  # each hashed for itself, so that none runs into the next
        hasher.update(hashlib.sha256(part).digest())
    return hasher.hexdigest()[:16]


def load_splits(
    path, data_root="data", pixel_format=RGB, hf_columns=None, hf_splits=None, need="both"
):
    """A folder, a list.txt, a .tar, hf:NAME, or one of NAMED_SETS → Splits. All ranks call it.

    A folder's train and val are each a list, train.txt, a folder, train/, or an archive, train.tar;
    the first of them that exists is taken. A folder without them is taken as images without labels,
    at any depth. hf_columns: of the image and of the label; hf_splits: to train on and to validate.
    need: "both", or what suffices:
      "val": images to measure a classifier on. A folder of class folders, a single list, the one
      split of hf_splits is val; train is None where only val exists.
      "train": labelled images to train on. A folder of class folders is train; val is None.
      "images": images to train on. Labels are kept if each image has one; val is None.
    UserError for what is missing, empty, ambiguous, or can't be downloaded; of these, LabelError
    for labels that "images" does without.
    """
    # These modules build on this one.
    from engine import folders, huggingface, named_sets

    if (hf_columns or hf_splits) and not path.startswith("hf:"):
        raise UserError(f"--hf-columns and --hf-splits are for hf:NAME, not for {path}")
    if path.startswith("hf:"):
        splits = huggingface.load(path, hf_columns, hf_splits, pixel_format, need)
    elif path in NAMED_SETS:
        splits = named_sets.load(path, data_root, pixel_format, need)
    else:
        splits = run_once_per_host(lambda: folders.load(path, pixel_format, need, data_root))
    return splits if need in ("both", "val") else splits._replace(val=None, note="")


def load_in_turns(load):
    """load(download) on rank 0 first, which may download; then on one process of each other host,
    which may not see rank 0's files; then on the others, which find the files in place."""
    if rank() == 0:
        splits = load(True)
    barrier()
    if rank() != 0 and local_rank() == 0:
        splits = load(True)
    barrier()
    if rank() != 0 and local_rank() != 0:
        splits = load(False)
    barrier()
    return splits


class LabelError(UserError):
    """Labels that can't be used; pre-training could do without them."""


def require_labels(splits, path, train=True):
    """`splits` if a classifier can be trained, or without `train` measured, on it; else UserError.

    path: what load_splits got, for the message.
    """
    if splits.val is None or (train and splits.train_labelled is None):
        needed = "labelled images to train on and to validate" if train else "labelled images"
        raise UserError(f"{path} needs {needed}: {splits.note or 'it has none to train on'}")
    if train and splits.num_classes < 2:
        raise UserError(f"{path} holds a single class: there is nothing to tell apart")
    return splits


def replace_val(splits, other, path, other_path):
    """`splits` with the val of `other`, whose classes are matched by name → Splits.

    UserError if either has no labels, or `other` has classes that `splits` lacks.
    """
    if splits.train_labelled is None:
        raise UserError(
            f"--val {other_path} is compared with labelled training images, and {path} has none: "
            "pre-training takes --knn-data DIR with train and val"
        )
    if other.val is None:
        raise UserError(f"--val {other_path} needs labelled images: {other.note}")
    other = other._replace(train=None, train_labelled=None)
    other, message = relabel(other, splits.class_names, path, f"--val {other_path}")
    remarks = [*splits.remarks, f"validated on {other_path}", *other.remarks, message]
    return splits._replace(val=other.val, note="", remarks=tuple(filter(None, remarks)))


def relabel(splits, class_names, path, data_name="the data"):
    """Numbers the labels as the classifier in `path` does → Splits, a sentence to print or "".

    splits: as require_labels returns them. class_names: of the classifier, in the order of its
    outputs. Classes are matched by name; the data may lack some. None if `path` doesn't state them:
    then labels stay, and the caller compares the numbers of classes.
    UserError, naming them, for classes that the classifier doesn't know.
    """
    if class_names is None:
        if splits.was_numeric:
            first = " ".join(splits.class_names[:4])
            raise UserError(
                f"{path} states no class names, and the order of its classes can't be told: now it "
                f"is {first} …, in earlier versions it was by value. Labels padded with zeros, 01 "
                "02 … 10, have the same order in both; class folders are as before"
            )
        return splits, f"{path} states no class names: only the number of classes is compared"
    labelled = [data for data in (splits.train_labelled, splits.val) if data is not None]
    used = {i for data in labelled for i in data.labels.unique().tolist()}
    unknown = sorted({splits.class_names[i] for i in used} - set(class_names))
    if unknown:
        raise UserError(
            f"{data_name} has classes that {path} does not know: {_join_some(unknown)} "
            f"(it knows {_join_some(class_names)})"
        )
    index = {name: i for i, name in enumerate(class_names)}
    # Classes that are declared but have no image may be unknown; -1 is never looked up.
    new_labels = torch.tensor([index.get(name, -1) for name in splits.class_names])
    relabelled = {}  # train may be train_labelled, and stays the same object
    for data in labelled:
        relabelled[id(data)] = copy.copy(data)
        relabelled[id(data)].labels = new_labels[data.labels]
    datasets = [relabelled.get(id(data), data) for data in splits[:3]]
    splits = Splits(*datasets, list(class_names), splits.note, splits.remarks)
    num_present = len(splits.val.labels.unique())
    message = ""
    if num_present < len(class_names):
        message = (
            f"{num_present} of the {len(class_names)} classes of {path} are measured, among the "
            f"scores of all {len(class_names)}"
        )
    return splits, message


def _join_some(names, most=5):
    more = ", …" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Labelled(NamedTuple):
    """A dataset, and for each image the name of its class.

    kind: what messages call the labels.
    """

    dataset: object
    label_names: list[str] | None
    kind: str = "labels"


def make_splits(path, train, val, note="", class_names=None, remarks=()):
    """Two Labelled, one of which may be None → Splits.

    note: why val is None. class_names: in order, if they are declared.
    """
    remarks = tuple(remarks)
    first = val if train is None else train
    if first.label_names is None:
        if train is None:
            return Splits(None, None, None, None, f"the images have no {first.kind}", remarks)
        note = f"the training images have no {first.kind}"
        return Splits(train.dataset, None, None, None, note, remarks)
    was_numeric = False
    if class_names is None:
        class_names = sorted(set(first.label_names))
        if first.kind == "labels" and all(name.isdecimal() for name in class_names):
            was_numeric = class_names != sorted(class_names, key=int)
    if val is not None and val.label_names is None:
        raise LabelError(
            f"{path}: val has no {val.kind}, while train has {len(class_names)} classes"
        )
    if train is not None and val is not None:
        unknown = sorted(set(val.label_names) - set(class_names))
        if unknown:
            origin = "".join(f" ({remark})" for remark in remarks if remark.startswith("read from"))
            raise LabelError(
                f"{path}: val has classes that train lacks: {' '.join(unknown[:5])}{origin}"
            )
    index = {name: i for i, name in enumerate(class_names)}
    for labelled in (train, val):
        if labelled is not None:
            labelled.dataset.labels = torch.tensor([index[name] for name in labelled.label_names])
    train_dataset = None if train is None else train.dataset
    val_dataset = None if val is None else val.dataset
    note = note if val is None else ""
    return Splits(
        train_dataset, train_dataset, val_dataset, class_names, note, remarks, was_numeric
    )
