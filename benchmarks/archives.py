"""Images in a .tar beside the same images as files; and the seconds to index 50,000 images.

    python benchmarks/archives.py --out benchmarks/results/archives.json
    python benchmarks/archives.py --quick
JPEGs of 500×375, quality 92, cut from scikit-learn's two photographs, on the local disk (--folder)
and in the page cache. Images per second of CPU time, which other jobs hardly change, in random
order: reading the bytes alone, and through TwoCrops, as a worker of the loader does it. Rounds take
turns; medians, and quartiles of the ratios. The index is of a sparse .tar whose members have the
size of those JPEGs: seconds by the clock, and of CPU time.
"""

import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import report  # first of ours: it makes the repository importable
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from engine.data.crops import TwoCrops
from engine.data.images import DIGEST_BYTES
from engine.data.splits import open_source

BATCH = 32


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--indexed", type=int, default=50_000, help="images in the index")
    parser.add_argument("--folder", help="to make them in (default: that of temporary files)")
    args = parser.parse_args()
    num_images, rounds, num_indexed = args.images, args.rounds, args.indexed
    if args.quick:
        num_images, rounds, num_indexed = 32, 2, 500
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        size = write_photographs(folder, num_images)
        datasets = {
            name: open_source(str(folder / path)).train().dataset
            for name, path in (("files", "files"), ("tar", "images.tar"))
        }
        assert all(
            datasets["files"].raw_bytes(i) == datasets["tar"].raw_bytes(i)
            for i in range(num_images)
        )
        crops = {name: TwoCrops(data, (224, 224), 0.08, seed=0) for name, data in datasets.items()}
        bytes_alone, two_crops = (
            measure(read, num_images, rounds)
            for read in (
                lambda name, i: datasets[name].raw_bytes(i),
                lambda name, i: crops[name].__getitems__([(0, i)]),
            )
        )
        seconds = index_seconds(folder, num_indexed, size, rounds=min(rounds, 5))
    report.finish(
        args,
        torch.device("cpu"),
        bytes_per_image=size,
        images_per_cpu_second={"bytes alone": bytes_alone, "two crops": two_crops},
        index={"images": num_indexed, **seconds},
    )


def measure(read, num_images, rounds):
    """read(name, index) → images per CPU second of "files" and "tar", medians, and their ratio."""
    order = np.random.default_rng(0)
    rates = {"files": [], "tar": []}
    for turn in range(rounds):
        indices = order.permutation(num_images).tolist()
        for name in sorted(rates, reverse=turn % 2 == 1):
            start = time.process_time()
            for i in indices:
                read(name, i)
            rates[name].append(num_images / (time.process_time() - start))
    ratios = [tar / files for tar, files in zip(rates["tar"], rates["files"])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {name: round(statistics.median(values)) for name, values in rates.items()}
    return result | {"tar/files": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def write_photographs(folder, count):
    """Cuts at random places, as files/….jpg and in images.tar → their mean size in bytes."""
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    (folder / "files").mkdir()
    sizes = []
    with tarfile.open(folder / "images.tar", "w") as tar:
        for i in range(count):
            photograph = photographs[i % 2]
            top, left = (rng.integers(s - c + 1) for s, c in zip(photograph.shape, (375, 500)))
            path = folder / "files" / f"{i:04}.jpg"
            cut = photograph[top : top + 375, left : left + 500]
            Image.fromarray(cut).save(path, quality=92)
            tar.add(path, path.name)
            sizes.append(path.stat().st_size)
    assert max(sizes) < DIGEST_BYTES  # raw_bytes reads them whole
    return round(statistics.mean(sizes))


def index_seconds(folder, count, size, rounds):
    """Time until the images of a .tar with 1,000 class folders are known."""
    with open(folder / "large.tar", "wb") as file:
        for i in range(count):
            info = tarfile.TarInfo(f"n{i % 1000:08}/n{i % 1000:08}_{i // 1000}.JPEG")
            info.size = size
            file.write(info.tobuf())
            file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.write(bytes(1024))
    seconds = []
    for _ in range(rounds):
        start = np.array([time.perf_counter(), time.process_time()])
        part = open_source(str(folder / "large.tar")).train()
        seconds.append([time.perf_counter(), time.process_time()] - start)
        assert len(part.dataset) == count and len(part.class_names) == min(count, 1000)
    return dict(zip(("seconds", "cpu_seconds"), np.median(seconds, axis=0).round(2).tolist()))


if __name__ == "__main__":
    main()
