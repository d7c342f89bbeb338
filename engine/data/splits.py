"""DIR → its splits; the labels of one set, numbered as another set or a classifier numbers them."""

import copy
import functools
from collections import Counter
from typing import NamedTuple

import torch

from engine.data import folder, hub, named
from engine.data.decode import RGB
from engine.data.images import Part, dataset_digest
from engine.errors import UserError, join_some, printable


def open_source(path, pixel_format=RGB, data_root="data"):
    """A folder, a list.txt, a .tar, hf:NAME, or one of NAMED_SETS → Source. All ranks call it.

    data_root: where named sets are downloaded to.
    UserError for what is missing, empty, ambiguous, or can't be downloaded.
    """
    if path.startswith("hf:"):
        return Source(path, *hub.find(path, pixel_format))
    if path in named.NAMED_SETS:
        return Source(path, *named.find(path, pixel_format, data_root))
    return Source(path, *folder.find(path, pixel_format))


class Source:
    """The images of DIR. Each split is read when it is asked for, by all ranks, and then kept.

    readers: {"train": function that returns its Part, "val": …}, or {"all": …} without splits.
    """

    def __init__(self, path, readers, remarks=()):
        self.path, self.remarks = path, remarks
        self._readers = {split: functools.cache(read) for split, read in readers.items()}

    def has_val(self):
        return "val" in self._readers

    def has_both(self):
        return {"train", "val"} <= self._readers.keys()

    def train(self):
        """The Part to pre-train on: train, or images that are in no split."""
        return self._get("train", "all")

    def train_labelled(self):
        """The labelled part of `train`, which is all of it in most sets."""
        return self._get("train_labelled", "train", "all")

    def val(self, hint=""):
        """The Part to validate on; hint: for the message if there is none."""
        return self._get("val", hint=hint)

    def val_or_all(self):
        """Images to measure on: val, or images that are in no split, such as a test set's."""
        return self._get("val", "all")

    def _get(self, *names, hint=""):
        for name in names:
            if name in self._readers:
                return self._readers[name]()
        kinds = "train" if "train" in names else "val"
        there = "only " + " and ".join(sorted(self._readers))
        if "all" in self._readers:
            there = "for it is not split"
        raise UserError(f"{self.path} has no {kinds}, {there}: docs/data.md has the forms{hint}")


class Splits(NamedTuple):
    """Labelled images for a classifier or kNN: datasets, or None for a train that is not needed.

    train: to train on, or the images that kNN searches; val: to measure on. Their labels number
    class_names. remarks: sentences on how the images were found.
    """

    train: object
    val: object
    class_names: list[str] | None
    remarks: tuple[str, ...] = ()

    @property
    def num_classes(self):
        return 0 if self.class_names is None else len(self.class_names)

    def __str__(self):
        return describe(self.train, self.val, self.class_names, self.remarks)


def load_splits(source, val_source=None, val_hint=""):
    """Labelled images to train on and to validate → Splits.

    val_source: where the latter come from instead; its classes are matched by name. val_hint: for
    the message if there are none.
    UserError if labels are missing, can't be used, or don't match, for a single class, and if
    val_source has the images to train on.
    """
    train = require_labels(source.train_labelled(), source.path)
    if len(train.class_names) < 2:
        raise UserError(f"{source.path} holds a single class: there is nothing to tell apart")
    remarks = (*source.remarks, *train.remarks)
    if val_source is None:
        val = match_classes(source.val(val_hint), train.class_names, f"{source.path}: val", "train")
    else:
        part, name = val_source.val_or_all(), f"--val {val_source.path}"
        val = match_classes(part, train.class_names, name, source.path)
        if _has_same_images(train, val):
            raise UserError(
                f"{name} has the same images as {source.path}: give others to validate on"
            )
        remarks += (f"validated on {val_source.path}", *val_source.remarks)
    return Splits(train.dataset, val.dataset, train.class_names, (*remarks, *val.remarks))


def _has_same_images(part, other):
    """Whether two Parts hold the same images with the same labels."""
    if len(part.dataset) != len(other.dataset):  # the usual case, which reads no image
        return False
    return dataset_digest(*part[:2]) == dataset_digest(*other[:2])


def load_knn_splits(source):
    """The same where kNN can be measured → Splits, ""; else None and the reason.

    UserError for labels that can't be used or don't match.
    """
    train = source.train_labelled()
    if train.class_names is None and not train.flaw:
        return None, "the images have no labels"
    if train.class_names is not None and len(train.class_names) < 2:
        return None, f"all images are of one class, {train.class_names[0]}"
    if not source.has_val():
        return None, f"{source.path} has no val"
    return load_splits(source), ""


def load_val(source, class_names, path):
    """Labelled images to measure the classifier in `path` on → Splits without train.

    class_names: of its outputs, in order; None where it states none: then labels stay.
    """
    if class_names is None:
        part = require_labels(source.val_or_all(), source.path)
        message = f"{path} states no class names: only the number of classes is compared"
        part = part._replace(remarks=(*part.remarks, message))
    else:
        part = match_classes(source.val_or_all(), class_names, source.path, path)
    return Splits(None, part.dataset, part.class_names, (*source.remarks, *part.remarks))


def require_labels(part, name):
    """The Part if it has labels; else UserError, which calls it `name`."""
    if part.flaw:
        raise UserError(part.flaw)
    if part.class_names is None:
        raise UserError(
            f"{name} has no labels: class folders (two at least), a list, .cls files in archives, "
            "a ClassLabel of hf:NAME"
        )
    twice = [name for name, times in Counter(part.class_names).items() if times > 1]
    if twice:
        raise UserError(f"{name} has two classes called {twice[0]}: their labels would be merged")
    return part


def match_classes(part, class_names, name, path):
    """The Part with its labels numbered by class_names, those of `path`, as a new one.

    Classes are matched by name; the Part may lack some. A single folder of images is a class here
    if it is called like one. UserError, naming them, for classes that `path` doesn't know.
    """
    index = {class_name: i for i, class_name in enumerate(class_names)}
    dataset = copy.copy(part.dataset)  # which may be another split's, too
    known_folders = [folder for folder in part.shared_folders if folder in index]
    if part.class_names is None and not part.flaw and len(known_folders) == 1:
        dataset.labels = torch.full((len(dataset),), index[known_folders[0]])
    else:
        require_labels(part, name)
        used = {part.class_names[i] for i in dataset.labels.unique().tolist()}
        unknown = sorted(used - index.keys())
        if unknown:
            raise UserError(
                f"{name} has classes that {path} does not know: {join_some(unknown)} (it knows "
                f"{join_some(class_names)})"
            )
        # Classes that are declared but have no image may be unknown; -1 is never looked up.
        numbers = torch.tensor([index.get(class_name, -1) for class_name in part.class_names])
        dataset.labels = numbers[dataset.labels]
    remarks, num_present = part.remarks, len(dataset.labels.unique())
    if num_present < len(class_names):
        measured = f"{num_present} of the {len(class_names)} classes of {path} are measured"
        remarks += (f"{measured}, among the scores of all",)
    return Part(dataset, list(class_names), remarks=remarks)


def describe(train, val, class_names, remarks=()):
    """A line about datasets, either of which may be None, and their classes."""
    counts = []
    if train is not None:
        counts.append(f"{len(train):,} images to train on")
    if val is not None:
        counts.append(f"{len(val):,} {'images ' if train is None else ''}to validate")
    if class_names is not None:
        counts.append(f"{len(class_names)} classes: {join_some(class_names, 3)}")
    return printable("; ".join([", ".join(counts), *remarks]))
