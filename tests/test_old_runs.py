"""Runs that an older version left, whose names in checkpoints and logs were others, still work.

tests/data/ has a run of each script on the digits, stopped after step 7 of 10: its checkpoint and
log. uninterrupted.json has the lines of runs that were not stopped, written by the same version.
The backbone is a vit_nano of one block with 16 channels, so that the files are small.
"""

import json
import shutil

import pytest
import torch
from conftest import ROOT

import vits
from engine import checkpoint
from engine.log import read_log
from engine.plots import collect_curves, plot_curves

DATA = ROOT / "tests" / "data"
COMMON = (
    "digits --batch-size 256 --epochs 2 --workers 0 --device cpu --amp off --print-freq 2 "
    "--save-minutes 1e-6 --resume auto"
)
PRETRAINED = "--pretrained pretraining/checkpoint.pth"
RUNS = {
    "pretraining": (
        "main_moco.py",
        "-a vit_nano --img-size 16 --patch-size 8 --optimizer adamw --lr 1e-3 --warmup-epochs 1 "
        "--moco-dim 8 --moco-mlp-dim 16 --moco-t 0.2 --moco-m-cos --knn-every 1",
    ),
    "probe": ("main_lincls.py", f"{PRETRAINED} --lr 0.1 1"),
    "finetuning": (
        "main_finetune.py",
        f"{PRETRAINED} --warmup-epochs 1 --ema 0.7 --lr-per iteration --layer-decay 0.8 --lr 1e-3",
    ),
}
NEW_KEYS = {
    "spread": "feature_std",
    **{f"lr {lr}": f"lr/{lr}" for lr in ("0.1", "1")},
    **{f"{name} lr {lr}": f"{name}/lr{lr}" for name in ("acc1", "acc5") for lr in ("0.1", "1")},
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A copy of the runs, in the current folder."""
    monkeypatch.setitem(vits.VITS, "vit_nano", dict(embed_dim=16, depth=1, num_heads=2))
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("job", RUNS)
def test_it_continues_with_the_losses_of_the_uninterrupted_run(script, runs, job):
    name, flags = RUNS[job]
    code, out, err = script(name, *COMMON.split(), *flags.split(), "--output-dir", job)
    assert code == 0 and "resumed after step 7 of 10" in out, err
    lines = read_log(runs / job / "log.jsonl")
    expected = json.loads((runs / "uninterrupted.json").read_text())[job]
    assert len(lines) == len(expected)
    for line, old in zip(lines, expected):
        if line["step"] > 7:
            old = {NEW_KEYS.get(key, key): value for key, value in old.items()}
        assert {key: line[key] for key in old} == pytest.approx(old, rel=1e-3)
    assert checkpoint.load(runs / job / "checkpoint.pth")["iteration"] == 10


def test_its_log_is_plotted(runs):
    folders = [runs / job for job in RUNS]
    plot_curves(*folders, out=runs / "curves.png")
    assert (runs / "curves.png").stat().st_size > 10_000
    curves = collect_curves([read_log(folder / "log.jsonl") for folder in folders])
    assert [epoch for epoch, _ in curves["feature_std"]["feature_std", 0]] == [0.4, 0.8, 1, 1.2]
    assert {key for key, _ in curves["acc1"]} == {"acc1 lr 0.1", "acc1 lr 1", "acc1"}
    assert {key for key, _ in curves["lr"]} == {"lr 0.1", "lr 1", "lr"}


def test_its_classifier_is_evaluated_and_lacks_class_names(script, runs):
    argv = ("digits", "--pretrained", "probe/linear_lr1.pth", "--evaluate", "--workers", 0)
    code, out, err = script("main_lincls.py", *argv, "--device", "cpu", "--amp", "off")
    assert code == 0, err
    assert out.count("states no class names") == 1
    expected = json.loads((runs / "uninterrupted.json").read_text())["probe"][-1]["acc1 lr 1"]
    assert f"top-1 {expected:.2f} %" in out


def test_other_weights_are_not_taken_for_the_pretrained_ones(script, runs):
    state = torch.load("probe/checkpoint.pth", weights_only=True)
    assert state["args"]["pretrained"] == "pretraining/checkpoint.pth"
    shutil.copy("pretraining/checkpoint.pth", "other.pth")
    argv = (*COMMON.split(), "--pretrained", "other.pth", "--lr", 0.1, 1, "--output-dir", "probe")
    code, _, err = script("main_lincls.py", *argv)
    assert code == 2 and "--pretrained pretraining/checkpoint.pth → other.pth" in err
