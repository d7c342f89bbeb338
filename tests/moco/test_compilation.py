"""torch.compile: the same loss and gradient, two graphs for a ViT, and no compiler is no error."""

import shutil

import pytest
import torch
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters

import vits
from moco import MoCo, compilation


@pytest.fixture
def traced_only(monkeypatch):
    """Graphs are made as always, but run without Inductor, which takes a minute on a CPU."""
    monkeypatch.setattr(compilation, "lookup_backend", lambda name: lookup_backend("aot_eager"))


def one_step(model, num_images=6):
    """→ loss, gradients of all parameters, in float64."""
    torch.manual_seed(1)
    x1, x2 = torch.randn(2, num_images, 3, 16, 16, dtype=torch.float64)
    loss, _ = model(x1, x2)
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return loss, *grads


def create_moco(compile, encode_chunk=0):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    vit = vits.vit_nano(img_size=16, patch_size=4, depth=3)
    return MoCo(vit, 32, 64, 0.2, encode_chunk, compile).double()


def num_graphs():
    return counters["stats"]["unique_graphs"]


def test_a_compiled_vit_has_two_graphs_and_keeps_its_keys(traced_only):
    eager, model = create_moco(compile=False), create_moco(compile=True)
    for _ in range(2):
        torch.testing.assert_close(one_step(model), one_step(eager), rtol=1e-9, atol=1e-12)
        assert num_graphs() == 2  # of 6 blocks: with gradients, and without
    assert model.state_dict().keys() == eager.state_dict().keys()
    assert compilation.is_compiled(model) and not compilation.is_compiled(eager)


def test_chunks_are_compiled_in_the_first_step(traced_only):
    eager, model = create_moco(compile=False), create_moco(compile=True, encode_chunk=4)
    for _ in range(2):  # chunks of 4, 4 and 2 images
        torch.testing.assert_close(one_step(model, 10), one_step(eager, 10), rtol=1e-9, atol=1e-12)
        assert num_graphs() == 4


def test_blocks_that_differ_are_compiled_as_one_graph(traced_only):
    create_moco(compile=False)
    vit = vits.vit_nano(img_size=16, patch_size=4, depth=3, drop_path_rate=0.1)
    compilation.compile_backbone(vit)
    for _ in range(2):
        vit(torch.randn(2, 3, 16, 16)).sum().backward()
    assert num_graphs() == 1


def test_without_a_compiler_a_warning_and_eager(monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no C++ compiler\ntraceback")

    monkeypatch.setattr(compilation, "lookup_backend", lambda name: fails)
    expected = one_step(create_moco(compile=False))
    with pytest.warns(UserWarning, match="goes on without it: no C.. compiler$") as warned:
        torch.testing.assert_close(one_step(create_moco(compile=True)), expected)
    assert len(warned) == 1  # for two graphs


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on a CPU")
def test_inductor_agrees_with_eager():
    expected = one_step(create_moco(compile=False))
    compiled = one_step(create_moco(compile=True))
    torch.testing.assert_close(compiled, expected, rtol=1e-9, atol=1e-12)
