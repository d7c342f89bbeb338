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


@pytest.mark.parametrize("name", ["attention", "listing", "loader", "memory", "probe", "soak"])
def test_a_benchmark_runs(name):
    done = launch(1, f"benchmarks/{name}.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == f"python benchmarks/{name}.py --quick"


@pytest.fixture
def side(monkeypatch):
    """Makes a Side in float64: in fp32 a ReLU that rounding switches moves losses by 1e-4."""
    augment = main_moco.augment
    monkeypatch.setattr(main_moco, "augment", lambda *args: augment(*args).double())

    def make(arch="vit_tiny", optimizer="adamw", **levers):
        args = SimpleNamespace(arch=arch, batch_size=8, img_size=32, optimizer=optimizer,
                               compile=False, encode_chunk=0)  # fmt: skip
        side = step.Side(args, torch.device("cpu"), None, **levers)
        side.model.double()
        return side

    return make


def test_the_fast_step_loses_as_the_plain_one(side):
    fast, plain = (
        [trained.run() for _ in range(10)]
        for trained in (side(), side(**dict.fromkeys(step.LEVERS, False)))
    )
    assert fast == pytest.approx(plain, rel=1e-8) and fast[-1] < fast[0] / 2


@pytest.mark.parametrize("arch, optimizer", [("vit_nano", "adamw"), ("resnet18", "lars")])
def test_each_lever_does_something_and_leaves_the_loss_as_it_is(side, arch, optimizer):
    fast = side(arch, optimizer)
    chosen, losses = fast.chosen(), [fast.run() for _ in range(3)]
    own = "one_pass fused_attention" if arch == "vit_nano" else "channels_last"
    shared = {"foreach_momentum", "fused_optimizer", "no_wait"}
    assert chosen.keys() == {*own.split(), *shared}
    for lever, value in chosen.items():
        other = side(arch, optimizer, **{lever: not value})
        assert [other.run() for _ in range(3)] == pytest.approx(losses, rel=1e-8), lever
        assert lever in shared or other.chosen().get(lever) != value


def test_step_measures_both_sides_and_each_lever():
    flags = "--quick --plain --levers --amp off --device cpu --encode-chunk 4".split()
    done = launch(1, "benchmarks/step.py", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    fast, plain = (report[side]["losses_of_10_steps"] for side in ("fast", "plain"))
    assert fast[:2] == pytest.approx(plain[:2], rel=1e-4)
    assert fast != plain  # rounded otherwise
    assert report["levers"].keys() == set(step.LEVERS) - {"one_pass", "channels_last", "compile"}
    assert set(report["fast"]["milliseconds_of_parts"]) == {
        "augment", "encode", "gather", "heads and loss", "backward", "optimizer", "momentum update",
    }  # fmt: skip
