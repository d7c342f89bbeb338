"""Explicit softmax against torch's fused attention, forward and backward, on one device.

    python benchmarks/attention.py --out benchmarks/results/attention_cpu.json
Why the scripts train with the explicit one in bf16 on a CPU, and only there. Medians of one run.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", help="write the JSON there")
    args = parser.parse_args()

    rows = []
    for name, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [
                torch.randn(shape, dtype=dtype, device=args.device, requires_grad=True)
                for _ in range(3)
            ]
            fused = milliseconds(F.scaled_dot_product_attention, inputs, args.repeats)
            plain = milliseconds(explicit, inputs, args.repeats)
            rows.append(
                {
                    "model": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "fused_ms": round(fused, 2),
                    "explicit_ms": round(plain, 2),
                    "fused/explicit": round(fused / plain, 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
        report = {
            "command": " ".join(["python benchmarks/attention.py", *sys.argv[1:]]),
            "hardware": f"{where}, {torch.get_num_threads()} CPU threads",
            "torch": str(torch.__version__),
            "rows": rows,
        }
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
