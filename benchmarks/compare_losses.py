"""Whether this working tree gives the losses of another revision, bit for bit, under a fixed seed.

    python benchmarks/compare_losses.py 61e295c

Runs three short jobs in fp32 in both: the digits recipe, a ResNet, and the recipe on two ranks.
Prints for each the number of steps and whether losses, kNN, lr and m in log.jsonl are identical.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = "--device cpu --amp off --workers 1 --print-freq 1 --knn-every 1 --warmup-epochs 1".split()
DIGITS = ["@recipes/digits.txt", *COMMON, "--epochs", "2"]
RESNET = [
    *"digits -a resnet18 --small-stem --img-size 16 --batch-size 128 --epochs 1 --lr 0.3".split(),
    *"--moco-mlp-dim 256 --moco-m-cos".split(),
    *COMMON,
]
JOBS = {"digits": (1, DIGITS), "resnet18": (1, RESNET), "digits, two ranks": (2, DIGITS)}
COMPARED = ("step", "loss", "top1", "knn", "lr", "m")


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "other")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(other), args.revision], check=True)
        try:
            same = [compare(name, other, Path(folder)) for name in JOBS]
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
    sys.exit(0 if all(same) else 1)


def compare(name, other, folder):
    logs = [run(name, checkout, folder / f"{name} {i}") for i, checkout in enumerate((ROOT, other))]
    same = logs[0] == logs[1]
    steps = max(line["step"] for line in logs[0])
    print(f"{name}: {steps} steps, {'identical' if same else 'DIFFERENT'}", flush=True)
    return same


def run(name, checkout, output_dir):
    """log.jsonl of a job, reduced to what is compared."""
    num_ranks, flags = JOBS[name]
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    command = [*launcher, "main_moco.py", *flags, "--output-dir", str(output_dir)]
    subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (output_dir / "log.jsonl").read_text().splitlines())
    return [{key: line[key] for key in COMPARED if key in line} for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="git revision to compare with")
    main(parser.parse_args())
