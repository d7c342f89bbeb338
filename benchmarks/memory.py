"""Memory and speed of a pre-training step, whole and in chunks (--encode-chunk).

    python benchmarks/memory.py --arch vit_small --batch-size 64 --encode-chunk 0 16
    python benchmarks/memory.py --arch vit_base --batch-size 4096 --encode-chunk 0 256
    python benchmarks/memory.py --arch vit_base --encode-chunk 0 256 --gib 16 24 40 80
    python benchmarks/memory.py --quick
Each setting in a process of its own, two steps and then the median of --steps: GiB at the peak, on
a GPU those that torch allocated, on a CPU the resident set, Python and torch included. --gib: the
largest batch, a power of two, that a GPU of so many GiB takes; null where that is less than 32, or
where the GPU at hand is smaller. A setting that runs out of memory is a line of the table, too.
Each line is printed, and written to --out, as soon as it is measured.
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

from engine.launch import init_distributed

OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
SIGKILL = -9  # the kernel's answer where a CPU's memory is full
SOLD_AS = 1.05  # a GPU sold as 80 GB has 79 GiB


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
    if args.quick and not args.one:
        args.arch, args.batch_size, args.img_size, args.steps = "vit_nano", 32, 64, 1
    if args.one:
        return measure(args)

    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    if args.gib and not on_gpu:
        parser.error("--gib limits the memory of a CUDA GPU: there is none")
    device = torch.device("cuda" if on_gpu else "cpu")
    lines, results = [], dict(arch=args.arch, amp=args.amp)
    for line in measure_largest_batches(args) if args.gib else measure_chunks(args):
        lines.append(line)
        print(json.dumps(line), file=sys.stderr, flush=True)
        report.save(args, device, **results, rows=lines)
    report.finish(args, device, **results, rows=lines)


def measure_chunks(args):
    """Yields a line of the table for each --encode-chunk, compared with the first one."""
    first = None
    for i, chunk in enumerate(args.encode_chunk):
        line = measure_in_process(args, args.batch_size, chunk)
        if line is None:
            yield dict(batch_size=args.batch_size, encode_chunk=chunk, out_of_memory=True)
            continue
        if i == 0:
            first = line
        elif first is not None:
            line["memory of the first/this"] = round(first["peak_gib"] / line["peak_gib"], 2)
            line["speed/that of the first"] = round(line["images_per_s"] / first["images_per_s"], 3)
        yield line


def measure_largest_batches(args):
    """Yields a line of the table for each --gib and --encode-chunk."""
    total_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    for gib in args.gib:
        for chunk in args.encode_chunk:
            line = dict(gib=gib, encode_chunk=chunk, largest_batch=None)
            if gib > total_gib * SOLD_AS:
                line["this_gpu_gib"] = round(total_gib, 1)
            else:
                line["largest_batch"] = largest_batch(args, gib, chunk)
            yield line


def largest_batch(args, gib, chunk):
    """The largest power of two from 32 on that fits; None if none does."""
    largest, batch_size = None, 32
    while measure_in_process(args, batch_size, chunk, gib) is not None:
        largest = batch_size
        batch_size *= 2
    return largest


def measure_in_process(args, batch_size, chunk, gib=None):
    """The measurement of one setting; None if it takes more memory than there is."""
    flags = ["--one", "--batch-size", batch_size, "--encode-chunk", chunk]
    for name in ("arch", "img_size", "amp", "device", "steps"):
        flags += ["--" + name.replace("_", "-"), getattr(args, name)]
    if args.compile:
        flags.append("--compile")
    if gib is not None:
        flags += ["--gib", gib]
    if args.quick:
        flags.append("--quick")
    command = [sys.executable, __file__, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode == SIGKILL or any(words in done.stderr for words in OUT_OF_MEMORY):
        return None
    sys.exit(done.stderr)


def measure(args):
    env = init_distributed(args.device, args.amp)
    if args.gib:
        total = torch.cuda.get_device_properties(env.device).total_memory
        fraction = min(1.0, args.gib[0] * 2**30 / total)
        torch.cuda.set_per_process_memory_fraction(fraction)
    [args.encode_chunk] = args.encode_chunk
    args.optimizer = "adamw"
    side = Side(args, env)
    side.run(2)
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        side.run()
        times.append(time.perf_counter() - start)
    if env.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = {
        "batch_size": args.batch_size,
        "encode_chunk": args.encode_chunk,
        "peak_gib": round(peak, 2),
        "images_per_s": round(args.batch_size / statistics.median(times), 2),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
