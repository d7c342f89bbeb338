"""Pre-training, linear probe and fine-tuning on a small set, beside their controls, over seeds.

    python benchmarks/accuracy.py digits           # → benchmarks/results/accuracy_digits.json
    python benchmarks/accuracy.py fashion_mnist --labels 1 10 100 --data-root DIR
    python benchmarks/accuracy.py digits --seeds 0 --out -    # prints only
It runs recipes/NAME.txt, lincls_NAME.txt and finetune_NAME.txt; finetune_NAME_10.txt is for 10 % of
the labels, finetune_few_labels.txt for other fractions. The controls train as long from random
weights. Arguments that it doesn't know go to main_moco.py. Runs that are finished are kept in
--runs; others continue.
"""

import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report  # first of ours: it makes the repository importable
import torch
from kept_runs import ROOT, last_value, run_script
from PIL import Image

from engine.data.decode import PixelFormat
from engine.data.splits import load_splits, open_source
from engine.files import exists
from engine.log import read_log


def run(seed, args, extra):
    """All jobs of one seed → accuracies in percent, and seconds."""
    folder = Path(args.runs, args.name, f"seed{seed}").resolve()
    result = {"seed": seed}

    def job(name, script, *flags):
        flags = [*flags, "--seed", seed, "--data-root", args.data_root]
        done = run_script(folder / name, args.threads, script, *flags)
        result[f"{name}_seconds"] = done["seconds"]
        return read_log(folder / name / "log.jsonl")

    lines = job("pretrain", "main_moco.py", f"@recipes/{args.name}.txt", *extra)
    knn = [line["knn"] for line in lines if "knn" in line]
    rates = [line["images_per_s"] for line in lines if "loss" in line]
    result |= dict(knn_before=knn[0], knn_after=knn[-1], images_per_s=statistics.median(rates))

    jobs = [] if args.pretrain_only else downstream_jobs(args)
    for name, script, *flags in jobs:
        flags += ["--pretrained", folder / "pretrain" / "checkpoint.pth"]
        flags += quick_flags(args, script)
        for control, more in (("", []), ("_from_scratch", ["--from-scratch"])):
            lines = job(name + control, script, *flags, *more)
            result[name + control] = last_value(lines, "acc1")
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def downstream_jobs(args):
    """(name, script, flags…) of the probe and of fine-tuning."""
    jobs = [("lincls", "main_lincls.py", f"@recipes/lincls_{args.name}.txt")]
    for percent in args.labels:
        flags = [f"@{finetune_recipe(args.name, percent)}"]
        if percent < 100:
            train, val = export_subset(args, percent)
            flags += [train, "--val", val]
        name = "finetune" if percent == 100 else f"finetune_{percent}"
        jobs.append((name, "main_finetune.py", *flags))
    return jobs


def finetune_recipe(name, percent):
    """Of so many percent of the labels; where they have none of their own, that of few labels."""
    recipe = f"recipes/finetune_{name}{'' if percent == 100 else f'_{percent}'}.txt"
    is_own = percent == 100 or (ROOT / recipe).exists()
    return recipe if is_own else "recipes/finetune_few_labels.txt"


def quick_flags(args, script):
    if not args.quick:
        return []
    return ["--epochs", 1, *(["--warmup-epochs", 0] if script != "main_lincls.py" else [])]


def export_subset(args, percent):
    """PNG files and lists of the first `percent` of each class, and of val → the two lists."""
    folder = Path(args.runs, args.name, "images").resolve()
    lists = folder / f"train_{percent}.txt", folder / "val.txt"
    if not all(map(exists, lists)):
        gray = PixelFormat(in_chans=1, mean=(0.5,), std=(0.5,))
        splits = load_splits(open_source(args.name, gray, args.data_root))
        per_class = len(splits.train) * percent // 100 // splits.num_classes
        labels = splits.train.labels
        first = [(labels == c).nonzero()[:per_class, 0] for c in range(splits.num_classes)]
        export(splits.train, torch.cat(first), splits.class_names, lists[0])
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
    add("--pretrain-only", action="store_true", help="kNN alone, no probe and no fine-tuning")
    add("--data-root", default="data", help="where fashion_mnist is")
    add("--jobs", type=int, default=1, help="seeds at a time")
    add("--threads", type=int, help="of each run (default: the cores, shared out)")
    add("--runs", default="runs/accuracy", metavar="DIR", help="folder of the runs")
    args, extra = parser.parse_known_args()
    args.threads = args.threads or max(1, os.cpu_count() // args.jobs)
    extra += quick_flags(args, "main_moco.py")
    if args.quick and not args.out:
        parser.error("--quick is not for the published results: add --out")
    for percent in args.labels:
        if percent < 100:
            export_subset(args, percent)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda seed: run(seed, args, extra), args.seeds))
    columns = {key: [result[key] for result in runs] for key in runs[0] if key != "seed"}
    median = {key: statistics.median(values) for key, values in columns.items()}
    if not args.out:
        args.out = str(ROOT / "benchmarks" / "results" / f"accuracy_{args.name}.json")
    folder = Path(args.runs, args.name, f"seed{args.seeds[0]}", "pretrain")
    precision = json.loads((folder / "args.json").read_text())["precision"]
    results = dict(threads=args.threads, precision=precision, median=median, runs=runs)
    report.finish(args, torch.device("cpu"), **results)


if __name__ == "__main__":
    main()
