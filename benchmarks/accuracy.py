"""Pre-training, linear probe and fine-tuning on a small set, beside their controls, over seeds.

    python benchmarks/accuracy.py digits           # → benchmarks/results/accuracy_digits.json
    python benchmarks/accuracy.py fashion_mnist --labels 1 10 100 --data-root DIR
    python benchmarks/accuracy.py digits --seeds 0 --out -    # prints only
It runs recipes/NAME.txt, lincls_NAME.txt and finetune_NAME.txt; finetune_NAME_10.txt is for 10 % of
the labels. The controls train as long from random weights. Arguments that it doesn't know go to
main_moco.py. Runs that are finished are kept in --runs; others continue.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report
import torch
from PIL import Image

from engine.datasets import load_splits
from engine.decode import PixelFormat
from engine.log import read_log

ROOT = Path(__file__).parents[1]


def run(seed, args, extra):
    """All jobs of one seed → accuracies in percent, and seconds."""
    folder = Path(args.runs, args.name, f"seed{seed}").resolve()
    common = ["--seed", seed, "--data-root", args.data_root, "--resume", "auto"]
    moco = folder / "moco"
    result = {"seed": seed}

    def job(name, script, *flags):
        out = folder / name if name != "pretrain" else moco
        flags = [*flags, *common, "--output-dir", out]
        result[f"{name}_seconds"] = timed(script, args.threads, out, *flags)
        return out

    job("pretrain", "main_moco.py", f"@recipes/{args.name}.txt", *extra)
    lines = read_log(moco / "log.jsonl")
    knn = [line["knn"] for line in lines if "knn" in line]
    rates = [line["images_per_s"] for line in lines if "loss" in line]
    result |= dict(knn_before=knn[0], knn_after=knn[-1], images_per_s=statistics.median(rates))

    pretrained = ["--pretrained", moco / "checkpoint.pth"]
    jobs = [("lincls", f"@recipes/lincls_{args.name}.txt")]
    for percent in args.labels:
        if percent == 100:
            jobs.append(("finetune", f"@recipes/finetune_{args.name}.txt"))
        else:
            lists = export_subset(args, percent)
            recipe = f"@recipes/finetune_{args.name}_{percent}.txt"
            jobs.append((f"finetune_{percent}", recipe, lists[0], "--val", lists[1]))
    for name, *flags in jobs:
        script = f"main_{name.split('_')[0]}.py"
        for control, more in (("", []), ("_from_scratch", ["--from-scratch"])):
            out = job(name + control, script, *flags, *pretrained, *more)
            result[name + control] = last_value(out, "acc1")
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def timed(script, threads, folder, *flags):
    """Runs a script unless its run is finished → its seconds, those of earlier parts included."""
    kept = folder / "seconds.txt"
    if kept.exists():
        return float(kept.read_text())
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    env = os.environ | dict(OMP_NUM_THREADS=str(threads))
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    seconds = round(time.perf_counter() - start, 1)
    kept.write_text(str(seconds))
    return seconds


def last_value(folder, key):
    """The last value of log.jsonl whose name begins with `key`; of several rates the best one's."""
    for line in reversed(read_log(Path(folder, "log.jsonl"))):
        values = [value for name, value in line.items() if name.startswith(key)]
        if values:
            return max(values)
    raise KeyError(key)


def export_subset(args, percent):
    """PNG files and lists of the first `percent` of each class, and of val → the two lists."""
    folder = Path(args.runs, args.name, "images").resolve()
    lists = folder / f"train_{percent}.txt", folder / "val.txt"
    if not all(path.exists() for path in lists):
        gray = PixelFormat(in_chans=1, mean=(0.5,), std=(0.5,))
        splits = load_splits(args.name, args.data_root, gray)
        per_class = len(splits.train_labelled) * percent // 100 // splits.num_classes
        labels = splits.train_labelled.labels
        first = [(labels == c).nonzero()[:per_class, 0] for c in range(splits.num_classes)]
        export(splits.train_labelled, torch.cat(first), splits.class_names, lists[0])
        export(splits.val, range(len(splits.val)), splits.class_names, lists[1])
    return lists


def export(dataset, indices, class_names, path):
    folder = path.parent / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in map(int, indices):
        Image.fromarray(dataset.images[i, 0].numpy()).save(folder / f"{i}.png")
        lines.append(f"{path.stem}/{i}.png\t{class_names[dataset.labels[i]]}\n")
    path.write_text("".join(lines))


def main():
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("name", choices=("digits", "fashion_mnist"))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--labels", type=int, nargs="+", default=[100], metavar="PERCENT", help="of fine-tuning")
    add("--data-root", default="data", help="where fashion_mnist is")
    add("--jobs", type=int, default=1, help="seeds at a time")
    add("--threads", type=int, help="of each run (default: the cores, shared out)")
    add("--runs", default="runs/accuracy", metavar="DIR", help="folder of the runs")
    args, extra = parser.parse_known_args()
    args.threads = args.threads or max(1, os.cpu_count() // args.jobs)
    if args.quick:
        args.seeds, extra = args.seeds[:1], [*extra, "--epochs", "1", "--warmup-epochs", "0"]

    for percent in args.labels:
        if percent < 100:
            export_subset(args, percent)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda seed: run(seed, args, extra), args.seeds))
    columns = {key: [result[key] for result in runs] for key in runs[0] if key != "seed"}
    median = {key: statistics.median(values) for key, values in columns.items()}
    if not args.out:
        args.out = str(ROOT / "benchmarks" / "results" / f"accuracy_{args.name}.json")
    args.out = None if args.out == "-" else args.out
    settings = Path(args.runs, args.name, f"seed{args.seeds[0]}", "moco", "args.json").read_text()
    precision = json.loads(settings)["precision"]
    results = dict(threads=args.threads, precision=precision, median=median, runs=runs)
    report.finish(args, torch.device("cpu"), **results)


if __name__ == "__main__":
    main()
