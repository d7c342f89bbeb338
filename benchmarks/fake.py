"""Tensors without data: the real code runs on them, and nothing is computed (FakeTensorMode)."""

import weakref
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from moco.augmentation import _per_channel

BLOCK = 512  # bytes; torch's CUDA allocator rounds up to it


class FakeTensors(TorchDispatchMode):
    """Counts the bytes of fake tensors: `live` ones, and their `peak`.

    Tensors from outside, such as the parameters of the augmentation, keep their data: what is
    computed from them alone on the CPU is computed, and not counted.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_real = len(tensors) > 0 and not any(isinstance(x, FakeTensor) for x in tensors)
        if is_real and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        for x in tree_iter(result):
            if isinstance(x, FakeTensor):
                self.count(x.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata
        if key not in self.storages:
            num_bytes = -(-storage.nbytes() // BLOCK) * BLOCK
            self.storages.add(key)
            self.live += num_bytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key, num_bytes)

    def free(self, key, num_bytes):
        self.storages.remove(key)
        self.live -= num_bytes


@contextmanager
def fake_tensors():
    """Inside, what creates a tensor creates a fake one → FakeTensors."""
    _per_channel.cache_clear()  # of the real tensors, and of the fake ones afterwards
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), FakeTensors() as tensors:
            yield tensors
    finally:
        _per_channel.cache_clear()


def create_fake_model(create_model, args, config, env):
    """main_moco.create_model with fake weights: copying and initializing real ones takes longer."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = create_model(args, config, replace(env, device=torch.device("meta")))
    return to_fake(model, env.device)


def to_fake(model, device):
    """Replaces the weights of a model by fake ones, in place."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
                    is_parameter = isinstance(x, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, x.requires_grad) if is_parameter else fake
    return model
