"""What the names of images tell: splits and classes, the same for folders and archives.

    train/cat/1.jpg  train/dog/2.jpg  val/cat/3.jpg      two splits, each with the classes cat, dog
    data/set/cat/1.jpg  data/set/dog/2.jpg               the classes cat and dog
    images/1.jpg  images/2.jpg                           no classes: all are in one folder

Folders that all images share tell nothing and are stripped. Names are paths with "/".
"""

import re
from collections import defaultdict

from engine.errors import UserError

OTHER_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}

# Files and folders that start with "." are hidden; these are what archivers, file servers and
# operating systems leave beside the images.
IGNORED_NAMES = {"__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN"}


def is_hidden(name):
    return name.startswith(".") or name in IGNORED_NAMES


def split_of(name):
    """The split that a name such as Validation tells, "train", "val" or "test"; else None."""
    split = OTHER_NAMES.get(name.lower(), name.lower())
    return split if split in ("train", "val", "test") else None


def split_of_shard(stem):
    """The same for an archive in whose name the split is one word: imagenet-train-0001."""
    splits = {split_of(word) for word in re.split(r"[^a-zA-Z]+", stem)} - {None}
    return splits.pop() if len(splits) == 1 else None


def are_splits(splits):
    """Whether names side by side, of these splits or None, are splits rather than classes.

    They are if all are called so, or if train and val are among them; a folder called train among
    others is a class.
    """
    if {"train", "val"} <= splits:
        return True
    return None not in splits and not splits.isdisjoint(("train", "val"))


def by_split(names, path):
    """{split: its name}; UserError for two names of one split. path: of all, for messages."""
    found = {}
    for name in sorted(names):
        split = split_of(name.removesuffix(".txt"))
        if split in found:
            raise UserError(f"{path} has {found[split]} and {name}: which one is {split}?")
        if split is not None:
            found[split] = name
    return found


def sort_by_folder(names):
    """By the first folder, then by the next one, and so on."""
    return sorted(names, key=lambda name: name.replace("/", "\0"))


def shared_folders(names):
    """The leading folders that all names share, for example ["data", "set"]."""
    shared = []
    # What these two share, all names between them share.
    for first, last in zip(min(names).split("/")[:-1], max(names).split("/")[:-1]):
        if first != last:
            break
        shared.append(first)
    return shared


def below_split(folders):
    """Of folders, each in the one before it, those below the last that is called train or val."""
    ends = [i + 1 for i, name in enumerate(folders) if split_of(name) in ("train", "val")]
    return folders[ends[-1] :] if ends else folders


def first_folders(names):
    """Of each name the first folder below the shared ones; "" if it has none."""
    start = sum(len(folder) + 1 for folder in shared_folders(names))
    return [name[start:].rpartition("/")[0].partition("/")[0] for name in names]


def find_splits(names, path):
    """{split: indices of its names}; {} where the names tell none. path: of all, for messages."""
    for folder in reversed(shared_folders(names)):
        if split_of(folder) in ("train", "val"):
            return {split_of(folder): range(len(names))}
    folders = first_folders(names)
    different = set(folders) - {""}
    if not are_splits({split_of(folder) for folder in different}):
        return {}
    return {
        split: [i for i, folder in enumerate(folders) if folder == name]
        for split, name in by_split(different, path).items()
    }


def label_by_folder(names):
    """The class of each name, its first folder below the shared ones → labels or None, a flaw."""
    labels = first_folders(names)
    num_beside = labels.count("")
    if num_beside == 0:
        return labels, ""
    if num_beside == len(names):
        return None, ""
    first = names[labels.index("")]
    return None, f"there are class folders and {num_beside:,} images beside them: {first}"


def find_nested_splits(names):
    """A folder that holds both train and val somewhere below, for example "set"; None without."""
    splits = defaultdict(set)  # of each folder
    for folder in {name.rpartition("/")[0] for name in names}:
        parts = folder.split("/")
        for i, part in enumerate(parts):
            splits["/".join(parts[:i])].add(split_of(part))
    return next((folder for folder in sorted(splits) if {"train", "val"} <= splits[folder]), None)
