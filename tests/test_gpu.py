"""What only an NVIDIA GPU can show. test_augmentation.py has the parity of the augmentation."""

import pytest
import torch
from conftest import ROOT, launch

from engine.log import read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_vit_base_trains_through_nccl(tmp_path, image_file, amp):
    for i in range(48):
        image_file(f"images/{i}.jpg", height=256, width=300)
    done = launch(
        1, "main_moco.py", f"@{ROOT}/recipes/vit_base_300.txt", tmp_path / "images", "--amp", amp,
        "--batch-size", 16, "--epochs", 1, "--warmup-epochs", 1, "--print-freq", 1,
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert len(lines) == 3
    assert lines[0]["loss"] == pytest.approx(lines[0]["chance"], rel=0.1)


def test_digits_recipe_learns(script, tmp_path):
    recipe = f"@{ROOT}/recipes/digits.txt"
    code, _, err = script("main_moco.py", recipe, "--device", "cuda", "--output-dir", tmp_path)
    assert code == 0, err
    assert [line["knn"] for line in read_log(tmp_path / "log.jsonl") if "knn" in line][-1] >= 95


@pytest.mark.parametrize("name", ["main_lincls.py", "main_finetune.py"])
def test_probe_and_fine_tuning_run_through_nccl(tmp_path, pretrained, name):
    argv = ["digits", "--pretrained", pretrained, "-b", 256, "--epochs", 5]
    done = launch(1, name, *argv, "--device", "cuda", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl") if "acc1" in line][-1] == 25
