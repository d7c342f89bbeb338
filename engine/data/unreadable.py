"""The images of a run that can't be read: counted, limited and listed."""

import sys
from contextlib import suppress
from pathlib import Path

from engine.data.crops import MAX_ATTEMPTS
from engine.errors import UserError, join_some
from engine.files import atomic_write, exists
from engine.launch import all_gather_object
from moco.distributed import is_main


class UnreadableImages:
    """The images that can't be read, each once: counted, limited, listed in folder/bad_images.txt.

    max_fraction: of each dataset may be unreadable. A resumed run continues the list that it finds,
    and counts anew. Without a folder each is reported on stderr. print_fn: prints on rank 0.
    all: path → reason, of all ranks and datasets, as of the last sync.
    """

    def __init__(self, max_fraction, folder=None, resumed=False, print_fn=print):
        self.max_fraction, self.print_fn = max_fraction, print_fn
        self.path = None if folder is None else Path(folder, "bad_images.txt")
        self.all = {}
        self._found, self._new = {}, {}  # dataset → path → reason; new: on this rank since sync
        if self.path is not None and resumed and is_main() and exists(self.path):
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            self.all = dict(line.split("\t", 1) for line in lines if "\t" in line)

    def add(self, unreadable, dataset):
        """unreadable: path → reason, of images of `dataset`."""
        self._new.setdefault(dataset, {}).update(unreadable)

    def check_batch(self, num_images, dataset):
        """After a batch of `dataset` none of whose num_images could be read.

        UserError, in place of a line for each, if it is a long one and max_fraction forbids it.
        """
        is_long = num_images >= min(MAX_ATTEMPTS, len(dataset))
        if is_long and num_images > self._num_allowed(dataset):
            path, reason = list(self._new[dataset].items())[-1]
            message = f"{num_images} unreadable images in a row, the last is {path}: {reason}"
            raise UserError(message, exit_code=1, rank_local=True)

    def sync(self, dataset):
        """Collects and reports what all ranks have found in `dataset`; all ranks call it.

        UserError if there are more than max_fraction allows.
        """
        found, num_before = self._found.setdefault(dataset, {}), self.count(dataset)
        for new in all_gather_object(self._new.pop(dataset, {})):
            found |= new
        if len(found) == num_before:
            return
        new = {path: reason for path, reason in found.items() if path not in self.all}
        self.all |= new
        if is_main() and new:
            self._report(new)
        num_allowed = self._num_allowed(dataset)
        if len(found) > num_allowed:
            examples = join_some((f"{path} ({found[path]})" for path in found), most=3)
            listed = f"; all are listed in {self.path}" if self.path else ""
            raise UserError(
                f"{_count(found)}, --max-bad-images {self.max_fraction:g} allows {num_allowed} of "
                f"{len(dataset):,}: {examples}{listed}; remove them, or raise it",
                exit_code=1,
            )

    def _num_allowed(self, dataset):
        return int(self.max_fraction * len(dataset) + 1e-6)  # .29 · 100 is 28.999…

    def count(self, dataset):
        """The number of unreadable images in `dataset`, as of the last sync."""
        return len(self._found.get(dataset, ()))

    def remark(self, dataset):
        """To append to an accuracy on `dataset`."""
        found = self._found.get(dataset)
        return f" ({_count(found)} counted as wrong)" if found else ""

    def _report(self, new):
        if self.path is None:
            for path, reason in new.items():
                print(f"unreadable image {path}: {reason}", file=sys.stderr, flush=True)
            return
        lines = [f"{path}\t{reason}\n" for path, reason in self.all.items()]
        with suppress(OSError), atomic_write(self.path) as file:  # saving reports a full disk
            file.write("".join(lines).encode())
        if len(new) == len(self.all):  # the first
            path, reason = next(iter(new.items()))
            listed = f"unreadable images are skipped and listed in {self.path}"
            self.print_fn(f"unreadable image {path}: {reason}; {listed}")

    def __str__(self):
        return f"{_count(self.all)} skipped: {self.path}"


def _count(paths):
    return f"{len(paths):,} unreadable image{'' if len(paths) == 1 else 's'}"
