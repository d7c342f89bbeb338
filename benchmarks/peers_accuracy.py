"""Accuracy beside other libraries' MoCo v3: the same budget, in the same loop, over seeds.

    pip install lightly stable-pretraining
    export OMP_NUM_THREADS=1
    python benchmarks/peers_accuracy.py --out benchmarks/results/peers_accuracy.json
recipes/NAME.txt with the loss and heads of each (benchmarks/other_methods.py says what is equal and
what is not), then the probe of recipes/lincls_NAME.txt: kNN and linear accuracy in percent on the
held-out images, last epoch, best learning rate of the probe. Arguments that it doesn't know go to
pre-training. Runs that are finished are kept in --runs; others continue.
"""

import statistics
from importlib import metadata
from pathlib import Path

import report  # first of ours: it makes the repository importable
import torch
from kept_runs import last_value, run_script

from engine.log import read_log

SCRIPTS = {
    "ours": ("main_moco.py",),
    "lightly": ("benchmarks/other_methods.py", "lightly"),
    "stable-pretraining": ("benchmarks/other_methods.py", "stable-pretraining"),
}


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--name", choices=("digits", "fashion_mnist"), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--data-root", default="data", help="where fashion_mnist is")
    parser.add_argument("--runs", default="runs/peers_accuracy", metavar="DIR")
    args, extra = parser.parse_known_args()
    probe_flags = ["--epochs", "1"] if args.quick else []
    if args.quick:
        extra += ["--epochs", "1", "--warmup-epochs", "0"]
    results = {name: {"version": version(name), "runs": []} for name in args.methods}
    for seed in args.seeds:
        for name in args.methods:
            folder = Path(args.runs, args.name, f"{name}_seed{seed}").resolve()
            results[name]["runs"].append(train(folder, args, name, seed, extra, probe_flags))
            results[name]["mean"] = mean(results[name]["runs"])
            report.save(args, torch.device("cpu"), results=results)  # what a stopped run has
    report.finish(args, torch.device("cpu"), results=results)


def train(folder, args, name, seed, extra, probe_flags):
    """Pre-training and probe → their accuracies in percent."""
    shared = "--seed", seed, "--data-root", args.data_root
    script, *method = SCRIPTS[name]
    flags = [*method, f"@recipes/{args.name}.txt", *extra, *shared]
    run_script(folder / "pretrain", torch.get_num_threads(), script, *flags)
    knn = [line["knn"] for line in read_log(folder / "pretrain" / "log.jsonl") if "knn" in line]

    flags = [f"@recipes/lincls_{args.name}.txt", *probe_flags, *shared]
    flags += ["--pretrained", folder / "pretrain" / "checkpoint.pth"]
    run_script(folder / "lincls", torch.get_num_threads(), "main_lincls.py", *flags)
    linear = last_value(read_log(folder / "lincls" / "log.jsonl"), "acc1")
    return dict(seed=seed, knn_before=knn[0], knn=knn[-1], linear=linear)


def mean(runs):
    values = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key != "seed"}
    return {key: round(value, 2) for key, value in values.items()}


def version(name):
    return None if name == "ours" else metadata.version(name)


if __name__ == "__main__":
    main()
