"""Explicit softmax against torch's fused attention, forward and backward, on one device.

    python benchmarks/attention.py --out benchmarks/results/attention_cpu.json
Why the scripts train with the explicit one in bf16 on a CPU, and only there. Medians of one run.
"""

import statistics
import time

import report
import torch
import torch.nn.functional as F

SHAPES = {  # images, heads, tokens, width of a head
    "vit_nano, 16 px": (128, 4, 17, 32),
    "vit_small, 224 px": (16, 12, 197, 32),
    "vit_base, 224 px": (16, 12, 197, 64),
}


def explicit(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def milliseconds(attention, inputs, repeats):
    times = []
    for _ in range(repeats + 2):  # the first two warm up
        start = time.perf_counter()
        attention(*inputs).sum().backward()
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    repeats, shapes = args.repeats, SHAPES
    if args.quick:
        repeats, shapes = 2, dict(list(SHAPES.items())[:1])

    rows = []
    for name, shape in shapes.items():
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [
                torch.randn(shape, dtype=dtype, device=args.device, requires_grad=True)
                for _ in range(3)
            ]
            fused = milliseconds(F.scaled_dot_product_attention, inputs, repeats)
            plain = milliseconds(explicit, inputs, repeats)
            rows.append(
                {
                    "model": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "fused_ms": round(fused, 2),
                    "explicit_ms": round(plain, 2),
                    "fused/explicit": round(fused / plain, 2),
                }
            )
    report.finish(args, torch.device(args.device), rows=rows)


if __name__ == "__main__":
    main()
