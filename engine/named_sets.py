"""Named sets: scikit-learn's digits, and torchvision's → Splits."""

import gzip
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.transforms.v2 import functional as tv

from engine.datasets import ArrayDataset, ImageFileDataset, Splits, load_in_turns
from engine.errors import UserError, first_line

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
    imagenet=("ImageNet", ("train",), "val", "imgs", "targets"),
)
NUM_CLASSES = dict(flowers102=102, pets=37, stl10=10)  # not all torchvisions name them
# Of the training images: several sets name their files alike.
FIRST_LABELS = dict(mnist=[5, 0, 4, 1, 9, 2, 1, 3], fashion_mnist=[9, 0, 0, 3, 0, 2, 7, 2])
NUM_IMAGENET = {"train": 1_281_167, "val": 50_000}


def load(name, data_root, pixel_format, need):
    """load_splits for one of NAMED_SETS."""
    _check_unambiguous(name, data_root)
    if pixel_format.in_chans not in (1, 3) or pixel_format.max_value:
        raise UserError(f"{name} is of 8-bit RGB: --in-chans 3 or 1, without --max-value")
    if name == "digits":
        return _load_digits(pixel_format)

    def load_published(download):
        try:
            with tempfile.TemporaryDirectory() as folder:
                return _load_torchvision(name, data_root, download, pixel_format, need, folder)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"no {name} under --data-root {data_root}, and no download: {first_line(error)}"
            ) from None

    return load_in_turns(load_published)


def _check_unambiguous(name, data_root):
    """UserError if a file or folder of the user's own has the name of the data set.

    Folders of runs, of --output-dir, and of the data sets are none.
    """
    folder = Path(name)
    holds_runs = any(any(folder.glob(lock)) for lock in ("run.lock", "*/run.lock"))
    data_folders = Path(data_root).resolve(), Path(data_root, "imagenet").resolve()
    is_own = not holds_runs and folder.resolve() not in data_folders
    if is_own and name in os.listdir():  # in this case of the letters
        kind = "folder" if folder.is_dir() else "file"
        raise UserError(
            f"{name} is a data set and a {kind} here: give ./{name} for the {kind}; for the data "
            f"set, rename the {kind} or start in another folder"
        )


def _load_digits(pixel_format):
    """scikit-learn's 1,797 handwritten digits, enlarged from 8×8 to 16×16; every fifth is val."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16 * 255).round().to(torch.uint8).view(-1, 1, 8, 8)
    images = tv.resize(images, [16, 16], antialias=True).expand(-1, 3, -1, -1).contiguous()
    is_val = torch.arange(len(images)) % 5 == 0
    labels = torch.tensor(labels)
    train = ArrayDataset(images[~is_val], labels[~is_val], pixel_format)
    val = ArrayDataset(images[is_val], labels[is_val], pixel_format)
    return Splits(train, train, val, [str(digit) for digit in range(10)])


def _load_torchvision(name, data_root, download, pixel_format, need, temporary):
    class_name, train_splits, val_split, images, labels = TORCHVISION_SETS[name]
    kind, options = getattr(torchvision.datasets, class_name), dict(download=download)
    if name == "imagenet":
        data_root, options = Path(data_root, name), {}
        train_splits = () if need == "val" else train_splits
    elif name in FIRST_LABELS and _unpack_mnist(kind, data_root, temporary):
        data_root, options = temporary, {}

    def read(*splits):
        parts = [kind(data_root, split, **options) for split in splits]
        if name == "imagenet" and len(parts[0]) != NUM_IMAGENET[splits[0]]:
            raise UserError(  # unpacking was interrupted, which torchvision doesn't notice
                f"{data_root}/{splits[0]} holds {len(parts[0]):,} images, not "
                f"{NUM_IMAGENET[splits[0]]:,}: delete it, and it is unpacked again"
            )
        return parts[0], _to_dataset(parts, images, labels, pixel_format)

    part, val = read(val_split)
    train = read(*train_splits)[1] if train_splits else None
    expected = FIRST_LABELS.get(name, [])
    if train is not None and train.labels[: len(expected)].tolist() != expected:
        raise UserError(f"the files under --data-root are not those of {name}")
    class_names = getattr(part, "wnids", None) or getattr(part, "classes", None) or []
    num_classes = NUM_CLASSES.get(name, len(class_names))
    if len(set(class_names)) != num_classes:
        class_names = map(str, range(num_classes))
    all_images = train
    if name == "stl10":
        all_images = read("train+unlabeled")[1]
        all_images.labels = None
    return Splits(all_images, train, val, list(class_names))


def _to_dataset(parts, images, labels, pixel_format):
    """Splits of torchvision and the names of their attributes → one dataset."""
    labels = [label for part in parts for label in getattr(part, labels)]
    images = [image for part in parts for image in getattr(part, images)]
    if isinstance(images[0], np.ndarray | torch.Tensor):
        images = np.stack(images)
        if images.ndim == 3:  # gray
            images = images[:, None]
        elif images.shape[3] == 3:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return ArrayDataset(images, labels, pixel_format)
    root = parts[0].root
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
