"""Devices, precision, collectives and BatchNorm, alone and on two gloo processes."""

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moco import UserError, distributed
from moco.distributed import ViewBatchNorm, check_agreement, gather, synchronize_batchnorm

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "amp, native, expected",
    [("auto", True, torch.bfloat16), ("auto", False, None), ("off", True, None)],
)
def test_precision_on_a_cpu(monkeypatch, amp, native, expected):
    monkeypatch.setattr(distributed, "_cpu_computes_bf16", lambda: native)
    assert distributed.set_up("cpu", amp) == (CPU, expected)


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_precision_on_new_and_old_gpus(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert distributed._amp_dtype("auto", torch.device("cuda", 0)) == expected


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU"):
        distributed.set_up("cuda")
    with pytest.raises(UserError, match="--amp fp16 needs a CUDA GPU"):
        distributed.set_up("cpu", "fp16")


def test_more_processes_than_gpus_are_refused_on_every_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="--nproc_per_node=4"):
        distributed.set_up("cuda")


def two_ranks(rank, check, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    check(rank)
    distributed.leave()


def on_two_ranks(check):
    """Runs check(rank) in two gloo processes; the first failure is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, (check, port), nprocs=2)


def batchnorm(rank):
    """Head and image BatchNorm of two ranks against torch's own on the whole batch."""
    for make, shape, views in (
        (lambda: (ViewBatchNorm(5), nn.BatchNorm1d(5)), (2, 8, 5), 2),
        (lambda: (ViewBatchNorm(5, affine=False), nn.BatchNorm1d(5, affine=False)), (2, 8, 5), 2),
        (lambda: (synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(5)), CPU), nn.BatchNorm2d(5)),
         (8, 5, 3, 2), 1),
    ):  # fmt: skip
        ours, theirs = (m.double() for m in make())
        whole = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(shape, dtype=torch.float64)
        axis = views - 1  # of the batch
        mine = whole.detach().chunk(2, axis)[rank].clone().requires_grad_()
        found = ours(mine)
        expected = torch.stack([theirs(v) for v in whole]) if views == 2 else theirs(whole)
        torch.testing.assert_close(found, expected.chunk(2, axis)[rank])

        (found * weight.chunk(2, axis)[rank]).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(mine.grad, whole.grad.chunk(2, axis)[rank])
        buffers = dict(theirs.named_buffers())
        for name, value in ours.named_buffers():
            torch.testing.assert_close(value, buffers[name.split(".")[-1]])


def agreement(rank):
    assert torch.equal(gather(torch.tensor([rank])), torch.tensor([[0], [1]]))
    check_agreement(CPU, images=5, epoch=2)
    with pytest.raises(UserError, match=r"disagree about epoch: \[0, 1\]"):
        check_agreement(CPU, images=5, epoch=rank)


def both(rank):
    batchnorm(rank)
    agreement(rank)


def test_batchnorm_and_gather_on_two_ranks_equal_the_whole_batch():
    on_two_ranks(both)
