"""Memory and speed of a pre-training step, whole and in chunks (--encode-chunk).

    python benchmarks/memory.py --arch vit_small --batch-size 64 --encode-chunk 0 16
    python benchmarks/memory.py --arch vit_base --batch-size 4096 --encode-chunk 0 256
    python benchmarks/memory.py --arch vit_base --encode-chunk 0 256 --gib 16 24 40 80
    python benchmarks/memory.py --quick
Each setting in a process of its own, two steps and then the median of --steps: GiB at the peak, on
a GPU those that torch allocated, on a CPU the resident set, Python and torch included. --gib: the
largest batch, a power of two, that a GPU of so many GiB takes exactly.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import report  # first: it makes the repository importable
import torch
from step import Side

from moco import distributed


def main():
    parser = report.parser(__doc__)
    parser.add_argument("-a", "--arch", default="vit_small")
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--encode-chunk", type=int, nargs="+", default=[0, 16])
    parser.add_argument("--gib", type=float, nargs="+", help="sizes of GPUs")
    parser.add_argument("--amp", default="auto", help="as in main_moco.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.quick:
        args.arch, args.batch_size, args.img_size, args.steps = "vit_tiny", 32, 64, 1
    if args.one:
        return measure(args)

    rows = []
    if args.gib:
        for gib in args.gib:
            for chunk in args.encode_chunk:
                found = largest(args, gib, chunk)
                rows.append({"gib": gib, "encode_chunk": chunk, "largest_batch": found})
    else:
        rows = [in_a_process(args, args.batch_size, chunk) for chunk in args.encode_chunk]
        for row in rows[1:]:
            row["memory of the first/this"] = round(rows[0]["peak_gib"] / row["peak_gib"], 2)
            row["speed/that of the first"] = round(row["images_per_s"] / rows[0]["images_per_s"], 3)
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    report.finish(args, device, arch=args.arch, amp=args.amp, rows=rows)


def in_a_process(args, batch_size, chunk, gib=0.0):
    """The measurement of one setting; None if it takes more memory than there is."""
    flags = ["--one", "--batch-size", batch_size, "--encode-chunk", chunk]
    for name in ("arch", "img_size", "amp", "device", "steps"):
        flags += ["--" + name.replace("_", "-"), getattr(args, name)]
    flags += ["--compile"] * args.compile + ["--gib", gib] * bool(gib)
    command = [sys.executable, __file__, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    if "OutOfMemoryError" in done.stderr:
        return None
    sys.exit(done.stderr)


def largest(args, gib, chunk):
    """The largest power of two that fits."""
    batch_size = 32
    while in_a_process(args, 2 * batch_size, chunk, gib):
        batch_size *= 2
    return batch_size


def measure(args):
    device, amp = distributed.set_up(args.device, args.amp)
    if args.gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.gib[0] * 2**30 / total)
    [args.encode_chunk] = args.encode_chunk
    args.optimizer = "adamw"
    side = Side(args, device, amp)
    side.run(2)
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        side.run()
        times.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {
        "batch_size": args.batch_size,
        "encode_chunk": args.encode_chunk,
        "peak_gib": round(peak, 2),
        "images_per_s": round(args.batch_size / statistics.median(times), 2),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
