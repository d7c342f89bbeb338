"""Images in .tar archives, read where they lie, at random, by an index of their offsets."""

import errno
import functools
import json
import os
import re
import tarfile
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from engine.data.images import MAX_NAME, ImageFileDataset, Listing, check_file_size
from engine.data.layout import is_hidden, shared_folders
from engine.errors import UserError, first_line, is_machine_failure

COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
MAX_LABEL_BYTES = 2**16  # of a .cls or .json
MAX_HEADER_BYTES = 2**20  # of names and the like that precede a member


class TarIndex(NamedTuple):
    """Where images lie. archives: below the root; spans: int64 [n, 3], archive, offset, size."""

    archives: tuple[str, ...]
    spans: np.ndarray

    def strip_shards(self, names):
        """The names without archives that are no folders: the only one, and shards.

        Shards are called alike but for a number. So are ImageNet's classes, n01440764.tar.
        """
        lower = [archive.lower() for archive in self.archives]
        stems = {re.sub(r"\d+(-of-\d+)?\.tar$", "", archive) for archive in lower}
        are_wordnet = all(re.search(r"(^|/)n\d{8}\.tar$", archive) for archive in lower)
        is_folder = len(lower) > 1 and (are_wordnet or len(stems) > 1)
        numbers = self.spans[:, 0].tolist()
        starts = [0 if is_folder else len(archive) + 1 for archive in self.archives]
        stripped = [name[starts[number] :] for name, number in zip(names, numbers)]
        return [name.replace(".tar/", "/").replace(".TAR/", "/") for name in stripped]


class TarDataset(ImageFileDataset):
    """Image files in archives: paths ARCHIVE/MEMBER below `root`."""

    def __init__(self, root, paths, index, pixel_format):
        super().__init__(root, paths, pixel_format=pixel_format)
        self.archives, self.spans = index.archives, index.spans
        self.states = [_state(os.stat(os.path.join(root, path))) for path in index.archives]

    def get_bytes(self, i):
        number, offset, size = self.spans[i].tolist()
        check_file_size(size)
        path, state = os.path.join(self.root, self.archives[number]), self.states[number]
        try:
            file = _open(path, state).fileno()
            if _state(os.fstat(file)) != state:
                raise UserError(f"{path} has changed since the run began", 1, rank_local=True)
            # Not seek and read: the workers, which are forked, share the position in the file.
            data = os.pread(file, size, offset)
            if len(data) < size:
                raise OSError(errno.EIO, "the archive is cut short")
            return data
        except OSError:
            _open.cache_clear()  # a stale handle stays stale
            raise


def _state(status):
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=64)  # below the limit on open files, whatever the number of archives
def _open(path, state):
    """state: a file that replaces another one is opened anew."""
    return open(path, "rb", buffering=0)


def index(root, archives, extensions, bar):
    """The images in archives below `root`, ARCHIVE/MEMBER → images.Listing.

    UserError for an archive that is compressed, cut short or damaged.
    """
    images, ignored = [], Counter()  # of each image: name, label, span
    for number, archive in enumerate(archives):
        path = os.path.join(root, archive)
        for name, label, span in _index_archive(path, extensions, ignored, bar):
            images.append((f"{archive}/{name}", label, (number, *span)))
    images.sort(key=lambda image: image[0].replace("/", "\0"))  # as sort_by_folder has it
    names, labels, spans = map(list, zip(*images)) if images else ([], [], [])
    index = TarIndex(tuple(archives), np.array(spans, np.int64))
    flaw = ""
    if None in labels:
        name = names[labels.index(None)]
        flaw = f"the label in the .json of {name} is neither a number nor a text"
    labels = labels if any(labels) else None
    return Listing(str(root), names, ignored, labels, flaw, index=index)


def _index_archive(path, extensions, ignored, bar):
    """Yields name, label and (offset, size) of each image in an archive."""
    try:
        with open(path, "rb") as file:
            if file.read(6).startswith(COMPRESSED_MAGIC):
                raise UserError(f"{path} is compressed: gunzip, bunzip2, unxz or unzstd it")
            members = {}
            for name, span in _read_members(file, 0, os.path.getsize(path), ignored):
                members[name] = span
                bar.update()
            num_shared = len(shared_folders(list(members))) if members else 0
            for name, span in members.items():
                if any(map(is_hidden, name.split("/")[num_shared:])):
                    continue
                key, extension = re.fullmatch(r"((?:.*/)?[^./]*)(.*)", name, re.DOTALL).groups()
                is_image, label = name.lower().endswith(extensions), ""
                beside = [members.get(f"{key}.{kind}") for kind in ("cls", "json")]
                # As WebDataset names files: KEY.jpg, KEY.cls; KEY.mask.png beside them is no image.
                if is_image and extension.lower() not in extensions:
                    others = [members.get(key + known) for known in extensions]
                    is_image = not any(others + beside)
                elif is_image and any(beside):
                    label = _read_label(file, *beside)
                if is_image:
                    yield name, label, span
                elif span not in beside:
                    ignored[os.path.splitext(name)[1].lower()] += 1
    except UserError:
        raise
    except Exception as error:  # tarfile raises nearly anything on a damaged header
        if is_machine_failure(error):
            raise
        raise UserError(f"{path} is not a whole .tar, copy it again: {first_line(error)}") from None


def _read_members(file, start, end, ignored):
    """Yields name, (offset, size) of the files in an archive, those of archives in it included.

    Hidden files are skipped; `ignored` counts links and the like.
    """
    file.seek(start)
    tar = tarfile.TarFile(fileobj=_Headers(file))
    for member in iter(tar.next, None):
        tar.members.clear()  # a kilobyte each
        name, offset, size = os.path.normpath(member.name), member.offset_data, member.size
        if len(name) > MAX_NAME:
            raise tarfile.ReadError("it is damaged")
        if is_hidden(os.path.basename(name)) or member.isdir():
            continue
        if not member.isreg() or member.issparse():
            ignored["links and sparse files"] += 1
            continue
        if size < 0 or offset + size > end:
            raise tarfile.ReadError("it is cut short or damaged")
        if name.lower().endswith(".tar"):
            for inner, span in _read_members(file, offset, offset + size, ignored):
                yield f"{name}/{inner}", span
        else:
            yield name, (offset, size)
    if tar.offset + tarfile.BLOCKSIZE > end:
        raise tarfile.ReadError("it is cut short")
    file.seek(tar.offset)
    if file.read(min(2**20, end - tar.offset)).strip(b"\0"):
        raise tarfile.ReadError(f"it is damaged, or several in one, at byte {tar.offset}")


class _Headers:
    """A file of which tarfile reads headers, forwards; a damaged one may state any size."""

    def __init__(self, file):
        self.file, self.tell = file, file.tell

    def seek(self, offset):
        if offset < self.tell():  # it would read the same headers for ever
            raise tarfile.ReadError("it is damaged")
        return self.file.seek(offset)

    def read(self, size):
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError("it is damaged")
        return self.file.read(size)


def _read_label(file, cls, json_fields):
    """The text in KEY.cls, else `label` or `cls` in KEY.json, else "".

    cls, json_fields: their offsets and sizes. None for a label that is of another type.
    """
    offset, size = cls or json_fields
    if size > (MAX_NAME if cls else MAX_LABEL_BYTES):
        return ""
    text = os.pread(file.fileno(), size, offset).decode(errors="replace").strip()
    if cls:
        return text
    with suppress(ValueError, AttributeError, RecursionError):  # not JSON, not an object
        fields = json.loads(text)
        labels = fields.get("label"), fields.get("cls")
        for label in labels:
            if isinstance(label, float) and label.is_integer():  # as pandas writes integers
                label = int(label)
            if isinstance(label, int | str):
                return str(label)
        # A list of several classes, for example; pandas writes NaN where there is none.
        if any(label is not None and label == label for label in labels):
            return None
    return ""
