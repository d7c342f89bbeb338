"""The tables of the documentation hold the figures of benchmarks/results/."""

import json

import pytest
from conftest import ROOT

SPEED = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("arch", ["vit_small", "vit_base", "resnet50"])
def test_the_steps_of_a_gpu_are_those_that_were_measured(arch):
    measured = results("gpu_step_h200")[f"step_{arch}"]
    ours, textbook = measured["fast"]["images_per_s"], measured["plain"]["images_per_s"]
    part, gib = measured["fast"]["share_of_peak"], measured["peak_memory_gib"]
    ratio = measured["fast/plain"]
    row = f"| {textbook:,.0f} | **{ours:,.0f}** | {ratio} | {100 * part:.0f} % | {gib:.1f} |"
    assert row in SPEED
    assert f"{ours:,.0f}" in README


def test_memory_and_end_to_end_on_a_gpu_are_those_that_were_measured():
    [row] = results("gpu_memory_h200")["rows"]
    assert f"takes {row['peak_gib']:.1f} GiB" in SPEED
    assert f"at {row['images_per_s']:.0f} images/s" in SPEED
    run = results("gpu_end_to_end_h200")
    assert f"{run['images_per_s, median of steps 11 to 64']:,.0f} images/s" in SPEED
    waiting = run["fraction waiting for data, largest of steps 11 to 64"]
    assert f"at most {100 * waiting:.1f} % of the time" in SPEED


def test_the_small_sets_of_the_readme_are_those_that_were_measured():
    """Mean, lowest and highest of three seeds."""
    rows = {
        "kNN": ("knn_before", "knn_after"),
        "linear probe": ("lincls_from_scratch", "lincls"),
        "fine-tuned": ("finetune_from_scratch", "finetune"),
        "fine-tuned on 1 % of the labels": ("finetune_1_from_scratch", "finetune_1"),
    }
    for label, (control, trained) in rows.items():
        cells = []
        for name in ("digits", "fashion_mnist"):
            runs = results(f"accuracy_{name}")["runs"]
            for key, mark in ((control, ""), (trained, "**")):
                values = [run[key] for run in runs if key in run]
                if not values:
                    cells.append("–")
                    continue
                mean = f"{mark}{sum(values) / len(values):.1f}{mark}"
                cells.append(f"{mean} ({min(values):.1f} to {max(values):.1f})")
        assert f"| {label} | {' | '.join(cells)} |" in README
