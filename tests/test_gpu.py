"""What only NVIDIA GPUs can show: NCCL, waits for the device, memory. Two GPUs where there are two.

test_augmentation.py has the parity of the augmentation.
"""

import os
import signal
import time

import pytest
import torch
import torch._dynamo
from conftest import ROOT, interrupted_after_saving, launch, start, wait_for_all

import main_moco
import vits
from engine import launch as engine_launch
from engine.log import read_log
from moco import MoCo, create_optimizer, optimizer_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NUM_GPUS = min(2, torch.cuda.device_count())
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="one GPU")
DIGITS = f"@{ROOT}/recipes/digits.txt"
VIT = [DIGITS, "-a", "vit_nano", "--device", "cuda", "--knn-every", 0, "--moco-mlp-dim", 8]
VIT += ["--epochs", 1, "--warmup-epochs", 0, "--print-freq", 1, "--amp", "off"]
CHUNKS, COMPILED = dict(encode_chunk=16), dict(compile=True)
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
    """Loss and gradients of the first step. Then AdamW makes whole steps of the signs of gradients
    that are zero but for rounding, and the runs part."""
    keys = "loss", "grad_l2/first", "grad_l2/last"
    lines = []
    for n in (1, 2):
        losses(n, tmp_path / str(n), *flags)
        line = read_log(tmp_path / str(n) / "log.jsonl")[0]
        lines.append([line[key] for key in keys])
    # A ReLU of the ResNet that rounding switches moves a gradient by 1e-4.
    assert lines[0] == pytest.approx(lines[1], rel=1e-3)


def first_step(**options):
    """A ViT's first loss and gradient in float32, without TF32."""
    env = engine_launch.init_distributed("cuda", "off")
    torch.manual_seed(0)
    backbone = vits.vit_nano(img_size=32, patch_size=4)
    model = MoCo(backbone, dim=64, mlp_dim=256, T=0.2, **options).to(env.device)
    x1, x2 = torch.randn(2, 64, 3, 32, 32).to(env.device)
    loss, _ = model(x1, x2)
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return loss.item(), torch.cat(grads)


@pytest.mark.parametrize("options", [CHUNKS, COMPILED, CHUNKS | COMPILED], ids=str)
def test_chunks_and_compilation_change_nothing(options):
    """But the order of sums. On a CPU that moves the loss by 1e-7 of it and the gradient by 4e-6,
    and rounding the patch projection's inputs to TF32 by 5e-6 and 1.5e-2."""
    loss, grads = first_step()
    other_loss, other_grads = first_step(**options)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert (other_grads - grads).norm() < 1e-4 * grads.norm()


def test_a_compiled_vit_has_two_graphs_and_compiles_none_after_the_first_step():
    """One for the blocks of each encoder, with gradients and without."""
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    model = MoCo(vits.vit_nano(img_size=32), dim=64, mlp_dim=256, compile=True).cuda()
    optimizer, graphs = create_optimizer("adamw", model, 1e-3, 0.1), []
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model(*torch.randn(2, 64, 3, 32, 32, device="cuda"))
        optimizer_step(loss, optimizer)
        model.update_momentum_encoder(0.99)
        graphs.append(counts["unique_graphs"])
    assert graphs == [2] * 4


def test_a_compiled_run_is_resumed(script, tmp_path):
    argv = "main_moco.py", *VIT, "--compile", "--epochs", 2, "--output-dir", tmp_path
    with interrupted_after_saving():
        code, _, err = script(*argv)
    assert code == 130, err
    state_dict = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["state_dict"]
    assert "module.base_encoder.blocks.0.norm1.weight" in state_dict
    code, _, err = script(*argv, "--resume", "auto")
    assert code == 0, err
    assert read_log(tmp_path / "log.jsonl")[-1]["epoch"] == 2


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


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
@pytest.mark.parametrize("chunk", [0, 8])
def test_a_step_never_waits_for_the_device(monkeypatch, tmp_path, chunk, compiled):
    """From the second step on: the first one copies constants, and compiles."""
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
    argv = [*VIT, "--amp", "bf16", "--print-freq", 1000, "--encode-chunk", chunk, compiled]
    argv += ["--output-dir", tmp_path]
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
