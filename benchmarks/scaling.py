"""What to expect on many GPUs: computed, not measured.

    python benchmarks/scaling.py --tflops 400 --gb-per-s 40
    python benchmarks/scaling.py --out benchmarks/results/scaling.json
For each model and number of GPUs at a global batch of --batch-size: the bytes that each GPU sends
and receives in a step, the time of computing at --tflops per GPU, and the time on a network that
moves --gb-per-s into and out of each GPU. A ring moves 2·(n−1)/n of the gradient's bytes and
(n−1)/n of what an all-gather collects. The gradient's part hides behind the backward pass as far as
that is longer, about two thirds of the computing; the heads' collectives do not, and each waits
--latency microseconds. Data loading and augmentation are not in it.
"""

from types import SimpleNamespace

import report  # first of ours: it makes the repository importable
import torch
from step import Side, flops_per_image

from engine.launch import Env
from moco.batchnorm import ViewBatchNorm

CPU = torch.device("cpu")
BACKWARD = 2 / 3  # of the computing
ARCHS = dict(vit_small="adamw", vit_base="adamw", vit_large="adamw", resnet50="lars")


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("-b", "--batch-size", type=int, default=4096)
    parser.add_argument("--tflops", type=float, default=400, help="of a GPU in training")
    parser.add_argument("--gb-per-s", type=float, default=40, help="of the network, per GPU")
    parser.add_argument("--latency", type=float, default=50, help="of a collective, in µs")
    args = parser.parse_args()
    if args.quick:
        args.archs, args.gpus = ["vit_small"], [8]
    models = {arch: describe(arch) for arch in args.archs}
    rows = [row(args, arch, models[arch], n) for arch in args.archs for n in args.gpus]
    report.finish(args, CPU, setting=vars(args), computed=True, models=models, rows=rows)


def describe(arch):
    """Trainable parameters, GFLOP per image, and the widths of the BatchNorms that are synced."""
    args = dict(arch=arch, batch_size=4, img_size=224, compile=False, encode_chunk=0, quick=False)
    args = SimpleNamespace(**args, optimizer=ARCHS[arch])
    side = Side(args, Env(CPU))
    model = side.model
    params = [p.numel() for p in model.parameters() if p.requires_grad]
    trained = [model.base_encoder, model.predictor]
    norms = [m for part in trained for m in part.modules() if isinstance(m, ViewBatchNorm)]
    momentum = [m for m in model.momentum_encoder.modules() if isinstance(m, ViewBatchNorm)]
    return dict(
        trainable_parameters=sum(params),
        gflop_per_image=round(flops_per_image(side) / 1e9, 1),
        # Forward, both views in one collective; backward, where there is a gradient.
        head_collectives=2 * len(norms) + len(momentum) + 1,  # 1: the keys
        head_channels=sum(m.num_features for m in norms + momentum),
    )


def row(args, arch, model, n):
    """Milliseconds and megabytes of a step on n GPUs."""
    share = (n - 1) / n
    gradient = 2 * share * 4 * model["trainable_parameters"]
    keys = share * 2 * args.batch_size * 256 * 4
    statistics = 2 * share * n * 2 * 2 * 4 * model["head_channels"]  # mean, variance of two views
    compute = args.batch_size / n * model["gflop_per_image"] / args.tflops  # GFLOP/TFLOP = ms
    to_ms = 1e3 / (args.gb_per_s * 1e9)
    heads = (keys + statistics) * to_ms + model["head_collectives"] * args.latency / 1e3
    exposed = max(0, gradient * to_ms - BACKWARD * compute)
    step = compute + heads + exposed
    return dict(
        arch=arch,
        gpus=n,
        images_per_gpu=args.batch_size // n,
        gradient_mb=round(gradient / 1e6),
        keys_mb=round(keys / 1e6, 1),
        statistics_mb=round(statistics / 1e6, 2),
        compute_ms=round(compute, 1),
        gradient_ms=round(gradient * to_ms, 1),
        heads_ms=round(heads, 1),
        step_ms=round(step, 1),
        efficiency=round(compute / step, 3),
        images_per_s=round(args.batch_size / step * 1e3),
    )


if __name__ == "__main__":
    main()
