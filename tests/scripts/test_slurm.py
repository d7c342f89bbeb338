"""recipes/slurm.sh: checked as a script, and run with two stand-ins for srun and scontrol."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from engine.log import read_log

SCRIPT = ROOT / "recipes" / "slurm.sh"
# srun of two nodes: what follows its own flag, twice, side by side, and the worse exit code.
SRUN = """
[[ "$1 $2" == "--kill-on-bad-exit=1 --cpus-per-task=3" ]] || exit 9
shift 2
((SLURM_JOB_NUM_NODES == 2)) || exec "$@"
"$@" & first=$!
"$@"
second=$?
wait $first || exit 1
exit $second
"""
SCONTROL = """
case $1 in
    requeue) echo "queued again: $2" ;;
    show) for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do echo localhost; done ;;
esac
"""
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


def sbatch(folder, *args, nodes=2):
    """The batch step on the first of so many nodes with one GPU each, as it starts."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = folder / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)
    job = dict(SLURM_JOB_ID=str(random.randrange(10**6)), SLURM_JOB_NUM_NODES=str(nodes),
               SLURM_JOB_NODELIST="node[1-2]", SLURM_GPUS_ON_NODE="1",
               SLURM_CPUS_PER_TASK="3")  # fmt: skip
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, **job, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", SCRIPT, *map(str, args)], cwd=ROOT, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_nodes_train_together(tmp_path):
    run = tmp_path / "run"
    job = sbatch(tmp_path, "main_moco.py", *TINY, "--epochs", 1, "--knn-every", 0,
                 "--output-dir", run)  # fmt: skip
    said, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert "2 node(s): localhost localhost" in said and "2 process(es)" in said
    assert len([line for line in read_log(run / "log.jsonl") if "loss" in line]) == 5


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_saved_and_queued_again(tmp_path):
    run = tmp_path / "run"
    argv = ("main_moco.py", *TINY, "--batch-size", 16, "--epochs", 1, "--knn-every", 0)
    argv += ("--output-dir", run, "--resume", "auto")
    job = sbatch(tmp_path, *argv, nodes=1)
    while not read_log(run / "log.jsonl")[3:]:
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    said, errors = job.communicate(timeout=60)
    assert job.returncode != 0 and "queued again: " in said
    step = re.search(r"stopped: saved after step (\d+)", errors)[1]
    job = sbatch(tmp_path, *argv, nodes=1)
    said, errors = job.communicate(timeout=300)
    assert job.returncode == 0 and f"resumed after step {step} of 89" in said
    assert "queued again" not in said


def test_without_a_script_it_says_how(tmp_path):
    job = sbatch(tmp_path)
    assert job.communicate()[1].startswith("usage: sbatch recipes/slurm.sh")
    assert job.returncode == 2


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    assert subprocess.run([shellcheck, SCRIPT]).returncode == 0
