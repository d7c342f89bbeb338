"""Device, precision, collectives and BatchNorm, in one process and in two that use gloo."""

import pytest
import torch
import torch.distributed as dist
from conftest import ENV, on_two_ranks
from torch import nn

from engine import launch
from engine.errors import UserError
from engine.launch import Env, all_reduce_max, check_same_on_all_ranks, init_distributed
from moco.batchnorm import ViewBatchNorm
from moco.distributed import all_gather


@pytest.mark.parametrize(
    "amp, native, expected",
    [("auto", True, torch.bfloat16), ("auto", False, None), ("off", True, None)],
)
def test_precision_on_a_cpu(monkeypatch, amp, native, expected):
    monkeypatch.setattr(launch, "_cpu_computes_bf16", lambda: native)
    assert init_distributed("cpu", amp) == Env(ENV.device, expected)


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_precision_on_new_and_old_gpus(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert launch.choose_amp_dtype("auto", torch.device("cuda", 0)) == expected


@pytest.mark.parametrize("amp, allowed", [("off", False), ("bf16", True)])
def test_float32_on_a_gpu_is_not_tf32(monkeypatch, amp, allowed):
    monkeypatch.setattr(launch, "choose_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    matmul_before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    init_distributed("cuda", amp)
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_before)
    assert (torch.backends.cudnn.allow_tf32, matmul == "high") == (allowed, allowed)


def test_missing_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU"):
        init_distributed("cuda")
    with pytest.raises(UserError, match="--amp fp16 needs a CUDA GPU"):
        init_distributed("cpu", "fp16")


def test_more_processes_than_gpus_are_refused_on_every_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="--nproc_per_node=4"):
        init_distributed("cuda")


def check_batchnorm(rank):
    """BatchNorm of the heads and of images on two ranks, and torch's own on the whole batch."""
    for make, shape, views in (
        (lambda: (ViewBatchNorm(5), nn.BatchNorm1d(5)), (2, 8, 5), 2),
        (lambda: (ViewBatchNorm(5, affine=False), nn.BatchNorm1d(5, affine=False)), (2, 8, 5), 2),
        (
            lambda: (ENV.sync_batchnorm(nn.Sequential(nn.BatchNorm2d(5))), nn.BatchNorm2d(5)),
            (8, 5, 3, 2),
            1,
        ),
    ):
        ours, theirs = (m.double() for m in make())
        whole = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(shape, dtype=torch.float64)
        batch_dim = views - 1
        half = whole.detach().chunk(2, batch_dim)[rank].clone().requires_grad_()
        result = ours(half)
        expected = torch.stack([theirs(v) for v in whole]) if views == 2 else theirs(whole)
        torch.testing.assert_close(result, expected.chunk(2, batch_dim)[rank])

        (result * weight.chunk(2, batch_dim)[rank]).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(half.grad, whole.grad.chunk(2, batch_dim)[rank])
        buffers = dict(theirs.named_buffers())
        for name, value in ours.named_buffers():
            torch.testing.assert_close(value, buffers[name.split(".")[-1]])


def check_collectives(rank):
    assert torch.equal(all_gather(torch.tensor([rank])), torch.tensor([[0], [1]]))
    assert all_reduce_max(rank, 3 - rank) == [1, 3] and all_reduce_max(rank) == 1
    assert launch.all_reduce_sum(torch.tensor(rank + 1.0)) == 3
    assert launch.all_reduce_mean(torch.tensor(rank + 1.0)) == 1.5
    assert launch.all_gather_object({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    check_same_on_all_ranks({"images": 5, "epoch": 2}, "look")
    with pytest.raises(UserError, match="disagree about epoch: 0 and 1; look"):
        check_same_on_all_ranks({"images": 5, "epoch": rank}, "look")

    def refuse():
        raise UserError(f"nothing on rank {rank}")

    assert launch.on_rank0(lambda: [rank]) == [0]
    with pytest.raises(UserError, match="nothing on rank 0"):
        launch.on_rank0(refuse)
    order = []
    launch.rank0_first(lambda download: order.append(download))
    assert order == [rank == 0]
    with pytest.raises(UserError, match="nothing on rank 0"):
        launch.rank0_first(lambda download: refuse())


def check_both(rank):
    check_batchnorm(rank)
    check_collectives(rank)


def test_batchnorm_and_collectives_on_two_ranks_equal_the_whole_batch():
    on_two_ranks(check_both)


def test_one_process_needs_no_group():
    x = torch.randn(3)
    assert torch.equal(all_gather(x), x[None])
    assert all_reduce_max(4) == 4 and all_reduce_max(4, 5) == [4, 5]
    assert launch.all_gather_object("x") == ["x"]
    check_same_on_all_ranks({"images": 5}, "")


def test_a_restart_forgets_that_nccl_failed():
    """NCCL's watchdog tells all processes to end by a key, which torchrun's store keeps."""
    store = dist.HashStore()
    store.set("exception_dump", "1")
    launch._store_of_this_restart(dist.PrefixStore("a", dist.PrefixStore("b", store)), 0, 1, 60)
    assert not store.check(["exception_dump"])
