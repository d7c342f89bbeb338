"""What clusters do to a run: nothing that was computed is lost, nothing wrong is computed."""

import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from conftest import TINY, Child

from moco import checkpoint
from moco.log import read_rows

LONG = (*TINY, "--batch-size", 32, "--print-freq", 3)  # 88 steps


def weights(folder):
    return checkpoint.load(folder / checkpoint.LAST)["state_dict"]


def assert_same_run(folder, whole):
    """Weights to the last bit, and the same lines in log.jsonl but for the times."""
    expected, found = weights(whole), weights(folder)
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    rows = [read_rows(run / "log.jsonl") for run in (whole, folder)]
    for row in (*rows[0], *rows[1]):
        row.pop("images_per_s", 0), row.pop("data_wait", 0)
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing happened to; its seconds of set-up and of training."""
    folder = tmp_path_factory.mktemp("whole")
    for run in ("first", "second"):  # the first starts the server that forks
        start = time.monotonic()
        child = Child(folder, "main_moco.py", *LONG, "--output-dir", folder / run)
        wait_for_training(child)
        began = time.monotonic()
        assert child.wait() == 0, child.said()
    return folder / run, began - start, time.monotonic() - began


def wait_for_training(child):
    while "before training" not in child.said() and "resumed" not in child.said():
        assert child.wait(0.02) is None, child.said()


@pytest.mark.slow
def test_killed_20_times_it_ends_in_the_same_weights(undisturbed, tmp_path):
    whole, set_up, training = undisturbed
    rng, kills, while_saving, run = np.random.default_rng(0), 0, 0, 0
    argv = ("--save-minutes", 1e-6, "--resume", "auto")  # after every step
    while kills < 20:
        folder = tmp_path / str(run)
        folder.mkdir(exist_ok=True)
        child = Child(tmp_path, "main_moco.py", *LONG, *argv, "--output-dir", folder)
        ended = child.wait(rng.uniform(0, set_up + training / 5))
        while kills % 4 == 0 and ended is None and not (folder / "checkpoint.tmp").exists():
            ended = child.wait(0)
        if ended is None:
            os.kill(child.pid, signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
            kills += 1
            while_saving += (folder / "checkpoint.tmp").exists()
        else:
            assert child.wait() == 0, child.said()
            assert_same_run(folder, whole)
            run += 1
    child = Child(tmp_path, "main_moco.py", *LONG, *argv, "--output-dir", tmp_path / str(run))
    assert child.wait() == 0, child.said()
    assert_same_run(tmp_path / str(run), whole)
    assert while_saving > 2
    print(f"{kills} kills, {while_saving} of them while saving, {run + 1} runs")


@pytest.mark.slow
def test_terminated_10_times_it_computes_no_step_twice(undisturbed, tmp_path):
    whole, _, training = undisturbed
    rng, done = np.random.default_rng(1), 0
    argv = (*LONG, "--resume", "auto", "--output-dir", tmp_path)
    for number in [signal.SIGTERM, signal.SIGUSR1] * 5:
        child = Child(tmp_path, "main_moco.py", *argv)
        wait_for_training(child)
        time.sleep(rng.uniform(0, training / 15))
        os.kill(child.pid, number)
        assert child.wait() == 75, child.said()
        said = child.said()
        assert done == 0 or f"resumed after step {done} of 88" in said
        done, before = int(re.search(r"stopped: saved after step (\d+)", said)[1]), done
        assert done >= before
    child = Child(tmp_path, "main_moco.py", *argv)
    assert child.wait() == 0, child.said()
    assert f"resumed after step {done} of 88" in child.said() and 0 < done < 88
    assert_same_run(tmp_path, whole)
