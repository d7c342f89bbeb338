"""The digits recipe over several seeds: kNN accuracy before and after, and the time it takes.

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


def run(seed, extra):
    """One run in a folder of its own → its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "main_moco.py"), f"@{ROOT}/recipes/digits.txt"]
        command += ["--seed", str(seed), "--output-dir", folder, *extra]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        rows = read_rows(Path(folder, "log.jsonl"))
        setting = json.loads(Path(folder, "args.json").read_text())
    knn = [row["knn"] for row in rows if "knn" in row]
    rates = [row["images_per_s"] for row in rows if "images_per_s" in row]
    result = {
        "seed": seed,
        "knn_before": knn[0],
        "knn_after": knn[-1],
        "seconds": round(seconds, 1),
        "images_per_s": round(statistics.median(rates)),
    }
    return result, setting


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
    after = [result["knn_after"] for result in runs]
    report = {
        "command": " ".join(["python benchmarks/digits.py", *sys.argv[1:]]),
        "knn_after": {"min": min(after), "median": statistics.median(after)},
        "seconds": {"median": statistics.median(result["seconds"] for result in runs)},
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
