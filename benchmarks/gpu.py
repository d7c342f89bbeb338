"""All that the GPU rows of the documentation need, on one GPU or two, in nine minutes → one JSON.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --only step_vit_base memory_4096
The jobs run one after the other, the most valuable first. The JSON is written after each of them:
what was measured is kept if the run is cut off. A job that fails or takes too long is reported, and
the next one starts.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report  # first of ours: it makes the repository importable
import torch
from loader import write_photographs

from engine.log import read_log

ROOT = Path(__file__).parents[1]
PYTEST = "-m pytest -n 0 -q -p no:cacheprovider"
TAIL = 4000  # characters of the output of a job that failed

# Name → command line, limit in seconds. {out}: a JSON; {run}: a run's folder; {images}: JPEGs.
JOBS = {
    "augmentation": (f"{PYTEST} tests/moco/test_augmentation.py", 60),
    "step_vit_base": ("benchmarks/step.py -a vit_base -b 256 --plain --out {out}", 90),
    "step_vit_small": ("benchmarks/step.py -a vit_small -b 512 --plain --out {out}", 90),
    "step_resnet50": (
        "benchmarks/step.py -a resnet50 -b 256 --optimizer lars --plain --out {out}",
        90,
    ),
    "memory_4096": (
        "benchmarks/memory.py -a vit_base -b 4096 --encode-chunk 128 --steps 2 --out {out}",
        120,
    ),
    "tests": (f"{PYTEST} tests/test_gpu.py", 240),
    "end_to_end": (
        "main_moco.py {images} -a vit_small --stop-grad-conv1 -b 512 --optimizer adamw --lr 1e-4 "
        "--wd 0.1 --moco-t 0.2 --epochs 3 --warmup-epochs 1 --knn-every 0 -j {cores} -p 1 "
        "--output-dir {run}",
        120,
    ),
    "levers_vit_base": ("benchmarks/step.py -a vit_base -b 256 --levers --out {out}", 120),
    "compile_vit_base": ("benchmarks/step.py -a vit_base -b 256 --compile --out {out}", 120),
    "memory_vit_base": (
        "benchmarks/memory.py -a vit_base -b 256 --encode-chunk 0 128 --steps 2 --out {out}",
        60,
    ),
    "memory_resnet50": (
        "benchmarks/memory.py -a resnet50 -b 256 --encode-chunk 0 --steps 2 --out {out}",
        60,
    ),
    "levers_resnet50": (
        "benchmarks/step.py -a resnet50 -b 256 --optimizer lars --levers channels_last "
        "grad_monitor --out {out}",
        60,
    ),
}
QUICK = {
    "step_vit_base": ("benchmarks/step.py --quick --out {out}", 60),
    "fails": ("benchmarks/step.py --no-such-flag", 60),
    "end_to_end": (
        "main_moco.py {images} -a vit_nano --img-size 32 --patch-size 16 -b 16 --epochs 1 "
        "--warmup-epochs 0 --knn-every 0 --moco-mlp-dim 16 -p 1 --output-dir {run}",
        60,
    ),
}


def run(command, limit, folder):
    """One job → its report and what became of it."""
    out, run_folder = folder / "out.json", folder / "run"
    places = dict(out=out, run=run_folder, images=folder.parent / "images", cores=os.cpu_count())
    argv = [sys.executable, *shlex.split(command.format(**places))]
    start = time.perf_counter()
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code = f"stopped after {limit:.0f} s"
        output = "".join(o.decode(errors="replace") for o in (error.stdout, error.stderr) if o)
    result = dict(seconds=round(time.perf_counter() - start, 1), exit_code=code)
    if out.exists():
        result["report"] = json.loads(out.read_text())
    elif run_folder.exists():
        result["log"] = summarize(read_log(run_folder / "log.jsonl"))
    elif "pytest" in command:
        result["summary"] = output.strip().splitlines()[-1:]
    if code != 0:
        result["output"] = output[-TAIL:]
    return result


def summarize(lines):
    """Medians of a run after its first epoch, which fills the caches."""
    lines = [line for line in lines if line["epoch"] > 1] or lines
    return {
        key: sorted(line[key] for line in lines)[len(lines) // 2]
        for key in ("images_per_s", "data_wait")
        if lines
    }


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=JOBS, help="these jobs")
    parser.add_argument("--images", type=int, default=2048, help="JPEGs of end_to_end")
    parser.add_argument("--limit", type=float, default=540, help="seconds in all")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.quick:
        parser.error("there is no GPU (--quick shows on a CPU that the script runs)")
    jobs = QUICK if args.quick else {name: JOBS[name] for name in args.only or JOBS}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    end, results = time.monotonic() + args.limit, {}
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary, "images")
        images.mkdir()
        write_photographs(images, 32 if args.quick else args.images)
        for name, (command, limit) in jobs.items():
            left = end - time.monotonic()
            if left < 5:
                results[name] = dict(exit_code="not run: no time left")
                continue
            folder = Path(temporary, name)
            folder.mkdir()
            results[name] = dict(command=f"python {command}") | run(
                command, min(limit, left), folder
            )
            print(name, json.dumps(results[name])[:300], file=sys.stderr, flush=True)
            report.save(args, device, gpus=torch.cuda.device_count(), jobs=results)
    report.finish(args, device, gpus=torch.cuda.device_count(), jobs=results)


if __name__ == "__main__":
    main()
