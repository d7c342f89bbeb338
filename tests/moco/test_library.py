"""docs/library.md and README: their Python code runs as it stands, on the CPU, without files."""

import math
import re

import numpy as np
import torch
from conftest import ROOT

import moco

PAGE = ROOT / "docs" / "library.md"


def python_blocks(path):
    """Source of each ```python block, on the lines that it has in the page."""
    text = path.read_text(encoding="utf-8")
    blocks = []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        lines_before = text[: match.start(1)].count("\n")
        blocks.append("\n" * lines_before + match[1])
    return blocks


def run(source, path, namespace):
    exec(compile(source, str(path), "exec"), namespace)


def test_the_training_loop_lowers_the_loss_and_the_other_blocks_run_after_it():
    namespace = {}
    loop, *others = [block for block in python_blocks(PAGE) if "load_backbone" not in block]
    run(loop, PAGE, namespace)
    losses, steps = namespace["losses"], len(namespace["batches"])
    chance = 4 * 0.2 * math.log(64)  # 4τ·ln N
    assert abs(losses[0] - chance) < 0.2
    assert sum(losses[-steps:]) / steps < sum(losses[:steps]) / steps - 0.2

    assert len(others) == 4
    for block in others:
        run(block, PAGE, namespace)
        if "loss, metrics" in block:
            assert namespace["loss"].isfinite()
            assert namespace["metrics"].keys() == {"top1", "feature_std"}


@torch.no_grad()
def test_load_backbone_gives_the_features_that_the_tool_writes(
    pretrained, image_file, tmp_path, script, monkeypatch
):
    [block] = [block for block in python_blocks(PAGE) if "load_backbone" in block]
    assert len([line for line in block.splitlines() if line]) <= 5
    image_file("1.png"), image_file("2.png", height=90)
    monkeypatch.chdir(tmp_path)
    namespace = dict(torch=torch)
    run(block.replace("runs/digits/checkpoint.pth", str(pretrained)), PAGE, namespace)
    flags = ["--pretrained", pretrained, "--device", "cpu", "--amp", "off", "--workers", 0]
    assert script("tools/features.py", tmp_path, *flags, "--out", "f.npz")[0] == 0
    expected = torch.tensor(np.load("f.npz")["features"])
    torch.testing.assert_close(namespace["features"], expected, rtol=0, atol=1e-5)


def test_the_training_loop_is_short():
    lines = [line for line in python_blocks(PAGE)[0].splitlines() if line.strip()]
    assert len(lines) <= 40


def test_adapters_have_at_most_five_lines():
    page = PAGE.read_text(encoding="utf-8")
    adapter = page.split("\nclass PooledEncoder")[1].split("\n\n\n")[0]
    assert len([line for line in adapter.splitlines() if line.strip()]) <= 5


def test_every_public_name_is_explained():
    explained = set(re.findall(r"^\*\*`(\w+)[(`]", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert explained == set(moco.__all__)


def test_the_code_of_the_readme_runs():
    """With a smaller ViT and smaller heads: the size changes seconds, not the interface."""
    readme = ROOT / "README.md"
    [block] = python_blocks(readme)
    assert "vit_small" in block and "mlp_dim=4096" in block
    namespace = {}
    run(block.replace("vit_small", "vit_nano").replace("4096", "256"), readme, namespace)
    assert namespace["loss"].isfinite()
