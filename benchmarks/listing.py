"""How long a run takes to find its images: 200,000 files in 100 class folders, and as a list.

    python benchmarks/listing.py --out benchmarks/results/listing.json
    python benchmarks/listing.py --quick
Empty files on the local disk (--folder), whose directories are in the page cache, as they are when
training begins for the second time. Medians of seconds: from DIR to paths and labels, then to the
digest that a resumed run compares, and to the first batch of keys.
    python benchmarks/listing.py --images 1281167 --rounds 3      # as many as ImageNet has
"""

import statistics
import tempfile
import time
from pathlib import Path

import report  # first of ours: it makes the repository importable
import torch

from engine.data.images import dataset_digest
from engine.data.sampler import EpochBatchSampler
from engine.data.splits import open_source


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
        seconds = {"class folders": [], "a list": [], "digest": [], "first batch": []}

        def measure(what, function, *args):
            start = time.perf_counter()
            result = function(*args)
            seconds[what].append(time.perf_counter() - start)
            return result

        for _ in range(rounds):
            for what, where in (("class folders", folder), ("a list", str(names))):
                part = measure(what, lambda where=where: open_source(where).train())
                assert (len(part.dataset), len(part.class_names)) == (images, 100)
            measure("digest", dataset_digest, part.dataset, part.class_names)
            measure("first batch", next, iter(EpochBatchSampler(images, 256, seed=0)))
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
