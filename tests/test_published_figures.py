"""The tables of the documentation hold the figures of benchmarks/results/."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import hours

SPEED = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TIME = (ROOT / "docs" / "time.md").read_text(encoding="utf-8")


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("arch", ["vit_small", "vit_base", "resnet50"])
def test_the_steps_of_a_gpu_are_those_that_were_measured(arch):
    measured = results("gpu_step_h200")[f"step_{arch}"]
    ours, textbook = measured["fast"]["images_per_s"], measured["plain"]["images_per_s"]
    part, gib = measured["fast"]["share_of_peak"], measured["peak_memory_gib"]
    ratio, batch_size = measured["fast/plain"], dict(vit_small=512).get(arch, 256)
    compiled = results("gpu_profile_h200").get(f"{arch},{batch_size},adamw,compile")
    last = f"**{compiled['images_per_s']:,.0f}**" if compiled else "not run"
    row = (
        f"| {textbook:,.0f} | **{ours:,.0f}** | {ratio} | {100 * part:.0f} % | {gib:.1f} | {last} |"
    )
    assert row in SPEED
    assert f"{ours:,.0f}" in README and (not compiled or last.strip("*") in README)


def test_the_tables_of_a_gpu_are_those_of_the_benchmark():
    path = ROOT / "benchmarks/results/gpu.json"
    if path.exists():
        assert "\n".join(gpu.tables(json.loads(path.read_text()))) in SPEED
    else:
        assert "**The present step on a GPU: not run.**" in SPEED


def test_a_table_of_a_gpu_shows_what_was_measured():
    step = dict(images_per_s=1400.4, mfu=0.512, peak_gib=35.94, first_step_s=14.2)
    rows = [
        dict(row="vit_base 256 bf16 compiled", **step),
        dict(row="vit_base 256 bf16 textbook", **step | dict(images_per_s=700.2)),
        dict(row="vit_small 512 bf16 eager", error="TooSlow: stopped"),
        dict(row="augmentation 2·512", eager_ms=19.04, compiled_ms=6.04),
        dict(row="end to end", images_per_s=3300.2, largest_data_wait=0.004),
    ]
    lines = gpu.tables(dict(rows=rows))
    assert "| ViT-B, compiled | 256 | bf16 | 1,400 | 2.00 | 51 % | 35.9 | 14 |" in lines
    assert "| ViT-S, eager | 512 | bf16 | not run | | | | |" in lines
    assert "| augmentation of both views of 512 images | 19.0 ms, compiled 6.0 ms |" in lines
    assert lines[-1].endswith("| 3,300 images/s, at most 0.4 % of the time waiting |")


def test_the_hours_of_the_recipes_are_computed_from_measured_rates():
    assert "\n".join(hours.table()) in TIME
    assert "\n".join(hours.table_of_small_sets()) in TIME
    _, compiled = hours.rates()
    whole = [hours.hours(epochs, compiled["vit_base"]) for epochs in (100, 300)]
    assert f"{whole[0]:.0f} hours for 100 epochs of ImageNet on one H200" in TIME
    assert f"and {whole[1]:.0f} hours for 300" in TIME
    assert f"8, {whole[0] / 8:.1f} hours and {whole[1] / 8:.1f}, if" in TIME


def test_memory_and_end_to_end_on_a_gpu_are_those_that_were_measured():
    [row] = results("gpu_memory_h200")["rows"]
    assert f"takes {row['peak_gib']:.1f} GiB" in SPEED
    assert f"at {row['images_per_s']:.0f} images/s" in SPEED
    run = results("gpu_end_to_end_h200")
    assert f"{run['images_per_s, median of steps 11 to 64']:,.0f} images/s" in SPEED
    waiting = run["fraction waiting for data, largest of steps 11 to 64"]
    assert f"at most {100 * waiting:.1f} % of the time" in SPEED


def spread(runs, key):
    values = [run[key] for run in runs]
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def test_the_accuracy_beside_other_libraries_is_that_which_was_measured():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name, measured in results("peers_accuracy")["results"].items():
        runs, label = measured["runs"], f"{name} {measured['version'] or ''}".strip()
        assert f"| {label} | {spread(runs, 'knn')} | {spread(runs, 'linear')} |" in text
        assert f"| none: the first weights | {spread(runs, 'knn_before')} | |" in text


def test_the_accuracy_from_other_weights_is_that_which_was_measured():
    text = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
    starts = dict(random="random_weights", **{"pre-trained on Fashion-MNIST": "fashion_mnist"})
    for label, name in starts.items():
        runs = results(f"accuracy_digits_from_{name}")["runs"]
        row = f"| {label} | {spread(runs, 'knn_before')} | {spread(runs, 'knn_after')} |"
        assert row in text


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
