"""Images in .tar archives, read where they lie, at random, by an index of their offsets.

timm's reader of archives knows no labels of WebDataset, keeps Python objects of every image in each
worker, and doesn't notice that an archive has changed.
"""

import copy
import functools
import hashlib
import json
import os
import re
import tarfile
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from engine.checkpoint import atomic_write
from engine.datasets import DIGEST_BYTES, ImageFileDataset
from engine.decode import UnreadableImage, decode_image
from engine.errors import UserError, first_line

COMPRESSED = tuple(".tar.gz .tgz .tar.bz2 .tbz2 .tar.xz .txz .tar.zst".split())
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
HOW_TO_DECOMPRESS = (
    "is compressed, images can't be read from it: gunzip, bunzip2, unxz or unzstd it"
)
INDEX_VERSION = 2
MAX_LINKS = 40  # in a path, as on Linux
LINKS = "links"  # a key, as extensions are, of the Counters of what is ignored

# Files and folders that start with "." are hidden; these are what archivers, file servers and
# operating systems leave beside the images.
IGNORED_NAMES = {"__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN"}


def is_hidden(name):
    return name.startswith(".") or name in IGNORED_NAMES


def _is_hidden_path(path):
    return any(map(is_hidden, path.split("/")))


class TarDataset(ImageFileDataset):
    """Image files in archives: paths ARCHIVE/MEMBER below `root`.

    tars: [path, size, mtime_ns] of each archive. spans: int64 [n, 3], for each image the number of
    its archive, offset and size.
    """

    def __init__(self, root, paths, tars, spans, pixel_format):
        super().__init__(root, paths, pixel_format=pixel_format)
        self.tars, self.spans = tars, spans

    def select(self, indices):
        """A dataset of some of the images."""
        part = copy.copy(self)
        part.paths, part.spans = self.paths[indices], self.spans[indices]
        return part

    def read(self, i):
        try:
            data = self._read_bytes(i)
        except OSError as error:
            raise UnreadableImage(self.path(i), error.strerror or first_line(error)) from None
        return decode_image(self.path(i), self.pixel_format, data)

    def raw_bytes(self, i):
        try:
            return b"%d " % self.spans[i, 2] + self._read_bytes(i)[:DIGEST_BYTES]
        except OSError:
            return b""

    def _read_bytes(self, i):
        number, offset, size = self.spans[i].tolist()
        path, *state = self.tars[number]
        file = _open(os.path.join(self.root, path), *state).fileno()
        status = os.fstat(file)
        if [status.st_size, status.st_mtime_ns] != state:
            raise OSError("the archive has changed since the run began")
        # Not seek and read: the workers, which are forked, share the position in the file.
        return os.pread(file, size, offset)


@functools.lru_cache(maxsize=64)  # below the limit on open files, whatever the number of archives
def _open(path, size, mtime):
    """size, mtime: a file that replaces another one is opened anew."""
    return open(path, "rb", buffering=0)


def index_tars(root, tars, extensions, data_root, bar):
    """The images in archives below `root` → paths, labels, tars, spans, ignored.

    They are kept in data_root until an archive changes. Labels are "" where there is none; tars and
    spans are TarDataset's; ignored: a Counter of the extensions of other files, and of LINKS.
    """
    try:
        states = [(tar, os.stat(os.path.join(root, tar))) for tar in tars]
    except OSError as error:
        raise UserError(f"can't read {error.filename}: {error.strerror}") from None
    states = [[tar, status.st_size, status.st_mtime_ns] for tar, status in states]
    key = json.dumps([INDEX_VERSION, extensions, states])
    name = f"{os.path.realpath(root)}:{tars[0] if len(tars) == 1 else ''}"
    name = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
    cache = Path(data_root, "tar_index", f"{name}.npz")
    # There may be none, or one that is damaged.
    with suppress(Exception), np.load(cache) as arrays:
        if arrays["key"].item() == key:
            text = json.loads(arrays["text"].item())
            return *text[:2], states, arrays["spans"], Counter(text[2])

    images, ignored = [], Counter()  # of each image path, label, span
    for number, tar in enumerate(tars):
        for name, label, span in _index_tar(os.path.join(root, tar), extensions, ignored, bar):
            images.append((f"{tar}/{name}", label, (number, *span)))
    paths, labels, spans = zip(*sorted(images)) if images else ((), (), ())
    spans = np.array(spans, np.int64)
    with suppress(OSError):  # then the next run makes it again
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as file:
            np.savez(file, key=key, text=json.dumps([paths, labels, ignored]), spans=spans)
    return paths, labels, states, spans, ignored


def _index_tar(path, extensions, ignored, bar):
    """Yields name, label and (offset, size) of each image in an archive."""
    try:
        with open(path, "rb") as file:
            if file.read(6).startswith(COMPRESSED_MAGIC):
                raise UserError(f"{path} {HOW_TO_DECOMPRESS}")
            members = {}
            for name, place in _read_members(file, 0, os.path.getsize(path)):
                members[name] = place
                bar.update()
            members = _follow_links(members, ignored)
            for name, span in members.items():
                key, extension = re.fullmatch(r"((?:.*/)?[^./]*)(.*)", name, re.DOTALL).groups()
                is_image, label = name.lower().endswith(extensions), ""
                labels = [members.get(f"{key}.{kind}") for kind in ("cls", "json")]
                if any(labels):  # as WebDataset names files: KEY.jpg, KEY.cls; KEY.mask.png is none
                    is_image = extension.lower() in extensions
                    label = _read_label(file, *labels) if is_image else ""
                if is_image:
                    yield name, label, span
                elif span not in labels:
                    ignored[os.path.splitext(name)[1].lower()] += 1
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path} is not a whole .tar, copy it again: {first_line(error)}") from None


def _read_members(file, start, end):
    """Yields name, (offset, size) of the files in an archive, nested ones included.

    Of a link: name, the path in the archive that it leads to.
    """
    file.seek(start)
    tar = tarfile.TarFile(fileobj=file)
    for member in iter(tar.next, None):
        tar.members.clear()  # a kilobyte each
        name, offset = os.path.normpath(member.name), member.offset_data
        if member.islnk():
            yield name, os.path.normpath(member.linkname)
        elif member.issym():
            yield name, os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
        elif member.issparse():
            if not _is_hidden_path(name):
                raise UserError(
                    f"{file.name} was packed with tar -S, which leaves out the holes of {name}: "
                    "pack it again without -S"
                )
        elif member.isreg():
            if offset + member.size > end:
                raise tarfile.ReadError("it is cut short")
            if name.endswith(".tar") and not _is_hidden_path(name):
                for inner, place in _read_members(file, offset, offset + member.size):
                    yield f"{name}/{inner}", f"{name}/{place}" if isinstance(place, str) else place
            else:
                yield name, (offset, member.size)
    if tar.offset + tarfile.BLOCKSIZE > end:
        raise tarfile.ReadError("it is cut short")
    file.seek(tar.offset)
    if file.read(min(2**20, end - tar.offset)).strip(b"\0"):
        raise tarfile.ReadError(f"it is damaged, or several in one, at byte {tar.offset}")


def _follow_links(members, ignored):
    """A dict of what _read_members yields → name: (offset, size) of files that are not hidden.

    A link becomes the file that it leads to, or the files in the folder. `ignored` counts the links
    that lead to none.
    """
    files, names = {}, sorted(members)
    for name, place in members.items():
        if _is_hidden_path(name):
            continue
        if isinstance(place, tuple):
            files[name] = place
            continue
        num_before = len(files)
        for below, place in _files_at(name, members, names):
            if not _is_hidden_path(name + below):
                files[name + below] = place
        if len(files) == num_before:
            ignored[LINKS] += 1
    return files


def _files_at(path, members, names, seen=()):
    """Yields /PATH in the folder, (offset, size) of its files; "", (offset, size) if it is a file.

    names: the members, sorted. seen: the folders whose links led here.
    """
    path = _resolve(path, members)
    if isinstance(members.get(path), tuple):
        yield "", members[path]
    elif path not in seen:
        first = bisect_left(names, f"{path}/")
        end = bisect_left(names, f"{path}0")  # the character after "/"
        for name in names[first:end]:
            for below, place in _files_at(name, members, names, (*seen, path)):
                yield name[len(path) :] + below, place


def _resolve(path, members):
    """The path without links: what each leads to is in its place."""
    for _ in range(MAX_LINKS):
        parts = accumulate(path.split("/"), "{}/{}".format)
        link = next((part for part in parts if isinstance(members.get(part), str)), None)
        if link is None:
            break
        path = members[link] + path[len(link) :]
    return path


def _read_label(file, cls, json_fields):
    """The text in KEY.cls, else `label` or `cls` in KEY.json, else ""; their offsets and sizes."""
    offset, size = cls or json_fields
    text = os.pread(file.fileno(), size, offset).decode(errors="replace").strip()
    if cls:
        return text
    with suppress(ValueError, AttributeError):  # not JSON, not an object
        fields = json.loads(text)
        for label in (fields.get("label"), fields.get("cls")):
            if isinstance(label, int | str):
                return str(label)
    return ""
