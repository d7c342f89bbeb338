"""Beside other libraries: MoCo v3 in lightly and in stable-pretraining, and in this repository.

    pip install lightly stable-pretraining
    python benchmarks/peers.py --out benchmarks/results/peers.json
    python benchmarks/peers.py --arch resnet50 --out benchmarks/results/peers_resnet50.json
    python benchmarks/peers.py --quick
Images a second of three things: the DataLoader alone, from JPEGs of 500×375 to two views; the
training step alone, on one batch in memory; and both end to end. The sides take turns. Medians, and
for ours/other the quartiles of the ratios within a round; above 1 ours is faster. A library that is
not installed is reported as such.

What is equal: the images, the backbone with its attention and memory format (engine/backbones.py),
the widths of the heads, two views, the loss of both pairs of views, BatchNorm of one view at a
time, batch, precision, AdamW, threads and workers. What differs is in the report as "work":
- Ours crops in the workers and augments on the device, within the step. The others do all of it in
  the workers, on PIL images. Loader and step therefore divide the work in another way: end to end
  is the comparison that holds.
- Ours also logs norms of gradients, top-1 and the spread of the features in every step. The
  others' step is the bare loop of their documentation, without the trainer of Lightning, which
  would add to it.
- The losses differ where benchmarks/other_methods.py says so.
"""

import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from importlib import metadata, util
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import report  # first of ours: it makes the repository importable
import torch
from loader import write_photographs
from other_methods import METHODS
from step import RepeatedBatch, RunInMemory, Side
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import main_moco
from engine import flags
from engine.backbones import choose_config, create_backbone
from engine.data.crops import TwoCrops
from engine.data.images import ImageFileDataset
from engine.data.loader import create_loader, unpack_batches
from engine.launch import init_distributed
from moco.augmentation import IMAGENET_MEAN, IMAGENET_STD

PARTS = ("loader", "step", "end_to_end")

# How the sides differ, for the report.
WORK = {
    "ours": {
        "loader": "decodes once for both views, two uint8 crops",
        "step": "augments, views one after the other or in one batch by moco/builder.py's choice",
        "loss": "MoCo v3's, symmetric, N − 1 negatives",
        "batchnorm": "one view at a time; none after the predictor of a ResNet",
        "momentum_update": "parameters, in one call",
        "optimizer": "AdamW, fused",
    },
    "lightly": {
        "loader": "decodes once for both views, PIL images, two normalized float views",
        "step": "views one after the other",
        "loss": "NTXentLoss, SimCLR's, of both pairs of views, 2N − 2 negatives",
        "batchnorm": "one view at a time; after the predictor always; the last has weights",
        "momentum_update": "parameters, one by one",
        "optimizer": "AdamW, torch's defaults",
    },
    "stable-pretraining": {
        "loader": "decodes once for both views, PIL images, two normalized float views and the "
        "parameters of each transform",
        "step": "views one after the other",
        "loss": "MoCo v3's without the factor 2τ, symmetric, N − 1 negatives",
        "batchnorm": "one view at a time; none after the predictor",
        "momentum_update": "parameters and buffers, by update_teacher of each wrapper",
        "optimizer": "AdamW, torch's defaults",
    },
}


def main():
    parser = report.parser(__doc__)
    parser.add_argument("-a", "--arch", default="vit_small")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("-j", "--workers", type=int, default=2)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--amp", default="auto", help="as in main_moco.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="measure these")
    parser.add_argument("--steps", type=int, default=1, help="timed steps in each turn")
    parser.add_argument("--batches", type=int, default=30, help="of the loader in each turn")
    args = parser.parse_args()
    if args.quick:
        args.arch, args.batch_size, args.img_size, args.workers = "vit_nano", 8, 32, 1
        args.images, args.rounds, args.steps, args.batches = 16, 2, 1, 2
    env = init_distributed(args.device, args.amp)

    with TemporaryDirectory() as folder:
        Path(folder, "photographs").mkdir()  # the one class of a folder of images
        write_photographs(Path(folder, "photographs"), args.images)
        sides, not_run = create_sides(args, env, folder)
        rates = defaultdict(list)
        for done in range(1, args.rounds + 1):
            measure_round(sides, args, rates, first=(done - 1) % len(sides))
            results = summary(args, env, sides, rates, done) | not_run
            report.save(args, env.device, **results)  # what a run has that is stopped
    report.finish(args, env.device, **results)


def measure_round(sides, args, rates, first):
    """Appends to rates, (name of a side, measure) → images/s of each round.

    first: which side begins; what comes right after another part finds colder caches.
    """
    names = list(sides)
    for part in args.parts:
        for name in names[first:] + names[:first]:
            for measure, rate in images_per_s(sides[name], part, args).items():
                rates[name, measure].append(rate)


def summary(args, env, sides, rates, rounds_done):
    precision = str(env.amp_dtype or torch.float32).removeprefix("torch.")
    results = {"setting": dict(precision=precision, **vars(args)), "rounds_done": rounds_done}
    measures = [measure for name, measure in rates if name == "ours"]
    for name, side in sides.items():
        version = {} if name == "ours" else {"version": metadata.version(name)}
        trained = sum(p.numel() for p in side.model.parameters() if p.requires_grad)
        of_rounds = {key: [round(rate, 2) for rate in rates[name, key]] for key in measures}
        medians = {key: round(median(rates[name, key]), 2) for key in measures}
        measured = {"trained_parameters": trained, "images_per_s": medians, "rounds": of_rounds}
        results[name] = version | measured | {"work": WORK[name]}
        if name == "ours":
            continue
        results[f"ours/{name}"] = {}
        for key in measures:
            ratios = [ours / other for ours, other in zip(rates["ours", key], rates[name, key])]
            # A single value has no quartiles.
            values = quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios
            results[f"ours/{name}"][key] = [round(q, 3) for q in values]
    return results


def create_sides(args, env, folder):
    """Name → side that has done a step; name → why a library is not measured."""
    sides, not_run = {"ours": Ours(args, env, folder)}, {}
    warm_up(sides["ours"])
    for side_class in (Lightly, StablePretraining):
        name = side_class.name
        if util.find_spec(name.replace("-", "_")) is None:
            not_run[name] = "not installed"
            continue
        try:
            with redirect_stdout(sys.stderr):  # the report alone goes to stdout
                side = side_class(sides["ours"].side.args, env, folder)
                warm_up(side)
        except Exception as error:  # whatever their next version brings
            not_run[name] = f"not run: {type(error).__name__}: {error}"
        else:
            sides[name] = side
    return sides, not_run


def warm_up(side):
    """Sets side.batch, what its loader yields, and does a step on it."""
    [keys] = random_batches(side, 1)
    side.batch = next(iter(side.batches(side.loader([keys], workers=0))))
    loader = RepeatedBatch(side.batch, 1)
    side.train(loader, Stopwatch(loader, 0, 1, side.env.device))


def images_per_s(side, part, args):
    """Measure → images/s. On a CPU the step is measured in CPU seconds, too, for a busy machine."""
    # Batches are counted once the workers' queues are in their stride. A step on a CPU is so long
    # that they are full after the first.
    fill = 2 * args.workers
    warm = 1 if part == "end_to_end" and side.env.device.type == "cpu" else fill
    steps = args.batches if part == "loader" else args.steps
    if part == "step":
        warm, batches = 0, RepeatedBatch(side.batch, steps)
        loader = batches
    else:
        # More than are taken, so that the workers never run out of work while the time is taken.
        loader = side.loader(random_batches(side, warm + steps + fill), args.workers)
        batches = side.batches(loader)
    stopwatch = Stopwatch(batches, warm, steps, side.env.device)
    if part == "loader":
        for _ in stopwatch:
            pass
    else:
        side.train(loader, stopwatch)
    num_images = steps * args.batch_size
    rates = {part: num_images / stopwatch.seconds}
    if part == "step" and side.env.device.type == "cpu":
        rates["step_per_cpu_s"] = num_images / stopwatch.cpu_seconds
    return rates


class Stopwatch:
    """Yields warm + steps batches.

    seconds, cpu_seconds: that the last `steps` of them took together with what is done to them;
    CPU seconds are those of this process, without the workers'.
    """

    def __init__(self, batches, warm, steps, device):
        self.batches, self.warm, self.steps, self.device = batches, warm, steps, device

    def __iter__(self):
        iterator = iter(self.batches)
        for n in range(self.warm + self.steps):
            if n == self.warm:
                start, cpu_start = self.now(), time.process_time()
            yield next(iterator)
        self.seconds, self.cpu_seconds = self.now() - start, time.process_time() - cpu_start

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def random_batches(side, num_batches):
    """Batches of indices, an image at most once in each."""
    rng = np.random.default_rng(0)
    shape = side.num_images, side.batch_size
    return [rng.choice(*shape, replace=False).tolist() for _ in range(num_batches)]


class Ours:
    """TwoCrops, create_loader, and main_moco.train_one_epoch by way of step.Side."""

    def __init__(self, args, env, folder):
        self.env, self.num_images, self.batch_size = env, args.images, args.batch_size
        options = vars(args) | dict(optimizer="adamw", compile=False, encode_chunk=0)
        self.side = Side(SimpleNamespace(**options), env)
        self.model = self.side.model
        paths = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.jpg"))
        size = (args.img_size, args.img_size)
        self.crops = TwoCrops(ImageFileDataset(folder, paths), size, crop_min=0.08, seed=0)

    def loader(self, batches, workers):
        keys = [[(epoch, i) for i in batch] for epoch, batch in enumerate(batches)]
        return create_loader(self.crops, keys, workers, self.env.device)

    def batches(self, loader):
        return unpack_batches(loader)

    def train(self, loader, batches):
        side = self.side
        run = RunFromLoader(side.env, batches)
        state = self.model, self.model, loader, side.optimizer, side.scaler
        main_moco.train_one_epoch(side.args, run, *state)


class RunFromLoader(RunInMemory):
    def __init__(self, env, batches):
        super().__init__(env)
        self.timed_batches = batches

    def batches(self, loader):
        return self.timed_batches


class OtherLibrary:
    """The loop that the libraries document. A subclass defines dataset and views.

    args: main_moco.py's.
    """

    def __init__(self, args, env, folder):
        self.args, self.env, self.batch_size = args, env, args.batch_size
        config = choose_config(flags.backbone_options(args))
        self.img_size = config.img_size
        torch.manual_seed(0)
        self.dataset = self.create_dataset(folder)
        self.num_images = len(self.dataset)
        backbone = create_backbone(config)
        model = METHODS[self.name](backbone, args.moco_dim, args.moco_mlp_dim, args.moco_t)
        self.model = model.to(env.device).train()
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(params, 1e-4, weight_decay=0.1)
        self.scaler = env.grad_scaler()

    def loader(self, batches, workers):
        pin_memory = self.env.device.type == "cuda"
        options = dict(batch_sampler=batches, num_workers=workers, pin_memory=pin_memory)
        return DataLoader(self.dataset, **options)

    def batches(self, loader):
        return loader

    def train(self, loader, batches):
        for batch in batches:
            x1, x2 = self.env.to_device(*self.views(batch))
            with self.env.autocast():
                loss, _ = self.model(x1, x2)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.model.update_momentum_encoder(self.args.moco_m)


class Lightly(OtherLibrary):
    """BYOLTransform, whose defaults are MoCo v3's augmentation."""

    name = "lightly"

    def create_dataset(self, folder):
        from lightly.data import LightlyDataset
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform

        size = self.img_size[0]
        views = BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size)
        return LightlyDataset(folder, transform=BYOLTransform(*views))

    def views(self, batch):
        (x1, x2), _, _ = batch
        return x1, x2


class StablePretraining(OtherLibrary):
    """MultiViewTransform, with transforms of its own."""

    name = "stable-pretraining"

    def create_dataset(self, folder):
        from stable_pretraining.data import FromTorchDataset
        from stable_pretraining.data import transforms as spt

        def view(blur_p, solarize_p):
            solarize = [spt.RandomSolarize(128, p=solarize_p)] if solarize_p else []
            return spt.Compose(
                spt.RGB(),
                spt.RandomResizedCrop(self.img_size, scale=(0.08, 1.0)),
                spt.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
                spt.RandomGrayscale(p=0.2),
                spt.PILGaussianBlur(sigma=(0.1, 2.0), p=blur_p),
                *solarize,
                spt.RandomHorizontalFlip(p=0.5),
                spt.ToImage(mean=IMAGENET_MEAN, std=IMAGENET_STD),
            )

        views = spt.MultiViewTransform([view(1.0, 0.0), view(0.1, 0.2)])
        return FromTorchDataset(ImageFolder(folder), ["image", "label"], transform=views)

    def views(self, batch):
        return [view["image"] for view in batch["views"]]


if __name__ == "__main__":
    main()
