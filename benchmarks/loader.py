"""What the loader does on one core, beside the recipe that everyone uses; and through DataLoader.

    python benchmarks/loader.py --out benchmarks/results/loader.json
    python benchmarks/loader.py --quick
    python benchmarks/loader.py --decoders
JPEGs of 500×375, quality 92, cut from scikit-learn's two photographs; two views of 224 pixels.
Images a second, one process and one thread: (a) PIL, torchvision's v1 transforms, two float views;
(b) our worker's half, two uint8 crops and the parameters of what the device will do; (c) decoding
alone, the limit. Then (b) through the DataLoader that main_moco.py uses, and the same with fresh
memory for every batch. Medians of rounds that take turns. And the CPU time of (b) in its parts.
"""

import os
import random
import statistics
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import report  # first of ours: it makes the repository importable
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torchvision import transforms

from engine.data import decode
from engine.data.crops import TwoCrops, random_crop_box, resized_crop
from engine.data.images import ImageFileDataset
from engine.data.loader import create_loader
from moco.augmentation import IMAGENET_MEAN, IMAGENET_STD, sample_params

SIZE, CROP_MIN, BATCH = 224, 0.08, 32


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--decoders", action="store_true", help="compare these alone")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-j", "--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    count, rounds = (16, 2) if args.quick else (args.images, args.rounds)
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), count)
        dataset = ImageFileDataset(folder, paths)
        if args.decoders:
            times = decoder_times(dataset, rounds)
            report.finish(args, torch.device("cpu"), us_per_image=times)
            return
        crops = TwoCrops(dataset, (SIZE, SIZE), CROP_MIN, seed=0)
        fresh = FreshMemory(dataset, (SIZE, SIZE), CROP_MIN, seed=0)
        usual_rate, our_rate, decode_rate = rates_of_a_core(crops, rounds)
        parts = cpu_time_of_parts(dataset, rounds)
        num_batches = 3 if args.quick else 80
        reused_rate, fresh_rate = median_rates(
            [partial(loader_rate, c, args.workers, num_batches) for c in (crops, fresh)], rounds
        )
    report.finish(
        args,
        torch.device("cpu"),
        cores=os.cpu_count(),
        images_per_s_per_core={
            "a: usual recipe": round(usual_rate),
            "b: ours": round(our_rate),
            "c: decoding alone": round(decode_rate),
        },
        cpu_us_per_image=parts,
        loader={
            "workers": args.workers,
            "images_per_s": round(reused_rate),
            "fraction of workers · b": round(reused_rate / (args.workers * our_rate), 2),
            "images_per_s with fresh memory": round(fresh_rate),
            "reused/fresh": round(reused_rate / fresh_rate, 2),
        },
        **{"b/a": round(our_rate / usual_rate, 2), "b/c": round(our_rate / decode_rate, 2)},
    )


def rates_of_a_core(crops, rounds):
    """Images/s of (a), (b) and (c), on one thread."""
    dataset, count = crops.dataset, len(crops)
    views = [usual_view(blur_p=1.0), usual_view(blur_p=0.1, solarize_p=0.2)]

    def usual():
        for i in range(count):
            with Image.open(Path(dataset.root, dataset.name(i))) as image:
                image = image.convert("RGB")
            torch.stack([view(image) for view in views])

    def ours():
        for first in range(0, count, BATCH):
            crops.__getitems__([(0, i) for i in range(first, min(first + BATCH, count))])

    def decoding():
        for i in range(count):
            dataset.read(i)

    def rate(work):
        start = time.perf_counter()
        work()
        return count / (time.perf_counter() - start)

    return median_rates([partial(rate, work) for work in (usual, ours, decoding)], rounds)


def median_rates(measures, rounds):
    """measures: functions → images/s. They take turns."""
    rates = [[measure() for measure in measures] for _ in range(rounds)]
    return map(statistics.median, zip(*rates))


def cpu_time_of_parts(dataset, rounds):
    """CPU microseconds of an image of (b), by what they are spent on: medians of rounds."""
    images = [dataset.read(i) for i in range(min(len(dataset), 2 * BATCH))]
    rngs = [np.random.default_rng((0, 0, i)) for i in range(len(images))]
    boxes = [
        [random_crop_box(rng, *image.shape[1:], CROP_MIN) for _ in range(2)]
        for rng, image in zip(rngs, images)
    ]
    buffer = torch.empty(2, SIZE, SIZE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    crop = resized_crop(images[0], boxes[0][0], (SIZE, SIZE))

    def draw(i):
        rng = np.random.default_rng((0, 0, i))
        for view in range(2):
            random_crop_box(rng, *images[i].shape[1:], CROP_MIN)
            sample_params(rng, view)

    def resize(i):
        for box in boxes[i]:
            resized_crop(images[i], box, (SIZE, SIZE))

    def store(i):
        for view in range(2):
            buffer[view] = crop

    works = {"decoding": dataset.read, "two resizes": resize, "storing": store, "drawing": draw}
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.process_time()
            for i in range(len(images)):
                work(i)
            times[name].append((time.process_time() - start) / len(images) * 1e6)
    return {name: round(statistics.median(values)) for name, values in times.items()}


def decoder_times(dataset, rounds):
    """CPU microseconds to decode an image by each decoder that is installed: medians of rounds."""
    decoders = {"PIL": (None, decode.JPEG_MODES)}
    with suppress(ImportError):
        from torchvision.io import ImageReadMode, decode_jpeg

        decoders["torchvision"] = decode_jpeg, {3: ImageReadMode.RGB}
    with suppress(ImportError):
        from torchcodec.decoders import decode_jpeg

        decoders["torchcodec"] = decode_jpeg, {3: "RGB"}
    encoded = [dataset.get_bytes(i) for i in range(len(dataset))]
    times = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, (decode.decode_jpeg, decode.JPEG_MODES) in decoders.items():
            start = time.process_time()
            for data in encoded:
                decode.decode_image(data)
            times[name].append((time.process_time() - start) / len(encoded) * 1e6)
    return {name: round(statistics.median(values)) for name, values in times.items()}


def write_photographs(folder, count):
    """Cuts of 500×375 at random places, alternating → file names."""
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    names = [f"{i:04}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        photograph = photographs[i % 2]
        top, left = (rng.integers(s - c + 1) for s, c in zip(photograph.shape, (375, 500)))
        cut = photograph[top : top + 375, left : left + 500]
        Image.fromarray(cut).save(folder / name, quality=92)
    return names


def usual_view(blur_p, solarize_p=0.0):
    """PIL image → normalized float view, as the paper's augmentation is commonly written down."""

    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, (CROP_MIN, 1)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([blur], blur_p),
            transforms.RandomApply([ImageOps.solarize], solarize_p),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class FreshMemory(TwoCrops):
    """Without the shared memory that workers reuse."""

    def _next_buffer(self, *shape):
        return torch.empty(shape, dtype=torch.uint8)


def loader_rate(crops, workers, num_batches):
    """Images/s of a DataLoader in its stride: the first batch of each worker isn't counted."""
    warm = 2 * workers
    keys = [[(e, i % len(crops)) for i in range(BATCH)] for e in range(warm + num_batches)]
    batches = iter(create_loader(crops, keys, workers, torch.device("cpu")))
    for _ in range(warm):
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return num_batches * BATCH / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
