"""Rank, number of processes, and the collective that the loss and BatchNorm need.

Without an initialised process group there is one process of rank 0, and nothing communicates.
"""

import torch
import torch.distributed as dist


def rank():
    """Number of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes, on all hosts together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this is rank 0, the one process that prints and writes files."""
    return rank() == 0


def all_gather(x):
    """x of every rank, in rank order: [...] → [world_size, ...]; one collective.

    Differentiable for BatchNorm's sake: the keys are gathered without a gradient.
    """
    return _AllGather.apply(x) if world_size() > 1 else x[None]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        gathered = x.new_empty(world_size() * x.numel())  # flat: the form that gloo and NCCL share
        _all_gather_flat(gathered, x.flatten())
        return gathered.view(world_size(), *x.shape)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(grad)
        return grad[rank()]


# The function's name since torch 2.14, where the older one warns.
_all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
