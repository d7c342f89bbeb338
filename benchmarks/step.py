"""Speed of a pre-training step: images/s, TFLOP/s, fraction of the peak, parts, levers.

    python benchmarks/step.py --arch vit_base --batch-size 512 --compile --out step_gpu.json
    python benchmarks/step.py --arch vit_small --batch-size 16 --plain
    python benchmarks/step.py --arch vit_small --batch-size 16 --levers
    python benchmarks/step.py --quick
It drives main_moco.py's own train_one_epoch on random crops that lie in memory, augmentation
included. Beside it in the same run, all taking turns, --plain measures the textbook step, which has
none of LEVERS, and --levers the step with one lever at a time set the other way: a ratio above 1
says that main_moco.py's choice pays. Medians, of the ratios quartiles too; the times of the parts
come from steps of their own, which wait for the device after each part.
"""

import statistics
import time
import timeit
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import report  # first of ours: it makes the repository importable
import torch

import main_moco
import moco.builder
from engine import flags
from engine.backbones import choose_config
from engine.data.decode import RGB
from engine.flops import forward_flops
from engine.launch import init_distributed
from moco import create_optimizer, sample_params
from moco.gradients import GradientMonitor
from vits import PatchProjection

LEVERS = (
    "concat_views",  # both views in one batch, if there is no BatchNorm; off: one after the other
    "patch_product",  # a ViT's patch projection as a matrix product; off: a convolution
    "fused_attention",  # off: an explicit softmax
    "channels_last",  # a ResNet's memory format
    "foreach_momentum",  # the momentum update in one call; off: parameter by parameter
    "fused_optimizer",  # off: parameter by parameter
    "grad_monitor",  # the norms of the gradients; off: without them
    "no_wait",  # for the loss of each step; on a CPU nothing changes, its ratio is the noise
    "compile",  # with --compile
    "encode_chunk",  # with --encode-chunk, which saves memory
)


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
    parser.add_argument("--levers", nargs="*", choices=LEVERS, help="measure these or all, too")
    args = parser.parse_args()
    if args.quick:
        args.arch, args.batch_size, args.img_size, args.steps = "vit_nano", 8, 32, 3
    env = init_distributed(args.device, args.amp)

    sides, on_gpu = {"fast": Side(args, env)}, env.device.type == "cuda"
    losses = {"fast": [sides["fast"].run() for _ in range(10)]}
    peak_memory = round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None
    if args.plain:
        sides["plain"] = Side(args, env, **dict.fromkeys(LEVERS, False))
        losses["plain"] = [sides["plain"].run() for _ in range(10)]
    levers = () if args.levers is None else args.levers or LEVERS
    chosen = {k: value for k, value in sides["fast"].chosen().items() if k in levers}
    for lever, value in chosen.items():
        sides[lever] = Side(args, env, **{lever: not value})
        sides[lever].run(2)

    seconds, steps_together = defaultdict(list), 5 if on_gpu else 1
    for _ in range(args.steps):
        for name, side in sides.items():
            start = time.perf_counter()
            side.run(steps_together)
            seconds[name].append((time.perf_counter() - start) / steps_together)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    flops = flops_per_image(sides["fast"]) * args.batch_size
    peak = matrix_product_flops(env, args.quick)
    precision = str(env.amp_dtype or torch.float32).removeprefix("torch.")
    results = {"setting": dict(precision=precision, **vars(args))}
    for name in losses:
        results[name] = {
            "images_per_s": round(args.batch_size / median[name], 2),
            "tflops": round(flops / median[name] / 1e12, 3),
            "share_of_peak": round(flops / median[name] / peak, 3),
            "losses_of_10_steps": [round(loss, 7) for loss in losses[name]],
        }
    results["fast"]["milliseconds_of_parts"] = sides["fast"].parts(min(5, args.steps))
    if args.plain:
        results["fast/plain"] = round(median["plain"] / median["fast"], 2)
    for lever, value in chosen.items():
        ratios = [other / fast for fast, other in zip(seconds["fast"], seconds[lever])]
        results.setdefault("levers", {})[lever] = {
            "chosen": value,
            "images_per_s_otherwise": round(args.batch_size / median[lever], 2),
            "fast/otherwise": [round(q, 3) for q in statistics.quantiles(ratios)],
        }
    results |= dict(peak_tflops_of_a_matrix_product=round(peak / 1e12, 3))
    report.finish(args, env.device, **results, peak_memory_gib=peak_memory)


class Side:
    """Model, optimizer and one batch, trained by main_moco.train_one_epoch.

    levers: of LEVERS, True or False; those not given are as main_moco.py sets them.
    """

    def __init__(self, args, env, **levers):
        args = SimpleNamespace(**vars(args) | levers)
        lr = {"adamw": 1e-4, "lars": 0.01}[args.optimizer] * 256 / args.batch_size
        argv = f"digits -a {args.arch} --img-size {args.img_size} -b {args.batch_size} --lr {lr} "
        argv += f"--encode-chunk {args.encode_chunk:d} --epochs 1000 --warmup-epochs 0 --moco-t .2"
        if args.quick:
            argv += " --moco-mlp-dim 64"
        self.args = main_moco.parse_args(argv.split())
        self.args.compile = args.compile  # else the default of the device
        self.env, self.waits = env, levers.get("no_wait") is False
        self.monitors = levers.get("grad_monitor", True)
        config = choose_config(flags.backbone_options(self.args))
        self.model = model = main_moco.create_model(self.args, config, env)
        self.optimizer = create_optimizer(args.optimizer, self.model, 0, 0.1)
        self.scaler = env.grad_scaler()
        self.batch = random_batch(args.batch_size, args.img_size, env.device)
        self.attentions = [m for m in self.model.modules() if hasattr(m, "fused_attn")]

        if levers.get("concat_views"):  # whatever the size
            model.encode = partial(encode_both_at_once, model)
        elif "concat_views" in levers:
            model.concat_views = False
        for attention in self.attentions:
            attention.fused_attn = levers.get("fused_attention", attention.fused_attn)
        if levers.get("patch_product") is False:
            for encoder in (model.base_encoder, model.momentum_encoder):
                for name, module in list(encoder.named_modules()):
                    if isinstance(module, PatchProjection):
                        encoder.set_submodule(name, as_convolution(module))
        if "channels_last" in levers:
            formats = {True: torch.channels_last, False: torch.contiguous_format}
            model.to(memory_format=formats[levers["channels_last"]])
        if levers.get("foreach_momentum") is False:
            model.update_momentum_encoder = partial(update_one_by_one, model)
        if levers.get("fused_optimizer") is False:
            self.optimizer = without_fusion(self.optimizer)

    def chosen(self):
        """The levers as main_moco.py sets them, without those that do nothing here."""
        model, levers = self.model, {}
        if model.concat_views and not self.args.encode_chunk:
            x, encoder = self.batch[0][0], model.base_encoder
            forward = Mock(side_effect=lambda x: x.new_empty(len(x), encoder.num_features))
            with patch.object(encoder, "forward", forward):
                model.encode(encoder, x, x)
            levers["concat_views"] = forward.call_count == 1
        if any(isinstance(m, PatchProjection) for m in model.base_encoder.modules()):
            levers["patch_product"] = True
        if self.attentions:
            levers["fused_attention"] = self.attentions[0].fused_attn
        if hasattr(model.base_encoder, "layer1"):
            weight = model.base_encoder.layer1[0].conv2.weight
            levers["channels_last"] = weight.is_contiguous(memory_format=torch.channels_last)
        always = ("foreach_momentum", "fused_optimizer", "grad_monitor", "no_wait")
        levers |= dict.fromkeys(always, True)
        asked = {name: getattr(self.args, name) for name in ("compile", "encode_chunk")}
        return levers | {name: value for name, value in asked.items() if value}

    def run(self, steps=1):
        """So many steps → the last one's loss."""
        return float(self.train(steps))

    def train(self, steps=1):
        """The same without waiting for the loss, which stays on the device."""
        run = RunInMemory(self.env, self.waits)
        loader = RepeatedBatch(self.batch, steps)
        state = self.model, self.model, loader, self.optimizer, self.scaler
        if self.monitors:
            main_moco.train_one_epoch(self.args, run, *state)
        else:
            with patch.object(main_moco, "GradientMonitor", lambda encoder: dict):
                main_moco.train_one_epoch(self.args, run, *state)
        return run.loss

    def parts(self, steps):
        """Median milliseconds of each part of a step."""
        runs = defaultdict(list)
        for _ in range(steps):
            clock = Clock(self.env.device)
            with (
                clock.around(main_moco, "augment"),
                clock.around(main_moco, "augment_compiled", "augment"),
                clock.around(self.model, "encode"),
                clock.around(moco.builder, "all_gather"),
                clock.around(self.model, "forward", "heads and loss"),
                clock.around(torch.Tensor, "backward"),
                clock.around(GradientMonitor, "__call__", "grad_monitor"),
                clock.around(self.optimizer, "step", "optimizer"),
                clock.around(self.model, "update_momentum_encoder", "momentum update"),
            ):
                self.run()
            for name, value in clock.own.items():
                runs[name].append(1000 * value)
        return {name: round(statistics.median(values), 2) for name, values in runs.items()}


def encode_both_at_once(model, encoder, x1, x2):
    return encoder(torch.cat([x1, x2])).unflatten(0, (2, len(x1)))


def as_convolution(projection):
    """vits.PatchProjection → the nn.Conv2d with its weight and bias."""
    d, in_chans, *patch = projection.weight.shape
    conv = torch.nn.Conv2d(in_chans, d, patch, patch, device="meta")
    conv.weight, conv.bias = projection.weight, projection.bias
    return conv


@torch.no_grad()
def update_one_by_one(model, m):
    encoders = model.momentum_encoder, model.base_encoder
    for k, q in zip(*(encoder.parameters() for encoder in encoders)):
        k.copy_(k * m + q * (1 - m))


def without_fusion(optimizer):
    """The same optimizer, new, which updates parameter by parameter.

    A new one, for a fused AdamW has promised GradScaler to undo the scaling of fp16 by itself.
    """
    [group] = optimizer.param_groups
    options = group | dict(foreach=False, fused=False)
    return type(optimizer)([options | dict(params=[p]) for p in group["params"]], lr=group["lr"])


class RunInMemory:
    """What a script's train_one_epoch uses of its Run; keeps the last loss.

    waits: for the device after each step.
    """

    def __init__(self, env, waits=False):
        self.env, self.waits = env, waits
        self.epoch = self.step = 0

    def batches(self, loader):
        return loader

    def end_step(self, loss, **metrics):
        self.loss = loss.item() if self.waits else loss.detach()


class RepeatedBatch(list):
    """A loader that repeats a batch."""

    dataset = SimpleNamespace(dataset=SimpleNamespace(pixel_format=RGB))

    def __init__(self, batch, steps):
        super().__init__([batch] * steps)


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
    """uint8 crops [2, N, 3, size, size] on the device, params [2, N, NUM_PARAMS]."""
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    coarse = torch.rand(2 * batch_size, 3, 4, 4, generator=torch_rng)  # blobs, not noise
    crops = torch.empty(2 * batch_size, 3, size, size, dtype=torch.uint8, device=device)
    for small, large in zip(coarse.split(256), crops.split(256)):
        pixels = torch.nn.functional.interpolate(small, (size, size), mode="bicubic").clamp(0, 1)
        large.copy_(255 * pixels)
    params = [[sample_params(rng, view) for _ in range(batch_size)] for view in range(2)]
    return crops.unflatten(0, (2, batch_size)), torch.from_numpy(np.array(params))


def flops_per_image(side):
    """Of both encoders, for both views: three forward passes' worth for each pass that is trained.

    What is computed twice in chunks counts once; the heads, less than 1 %, are left out.
    """
    size = side.batch[0].shape[-2:]
    return 2 * (3 + 1) * forward_flops(side.model.base_encoder, size)


def matrix_product_flops(env, quick=False):
    """FLOP/s of a large matrix product in this precision: the best of ten."""
    side = 8192 if env.device.type == "cuda" else 2048
    if quick:
        side = 512
    a, b = torch.randn(2, side, side, device=env.device, dtype=env.amp_dtype or torch.float32)
    wait = Clock(env.device).wait
    times = timeit.repeat(lambda: (a @ b, wait()), setup=wait, number=1, repeat=10)
    return 2 * side**3 / min(times)


if __name__ == "__main__":
    main()
