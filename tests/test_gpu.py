"""What only NVIDIA GPUs can show: NCCL, waits for the device, memory. Two GPUs where there are two.

test_augmentation.py has the parity of the augmentation.
"""

import os
import signal
import time

import pytest
import torch
from conftest import ROOT, launch, start, wait_for_all

import main_moco
from engine import launch as engine_launch
from engine.log import read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NUM_GPUS = min(2, torch.cuda.device_count())
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="one GPU")
DIGITS = f"@{ROOT}/recipes/digits.txt"
VIT = [DIGITS, "-a", "vit_nano", "--device", "cuda", "--knn-every", 0, "--moco-mlp-dim", 8]
VIT += ["--epochs", 1, "--warmup-epochs", 0, "--print-freq", 1, "--amp", "off"]
RESNET = [*VIT, "-a", "resnet18", "--small-stem", "--optimizer", "lars", "--lr", 0.3]


def losses(processes, folder, *args):
    done = launch(processes, "main_moco.py", *args, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    lines = read_log(folder / "log.jsonl")  # without labels RankMe has lines, too
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_vit_base_trains_through_nccl(tmp_path, image_file, amp):
    for i in range(48):
        image_file(f"images/{i}.jpg", height=256, width=300)
    values = losses(
        NUM_GPUS, tmp_path / "run", f"@{ROOT}/recipes/vit_base_300.txt", tmp_path / "images",
        "--amp", amp, "--batch-size", 16, "--epochs", 1, "--warmup-epochs", 1, "--print-freq", 1,
    )  # fmt: skip
    lines = read_log(tmp_path / "run" / "log.jsonl")
    chance = next(line["chance"] for line in lines if "chance" in line)
    assert len(values) == 3 and values[0] == pytest.approx(chance, rel=0.1)


@two_gpus
@pytest.mark.parametrize("flags", [VIT, RESNET], ids=["vit", "resnet"])
def test_two_gpus_equal_one(tmp_path, flags):
    one, two = (losses(n, tmp_path / str(n), *flags) for n in (1, 2))
    torch.testing.assert_close(one[:5], two[:5], rtol=1e-4, atol=1e-4)  # then rounding grows


@pytest.mark.parametrize("flags", [["--encode-chunk", 16], ["--compile"]], ids=["chunk", "compile"])
def test_chunks_and_compilation_change_nothing(tmp_path, flags):
    plain = losses(NUM_GPUS, tmp_path / "plain", *VIT)
    other = losses(NUM_GPUS, tmp_path / "other", *VIT, *flags)
    torch.testing.assert_close(plain[:5], other[:5], rtol=1e-4, atol=1e-4)


def test_sigterm_saves_on_all_processes(tmp_path):
    children = start(
        NUM_GPUS, tmp_path, "main_moco.py", *VIT, "--epochs", 1000, "--output-dir", tmp_path / "run"
    )
    deadline = time.monotonic() + 200
    while len(read_log(tmp_path / "run" / "log.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(children[-1].pid, signal.SIGTERM)
    assert wait_for_all(children, timeout=100) == [75] * NUM_GPUS
    assert (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.parametrize("flags", [[], ["--encode-chunk", 8]], ids=["whole", "chunks"])
def test_a_step_never_waits_for_the_device(monkeypatch, tmp_path, flags):
    """From the second step on: the first one copies constants."""
    optimizer_step = main_moco.optimizer_step
    count = 0

    def watched(*args):
        nonlocal count
        count += 1
        result = optimizer_step(*args)
        if count == 2:
            torch.cuda.set_sync_debug_mode("error")
        elif count == 5:
            torch.cuda.set_sync_debug_mode("default")
        return result

    monkeypatch.setattr(main_moco, "optimizer_step", watched)
    argv = [*VIT, "--amp", "bf16", "--print-freq", 1000, *flags, "--output-dir", tmp_path]
    try:
        main_moco.main(main_moco.parse_args([str(arg) for arg in argv]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count > 5


def test_nccl_waits_longer_than_gloo(monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    env = engine_launch.init_distributed("cuda", timeout=60)
    group = torch.distributed.group.WORLD
    backends = [group._get_backend(device) for device in (torch.device("cpu"), env.device)]
    limits = [backend.options._timeout.total_seconds() for backend in backends]
    engine_launch.destroy_process_group()
    assert limits == [60, 120]


def test_digits_recipe_learns(script, tmp_path):
    code, _, err = script("main_moco.py", DIGITS, "--device", "cuda", "--output-dir", tmp_path)
    assert code == 0, err
    assert [line["knn"] for line in read_log(tmp_path / "log.jsonl") if "knn" in line][-1] >= 95


@pytest.mark.parametrize("name", ["main_lincls.py", "main_finetune.py"])
def test_probe_and_fine_tuning_run_through_nccl(tmp_path, pretrained, name):
    argv = ["digits", "--pretrained", pretrained, "-b", 256, "--epochs", 5]
    argv += ["--warmup-epochs", 1] if name == "main_finetune.py" else []
    done = launch(NUM_GPUS, name, *argv, "--device", "cuda", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl") if "acc1" in line][-1] == 25
