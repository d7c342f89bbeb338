"""Each benchmark runs, and what it compares agrees."""

import json

import pytest
from conftest import launch


@pytest.mark.parametrize("name", ["attention", "loader", "memory", "probe"])
def test_a_benchmark_runs(name):
    done = launch(1, f"benchmarks/{name}.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == f"python benchmarks/{name}.py --quick"


def test_the_fast_step_loses_as_the_plain_one():
    done = launch(1, "benchmarks/step.py", "--quick", "--plain", "--amp", "off", "--device", "cpu",
                  "--optimizer", "lars")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    fast, plain = (report[side]["losses_of_10_steps"] for side in ("fast", "plain"))
    assert len(fast) == 10 and fast == pytest.approx(plain, rel=1e-5)
    assert set(report["fast"]["milliseconds_of_parts"]) == {
        "augment", "encode", "gather", "heads and loss", "backward", "optimizer", "momentum update",
    }  # fmt: skip
