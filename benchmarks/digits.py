"""The digits recipes over several seeds: pre-training, probe, fine-tuning, each beside its control.

    python benchmarks/digits.py                      # seeds 0 1 2 → benchmarks/results/digits.json
    python benchmarks/digits.py --seeds 0 --out -    # prints only
Arguments that it doesn't know go to main_moco.py, after the recipe.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.log import read_log

ROOT = Path(__file__).parents[1]


def script(name, *args):
    """Runs one of the scripts → its seconds."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 1)


def last_value(folder, key):
    """The last value of log.jsonl whose name begins with `key`; of several rates the best one's."""
    for line in reversed(read_log(Path(folder, "log.jsonl"))):
        values = [value for name, value in line.items() if name.startswith(key)]
        if values:
            return max(values)
    raise KeyError(key)


def run(seed, extra):
    """Pre-training, then probe and fine-tuning from it and from a random initialization."""
    with tempfile.TemporaryDirectory() as folder:
        moco = Path(folder, "moco")
        flags = ["--seed", seed, "--output-dir", moco, *extra]
        seconds = script("main_moco.py", f"@{ROOT}/recipes/digits.txt", *flags)
        lines = read_log(moco / "log.jsonl")
        result = {
            "seed": seed,
            "knn_before": next(line["knn"] for line in lines if "knn" in line),
            "knn_after": last_value(moco, "knn"),
            "seconds": seconds,
            "images_per_s": round(
                statistics.median(line["images_per_s"] for line in lines if "loss" in line)
            ),
        }
        for job in ("lincls", "finetune"):
            for control, flags in (("", []), ("_from_scratch", ["--from-scratch"])):
                out = Path(folder, job + control)
                flags = [*flags, "--seed", seed, "--output-dir", out]
                flags += ["--pretrained", moco / "checkpoint.pth"]
                seconds = script(f"main_{job}.py", f"@{ROOT}/recipes/{job}_digits.txt", *flags)
                result[job + control] = last_value(out, "acc1")
                result[f"{job}{control}_seconds"] = seconds
        return result, json.loads((moco / "args.json").read_text())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "digits.json"))
    args, extra = parser.parse_known_args()

    runs = []
    for seed in args.seeds:
        result, metadata = run(seed, extra)
        runs.append(result)
        print(json.dumps(result), flush=True)
    columns = {key: [result[key] for result in runs] for key in runs[0] if key != "seed"}
    report = {
        "command": " ".join(["python benchmarks/digits.py", *sys.argv[1:]]),
        "min": {key: min(values) for key, values in columns.items()},
        "median": {key: statistics.median(values) for key, values in columns.items()},
        "runs": runs,
        "device": metadata["device"],
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "precision": metadata["precision"],
        "versions": metadata["versions"],
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if args.out != "-":
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
