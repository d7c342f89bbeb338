"""Each benchmark runs, and what it compares agrees."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launch

import main_moco

sys.path.insert(0, str(ROOT / "benchmarks"))

import step


@pytest.mark.parametrize("name", ["attention", "loader", "memory", "probe"])
def test_a_benchmark_runs(name):
    done = launch(1, f"benchmarks/{name}.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == f"python benchmarks/{name}.py --quick"


def test_the_fast_step_loses_as_the_plain_one(monkeypatch):
    """Ten steps in float64: in fp32 a ReLU that rounding switches moves the last ones by 1e-4."""
    augment = main_moco.augment
    monkeypatch.setattr(main_moco, "augment", lambda *args: augment(*args).double())
    args = SimpleNamespace(arch="vit_tiny", batch_size=8, img_size=32, optimizer="adamw",
                           compile=False, encode_chunk=0)  # fmt: skip
    losses = []
    for side in (step.Side, step.PlainSide):
        trained = side(args, torch.device("cpu"), None)
        trained.model.double()
        losses.append([trained.run() for _ in range(10)])
    fast, plain = losses
    assert fast == pytest.approx(plain, rel=1e-8) and fast[-1] < fast[0] / 2


def test_step_measures_both_sides():
    done = launch(1, "benchmarks/step.py", "--quick", "--plain", "--amp", "off", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    fast, plain = (report[side]["losses_of_10_steps"] for side in ("fast", "plain"))
    assert fast[:2] == pytest.approx(plain[:2], rel=1e-4)
    assert set(report["fast"]["milliseconds_of_parts"]) == {
        "augment", "encode", "gather", "heads and loss", "backward", "optimizer", "momentum update",
    }  # fmt: skip
