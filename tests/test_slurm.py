"""recipes/slurm.sh: checked as a script, and run where srun and scontrol are two stand-ins."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from moco.log import read_rows

SCRIPT = ROOT / "recipes" / "slurm.sh"
# srun of two nodes: what follows its own flag, twice, side by side, and the worse exit code.
SRUN = """
[[ $1 == --cpus-per-task=3 ]] || exit 9
shift
"$@" & first=$!
"$@"
second=$?
wait $first || exit 1
exit $second
"""
SCONTROL = "echo localhost\necho localhost\n"
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


def sbatch(folder, *args):
    """What a batch step sees on the first of two nodes with one GPU each."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = folder / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)
    job = dict(SLURM_JOB_ID=str(random.randrange(10**6)), SLURM_JOB_NUM_NODES="2",
               SLURM_JOB_NODELIST="node[1-2]", SLURM_GPUS_ON_NODE="1",
               SLURM_CPUS_PER_TASK="3")  # fmt: skip
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, **job, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", SCRIPT, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_two_nodes_train_together(tmp_path):
    run = tmp_path / "run"
    done = sbatch(tmp_path, "main_moco.py", *TINY, "--epochs", 1, "--knn-every", 0,
                  "--output-dir", run)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 node(s): localhost localhost" in done.stdout and "2 process(es)" in done.stdout
    assert len([row for row in read_rows(run / "log.jsonl") if "loss" in row]) == 5


def test_without_a_script_it_says_how(tmp_path):
    done = sbatch(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch recipes/slurm.sh")


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    assert subprocess.run([shellcheck, SCRIPT]).returncode == 0
