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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moco.log import read_rows  # noqa: E402


def script(name, *args):
    """Runs one of the scripts → its seconds."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 1)


def last(folder, key):
    """The last value of log.jsonl whose name begins with `key`; of several rates the best one's."""
    row = [
        row for row in read_rows(Path(folder, "log.jsonl")) if any(k.startswith(key) for k in row)
    ]
    return max(value for name, value in row[-1].items() if name.startswith(key))


def run(seed, extra):
    """Pre-training, then probe and fine-tuning from it and from a random initialisation."""
    with tempfile.TemporaryDirectory() as folder:
        moco = Path(folder, "moco")
        seconds = script("main_moco.py", f"@{ROOT}/recipes/digits.txt", "--seed", seed,
                         "--output-dir", moco, *extra)  # fmt: skip
        rows = read_rows(moco / "log.jsonl")
        result = {
            "seed": seed,
            "knn_before": next(row["knn"] for row in rows if "knn" in row),
            "knn_after": last(moco, "knn"),
            "seconds": seconds,
            "images_per_s": round(
                statistics.median(r["images_per_s"] for r in rows if "loss" in r)
            ),
        }
        for job in ("lincls", "finetune"):
            for control, flags in (("", []), ("_from_scratch", ["--from-scratch"])):
                out = Path(folder, job + control)
                seconds = script(
                    f"main_{job}.py", f"@{ROOT}/recipes/{job}_digits.txt", "--seed", seed,
                    "--pretrained", moco / "checkpoint.pth", "--output-dir", out, *flags,
                )  # fmt: skip
                result[job + control] = last(out, "acc1")
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
        result, setting = run(seed, extra)
        runs.append(result)
        print(json.dumps(result), flush=True)
    columns = {key: [result[key] for result in runs] for key in runs[0] if key != "seed"}
    report = {
        "command": " ".join(["python benchmarks/digits.py", *sys.argv[1:]]),
        "min": {key: min(values) for key, values in columns.items()},
        "median": {key: statistics.median(values) for key, values in columns.items()},
        "runs": runs,
        "device": setting["device"],
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "precision": setting["precision"],
        "versions": setting["versions"],
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if args.out != "-":
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
