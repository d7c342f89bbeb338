"""Whether this working tree gives the losses of another revision, digit for digit.

    python benchmarks/compare_losses.py 61e295c

Runs short jobs in fp32 under a fixed seed in both: the digits recipe, a ResNet, the recipe on two
ranks, then the probe and fine-tuning, once per epoch with mixup, once per iteration with layer-wise
decay, of what the first one left. Prints for each the number of steps, and whether all that both
log.jsonl have is identical.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = "--device cpu --amp off --workers 1 --print-freq 1".split()
EVERY = "--knn-every 1 --warmup-epochs 1".split()
DIGITS = ["main_moco.py", "@recipes/digits.txt", "--epochs", "2", *EVERY]
RESNET = [
    *"main_moco.py digits -a resnet18 --small-stem --img-size 16 --batch-size 128".split(),
    *"--epochs 1 --lr 0.3 --moco-mlp-dim 256 --moco-m-cos".split(),
    *EVERY,
]
PROBE = ["main_lincls.py", "@recipes/lincls_digits.txt", "--epochs", "2", "--lr", "0.3", "1"]
FINETUNE = ["main_finetune.py", "@recipes/finetune_digits.txt", "--epochs", "3"]
PER_EPOCH = "--lr-per epoch --mixup 0.8 --drop-path 0.1 --aa rand-m9-mstd0.5-inc1".split()
PER_ITERATION = "--lr-per iteration --layer-decay 0.75 --ema 0.9".split()
JOBS = {  # name: number of processes, command; CKPT is the checkpoint of the first job
    "digits": (1, DIGITS),
    "resnet18": (1, RESNET),
    "digits, two ranks": (2, DIGITS),
    "probe": (1, [*PROBE, "--pretrained", "CKPT"]),
    "fine-tuning per epoch": (1, [*FINETUNE, *PER_EPOCH, "--pretrained", "CKPT"]),
    "fine-tuning per iteration": (1, [*FINETUNE, *PER_ITERATION, "--pretrained", "CKPT"]),
}
NOT_COMPARED = ("images_per_s", "data_wait", "seconds_left", "mfu", "peak_gib", "epoch")


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
    logs = [run(name, checkout, folder / f"side{i}") for i, checkout in enumerate((ROOT, other))]
    same = len(logs[0]) == len(logs[1])
    for ours, theirs in zip(*logs):
        shared = ours.keys() & theirs.keys() - set(NOT_COMPARED)
        same = same and "step" in shared and all(ours[key] == theirs[key] for key in shared)
    steps = max(line["step"] for line in logs[0])
    print(f"{name}: {steps} steps, {'identical' if same else 'DIFFERENT'}", flush=True)
    return same


def run(name, checkout, folder):
    """log.jsonl of a job: a list of dicts."""
    num_ranks, command = JOBS[name]
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    checkpoint, output_dir = folder / "digits" / "checkpoint.pth", folder / name
    words = [str(checkpoint) if word == "CKPT" else word for word in command]
    command = [*launcher, *words, *COMMON, "--output-dir", str(output_dir)]
    subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="git revision to compare with")
    main(parser.parse_args())
