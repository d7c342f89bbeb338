"""Memory and speed of a pre-training step, whole and in chunks (--encode-chunk).

    python benchmarks/memory.py --arch vit_small --batch-size 64 --encode-chunk 0 16
    python benchmarks/memory.py --arch vit_base --batch-size 4096 --encode-chunk 0 256
    python benchmarks/memory.py --arch vit_base --encode-chunk 0 256 --gib 16 24 40 80
    python benchmarks/memory.py --estimate --arch vit_base --batch-size 512 --encode-chunk 0 256
    python benchmarks/memory.py --estimate --arch vit_small vit_base --gib 16 24 40 80 141
    python benchmarks/memory.py --quick
Each setting in a process of its own, two steps and then the median of --steps: GiB at the peak, on
a GPU those that torch allocated, on a CPU the resident set, Python and torch included. --gib: the
largest batch, a power of two, that a GPU of so many GiB takes; null where that is less than 32, or
where the GPU at hand is smaller. A setting that runs out of memory is a line of the table, too.
Each line is printed, and written to --out, as soon as it is measured.

--estimate needs no GPU: it counts the bytes of the tensors of two steps of main_moco.py in one
process, which run on tensors without data. They are tensors of the CPU with the choices of a GPU
(fused attention, both views in one batch, bf16), because the backward pass of CUDA tensors needs
CUDA. --device cpu: with the choices of a CPU. With --gib it finds the largest multiple of 32
images, up to 4096, and leaves a part of each GPU to what isn't a tensor, see USABLE.
"""

import copy
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import report  # first: it makes the repository importable
import torch
from fake import create_fake_model, fake_tensors
from step import Side
from timm.layers import set_fused_attn

import main_moco
import moco.builder
from engine.backbones import RESNETS
from engine.launch import Env, init_distributed

OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
SIGKILL = -9  # the kernel's answer where a CPU's memory is full
SOLD_AS = 1.05  # a GPU sold as 80 GB has 79 GiB
# Of a GPU's memory for tensors; the rest is for CUDA's context, the workspaces of cuBLAS, cuDNN and
# NCCL, fragmentation, and the GiB that it lacks of what it is sold as.
USABLE = 0.9
GRANULARITY, MAX_BATCH = 32, 4096  # images: the largest batch is a multiple, and no larger
AMP_DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def main():
    parser = report.parser(__doc__)
    parser.add_argument("-a", "--arch", nargs="+", default=["vit_small"], dest="archs")
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--encode-chunk", type=int, nargs="+", default=[0, 16])
    parser.add_argument("--gib", type=float, nargs="+", help="sizes of GPUs")
    parser.add_argument("--amp", default="auto", help="as in main_moco.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--estimate", action="store_true", help="compute it, without a GPU")
    parser.add_argument("--one", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.quick and not args.one:
        args.archs, args.batch_size, args.img_size, args.steps = ["vit_nano"], 32, 64, 1
    if args.one:
        [args.arch] = args.archs
        return measure(args)

    on_gpu = torch.cuda.is_available() and args.device != "cpu" and not args.estimate
    if args.gib and not on_gpu and not args.estimate:
        parser.error("--gib limits the memory of a CUDA GPU: there is none; --estimate needs none")
    if args.estimate and args.compile:
        parser.error("--estimate is of the step without --compile")
    device = torch.device("cuda" if on_gpu else "cpu")
    lines, results = [], dict(estimated=args.estimate, amp=args.amp)
    for line in rows(args):
        lines.append(line)
        print(json.dumps(line), file=sys.stderr, flush=True)
        report.save(args, device, **results, rows=lines)
    report.finish(args, device, **results, rows=lines)


def rows(args):
    """Yields the lines of the table, architecture by architecture."""
    if args.estimate:
        make = estimate_largest_batches if args.gib else estimate_chunks
    else:
        make = measure_largest_batches if args.gib else measure_chunks
    for arch in args.archs:
        args.arch = arch
        for line in make(args):
            yield dict(arch=arch) | line


def estimate_chunks(args):
    for chunk in args.encode_chunk:
        gib = round(estimate(args, args.batch_size, chunk), 2)
        yield dict(batch_size=args.batch_size, encode_chunk=chunk, estimated_gib=gib)


def estimate_largest_batches(args):
    """Yields a line of the table for each --encode-chunk and --gib."""
    for chunk in args.encode_chunk:
        peak = cache(partial(estimate, args, chunk=chunk))
        for gib in args.gib:
            line = dict(gib=gib, encode_chunk=chunk, largest_batch=None)
            try:
                batch_size = largest_estimated_batch(peak, USABLE * gib, chunk)
            except ValueError as error:  # BatchNorm and --encode-chunk
                yield line | dict(refused=str(error))
                continue
            if batch_size:
                line |= dict(largest_batch=batch_size, estimated_gib=round(peak(batch_size), 2))
            yield line


def largest_estimated_batch(peak, limit, chunk=0):
    """The largest multiple of GRANULARITY up to MAX_BATCH with peak(batch_size) ≤ limit, in GiB.

    0 if none. The peak is nearly a line over the batch size, so that the secant method converges;
    from the chunk on it is another, flatter one.
    """
    low, high = (chunk, 2 * chunk) if chunk and peak(chunk) <= limit else (128, 256)
    for _ in range(3):
        slope = (peak(high) - peak(low)) / (high - low)
        batch_size = int((high + (limit - peak(high)) / slope) // GRANULARITY) * GRANULARITY
        batch_size = min(max(GRANULARITY, batch_size), MAX_BATCH)
        if batch_size in (low, high):
            break
        low, high = high, batch_size
    while batch_size > 0 and peak(batch_size) > limit:
        batch_size -= GRANULARITY
    return batch_size


def estimate(args, batch_size, chunk):
    """GiB of the tensors of a step at its peak, of one process, computed on tensors without data.

    That of the second step, for the optimizer has a state then; the first one is on two images.
    """
    args = copy.copy(args)
    args.batch_size, args.encode_chunk, args.optimizer = batch_size, chunk, optimizer(args)
    env = Env(torch.device("cpu"), AMP_DTYPES[args.amp])
    as_on_cpu = args.device == "cpu"
    set_fused_attn(not (as_on_cpu and env.amp_dtype))  # as init_distributed does
    concat_limit = moco.builder.CPU_CONCAT_LIMIT if as_on_cpu else math.inf
    create_model = partial(create_fake_model, main_moco.create_model)
    with (
        patch.object(moco.builder, "CPU_CONCAT_LIMIT", concat_limit),
        patch.object(main_moco, "create_model", create_model),
        fake_tensors() as tensors,
    ):
        side = Side(args, env)
        crops, params = side.batch
        side.batch = crops[:, :2], params[:, :2]
        side.train()
        side.batch, tensors.peak = (crops, params), 0
        side.train()
    return tensors.peak / 2**30


def optimizer(args):
    """The optimizer of the recipes."""
    return "lars" if args.arch in RESNETS else "adamw"


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
    args.optimizer = optimizer(args)
    gib_before = resident_gib()
    side = Side(args, env)
    side.run(2)
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        side.run()
        times.append(time.perf_counter() - start)
    on_gpu = env.device.type == "cuda"
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resident_gib()
    line = {
        "batch_size": args.batch_size,
        "encode_chunk": args.encode_chunk,
        "peak_gib": round(peak, 3),
        **({} if on_gpu else {"of_python_and_torch": round(gib_before, 3)}),
        "images_per_s": round(args.batch_size / statistics.median(times), 2),
    }
    print(json.dumps(line))


def resident_gib():
    """The largest resident set of this process so far.

    getrusage would count that of the parent, which lies in it before Python starts.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
