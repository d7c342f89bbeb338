"""Speed of a pre-training step: images/s, TFLOP/s, the share of the hardware's peak, each part.

    python benchmarks/step.py --arch vit_base --batch-size 512 --compile --out benchmarks/results/step.json
    python benchmarks/step.py --arch vit_small --batch-size 16 --plain
    python benchmarks/step.py --quick
It drives main_moco.py's own train_one_epoch on random crops that lie in memory, augmentation
included. --plain measures the textbook step beside it in the same run, the two taking turns: eager,
each view by itself, attention by an explicit softmax, momentum update and AdamW parameter by
parameter, a wait for the loss at every step. Medians; the times of the parts come from steps of
their own, which wait for the device after each part.
"""  # noqa: E501

import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import report  # first: it makes the repository importable
import torch
from timm.layers import set_fused_attn
from torch.utils.flop_counter import FlopCounterMode

import main_moco
import moco.builder
from moco import augment, distributed
from moco.optimizer import create_optimizer


def main():
    parser = report.parser(__doc__)
    parser.add_argument("-a", "--arch", default="vit_small")
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--optimizer", choices=("lars", "adamw"), default="adamw")
    parser.add_argument("--amp", default="auto", help="as in main_moco.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--encode-chunk", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--plain", action="store_true", help="measure the textbook step, too")
    args = parser.parse_args()
    if args.quick:
        args.arch, args.batch_size, args.img_size, args.steps = "vit_tiny", 8, 32, 3
    device, amp = distributed.set_up(args.device, args.amp)

    sides = {"fast": Side(args, device, amp)}
    if args.plain:
        sides["plain"] = PlainSide(args, device, amp)
    losses = {name: [side.run() for _ in range(10)] for name, side in sides.items()}  # warms up
    peak_memory = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        sides["fast"].run()
        peak_memory = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    seconds, together = defaultdict(list), 5 if device.type == "cuda" else 1
    for _ in range(args.steps):
        for name, side in sides.items():
            start = time.perf_counter()
            side.run(together)
            seconds[name].append((time.perf_counter() - start) / together)

    flops = flops_per_image(args) * args.batch_size
    peak = peak_flops(device, amp)
    results = dict(
        setting={"precision": str(amp or torch.float32).removeprefix("torch."), **vars(args)}
    )
    for name in sides:
        median = statistics.median(seconds[name])
        results[name] = {
            "images_per_s": round(args.batch_size / median, 2),
            "tflops": round(flops / median / 1e12, 3),
            "share_of_peak": round(flops / median / peak, 3),
            "losses_of_10_steps": [round(loss, 7) for loss in losses[name]],
        }
    results["fast"]["milliseconds_of_parts"] = sides["fast"].parts(min(5, args.steps))
    if args.plain:
        ratio = statistics.median(seconds["plain"]) / statistics.median(seconds["fast"])
        results["fast/plain"] = round(ratio, 2)
    results["peak_tflops_of_a_matrix_product"] = round(peak / 1e12, 3)
    results["peak_memory_gib"] = peak_memory
    report.finish(args, device, **results)


class Side:
    """Model, optimizer and one batch, trained by main_moco.train_one_epoch."""

    waits = False  # for the loss of every step

    def __init__(self, args, device, amp):
        lr = {"adamw": 1e-4, "lars": 0.01}[args.optimizer] * 256 / args.batch_size
        argv = ["-a", args.arch, "--img-size", args.img_size, "-b", args.batch_size, "--epochs",
                "1000", "--warmup-epochs", "0", "--lr", lr, "--moco-t", ".2", "--encode-chunk",
                args.encode_chunk]  # fmt: skip
        argv = ["digits", *map(str, argv)] + ["--compile"] * args.compile
        self.args, self.device = main_moco.parse_args(argv), device
        self.model = main_moco.create_model(self.args, device, amp)
        self.optimizer = create_optimizer(args.optimizer, self.model, 0, 0.1)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
        self.autocast = partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
        self.batch = random_batch(args.batch_size, args.img_size, device)

    def run(self, steps=1):
        """So many steps → the last one's loss."""
        loader, log = OneBatch([self.batch] * steps), Quiet(self.waits)
        main_moco.train_one_epoch(
            self.model, self.model, loader, self.optimizer, self.scaler, self.autocast, self.args,
            log, keeper=SimpleNamespace(epoch=0, iteration=0, step=id),
        )  # fmt: skip
        return float(log.loss)

    def parts(self, steps):
        """Median milliseconds of each part of a step."""
        runs = defaultdict(list)
        for _ in range(steps):
            clock = Clock(self.device)
            with (
                clock.around(main_moco, "augment"),
                clock.around(augment, "augment"),
                clock.around(self.model, "encode"),
                clock.around(moco.builder, "gather"),
                clock.around(self.model, "forward", "heads and loss"),
                clock.around(torch.Tensor, "backward"),
                clock.around(self.optimizer, "step", "optimizer"),
                clock.around(self.model, "update_momentum_encoder", "momentum update"),
            ):
                self.run()
            for name, value in clock.own.items():
                runs[name].append(1000 * value)
        return {name: round(statistics.median(values), 2) for name, values in runs.items()}


class PlainSide(Side):
    """The textbook step."""

    waits = True

    def __init__(self, args, device, amp):
        set_fused_attn(False)
        super().__init__(SimpleNamespace(**vars(args) | dict(compile=False, encode_chunk=0)),
                         device, amp)  # fmt: skip
        set_fused_attn(not (device.type == "cpu" and amp))
        self.model.one_pass = False
        for group in self.optimizer.param_groups:
            group |= dict(foreach=False, fused=False) if args.optimizer == "adamw" else {}

    def run(self, steps=1):
        with patch.object(self.model, "update_momentum_encoder", self.update_one_by_one):
            return super().run(steps)

    @torch.no_grad()
    def update_one_by_one(self, m):
        encoders = self.model.momentum_encoder, self.model.base_encoder
        for k, q in zip(*(encoder.parameters() for encoder in encoders)):
            k.copy_(k * m + q * (1 - m))


class OneBatch(list):
    """A loader that repeats a batch."""

    batch_sampler = SimpleNamespace(start=max)


class Quiet:
    """A log that keeps the last loss."""

    def __init__(self, waits):
        self.waits = waits

    def timed(self, loader):
        return iter(loader)

    def step(self, step, settings, loss, **monitors):
        self.loss = loss.item() if self.waits else loss.detach()


class Clock:
    """Time spent inside functions, each without what it spends in the others."""

    def __init__(self, device):
        self.device, self.own, self.inner = device, defaultdict(float), [0.0]

    @contextmanager
    def around(self, owner, attribute, name=None):
        function = getattr(owner, attribute)

        def timed(*args, **kwargs):
            self.wait()
            start = time.perf_counter()
            self.inner.append(0.0)
            result = function(*args, **kwargs)
            self.wait()
            seconds = time.perf_counter() - start
            self.own[name or attribute] += seconds - self.inner.pop()
            self.inner[-1] += seconds
            return result

        with patch.object(owner, attribute, timed):
            yield

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def random_batch(batch_size, size, device):
    """uint8 crops [2, N, 3, size, size] on the device, parameters [2, N, COLUMNS]."""
    rng, torch_rng = main_moco.data.np.random.default_rng(0), torch.Generator().manual_seed(0)
    coarse = torch.rand(2 * batch_size, 3, 4, 4, generator=torch_rng)  # blobs, not noise
    crops = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    rows = [[torch.from_numpy(augment.draw(rng, view)) for _ in range(batch_size)]
            for view in range(2)]  # fmt: skip
    crops = (255 * crops).to(torch.uint8).view(2, batch_size, 3, size, size)
    return crops.to(device), torch.stack([torch.stack(view) for view in rows])


def flops_per_image(args):
    """Forward and backward of both views, the momentum encoder's forward included, in all layers.

    Counted on four images with an explicit softmax; what is computed twice in chunks counts once.
    """
    set_fused_attn(False)
    few = SimpleNamespace(**vars(args) | dict(batch_size=4, compile=False, encode_chunk=0))
    side = Side(few, torch.device("cpu"), None)
    with FlopCounterMode(display=False) as counter:
        side.run()
    return counter.get_total_flops() / 4


def peak_flops(device, amp):
    """FLOP/s of a large matrix product in this precision: the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=amp or torch.float32)
    clock, times = Clock(device), []
    for _ in range(10):
        clock.wait()
        start = time.perf_counter()
        a @ b
        clock.wait()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


if __name__ == "__main__":
    main()
