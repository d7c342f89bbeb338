"""Named sets: scikit-learn's digits, and torchvision's."""

import gzip
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.transforms.v2 import functional as tv

from engine.data.images import ArrayDataset, ImageFileDataset, Part
from engine.errors import UserError, first_line
from engine.launch import rank0_first

# Name → class of torchvision.datasets, the splits to train on, that to validate, and where a split
# has its images, arrays or paths, and its labels. The 2,040 images of train and val together are
# what the protocols of flowers102 train on.
TORCHVISION_SETS = dict(
    mnist=("MNIST", (True,), False, "data", "targets"),
    fashion_mnist=("FashionMNIST", (True,), False, "data", "targets"),
    cifar10=("CIFAR10", (True,), False, "data", "targets"),
    cifar100=("CIFAR100", (True,), False, "data", "targets"),
    stl10=("STL10", ("train",), "test", "data", "labels"),
    flowers102=("Flowers102", ("train", "val"), "test", "_image_files", "_labels"),
    pets=("OxfordIIITPet", ("trainval",), "test", "_images", "_labels"),
    imagenette=("Imagenette", ("train",), "val", "_samples", "_samples"),
    imagenet=("ImageNet", ("train",), "val", "imgs", "targets"),
)
NAMED_SETS = ("digits", *TORCHVISION_SETS)
# Of the training images: several sets name their files alike.
FIRST_LABELS = dict(mnist=[5, 0, 4, 1, 9, 2, 1, 3], fashion_mnist=[9, 0, 0, 3, 0, 2, 7, 2])
NUM_IMAGENET = {"train": 1_281_167, "val": 50_000}


def find(name, pixel_format, data_root):
    """One of NAMED_SETS → {split: function that reads its Part}, remarks.

    "train_labelled" differs from "train" for stl10 only, most of whose images have no labels.
    """
    _check_unambiguous(name, data_root)
    if pixel_format.in_chans not in (1, 3) or pixel_format.value_range:
        raise UserError(f"{name} is of 8-bit RGB: --in-chans 3 or 1, without --value-range")
    if name == "digits":
        return _load_digits(pixel_format), ()

    def read(splits):
        return rank0_first(partial(_load, name, splits, data_root, pixel_format))

    _, train_splits, val_split, *_ = TORCHVISION_SETS[name]
    readers = {"train": partial(read, train_splits), "val": partial(read, (val_split,))}
    if name == "stl10":
        readers["train_labelled"] = readers["train"]
        readers["train"] = partial(read, ("train+unlabeled",))
    return readers, ()


def _check_unambiguous(name, data_root):
    """UserError for a folder of that name here, unless it holds runs or downloaded sets."""
    folder = Path(name)
    is_ours = folder.resolve() in (Path(data_root).resolve(), Path(data_root, "imagenet").resolve())
    if folder.exists() and not is_ours and not any(folder.rglob("run.lock")):
        raise UserError(
            f"{name} is a data set, and ./{name} is here: give ./{name}, or start in another folder"
        )


def _load_digits(pixel_format):
    """1,797 handwritten digits, enlarged from 8×8 to 16×16; every fifth is val."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16 * 255).round().to(torch.uint8).view(-1, 1, 8, 8)
    images = tv.resize(images, [16, 16], antialias=True).expand(-1, 3, -1, -1).contiguous()
    is_val, labels = torch.arange(len(images)) % 5 == 0, torch.tensor(labels)
    class_names = [str(digit) for digit in range(10)]

    def read(chosen):
        return Part(ArrayDataset(images[chosen], labels[chosen], pixel_format), class_names)

    return {"train": partial(read, ~is_val), "val": partial(read, is_val)}


def _load(name, splits, data_root, pixel_format, download):
    """Splits of a set of torchvision, together → Part."""
    class_name, train_splits, _, images_name, labels_name = TORCHVISION_SETS[name]
    kind, root, options = getattr(torchvision.datasets, class_name), data_root, {}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if name == "imagenet":
                root = Path(data_root, name)
            elif name in FIRST_LABELS and _unpack_mnist(kind, data_root, temporary):
                root = temporary
            else:
                options = dict(download=download)
            sets = [kind(root, split, **options) for split in splits]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no {name} under --data-root {data_root}, and no download: {first_line(error)}"
        ) from None
    if name == "imagenet" and len(sets[0]) != NUM_IMAGENET[splits[0]]:  # a cut unpacking
        raise UserError(f"{root}/{splits[0]} is not whole: delete it to unpack it again")
    dataset = _to_dataset(sets, images_name, labels_name, pixel_format)
    expected = FIRST_LABELS.get(name, []) if splits == train_splits else []
    if dataset.labels[: len(expected)].tolist() != expected:
        raise UserError(f"the files under --data-root are not those of {name}")
    if dataset.labels.min() < 0:  # unlabelled images among them
        dataset.labels = None
        return Part(dataset)
    class_names = getattr(sets[0], "wnids", None) or getattr(sets[0], "classes", None)
    if class_names is None:  # older torchvisions name no flowers
        class_names = map(str, range(dataset.labels.max() + 1))
    return Part(dataset, list(class_names))


def _to_dataset(sets, images_name, labels_name, pixel_format):
    """Splits of torchvision and the names of their attributes → one dataset."""
    labels = [label for split in sets for label in getattr(split, labels_name)]
    images = [image for split in sets for image in getattr(split, images_name)]
    if isinstance(labels[0], tuple):  # Imagenette's (path, label)
        labels = [label for _, label in labels]
    if isinstance(images[0], np.ndarray | torch.Tensor):
        images = np.stack(images)
        if images.ndim == 3:  # gray
            images = images[:, None]
        elif images.shape[3] == 3:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return ArrayDataset(images, labels, pixel_format)
    root = sets[0].root
    paths = [image[0] if isinstance(image, tuple) else image for image in images]  # ImageNet's
    paths = [os.path.relpath(path, root) for path in paths]
    return ImageFileDataset(root, paths, labels, pixel_format)


def _unpack_mnist(kind, data_root, folder):
    """Unpacks the four files of a MNIST to where torchvision looks, if they are in data_root.

    Whoever packages them compresses them anew: torchvision's sums would not be theirs.
    """
    files = [Path(data_root, name) for name, _ in kind.resources]
    if not all(file.is_file() for file in files):
        return False
    raw = Path(folder, kind.__name__, "raw")
    raw.mkdir(parents=True)
    for file in files:
        with gzip.open(file) as source, open(raw / file.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    return True
