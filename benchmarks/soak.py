"""Memory and open files of a long run: 500 epochs of a tiny one, looked at from outside.

    python benchmarks/soak.py --out benchmarks/results/soak.json
    python benchmarks/soak.py --quick
main_moco.py on the digits with two workers, a checkpoint after every epoch and kNN after every
tenth. In MiB the proportional set sizes (memory that processes share counts once) of the script
and its workers together, with the open files and threads of all; first is after a tenth of the run,
when everything has happened once.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
import torch

from engine.log import read_log

SCRIPT = Path(__file__).parents[1] / "main_moco.py"
FLAGS = (
    "digits -a vit_nano --img-size 16 --patch-size 4 --batch-size 256 --optimizer adamw --lr 1e-3 "
    "--moco-dim 32 --moco-mlp-dim 64 --moco-t .2 --knn-every 10 --workers 2 --device cpu"
).split()


def main():
    args = report.parser(__doc__).parse_args()
    epochs = 8 if args.quick else 500
    with tempfile.TemporaryDirectory() as folder:
        flags = [*FLAGS, "--epochs", str(epochs), "--warmup-epochs", "1", "--output-dir", folder]
        run = subprocess.Popen([sys.executable, SCRIPT, *flags], stdout=subprocess.DEVNULL)
        seen = {}  # epoch → MiB, files, threads
        while run.poll() is None:
            lines, used = read_log(Path(folder, "log.jsonl")), resources_of(run.pid)
            if lines and used is not None:
                seen[int(lines[-1]["epoch"])] = used
            time.sleep(0.1 if args.quick else 0.5)
        if run.returncode:
            sys.exit(run.returncode)

    settled = {epoch: used for epoch, used in seen.items() if epochs / 10 <= epoch < epochs}
    table = {}
    for name, values in zip(("mebibytes", "open_files", "threads"), zip(*settled.values())):
        tenth = max(1, len(values) // 10)
        table[name] = dict(
            first=statistics.median(values[:tenth]),
            last=statistics.median(values[-tenth:]),
            most=max(values),
        )
    report.finish(args, torch.device("cpu"), epochs=epochs, samples=len(settled), **table)


def resources_of(pid):
    """Of a process and its children: MiB, open files, threads; None if one has just ended."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        mib = files = threads = 0
        for number in (pid, *listed):
            process = Path(f"/proc/{number}")
            rollup = (process / "smaps_rollup").read_text().split("Pss:")[1].split()[0]
            mib += int(rollup) / 1024
            files += len(list((process / "fd").iterdir()))
            threads += len(list((process / "task").iterdir()))
        return round(mib, 1), files, threads
    except (OSError, IndexError):
        return None


if __name__ == "__main__":
    main()
