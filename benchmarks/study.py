"""A study: pre-training under every combination of settings and seeds, kNN and a linear probe.

    python benchmarks/study.py patch_projection       # benchmarks/studies/patch_projection.txt
    python benchmarks/study.py my_study.txt --seeds 0 --jobs 1
    python benchmarks/study.py components --draw      # only the picture, from the JSON

A study file has blocks of lines with a blank line between. The first block is flags of
main_moco.py for all runs. Each other block is a list of settings, `name: flags`. The grid is the
product of these blocks and the seeds. Runs that are finished are kept; others continue.

Writes benchmarks/results/study_NAME.json and docs/study_NAME.png, or --out and a picture beside it.
"""

import itertools
import json
import os
import re
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report  # first of ours: it makes the repository importable
import torch
from kept_runs import ROOT, last_value, run_script

from engine.log import read_log
from engine.spikes import SpikeDetector

GRADIENTS = ("grad_linf/first_max", "grad_linf/last_max")
CURVES = ("knn", *GRADIENTS)
STEPS_PER_POINT = 10  # of a curve of gradients: their maximum
MAX_LAG = 100  # steps from a spike in the first layer to the one in the last that belongs to it


def read_study(path):
    """→ flags of all runs, blocks of settings [{name: flags}]."""
    text = re.sub(r"^#.*\n", "", Path(path).read_text(), flags=re.MULTILINE)
    common, *blocks = re.split(r"\n\s*\n", text.strip())
    return shlex.split(common), [parse_block(block) for block in blocks]


def parse_block(block):
    settings = {}
    for line in block.splitlines():
        name, colon, flags = line.partition(":")
        if not colon or name in settings:
            raise SystemExit(f"not `name: flags` with a name of its own: {line}")
        settings[name] = shlex.split(flags)
    return settings


def run_grid(study, common, blocks, args):
    """Every combination of one setting of each block and a seed → what is reported of each run."""

    def job(settings, seed):
        names, flags = [name for name, _ in settings], [f for _, fs in settings for f in fs]
        folder = "_".join(re.sub(r"[^\w.-]+", "-", name) for name in names)
        folder = Path(args.runs, study, folder, f"seed{seed}").resolve()
        result = run(names, common + flags, seed, folder, args)
        outcome = "diverged" if result["diverged"] else f"kNN {result['knn']:.1f} %"
        print(f"{', '.join(names)}, seed {seed}: {outcome}", file=sys.stderr)
        return result

    with ThreadPoolExecutor(args.jobs) as pool:
        grid = itertools.product(args.seeds, *(block.items() for block in blocks))
        futures = [pool.submit(job, settings, seed) for seed, *settings in grid]
        try:
            runs = [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
    return sorted(runs, key=lambda r: [list(b).index(n) for b, n in zip(blocks, r["setting"])])


def run(names, flags, seed, folder, args):
    """One pre-training and its probe → what is reported of it."""
    common = ["--seed", seed, "--workers", 1, "--print-freq", 1]  # spikes are found in the log
    done = run_script(folder, args.threads, "main_moco.py", *flags, *common)
    result = dict(setting=names, seed=seed, flags=shlex.join(flags)) | done

    lines = read_log(folder / "log.jsonl")
    curves = {name: [(x["epoch"], x[name]) for x in lines if name in x] for name in CURVES}
    curves |= {name: maxima(curves[name]) for name in GRADIENTS}
    result["git"] = json.loads((folder / "args.json").read_text())["versions"]["git"]
    result["knn"] = curves["knn"][-1][1]
    result |= find_spikes(lines)
    if args.probe and not result["diverged"]:
        probe = [*shlex.split(args.probe), "--pretrained", folder / "checkpoint.pth"]
        run_script(folder / "probe", args.threads, "main_lincls.py", *probe, "--seed", seed)
        result["probe"] = last_value(read_log(folder / "probe" / "log.jsonl"), "acc1")
    result["curves"] = {name: rounded(points) for name, points in curves.items()}
    return result


def find_spikes(lines):
    """Lines of a log with one for each step → how many spikes and dips, and the lags of spikes.

    lags: steps by which spikes in the first layer came before those in the last block.
    """
    detector, first_step, lags = SpikeDetector(), None, []
    for line in lines:
        if "knn" in line and line["step"] > 0:
            detector.update_knn(line["knn"])
        if not all(name in line for name in GRADIENTS):
            continue
        before = dict(detector.counts)
        detector.update(line["step"], first=line[GRADIENTS[0]], last=line[GRADIENTS[1]])
        if detector.counts["first"] > before["first"]:
            first_step = line["step"]
        if detector.counts["last"] > before["last"] and first_step is not None:
            if line["step"] - first_step <= MAX_LAG:
                lags.append(line["step"] - first_step)
            first_step = None
    return dict(spikes=detector.counts, lags=lags, dips=detector.num_dips)


def maxima(points):
    """[(epoch, value)] of every step → of every STEPS_PER_POINT steps, the largest value."""
    groups = [points[i : i + STEPS_PER_POINT] for i in range(0, len(points), STEPS_PER_POINT)]
    return [(group[-1][0], max(value for _, value in group)) for group in groups]


def rounded(points):
    """[(epoch, value)] → (epochs, values) in 4 digits, so that the JSON stays small."""
    return [[float(f"{number:.4g}") for number in column] for column in zip(*points)]


def summarize(runs):
    """→ {setting: {"knn": [mean, lowest, highest], "probe": the same, …}} over the seeds."""
    summary = {}
    for setting, group in grouped(runs).items():
        values = {"diverged": sum(r["diverged"] for r in group)}
        for key in ("knn", "probe", "seconds"):
            numbers = [r[key] for r in group if key in r and not r["diverged"]]
            if numbers:
                mean = statistics.mean(numbers)
                values[key] = [round(x, 2) for x in (mean, min(numbers), max(numbers))]
        for place in ("first", "last"):
            values[f"spikes_{place}"] = sum(r["spikes"][place] for r in group)
        values["dips"] = sum(r["dips"] for r in group)
        lags = [lag for r in group for lag in r["lags"]]
        if lags:
            values["median_lag"] = statistics.median(lags)
        summary[", ".join(setting)] = values
    return summary


def grouped(runs):
    """→ {setting: its runs}."""
    groups = {}
    for result in runs:
        groups.setdefault(tuple(result["setting"]), []).append(result)
    return groups


# Pictures


def draw(path, study):
    """Two blocks of settings: curves, a column for each of the second. One: accuracies."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    plot = plot_curves if len(study["blocks"]) > 1 else plot_accuracies
    plot(figure, study)
    figure.savefig(path, dpi=100)


def plot_curves(figure, study):
    from matplotlib.lines import Line2D

    first, second = study["blocks"][:2]
    figure.set_size_inches(3.2 * len(second) + 0.6, 7.2)
    axes = figure.subplots(len(CURVES), len(second), sharex=True, sharey="row", squeeze=False)
    titles = ("kNN, %", "gradient of the first layer, ℓ∞", "gradient of the last block, ℓ∞")
    for result in study["runs"]:
        row = first.index(result["setting"][0])
        column = axes[:, second.index(result["setting"][1])]
        for ax, points in zip(column, result["curves"].values()):
            if points:
                ax.plot(*points, color=f"C{row}", lw=0.9, alpha=0.8)
    for column, name in enumerate(second):
        diverged = sum(r["diverged"] for r in study["runs"] if r["setting"][1] == name)
        title = f"{name} ({diverged} diverged)" if diverged else name
        axes[0, column].set_title(title, fontsize=10)
        axes[-1, column].set_xlabel("epoch", fontsize=9)
    for row, title in enumerate(titles):
        axes[row, 0].set_ylabel(title, fontsize=9)
        for ax in axes[row]:
            ax.grid(alpha=0.3)
            ax.set_yscale("log" if row else "linear")
    handles = [Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(first)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(first), fontsize=10)


def plot_accuracies(figure, study):
    names = study["blocks"][0]
    figure.set_size_inches(8, 0.32 * len(names) + 1)
    panels = figure.subplots(1, 2, sharey=True)
    for ax, key, title in zip(panels, ("knn", "probe"), ("kNN, %", "linear probe, %")):
        for y, name in enumerate(names):
            values = [r[key] for r in study["runs"] if r["setting"] == [name] and key in r]
            ax.plot(values, [y] * len(values), "o", color="C0", ms=4, alpha=0.6)
            if values:
                ax.plot(statistics.mean(values), y, "|", color="black", ms=14)
                if y == 0:
                    ax.axvline(statistics.mean(values), color="gray", ls="--", lw=0.8)
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    panels[0].invert_yaxis()


def main():
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("study", help="a name in benchmarks/studies, or the path of a study file")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    add("--threads", type=int, help="of each run (default: the cores, shared out)")
    add("--probe", default="@recipes/lincls_digits.txt", help="flags of the probe; '' for none")
    add("--runs", default="runs/studies", metavar="DIR", help="folder of the runs")
    add("--draw", action="store_true", help="only the picture, from the JSON")
    args = parser.parse_args()
    args.threads = args.threads or max(1, os.cpu_count() // args.jobs)

    path = Path(args.study)
    path = path if path.is_file() else ROOT / "benchmarks" / "studies" / f"{args.study}.txt"
    if args.out == "-":
        parser.error("the picture is drawn from the report: give --out a file")
    if args.quick and not args.out:
        parser.error("--quick is not for the published results: add --out")
    results = ROOT / "benchmarks" / "results" / f"study_{path.stem}.json"
    picture = ROOT / "docs" / f"study_{path.stem}.png"
    if args.out:
        results, picture = Path(args.out), Path(args.out).with_suffix(".png")
    if not args.draw:
        common, blocks = read_study(path)
        if args.quick:
            common += ["--epochs", "1", "--warmup-epochs", "0"]
            args.seeds, blocks = args.seeds[:1], [dict(list(block.items())[:2]) for block in blocks]
        runs = run_grid(path.stem, common, blocks, args)
        study = dict(common=shlex.join(common), blocks=[list(block) for block in blocks])
        study |= dict(threads=args.threads, summary=summarize(runs), runs=runs)
        args.out = str(results)
        report.save(args, torch.device("cpu"), **study)
    draw(picture, json.loads(results.read_text()))


if __name__ == "__main__":
    main()
