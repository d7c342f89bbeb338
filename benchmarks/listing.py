"""How long a run takes to find its images: 200,000 files in 100 class folders, and as a list.

    python benchmarks/listing.py --out benchmarks/results/listing.json
    python benchmarks/listing.py --quick
Empty files on the local disk (--folder), whose directories are in the page cache, as they are when
training begins for the second time. Seconds from DIR to paths and labels; medians.
"""

import statistics
import tempfile
import time
from pathlib import Path

import report  # first of ours: it makes the repository importable
import torch

from engine.datasets import load_splits


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="to make them in (default: that of temporary files)")
    args = parser.parse_args()
    images, rounds = (2_000, 2) if args.quick else (args.images, args.rounds)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = make_files(Path(folder), images)
        names = Path(folder, "list.txt")
        names.write_text("".join(f"{path}\t{path.split('/')[1]}\n" for path in paths))
        seconds = {"class folders": [], "a list": []}
        for _ in range(rounds):
            for what, where in zip(seconds, (folder, str(names))):
                start = time.perf_counter()
                splits = load_splits(where)
                seconds[what].append(time.perf_counter() - start)
                assert (len(splits.train), splits.num_classes) == (images, 100)
    medians = {what: round(statistics.median(values), 2) for what, values in seconds.items()}
    report.finish(args, torch.device("cpu"), images=images, seconds=medians)


def make_files(folder, count):
    """train/CLASS/… in 100 classes → their paths below `folder`."""
    paths = [f"train/n{i % 100:08}/n{i % 100:08}_{i // 100}.JPEG" for i in range(count)]
    for path in paths[:100]:
        (folder / path).parent.mkdir(parents=True)
    for path in paths:
        (folder / path).touch()
    return paths


if __name__ == "__main__":
    main()
