"""Several processes: who waits for whom, and who prints."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import on_two_ranks

from engine import launch


def work_longer_than_the_timeout(rank):
    gloo = dist.group.WORLD._get_backend(torch.device("cpu"))
    set_timeout = getattr(gloo, "set_timeout", None) or gloo._set_default_timeout  # old torch
    set_timeout(timedelta(seconds=1))
    assert launch.on_rank0(lambda: time.sleep(2.5) or "listed") == "listed"
    assert launch.rank0_first(lambda download: time.sleep(1.5) or rank) == rank


def test_ranks_wait_for_one_that_works_longer_than_the_timeout():
    on_two_ranks(work_longer_than_the_timeout)


def refuse_on_some_ranks(rank):
    if rank == 1:
        assert launch.is_first_to_print("rank 1 alone has this reason")
    printed = torch.tensor(int(launch.is_first_to_print("both have this one")))
    assert launch.all_reduce_sum(printed) == 1


def test_a_refusal_is_printed_once_whichever_rank_has_it():
    on_two_ranks(refuse_on_some_ranks)


def test_a_shell_within_srun_is_one_process(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(launch.UserError, match="start the script with torchrun, too"):
        launch.check_launcher()
    monkeypatch.setenv("SLURM_PTY_PORT", "40000")
    launch.check_launcher()
