"""The images of a run that can't be read: counted, limited and listed."""

import sys
from contextlib import suppress
from pathlib import Path

from engine.errors import UserError, join_some
from engine.files import atomic_write
from engine.launch import all_gather_object
from moco.distributed import is_main


class UnreadableImages:
    """The images that can't be read, each once: counted, limited, listed in folder/bad_images.txt.

    max_fraction: of num_images may be unreadable. A resumed run continues the list that it finds.
    Without a folder each is reported on stderr. print_fn: prints on rank 0.
    all: path → reason, of all ranks, as of the last sync.
    """

    def __init__(self, max_fraction, num_images, folder=None, resumed=False, print_fn=print):
        self.max_fraction, self.num_images = max_fraction, num_images
        self.print_fn = print_fn
        self.path = None if folder is None else Path(folder, "bad_images.txt")
        self.all, self._new = {}, {}  # _new: what this rank has found since the last sync
        if self.path is not None and resumed and is_main() and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            self._new = dict(line.split("\t", 1) for line in lines if "\t" in line)

    def add(self, unreadable):
        """unreadable: path → reason."""
        self._new |= unreadable

    def sync(self):
        """Collects and reports what all ranks have found since the last call; all ranks call it.

        UserError if there are more than max_fraction allows.
        """
        new = {}
        for found in all_gather_object(self._new):
            new |= {path: reason for path, reason in found.items() if path not in self.all}
        self._new = {}
        if not new:
            return
        self.all |= new
        if is_main():
            self._report(new)
        num_allowed = int(self.max_fraction * self.num_images + 1e-6)  # .29 · 100 is 28.999…
        if len(self.all) > num_allowed:
            examples = join_some((f"{path} ({self.all[path]})" for path in self.all), most=3)
            listed = f"; all are listed in {self.path}" if self.path else ""
            raise UserError(
                f"{self._count()}, --max-bad-images {self.max_fraction:g} allows {num_allowed} of "
                f"{self.num_images:,}: {examples}{listed}",
                exit_code=1,
            )

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
        return f"{self._count()} skipped: {self.path}"

    def _count(self):
        return f"{len(self.all):,} unreadable image{'' if len(self.all) == 1 else 's'}"
