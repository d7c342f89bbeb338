"""Folders, lists and archives on disk: what is in them, as Parts."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from engine.data import layout, tar
from engine.data.decode import EXTENSIONS
from engine.data.images import ImageFileDataset, Listing, Part
from engine.data.lists import read_list
from engine.data.places import find_places, is_archive, scandir
from engine.errors import UserError, join_some, printable
from engine.launch import on_rank0
from moco.distributed import is_main


def find(path, pixel_format):
    """A folder, a list.txt or a .tar → {split: function that reads its Part}, remarks."""
    extensions = EXTENSIONS if pixel_format.in_chans == 3 else (*EXTENSIONS, ".npy")

    def read(paths):
        listing = on_rank0(lambda: _list_images(paths, extensions))
        return _to_part(listing, pixel_format)

    places, remarks = on_rank0(lambda: find_places(Path(path)))
    if places:
        return {split: partial(read, paths) for split, paths in places.items()}, remarks
    listing = on_rank0(lambda: _list_images([Path(path)], extensions))
    splits = layout.find_splits(_folders_of(listing), path)
    if not splits:
        nested = layout.find_nested_splits(_folders_of(listing))
        if nested is not None:
            raise UserError(
                f"{path} has train and val in {nested}/, and other images beside: give one folder "
                "that holds both, or move the others away"
            )
        return {"all": partial(_to_part, listing, pixel_format)}, ()
    splits.pop("test", None)
    num_left_out = len(listing.names) - sum(map(len, splits.values()))
    if num_left_out:
        remarks = (f"images outside train/ and val/: {num_left_out:,} ignored",)
    readers = {}
    for split, indices in splits.items():
        readers[split] = partial(_to_part, _select(listing, indices), pixel_format)
    return readers, remarks


def _list_images(paths, extensions):
    """A list, a folder, or archives in a folder → Listing. UserError if there are no images."""
    first = paths[0]
    if first.suffix == ".txt" and not first.is_dir():
        return read_list(first, extensions)
    root, archives = first.parent, [path.name for path in paths]
    shown = dict(unit=" images", delay=2, leave=False, disable=not is_main())
    with tqdm(desc=printable(f"listing {root}"), **shown) as bar:
        if first.is_dir():
            root, (listing, archives) = first, _list_folder(first, extensions, bar)
        if archives:
            listing = tar.index(root, archives, extensions, bar)
    if not listing.names:
        looked_for = "; ".join([f"looked for {' '.join(extensions)}", *_ignored(listing)])
        raise UserError(f"{join_some(map(str, paths), 1)} holds no images ({looked_for})")
    return listing


def _list_folder(root, extensions, bar):
    """Images at any depth, one pass → Listing; and the archives where there are no images."""
    names, archives, ignored, folders, seen = [], [], Counter(), [""], {}
    for folder in folders:  # which grows
        entries, num_broken = scandir(os.path.join(root, folder), seen)
        ignored["broken links"] += num_broken
        for own_name, is_dir in entries:
            name = os.path.join(folder, own_name)
            if is_dir:
                folders.append(name)
            elif own_name.lower().endswith(extensions):
                names.append(name)
                bar.update()
            else:
                ignored[os.path.splitext(own_name)[1].lower()] += 1
                if is_archive(own_name):
                    archives.append(name)
    top_folders = {name for name in folders[1:] if os.sep not in name}
    empty = sorted(top_folders - {name.split(os.sep)[0] for name in names})
    listing = Listing(str(root), layout.sort_by_folder(names), ignored, empty=empty)
    return listing, [] if names else sorted(archives)


def _select(listing, indices):
    """A Listing of some of the images."""
    return listing._replace(
        names=[listing.names[i] for i in indices],
        labels=listing.labels and [listing.labels[i] for i in indices],
        empty=(),  # folders beside the splits
        index=listing.index and listing.index._replace(spans=listing.index.spans[indices]),
    )


def _folders_of(listing):
    """The images' names with folders that may be splits or classes, as archives may."""
    return listing.index.strip_shards(listing.names) if listing.index else listing.names


def _to_part(listing, pixel_format):
    if listing.index is None:
        root, names, list_path = listing.root, listing.names, listing.list_path
        dataset = ImageFileDataset(root, names, pixel_format=pixel_format, list_path=list_path)
    else:
        dataset = tar.TarDataset(listing.root, listing.names, listing.index, pixel_format)
    labels, shared, flaw = _find_labels(listing)
    if flaw or labels is None:
        flaw = f"{listing.root}: {flaw}" if flaw else ""
        return Part(dataset, None, flaw, shared, _ignored(listing))
    class_names = sorted(set(labels))  # as strings, as torchvision's ImageFolder sorts them
    index = {name: i for i, name in enumerate(class_names)}
    dataset.labels = torch.tensor([index[label] for label in labels])
    return Part(dataset, class_names, remarks=_ignored(listing))


def _find_labels(listing):
    """Labels beside the images, else their folders → labels or None, shared folders, a flaw."""
    if listing.flaw:
        return None, (), listing.flaw
    labels = listing.labels
    if labels is not None:
        num_missing = labels.count("")
        if num_missing == len(labels):
            return None, (), ""
        if num_missing == 0:
            return labels, (), ""
        first = listing.names[labels.index("")]
        return None, (), f"{num_missing:,} of {len(labels):,} images have no label: {first}"
    names = _folders_of(listing)
    shared = layout.below_split(layout.shared_folders(names))
    labels, flaw = layout.label_by_folder(names)
    class_names = sorted(set(labels or ()))
    if labels and all(map(layout.split_of, class_names)):
        raise UserError(
            f"{listing.root}/{listing.names[0]}: are {join_some(class_names)} splits or classes? "
            "Give the folder that holds the splits, or rename the classes"
        )
    if labels and listing.empty:
        flaw = f"{listing.empty[0]}/ holds no images"
    return labels, shared, flaw


def _ignored(listing):
    """A remark on the files that are not images."""
    found = (+listing.ignored).most_common()
    counts = [f"{n:,} {kind or 'without extension'}" for kind, n in found]
    return (f"ignored: {join_some(counts)}",) if counts else ()
