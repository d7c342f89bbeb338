"""On CUDA tensors without data: each tensor is on the device, and no step waits for it.

FakeTensorMode runs the real code, and raises where tensors of two devices meet, and where the host
would read a value or a size that the device computes (`item`, `bool`, `nonzero`, boolean indices).
NoWaits raises where a copy waits. What only a GPU shows: autograd (its threads need CUDA; backward
passes here leave gradients without data), NCCL, the kernels and their numbers.
"""

import sys
from collections import Counter, OrderedDict
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main_finetune
import main_lincls
import main_moco
import moco
from engine import evaluation
from engine.backbones import BackboneConfig, create_backbone
from engine.data.decode import RGB
from engine.launch import Env

sys.path.insert(0, str(ROOT / "benchmarks"))

import step
from fake import create_fake_model, fake_tensors, to_fake

pytestmark = pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.14"),
    reason="fake CUDA tensors of torch 2.6 ask for a driver; known to work: 2.14",
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
aten = torch.ops.aten


class NoWaits(TorchDispatchMode):
    """RuntimeError for a copy between host and device that waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = [x.device.type for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if func is aten._to_copy.default:
            devices.append(torch.device(kwargs.get("device") or devices[0]).type)
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        is_index = func in (aten.index.Tensor, aten.index_put_.default)
        if (is_copy or is_index) and {"cpu", "cuda"} <= set(devices):
            to_device = func is aten._to_copy.default and devices[-1] == "cuda"
            if not (to_device and kwargs.get("non_blocking")):
                raise RuntimeError(f"{func} waits for the device")
        return func(*args, **kwargs)


@contextmanager
def fake_cuda():
    """Inside, tensors are fake, autocast acts on CUDA, and backward leaves gradients alone."""

    def backward(loss):
        assert loss.device.type == "cuda" and loss.requires_grad
        for p in trained:
            p.grad = torch.empty_like(p)

    trained = []
    with (
        fake_tensors(),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        patch.object(torch.Tensor, "backward", backward),
    ):
        yield trained


ENV = Env(CUDA, torch.bfloat16)


@pytest.fixture
def side(monkeypatch):
    """Makes a step.Side whose batch is in CPU memory, as the loader's is."""
    create_model = main_moco.create_model
    monkeypatch.setattr(
        main_moco, "create_model", lambda *args: create_fake_model(create_model, *args)
    )

    def make(arch="vit_nano", encode_chunk=0, clip_grad=None):
        optimizer = "lars" if arch == "resnet18" else "adamw"
        args = dict(arch=arch, batch_size=8, img_size=32, compile=False, encode_chunk=encode_chunk)
        side = step.Side(SimpleNamespace(**args, optimizer=optimizer, quick=True), ENV)
        side.batch = step.random_batch(8, 32, CPU)
        side.args.clip_grad = clip_grad
        return side

    return make


def train(side, trained):
    """Two steps; the first one may copy constants to the device."""
    trained += [p for p in side.model.parameters() if p.requires_grad]
    side.train()
    with NoWaits():
        side.train()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(encode_chunk=4),
        dict(arch="vit_conv_nano", clip_grad=1.0),
        dict(arch="resnet18"),
    ],
)
def test_a_step_of_pretraining_stays_on_the_device(side, options):
    with fake_cuda() as trained:
        train(side(**options), trained)


Unread, Unsized = DataDependentOutputException, DynamicOutputShapeException
WAITS = {
    "item": (lambda x: x.sum().item(), Unread),
    "bool": (lambda x: bool(x.sum() > 0), Unread),
    "tolist": (lambda x: x[0, 0, 0].tolist(), Unread),
    "nonzero": (lambda x: x.nonzero(), Unsized),
    "boolean indices": (lambda x: x[x > 0], Unsized),
    "copy to the host": (lambda x: x.cpu(), "_to_copy.default waits"),
    "copy from the host": (lambda x: torch.ones(3).to(x.device), "_to_copy.default waits"),
    "indices in CPU memory": (lambda x: x[torch.arange(2)], "index.Tensor waits"),
    "another device": (lambda x: x + torch.ones(x.shape), "all tensors to be on the same device"),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_in_the_augmentation_is_found(side, monkeypatch, name):
    wait, error = WAITS[name]
    kind, match = (RuntimeError, error) if isinstance(error, str) else (error, None)

    def augment(*args):
        x = moco.augment(*args)
        wait(x)
        return x

    with fake_cuda():
        patched = side()
        main_moco.make_views(patched.batch[0].to(CUDA), patched.batch[1], RGB)  # constants
        monkeypatch.setattr(main_moco, "augment", augment)
        with pytest.raises(kind, match=match), NoWaits():
            patched.train()


def run_in_memory():
    run = step.RunInMemory(ENV)
    run.epoch = 1
    return run


@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_step_of_the_probe_stays_on_the_device(batchnorm):
    args = SimpleNamespace(lr=[0.1, 1.0], batch_size=8, epochs=2, seed=0, batchnorm=batchnorm)
    with torch.device("meta"):
        backbone = create_backbone(BackboneConfig("vit_nano", 32))
        classifiers = main_lincls.create_classifiers(args, backbone.num_features, 10)
    with fake_cuda() as trained:
        to_fake(backbone, CUDA).requires_grad_(False).eval()
        to_fake(classifiers, CUDA)
        trained += classifiers.parameters()
        optimizer, run = main_lincls.create_sgd(classifiers), run_in_memory()
        crops = torch.empty(8, 3, 32, 32, dtype=torch.uint8)
        loader = step.RepeatedBatch((crops, torch.empty(8, dtype=torch.long)), 1)
        step_args = args, run, classifiers, backbone, loader, optimizer
        main_lincls.train_one_epoch(*step_args)
        with NoWaits():
            main_lincls.train_one_epoch(*step_args)
        assert run.loss.device.type == "cuda"


@pytest.mark.parametrize("mixes", [False, True])
def test_a_step_of_fine_tuning_stays_on_the_device(mixes):
    argv = "DIR --from-scratch -a vit_nano -b 256 --clip-grad 1 --lr-per iteration".split()
    args = main_finetune.parse_args(argv if mixes else [*argv, "--mixup", "0", "--cutmix", "0"])
    mixup = main_finetune.create_mixup(args, num_classes=10)
    config = BackboneConfig("vit_nano")
    backbone = create_backbone(BackboneConfig("vit_nano", 32), drop_path=0.1)
    model = main_finetune.add_classifier(backbone, 10, config, Env(CPU))
    ema = ModelEmaV3(model, decay=0.9)
    with fake_cuda() as trained:
        to_fake(model, CUDA)
        to_fake(ema, CUDA)
        trained += model.parameters()
        optimizer, run = main_finetune.create_adamw(args, model, "vit_nano"), run_in_memory()
        images, labels = torch.empty(8, 3, 32, 32), torch.empty(8, dtype=torch.long)
        loader = step.RepeatedBatch((images, labels), 1)
        scaler = ENV.grad_scaler()
        for mode in (nullcontext(), NoWaits()):
            with mode:
                main_finetune.train_one_epoch(
                    args, run, model, model, ema, loader, mixup, optimizer, scaler
                )
        assert run.loss.device.type == "cuda"


class Labelled(list):
    labels = torch.arange(16) % 10


def test_features_and_knn_are_on_the_device(monkeypatch):
    """They may wait, but once for the dataset."""
    is_read, dataset = torch.ones(16, dtype=torch.bool), Labelled(range(16))
    splits = SimpleNamespace(train=dataset, val=dataset, num_classes=10)
    batches = [torch.arange(0, 8), torch.arange(8, 16)]

    def iterate_eval_batches(*_):
        for positions in batches:
            yield positions, torch.empty(len(positions), 3, 32, 32, device=CUDA)

    def all_reduce_sum(x):
        assert x.device.type == "cuda"
        reduced.append(x)
        if x.ndim == 0:  # the number of images that were read
            return torch.tensor(1)
        return no_hits if x.shape == no_hits.shape else x

    reduced, no_hits = [], torch.zeros(2, 2)
    monkeypatch.setattr(evaluation, "iterate_eval_batches", iterate_eval_batches)
    monkeypatch.setattr(evaluation, "all_reduce_sum", all_reduce_sum)
    with torch.device("meta"):
        encoder = create_backbone(BackboneConfig("vit_nano", 32))
    knn = evaluation.KNN(splits, 32, None, 0, ENV)
    with fake_cuda():
        bank, _ = knn.encode_bank(to_fake(encoder, CUDA).eval())
        assert knn.measure(encoder, bank, is_read, k_values=[1, 5]) == [0, 0]
    assert len(reduced) == 4  # features, what was read, how many, hits


class Collectives(TorchDispatchMode):
    """Counts the collectives by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def eight_ranks():
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("form, projector, predictor", [("vit", 3, 2), ("resnet", 2, 1)])
def test_the_collectives_of_a_step(eight_ranks, form, projector, predictor):
    """The keys' and, for both views together, one per BatchNorm of the heads, and its backward."""
    norm = nn.BatchNorm1d(8) if form == "resnet" else nn.LayerNorm(8)
    backbone = nn.Sequential(OrderedDict(flat=nn.Flatten(), norm=norm, head=nn.Linear(8, 8)))
    with torch.device("meta"):
        model = moco.MoCo(backbone.to("meta"), dim=4, mlp_dim=8)
    norms = 2 * projector + predictor  # the projector is in both encoders
    with fake_cuda(), Collectives() as forward:
        x = torch.empty(2, 4, 8, device=CUDA)
        to_fake(model, CUDA)(*x)
    gathers = forward.counts.popitem()
    assert gathers[1] == norms + 1 and not forward.counts

    with fake_tensors(), Collectives() as both:  # autograd on CUDA tensors needs CUDA
        loss, _ = to_fake(model, CPU)(*torch.empty(2, 4, 8))
        loss.backward()
    assert both.counts == {gathers[0]: norms + 1, "allreduce_": projector + predictor}
