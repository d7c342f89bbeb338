"""Images on disk: folders, lists and .tar archives → Splits."""

import os
import re
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import features
from tqdm import tqdm

from engine.archives import COMPRESSED, HOW_TO_DECOMPRESS, LINKS, TarDataset, index_tars, is_hidden
from engine.datasets import NAMED_SETS, ImageFileDataset, LabelError, Labelled, make_splits
from engine.errors import UserError, printable
from moco.distributed import is_main

OUTSIDE = "outside"  # of train/ and val/: a key of the Counters of what is ignored
NO_TRAIN = "train/ above them: all are taken, without labels"


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


def load(path, pixel_format, need, data_root):
    """load_splits for a folder, a list.txt or a .tar; indexes of archives are kept in data_root."""
    root, ignored = Path(path), Counter()
    if not root.is_dir() and not (root.is_file() and root.suffix in (".txt", ".tar")):
        if root.is_file() and root.name.endswith(COMPRESSED):
            raise UserError(f"{path} {HOW_TO_DECOMPRESS}")
        problem = "is neither a folder, a .txt nor a .tar" if root.exists() else "does not exist"
        raise UserError(
            f"{path} {problem}: give a folder of images, a list.txt, hf:NAME, a .tar, or one of: "
            f"{' '.join(NAMED_SETS)}"
        )
    read = partial(_read_place, ignored, pixel_format, need, data_root)
    train, val = _find_split(root, "train"), _find_split(root, "val")
    if train is None and (val is None or need != "val"):  # the images are in `root` itself
        if val is not None and val.suffix == ".txt":
            raise UserError(f"{path} has val.txt, but neither train.txt nor train/")
        parts = read(root, has_classes=need in ("train", "val") and val is None)
        if need == "val" and parts[1] is None:
            parts = None, parts[0]
        note = "a single list has no images to validate"
        if root.suffix != ".txt":
            note = "no val/ in it"
        remarks = ()
        if val is not None:
            note = f"no train/ or train.txt beside {_place_name(val)}"
            remarks = _val_remark(parts[0].dataset, val)
    else:
        if need in ("train", "images"):
            val = None
        parts = [None if place is None else read(place)[0] for place in (train, val)]
        note = "" if train is None else f"no val/ or val.txt beside {_place_name(train)}"
        remarks = _lists_remark([train, val])
    return make_splits(path, *parts, note, remarks=remarks + _ignored_remark(ignored))


def image_folders(path):
    """The folders that load_splits(path) searches: what is written there is taken for images."""
    root = Path(path)
    if path in NAMED_SETS or path.startswith("hf:") or not root.is_dir():
        return []
    places = [_find_split(root, "train"), _find_split(root, "val")]
    if places[0] is None:
        return [root]
    return [place for place in places if place is not None and place.is_dir()]


def _find_split(root, name):
    """The list root/NAME.txt, the folder root/NAME or the archive root/NAME.tar, else None."""
    if (root / f"{name}.txt").is_file():
        return root / f"{name}.txt"
    if (root / name).is_dir():
        return root / name
    return root / f"{name}.tar" if (root / f"{name}.tar").is_file() else None


def _place_name(place):
    return f"{place.name}/" if place.is_dir() else place.name


def _lists_remark(places):
    """Says which lists, folders and archives were read, unless they are all folders."""
    places = [place for place in places if place is not None]
    if all(place.is_dir() for place in places):
        return ()
    words = []
    for place in places:
        is_preferred = place.suffix == ".txt" and place.with_suffix("").is_dir()
        words.append(_place_name(place) + (f" (not {place.stem}/)" if is_preferred else ""))
    return (f"read from {' and '.join(words)}",)


def _val_remark(dataset, val):
    """val: a folder or an archive that is read as a part of the images to train on."""
    count = np.char.startswith(dataset.paths, os.fsencode(f"{val.name}/")).sum()
    return (f"{count:,} of them are those of {_place_name(val)}",) if count else ()


def _ignored_remark(ignored):
    """ignored: a Counter of LINKS, OUTSIDE, and the extensions of files that are not images."""
    extensions, remarks = Counter(ignored), ()
    num_outside, num_links = extensions.pop(OUTSIDE, 0), extensions.pop(LINKS, 0)
    if num_outside:
        remarks += (f"images outside train/ and val/: {num_outside:,} ignored",)
    if num_links:
        remarks += (
            f"links to nothing in the archive: {num_links:,} ignored (tar -h packs the files "
            "themselves)",
        )
    num_files = extensions.total()
    if num_files == 0:
        return remarks
    counts = sorted((-n, kind or "none") for kind, n in extensions.items())
    kinds = ", ".join(f"{kind} {-n:,}" for n, kind in counts[:5])
    if len(counts) > 5:
        kinds += ", …"
    files = "file with another extension" if num_files == 1 else "files with other extensions"
    return (f"{num_files:,} {files} ignored ({printable(kinds)})", *remarks)


def _read_place(ignored, pixel_format, need, data_root, place, has_classes=True):
    """A list, a folder or an archive → Labelled, and a second one if an archive has train and val.

    ignored: counts the extensions of files that are not images. has_classes: the folders in a
    folder are its classes, as they are in train/.
    """
    if place.suffix == ".txt" and place.is_file():
        try:
            return _read_list(place, pixel_format, need), None
        except UserError as error:
            if place.name not in ("train.txt", "val.txt"):
                raise
            hint = f"{place.name} in DIR is read as a list of images: rename it if it is none"
            raise UserError(f"{error} ({hint})") from None
    tars = [place.name]
    if place.is_dir():
        paths, folders, tars, other = _list_images(place, _extensions(pixel_format))
        if paths:
            ignored.update(other)
            folders = folders if has_classes else set()
            labelled = _label_by_folder(place, paths, folders, pixel_format, need)
            if not has_classes:
                labelled = labelled._replace(kind=NO_TRAIN)
            return labelled, None
    return _read_tars(place, tars, ignored, pixel_format, need, data_root)


def _read_tars(place, tars, ignored, pixel_format, need, data_root):
    """Archives, `place` or in it → as _read_place.

    Labels are WebDataset's if there are any, else the folders in the archives, else the archives'
    own names.
    """
    root = place if place.is_dir() else place.parent
    extensions = _extensions(pixel_format)
    with _progress_bar(f"indexing {place}") as bar:
        paths, labels, tars, spans, other = index_tars(root, tars, extensions, data_root, bar)
    ignored.update(other)
    if not paths:
        raise UserError(f"{place} holds no images ({_looked_for(extensions, other)})")
    dataset = TarDataset(root, paths, tars, spans, pixel_format)
    parts, kind = {"train": range(len(paths))}, "labels"
    if not any(labels):
        kind = "labels, neither .cls or .json nor class folders"
        folders = _folders_in_tars(dataset, paths)
        labels = [folder[0] if folder else "" for folder in folders]
        # Classes may be called train, too, but then there is neither a val nor a test.
        if "train" in labels and not {"val", "test"}.isdisjoint(labels):
            parts = {}
            for part in ("train", "val"):
                parts[part] = [i for i, label in enumerate(labels) if label == part]
            ignored[OUTSIDE] += len(paths) - len(parts["train"]) - len(parts["val"])
            labels = [folder[1] if len(folder) > 1 else "" for folder in folders]
            if need == "val" and not parts["val"]:
                raise UserError(f"{place} has train/ in it, but no val/ to validate")
            if need in ("train", "images") or not parts["val"]:
                del parts["val"]
    for part, indices in parts.items():
        label_names = [labels[i] for i in indices]
        missing = [paths[i] for i in indices if not labels[i]]
        if missing and len(missing) < len(indices) and need != "images":
            raise LabelError(
                f"{place}: {len(missing):,} of {len(indices):,} images have no label: {missing[0]}"
            )
        label_names = None if missing else label_names
        parts[part] = Labelled(dataset.select(indices), label_names, kind)
    return parts["train"], parts.get("val")


def _folders_in_tars(dataset, paths):
    """For each image the folders that it is in, its class first; nested archives are folders.

    An archive is one, too, unless it is the only one or a shard: names that differ in a number
    alone. Those of ImageNet's classes, n01440764.tar, do so as well.
    """
    tars = [tar for tar, _, _ in dataset.tars]
    are_shards = len({re.sub(r"\d+(-of-\d+)?\.tar$", "", tar) for tar in tars}) == 1
    are_wordnet = all(re.fullmatch(r"n\d{8}\.tar", tar) for tar in tars)
    are_classes = len(tars) > 1 and (are_wordnet or not are_shards)
    folders = []
    for path, number in zip(paths, dataset.spans[:, 0].tolist()):
        inner = path if are_classes else path[len(tars[number]) + 1 :]
        folders.append([name.removesuffix(".tar") for name in inner.split("/")[:-1]])
    tops = {folder[0] if folder else "" for folder in folders}
    have_subfolders = all(len(folder) > 1 for folder in folders)
    have_train = any(folder[1:2] == ["train"] for folder in folders)
    if len(tops) == 1 and (have_subfolders or have_train) and not are_classes:
        folders = [folder[1:] for folder in folders]  # `tar cf set.tar set` made it
    return folders


def _label_by_folder(root, paths, folders, pixel_format, need):
    """root/CLASS/…/image → Labelled, whose label names are None without class folders.

    folders: the names of the folders in root.
    """
    paths.sort(key=lambda path: path.replace(os.sep, "\0", 1))  # by the class, then by the rest
    label_names = [path.rpartition(os.sep)[0].partition(os.sep)[0] for path in paths]
    num_beside = label_names.count("")
    empty = sorted(folders - set(label_names))
    if folders and need != "images":
        if num_beside:
            beside = paths[label_names.index("")]
            raise LabelError(
                f"{root} has class folders and {num_beside} images beside them: {beside}"
            )
        if empty:
            looked_for = _looked_for(_extensions(pixel_format), {})
            raise LabelError(f"{root}/{empty[0]} holds no images ({looked_for})")
    if not folders or num_beside:
        paths, label_names = sorted(paths), None
    dataset = ImageFileDataset(root, paths, pixel_format=pixel_format)
    return Labelled(dataset, label_names, "class folders")


def _extensions(pixel_format):
    return EXTENSIONS if pixel_format.in_chans == 3 else (*EXTENSIONS, ".npy")


def _looked_for(extensions, ignored):
    return "; ".join([f"looked for {' '.join(extensions)}", *_ignored_remark(Counter(ignored))])


def _progress_bar(text):
    """Of images, shown when it takes long."""
    return tqdm(
        desc=text, unit=" images", delay=2, mininterval=1, leave=False, disable=not is_main()
    )


def _list_images(root, extensions):
    """Images at any depth → their paths below root, the folders in root, paths of .tars, ignored.

    ignored: Counter of the extensions of other files, .tar among them. Hidden files and folders are
    skipped. One pass. UserError if there are neither images nor archives.
    """
    paths, top_folders, tars, ignored, folders = [], None, [], Counter(), [""]
    compressed = None
    with _progress_bar(f"listing {root}") as bar:
        while folders:
            folder = folders.pop()
            try:
                for entry in os.scandir(os.path.join(root, folder)):
                    name = entry.name
                    if is_hidden(name):
                        continue
                    if entry.is_dir():
                        folders.append(os.path.join(folder, name))
                    elif name.lower().endswith(extensions):
                        paths.append(os.path.join(folder, name))
                        bar.update()
                    else:
                        extension = os.path.splitext(name)[1].lower()
                        ignored[extension] += 1
                        if extension == ".tar":
                            tars.append(os.path.join(folder, name))
                        elif name.endswith(COMPRESSED):
                            compressed = os.path.join(root, folder, name)
            except OSError as error:
                raise UserError(f"can't list {root}/{folder}: {error.strerror}") from None
            if top_folders is None:
                top_folders = set(folders)
    if not paths and compressed:
        raise UserError(f"{compressed} {HOW_TO_DECOMPRESS}")
    if not paths and not tars:
        raise UserError(f"{root} holds no images ({_looked_for(extensions, ignored)})")
    return paths, top_folders, sorted(tars), ignored


def _read_list(path, pixel_format, need):
    """A .txt → Labelled, whose label names are None without labels.

    One image a line: PATH or PATH<TAB>LABEL, PATH relative to the list's folder. UserError, naming
    the line, for a path that leads out of the folder and for one with two different labels.
    """
    has_labels = True
    extensions = _extensions(pixel_format)
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    paths, labels, first_lines = [], [], {}
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
        first_number, first_label = first_lines.setdefault(entry, (number, labels[-1]))
        if labels[-1] != first_label and need == "images":
            has_labels = False
        elif labels[-1] != first_label:
            raise LabelError(
                f"{path}, line {number}: {entry} has the label {labels[-1]}, and in line "
                f"{first_number} the label {first_label}"
            )
    if not paths:
        raise UserError(f"{path} names no images")
    dataset = ImageFileDataset(path.parent, paths, pixel_format=pixel_format)
    return Labelled(dataset, labels if labels[0] and has_labels else None)
