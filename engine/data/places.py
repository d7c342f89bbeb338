"""Where a folder has its splits: lists, folders and archives whose names say so."""

import os
from pathlib import Path

from engine.data import layout
from engine.data.decode import EXTENSIONS
from engine.errors import UserError, join_some
from engine.files import exists

# Compressed ones are listed to be refused by name.
ARCHIVES = tuple(".tar .tar.gz .tgz .tar.bz2 .tbz2 .tar.xz .txz .tar.zst".split())
IMAGES = (*EXTENSIONS, ".npy")


def is_archive(name):
    return name.lower().endswith(ARCHIVES)


def image_folders(path):
    """The folders that are searched for images: what is written there is taken for some."""
    if not os.path.isdir(path):
        return []
    places = find_places(Path(path))[0].values()
    return [place for [place, *_] in places if place.is_dir()] or [Path(path)]


def find_places(root):
    """{split: paths of its list, folder or archives}; {} where names at this level tell no splits.

    Also remarks on what is read and left out. A list is {"all": [root]}.
    """
    _check_form(root)
    if not root.is_dir():
        return ({} if is_archive(root.name) else {"all": [root]}), ()
    seen = {}
    while True:
        entries, _ = scandir(root, seen)
        folders = sorted(name for name, is_dir in entries if is_dir)
        files = sorted(name for name, is_dir in entries if not is_dir)
        archives = [name for name in files if is_archive(name)]
        lists = [name for name in files if name.endswith(".txt") and layout.split_of(name[:-4])]
        num_images = sum(name.lower().endswith(IMAGES) for name in files)
        is_alone = len(folders) == 1 and not (lists or archives or num_images)
        if not is_alone or layout.split_of(folders[0]) is not None:
            break
        root /= folders[0]

    found = {}  # split → names; a list is preferred to a folder, and a folder to archives
    for name in archives:
        found.setdefault(layout.split_of_shard(Path(name).stem), []).append(name)
    for names in (folders, lists):
        found |= {split: [name] for split, name in layout.by_split(names, root).items()}
    others = [name for name in folders if layout.split_of(name) is None] + found.pop(None, [])
    splits = {*found, None} if others else {*found}
    if not (lists or layout.are_splits(splits)):
        return {}, ()
    found = {split: found[split] for split in ("train", "val") if split in found}
    places = {split: [root / name for name in names] for split, names in found.items()}

    read, remarks = {name for names in found.values() for name in names}, []
    left_out = [name for name in (*folders, *lists, *archives) if name not in read]
    if lists:  # the other folders may hold the images that they name
        left_out = [name for name in left_out if name not in others]
    elif num_images:
        left_out.append(f"{num_images:,} images")
    if not read.issubset(folders):
        read_from = " and ".join(join_some(names, 1) for names in found.values())
        remarks.append(f"read from {read_from}")
    if left_out:
        remarks.append(f"not read: {join_some(left_out)}")
    return places, tuple(remarks)


def _check_form(root):
    # os.path: Path's methods raise for names that are too long or out of reach.
    if os.path.isdir(root):
        return
    if os.path.isfile(root) and (root.suffix == ".txt" or is_archive(root.name)):
        return
    problem = "is neither a folder nor a .txt or .tar" if os.path.exists(root) else "does not exist"
    raise UserError(
        f"{root} {problem}: give a folder of images, a list.txt, a .tar, hf:NAME, or the name of a "
        "data set (--help lists them)"
    )


def scandir(folder, seen):
    """What is not hidden in a folder → [(name, whether it is a folder)], number of broken links.

    seen: the folders that were read before, to which this one is added. UserError for a folder
    that can't be read, or that was read before: links make a circle, or a folder of two classes.
    """
    entries, num_broken = [], 0
    try:
        status = os.stat(folder)
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first is not folder:
            raise UserError(f"{folder} is a link to {first}, which is read, too: remove it")
        for entry in os.scandir(folder):
            if layout.is_hidden(entry.name):
                continue
            if entry.is_symlink() and not exists(entry.path):
                num_broken += 1
            else:
                entries.append((entry.name, entry.is_dir()))
    except OSError as error:
        raise UserError(f"can't list {folder}: {error.strerror}") from None
    return entries, num_broken
