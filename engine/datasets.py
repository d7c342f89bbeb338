"""Where images come from: folders, lists, Hugging Face datasets, named sets.

A dataset has a length, `labels` [n] or None, `pixel_format`, and for image i read(i) → uint8
[C, H, W], name(i), which is printable, and raw_bytes(i) for the digest. `load_splits` finds the
datasets of a path or a name.

Class i is class_names[i]. Names are sorted as strings, as torchvision's ImageFolder sorts them, for
class folders, lists and Hugging Face labels that are plain values; a ClassLabel of Hugging Face and
the named sets keep the order that they declare.
"""

import copy
import hashlib
import os
import stat
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import features
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

from engine.decode import RGB, UnreadableImage, decode_image
from engine.errors import UserError, first_line, printable
from engine.launch import barrier, local_rank, run_once_per_host
from moco.augmentation import luminance
from moco.distributed import is_main, rank

NAMED_SETS = ("digits", "cifar10", "cifar100", "stl10", "flowers102", "pets")

# Files and folders that start with "." are hidden; these are what archivers, file servers and
# operating systems leave beside the images.
IGNORED_NAMES = {"__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN"}

DIGEST_IMAGES = 64  # images whose content is part of a digest
DIGEST_BYTES = 2**20  # at most so much of each file


def _find_extensions():
    """Extensions of the image files that this Pillow reads, in lower case."""
    extensions = ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow warns about features it doesn't know
        for extension, feature in ((".jp2", "jpg_2000"), (".avif", "avif")):
            if features.check(feature):
                extensions.append(extension)
    return tuple(extensions)


EXTENSIONS = _find_extensions()


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
        return self._text(self.train, [self.note] if self.val is None else [])

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
    """Images in memory: uint8 [n, C, H, W], labels [n] or None; as one channel, their luminance."""

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
        return _start_of_file(self.path(i))


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
        return _start_of_file(path) if data is None else data[:DIGEST_BYTES]


def _start_of_file(path):
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
    path, data_root="data", pixel_format=RGB, hf_columns=None, hf_splits=None, evaluate=False
):
    """A folder, a list in a .txt, hf:NAME, or one of NAMED_SETS → Splits. All ranks call it.

    A folder's train and val are each a list, train.txt, or a folder of class folders, train/; of
    both the list is taken. A folder without them is taken as images without labels, at any depth.
    hf_columns: of the image and of the label; hf_splits: to train on and to validate.
    evaluate: images to measure a classifier on suffice. train is None where only val exists; a
    single list, or the one split of hf_splits, is val.
    UserError for what is missing, empty, ambiguous, or can't be downloaded.
    """
    if path.startswith("hf:"):
        return _load_in_turns(
            lambda _: _load_hugging_face(path, hf_columns, hf_splits, pixel_format, evaluate)
        )
    if hf_columns or hf_splits:
        raise UserError(f"--hf-columns and --hf-splits are for hf:NAME, not for {path}")
    if path not in NAMED_SETS:
        return run_once_per_host(lambda: _load_files(path, pixel_format, evaluate))
    if pixel_format.in_chans not in (1, 3) or pixel_format.max_value:
        raise UserError(f"{path} is of 8-bit RGB: --in-chans 3 or 1, without --max-value")
    if path == "digits":
        return _load_digits(pixel_format)
    return _load_in_turns(
        lambda download: _load_torchvision(path, data_root, download, pixel_format)
    )


def require_labels(splits, path, train=True):
    """`splits` if a classifier can be trained, or without `train` measured, on it; else UserError.

    path: what load_splits got, for the message.
    """
    if splits.val is None or (train and splits.train_labelled is None):
        needed = "labelled images to train on and to validate" if train else "labelled images"
        raise UserError(f"{path} needs {needed}: {splits.note}")
    if train and splits.num_classes < 2:
        raise UserError(f"{path} holds a single class: there is nothing to tell apart")
    return splits


def relabel(splits, class_names, path):
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
            f"the data has classes that {path} does not know: {_join_some(unknown)} "
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


def image_folders(path):
    """The folders that load_splits(path) searches: what is written there is taken for images."""
    root = Path(path)
    if path in NAMED_SETS or path.startswith("hf:") or not root.is_dir():
        return []
    places = [_find_split(root, "train"), _find_split(root, "val")]
    if places[0] is None:
        return [root]
    return [place for place in places if place is not None and place.suffix != ".txt"]


def _join_some(names, most=5):
    more = ", …" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _Labelled(NamedTuple):
    """A dataset, and for each image the name of its class.

    kind: what messages call the labels.
    """

    dataset: object
    label_names: list[str] | None
    kind: str = "labels"


def _make_splits(path, train, val, note="", class_names=None, remarks=()):
    """Two _Labelled, one of which may be None → Splits.

    note: why val is None. class_names: in order, if they are declared.
    """
    remarks = tuple(remarks)
    first = val if train is None else train
    if first.label_names is None:
        if train is None:
            return Splits(None, None, None, None, f"the images have no {first.kind}", remarks)
        note = f"the training images have no {first.kind}; kNN is off"
        return Splits(train.dataset, None, None, None, note, remarks)
    was_numeric = False
    if class_names is None:
        class_names = sorted(set(first.label_names))
        if first.kind == "labels" and all(name.isdecimal() for name in class_names):
            was_numeric = class_names != sorted(class_names, key=int)
    if val is not None and val.label_names is None:
        raise UserError(
            f"{path}: val has no {val.kind}, while train has {len(class_names)} classes"
        )
    if train is not None and val is not None:
        unknown = sorted(set(val.label_names) - set(class_names))
        if unknown:
            origin = "".join(f" ({remark})" for remark in remarks if remark.startswith("read from"))
            raise UserError(
                f"{path}: val has classes that train lacks: {' '.join(unknown[:5])}{origin}"
            )
    index = {name: i for i, name in enumerate(class_names)}
    for labelled in (train, val):
        if labelled is not None:
            labelled.dataset.labels = torch.tensor([index[name] for name in labelled.label_names])
    if val is None:
        return Splits(train.dataset, None, None, class_names, f"{note}; kNN is off", remarks)
    train_dataset = None if train is None else train.dataset
    return Splits(train_dataset, train_dataset, val.dataset, class_names, "", remarks, was_numeric)


# Files: folders and lists.


def _load_files(path, pixel_format, evaluate):
    root = Path(path)
    if root.suffix == ".txt" and root.is_file():
        images = _read_list(root, pixel_format)
        if evaluate:
            return _make_splits(path, None, images)
        return _make_splits(path, images, None, "a single list has no images to validate")
    if not root.is_dir():
        problem = "is a file, not a folder or a .txt" if root.exists() else "does not exist"
        raise UserError(
            f"{path} {problem}: give a folder of images, a list.txt, hf:NAME, or one of: "
            f"{' '.join(NAMED_SETS)}"
        )
    train, val = _find_split(root, "train"), _find_split(root, "val")
    if train is None and not (evaluate and val is not None):
        if val is not None and val.suffix == ".txt":
            raise UserError(f"{path} has val.txt, but neither train.txt nor train/")
        paths, _, ignored = _list_images(root, pixel_format)
        note = "no train/ below it: all images, without labels; kNN is off"
        dataset = ImageFileDataset(root, sorted(paths), pixel_format=pixel_format)
        return Splits(dataset, None, None, None, note, _ignored_remark(ignored))

    ignored, parts = Counter(), []
    for place in (train, val):
        if place is None:
            parts.append(None)
        elif place.suffix == ".txt":
            parts.append(_read_split_list(place, pixel_format))
        else:
            parts.append(_read_class_folders(place, pixel_format, ignored))
    note = "" if train is None else f"no val/ or val.txt beside {_place_name(train)}"
    remarks = _lists_remark([train, val]) + _ignored_remark(ignored)
    return _make_splits(path, *parts, note, remarks=remarks)


def _find_split(root, name):
    """The list root/NAME.txt, else the folder root/NAME, else None."""
    if (root / f"{name}.txt").is_file():
        return root / f"{name}.txt"
    return root / name if (root / name).is_dir() else None


def _place_name(place):
    return place.name if place.suffix == ".txt" else f"{place.name}/"


def _lists_remark(places):
    """Says which lists and folders were read, if a list was among them."""
    places = [place for place in places if place is not None]
    if all(place.suffix != ".txt" for place in places):
        return ()
    words = []
    for place in places:
        is_preferred = place.suffix == ".txt" and place.with_suffix("").is_dir()
        words.append(_place_name(place) + (f" (not {place.stem}/)" if is_preferred else ""))
    return (f"read from {' and '.join(words)}",)


def _ignored_remark(ignored):
    """ignored: a Counter of the extensions of files that are not images."""
    num_files = ignored.total()
    if num_files == 0:
        return ()
    counts = sorted((-n, kind or "none") for kind, n in ignored.items())
    kinds = ", ".join(f"{kind} {-n:,}" for n, kind in counts[:5])
    if len(counts) > 5:
        kinds += ", …"
    files = "file with another extension" if num_files == 1 else "files with other extensions"
    return (f"{num_files:,} {files} ignored ({printable(kinds)})",)


def _read_class_folders(root, pixel_format, ignored):
    """root/CLASS/…/image → _Labelled, whose label names are None without class folders.

    `ignored` counts the extensions of other files.
    """
    paths, folders, other = _list_images(root, pixel_format)
    ignored.update(other)
    if not folders:
        dataset = ImageFileDataset(root, sorted(paths), pixel_format=pixel_format)
        return _Labelled(dataset, None, "class folders")
    beside = [path for path in paths if os.sep not in path]
    if beside:
        raise UserError(
            f"{root} has class folders and {len(beside)} images beside them: {beside[0]}"
        )
    paths.sort(key=lambda path: path.replace(os.sep, "\0", 1))  # by the class, then by the rest
    label_names = [path[: path.index(os.sep)] for path in paths]
    empty = sorted(folders - set(label_names))
    if empty:
        raise UserError(f"{root}/{empty[0]} holds no images ({_looked_for(pixel_format, {})})")
    dataset = ImageFileDataset(root, paths, pixel_format=pixel_format)
    return _Labelled(dataset, label_names, "class folders")


def _extensions(pixel_format):
    return EXTENSIONS if pixel_format.in_chans == 3 else (*EXTENSIONS, ".npy")


def _looked_for(pixel_format, ignored):
    return "; ".join(
        [f"looked for {' '.join(_extensions(pixel_format))}", *_ignored_remark(Counter(ignored))]
    )


def _list_images(root, pixel_format):
    """Images at any depth → their paths below root, the folders in root itself, ignored.

    ignored: Counter of the extensions of other files. Hidden files and folders are skipped.
    One pass, with a progress bar when it takes long. UserError if there are no images.
    """
    extensions = _extensions(pixel_format)
    paths, top_folders, ignored, folders = [], None, Counter(), [""]
    progress_bar = tqdm(
        desc=f"listing {root}",
        unit=" images",
        delay=2,
        mininterval=1,
        leave=False,
        disable=not is_main(),
    )
    with progress_bar as bar:
        while folders:
            folder = folders.pop()
            try:
                for entry in os.scandir(os.path.join(root, folder)):
                    name = entry.name
                    if name[0] == "." or name in IGNORED_NAMES:
                        continue
                    if entry.is_dir():
                        folders.append(os.path.join(folder, name))
                    elif name.lower().endswith(extensions):
                        paths.append(os.path.join(folder, name))
                        bar.update()
                    else:
                        ignored[os.path.splitext(name)[1].lower()] += 1
            except OSError as error:
                raise UserError(f"can't list {root}/{folder}: {error.strerror}") from None
            if top_folders is None:
                top_folders = set(folders)
    if not paths:
        raise UserError(f"{root} holds no images ({_looked_for(pixel_format, ignored)})")
    return paths, top_folders, ignored


def _read_split_list(path, pixel_format):
    """train.txt or val.txt of a folder, which the user may not have meant as a list."""
    try:
        return _read_list(path, pixel_format)
    except UserError as error:
        raise UserError(
            f"{error} ({path.name} in DIR is read as a list of images: rename it if it is none)"
        ) from None


def _read_list(path, pixel_format):
    """A .txt → _Labelled, whose label names are None without labels.

    One image a line: PATH or PATH<TAB>LABEL, PATH relative to the list's folder. UserError, naming
    the line, for a path that leads out of the folder.
    """
    extensions = _extensions(pixel_format)
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
                f"{path}, line {number}: {entry} is not the name of an image (known: "
                f"{' '.join(extensions)}); a label goes after a tab"
            )
        paths.append(entry)
        labels.append(label.strip())
        if bool(labels[-1]) != bool(labels[0]):
            raise UserError(f"{path}, line {number}: either each line has a label, or none has")
    if not paths:
        raise UserError(f"{path} names no images")
    dataset = ImageFileDataset(path.parent, paths, pixel_format=pixel_format)
    return _Labelled(dataset, labels if labels[0] else None)


# Hugging Face.


def _load_hugging_face(path, columns, split_names, pixel_format, evaluate):
    """hf:DIR, which save_to_disk wrote, or hf: and what load_dataset takes → Splits."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path} needs Hugging Face's datasets: pip install datasets") from None
    name = path.removeprefix("hf:")
    saved = any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        splits = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # as many kinds as there are ways to keep data
        raise UserError(f"can't load {path}: {first_line(error)}") from None
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    train_name, val_name = _choose_hf_splits(path, splits, split_names, evaluate)

    first = splits[val_name if train_name is None else train_name].features
    if not columns:
        image_columns = [name for name in first if isinstance(first[name], datasets.Image)]
        label_columns = [name for name in first if isinstance(first[name], datasets.ClassLabel)]
        if len(image_columns) != 1 or len(label_columns) > 1:
            raise UserError(
                f"{path} has {len(image_columns)} columns of images and {len(label_columns)} of "
                f"labels among {' '.join(first)}: choose by --hf-columns IMAGE LABEL"
            )
        columns = image_columns + label_columns
    parts = []
    for name in (train_name, val_name):
        part = None
        if name is not None:
            part = _read_hf_split(splits[name], columns, f"{path} {name}", pixel_format)
        parts.append(part)
    class_names = getattr(first[columns[-1]], "names", None)  # of a ClassLabel
    return _make_splits(path, *parts, "no split to validate", class_names)


def _choose_hf_splits(path, splits, names, evaluate):
    """names: --hf-splits or None → the split to train on and the one to validate, or None."""
    default_val = next((name for name in ("validation", "val", "test") if name in splits), None)
    if not names:
        train = None if evaluate and "train" not in splits else "train"
        val = default_val
    elif evaluate and len(names) == 1:
        train, val = None, names[0]
    else:
        train, val = names[0], names[1] if len(names) > 1 else None
    chosen = [name for name in (train, val) if name is not None]
    unknown = [name for name in chosen if name not in splits]
    if unknown or not chosen:
        missing = unknown[0] if unknown else "validation, val or test"
        raise UserError(
            f"{path} has no {missing}, but {' '.join(map(str, splits))}: choose by --hf-splits "
            "TRAIN VAL"
        )
    return train, val


def _read_hf_split(records, columns, split_name, pixel_format):
    """A split and the columns of its image and its label → _Labelled."""
    import datasets

    unknown = [column for column in columns if column not in records.features]
    if unknown:
        raise UserError(
            f"{split_name} has no column {unknown[0]}, but {' '.join(records.features)}"
        )
    image_column, label_column = columns[0], columns[1] if len(columns) > 1 else None
    if label_column is not None and not isinstance(
        records.features[label_column], datasets.ClassLabel | datasets.Value
    ):
        raise UserError(f"{split_name}: column {label_column} holds no labels")
    try:
        images = records.select_columns(image_column)
        images = images.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:  # columns of another type
        raise UserError(
            f"{split_name}: column {image_column} holds no images: {first_line(error)}"
        ) from None
    label_names = None
    if label_column is not None:
        label_names = _read_hf_labels(records, label_column, split_name)
    dataset = HuggingFaceDataset(images, image_column, split_name, pixel_format=pixel_format)
    return _Labelled(dataset, label_names)


def _read_hf_labels(records, column, split_name):
    """The name of each record's class; None if no record has a label, UserError if some have."""
    import datasets

    feature = records.features[column]
    # From Arrow: numpy would turn labels that are missing into NaN, and integers into floats.
    table = records.select_columns(column).with_format("arrow")[:]
    label_names = []
    for value in table.column(0).to_pylist():
        if isinstance(feature, datasets.ClassLabel):
            # -1: test sets whose labels are kept secret.
            missing = value is None or value < 0
            label_names.append(None if missing else feature.names[value])
        else:
            missing = value is None or value == "" or value != value  # NaN
            label_names.append(None if missing else str(value))
    num_missing = label_names.count(None)
    if num_missing == len(label_names):
        return None
    if num_missing:
        raise UserError(
            f"{split_name}: {num_missing:,} of {len(label_names):,} records have no label in "
            f"column {column}: filter them out, or give --hf-columns IMAGE alone to use no labels"
        )
    return label_names


# Named sets.


def _load_in_turns(load):
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


def _load_torchvision(name, data_root, download, pixel_format):
    try:
        if name == "stl10":
            return _load_stl10(data_root, download, pixel_format)
        if name == "flowers102":
            return _load_flowers102(data_root, download, pixel_format)
        if name == "pets":
            return _load_pets(data_root, download, pixel_format)
        return _load_cifar(name, data_root, download, pixel_format)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no {name} under --data-root {data_root}, and no download: {first_line(error)}"
        ) from None


def _load_cifar(name, data_root, download, pixel_format):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    train, val = (kind[name](data_root, train, download=download) for train in (True, False))
    class_names = list(train.classes)
    train, val = (
        ArrayDataset(
            np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), part.targets, pixel_format
        )
        for part in (train, val)
    )
    return Splits(train, train, val, class_names)


def _load_stl10(data_root, download, pixel_format):
    all_images, train, val = (
        torchvision.datasets.STL10(data_root, split, download=download)
        for split in ("train+unlabeled", "train", "test")
    )
    return Splits(
        ArrayDataset(np.ascontiguousarray(all_images.data), None, pixel_format),
        ArrayDataset(np.ascontiguousarray(train.data), train.labels, pixel_format),
        ArrayDataset(np.ascontiguousarray(val.data), val.labels, pixel_format),
        _declared_names(train, 10),
    )


def _load_flowers102(data_root, download, pixel_format):
    """train and val of 2,040 images together are what the protocols train on; test is val."""
    train, more, val = (
        torchvision.datasets.Flowers102(data_root, split, download=download)
        for split in ("train", "val", "test")
    )
    paths, labels = train._image_files + more._image_files, train._labels + more._labels
    class_names = _declared_names(train, 102)
    train = _files_below(train.root, paths, labels, pixel_format)
    val = _files_below(val.root, val._image_files, val._labels, pixel_format)
    return Splits(train, train, val, class_names)


def _load_pets(data_root, download, pixel_format):
    train, val = (
        torchvision.datasets.OxfordIIITPet(data_root, split, download=download)
        for split in ("trainval", "test")
    )
    class_names = _declared_names(train, 37)
    train, val = (
        _files_below(part.root, part._images, part._labels, pixel_format) for part in (train, val)
    )
    return Splits(train, train, val, class_names)


def _files_below(root, paths, labels, pixel_format):
    paths = [os.path.relpath(path, root) for path in paths]
    return ImageFileDataset(root, paths, labels, pixel_format)


def _declared_names(dataset, num_classes):
    """torchvision's names of the classes, where it has them all; else their numbers."""
    names = list(getattr(dataset, "classes", None) or [])
    if len(set(names)) != num_classes:
        names = [str(i) for i in range(num_classes)]
    return names
