"""The official release's losses and gradients in float64, held to 1e-7; its code isn't needed.

official.json says how its figures were measured; measure_official.py measures them again.
"""

import json
from pathlib import Path

import measure_official
import pytest
import torch

from vits import sincos_position_embedding

FIGURES = json.loads((Path(__file__).parent / "official.json").read_text())["models"]


@pytest.mark.parametrize(
    ("arch", "num_steps"),
    [
        ("vit_small", 1),  # the gradients of the first step
        pytest.param("vit_small", 2, marks=pytest.mark.slow),
        pytest.param("resnet50", 2, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_the_official_release(arch, num_steps):
    [figures] = [figures for figures in FIGURES if figures["arch"] == arch]
    model = measure_official.create_ours(arch)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == figures["state_dict_shapes"]

    # Later steps amplify rounding: batch 4, and LARS at lr 0.3.
    losses, grad_norms = measure_official.train(model, figures, num_steps)
    assert losses == pytest.approx(figures["losses"][:num_steps], abs=1e-7)
    expected = figures["grad_norms_step0"]
    assert grad_norms.keys() >= expected.keys()
    for name, norm in expected.items():
        if norm is None:
            assert grad_norms[name] is None, name
        else:
            assert grad_norms[name] == pytest.approx(norm, rel=1e-7, abs=1e-7), name


def test_position_embedding_is_that_of_the_official_release():
    expected = FIGURES[0]["pos_embed"]["norm"]
    theirs, ours = measure_official.official_pos_embed(384), sincos_position_embedding(14, 14, 384)
    assert theirs.norm().item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)  # theirs is in float32
