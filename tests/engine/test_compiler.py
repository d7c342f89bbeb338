"""--compile in the scripts: when it is on, with what it goes together, and its private cache."""

import shutil
import stat

import pytest
import torch
from conftest import ENV, FP32, PROBE, TINY, launch
from torch._dynamo.utils import counters

import vits
from engine.compiler import private_cache, should_compile
from engine.data.splits import load_splits, open_source
from engine.evaluation import encode_dataset
from engine.log import read_log

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def test_vits_are_compiled_on_cuda_by_default():
    vit, other = vits.vit_nano(img_size=16), torch.nn.Linear(2, 2)
    assert should_compile(None, vit, CUDA) and not should_compile(None, vit, CPU)
    assert not should_compile(None, other, CUDA) and not should_compile(False, vit, CUDA)
    assert should_compile(True, other, CPU)


def test_compiled_code_is_kept_where_nobody_else_writes(tmp_path):
    folder = private_cache()
    assert folder == tmp_path / "torch" / "inductor"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)  # somebody could have written to it
    other = private_cache()
    assert other != folder and stat.S_IMODE(other.stat().st_mode) == 0o700


def test_a_cache_without_a_home_is_temporary(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "/proc/none")
    assert private_cache().is_dir()


@pytest.mark.parametrize("name", ["main_lincls.py", "main_finetune.py"])
def test_compile_without_training_is_refused(refusal, pretrained, name):
    message = refusal(name, "digits", "--pretrained", pretrained, "--evaluate", "--compile")
    assert "--compile is for training" in message


def test_evaluation_compiles_nothing():
    dataset = load_splits(open_source("digits")).val
    vit = vits.vit_nano(img_size=16, patch_size=8, num_classes=0).eval()
    expected, _ = encode_dataset(vit, dataset, torch.arange(9), (16, 16), 0, ENV)
    torch._dynamo.reset()
    counters.clear()
    for block in vit.blocks:
        block.compile(backend="aot_eager")
    features, _ = encode_dataset(vit, dataset, torch.arange(9), (16, 16), 0, ENV)
    assert torch.equal(features, expected) and counters["stats"]["unique_graphs"] == 0
    vit(torch.zeros(2, 3, 16, 16))
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("processes, name", [(2, "main_moco.py"), (1, "main_lincls.py")])
def test_compiled_and_eager_runs_agree(tmp_path, pretrained, processes, name):
    argv = [*TINY, *FP32, "--encode-chunk", 100, "--epochs", 1]
    if name == "main_lincls.py":
        argv = [*PROBE, "--pretrained", pretrained, "--epochs", 1, "--print-freq", 1]
    losses = []
    for flag in ("--no-compile", "--compile"):
        folder = tmp_path / flag
        done = launch(processes, name, *argv, flag, "--output-dir", folder)
        assert done.returncode == 0, done.stderr
        assert (", compiled" in done.stdout) == (flag == "--compile") and not done.stderr
        losses.append([line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line])
    assert losses[0][:4] == pytest.approx(losses[1][:4], rel=1e-4)
