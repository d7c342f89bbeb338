"""Processes and devices: torchrun's set-up, collectives, BatchNorm over all ranks, AMP's choice."""

import inspect
import os
import pickle
import re
import tempfile
import time
import uuid
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm, set_fused_attn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco import UserError


def set_up(device="auto", amp="auto", timeout=600):
    """Joins torchrun's processes, if any → this one's torch.device, autocast dtype or None.

    CUDA talks through NCCL, the CPU through gloo; without torchrun there is one process, no group.
    A process that waits for another one longer than `timeout` seconds gives up.
    `amp` auto: bf16 where the hardware computes in it, fp16 on older CUDA, off elsewhere.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available() and "RANK" not in os.environ
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; --device cpu would run")
    if device == "mps" and (not torch.backends.mps.is_available() or "RANK" in os.environ):
        raise UserError("--device mps needs an Apple GPU and runs one process, without torchrun")

    if device == "cuda":
        gpus = torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
            raise UserError(f"more processes than GPUs on this host: use --nproc_per_node={gpus}")
        torch.cuda.set_device(local_rank())
    device = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    if "RANK" in os.environ:
        # Flags that only the CPU needs go through gloo on a GPU, too: nothing waits for it then.
        on_gpu, limit = device.type == "cuda", timedelta(seconds=timeout)
        store, number, count = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=limit,
            store=_fresh(store, number, count, timeout),
            rank=number,
            world_size=count,
            device_id=device if on_gpu else None,
        )
    amp = _amp_dtype(amp, device)
    # In bf16 on a CPU torch's fused attention is slower than the explicit softmax, several times
    # over (benchmarks/attention.py).
    set_fused_attn(not (device.type == "cpu" and amp))
    return device, amp


def leave():
    """Takes this process out of the group, all of them together, after a run that succeeded."""
    if dist.is_initialized():
        dist.barrier()
        # torch 2.6 destroys a gloo group with the GIL held, and waits forever for a thread of it
        # that frees the tensors of the last collective and needs the GIL for that.
        time.sleep(0.1)
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """Rank among the processes of this host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _fresh(store, number, count, timeout):
    """The part of the store that is this generation's of processes alone.

    torchrun keeps one store through its restarts, and a process that finds in it where the others
    listened before they were killed calls there in vain.
    """
    me = uuid.uuid4().hex
    if number == 0:
        store.set("generation", me)
        for other in range(1, count):
            name = store.get(f"{me}/{other}").decode()
            store.set(f"{me}/{name} is welcome", "")
        return dist.PrefixStore(me, store)
    start = time.monotonic()
    while time.monotonic() - start < timeout:
        generation = store.get("generation").decode()  # of those before us, perhaps
        store.set(f"{generation}/{number}", me)
        if store.check([f"{generation}/{me} is welcome"]):
            return dist.PrefixStore(generation, store)
        time.sleep(0.01)
    raise dist.DistStoreError(f"rank 0 did not come within {timeout:g} seconds")


def barrier():
    if world() > 1:
        dist.barrier()


def once_per_host(make):
    """make() of each host's first process, for all of its processes; a UserError, too.

    They pass it on in a file. All ranks call it.
    """
    if world() == 1:
        return make()
    path = None
    if local_rank() == 0:
        try:
            made = make()
        except UserError as error:
            made = error
        with tempfile.NamedTemporaryFile(delete=False) as file:
            pickle.dump(made, file)
            path = file.name
    paths = [None] * world()
    dist.all_gather_object(paths, path)
    if local_rank() > 0:
        made = pickle.loads(Path(paths[rank() - local_rank()]).read_bytes())
    barrier()
    if path:
        os.unlink(path)
    if isinstance(made, UserError):
        raise made
    return made


def say(text, file=None):
    """Rank 0 prints it."""
    if rank() == 0:
        print(text, file=file, flush=True)


def largest(*numbers):
    """The largest of the ranks' whole numbers, for each; through the CPU."""
    if world() == 1:
        return numbers
    numbers = torch.tensor(numbers)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def parallel(model, device):
    """DistributedDataParallel over all processes; one process: the model itself.

    Buffers are not broadcast: BatchNorm sees the batch of all ranks, so they are equal already.
    """
    if world() == 1:
        return model
    # The first is the new name; the old one warns where both are known.
    known = inspect.signature(DistributedDataParallel).parameters
    # gloo's layout of a 1×1 convolution's gradient: a copy, no error.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{sync: False},
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        everyone = x.new_empty(world() * x.numel())  # flat, the one form that gloo and NCCL share
        dist.all_gather_into_tensor(everyone, x.flatten())
        return everyone.view(world(), *x.shape)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd's own stays as it is
        dist.all_reduce(grad)
        return grad[rank()]


def gather(x):
    """x of every rank, in rank order: [...] → [world, ...]. Differentiable; one collective."""
    return _Gather.apply(x) if world() > 1 else x[None]


def at_least_fp32(x):
    """bf16 and fp16 → fp32; float64 stays, so that formulas can be tested in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def average(x):
    """Mean of x over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)
        x /= world()
    return x


def check_agreement(device, **numbers):
    """UserError if the ranks don't hold the same numbers: hosts that see different files, say."""
    everyone = gather(torch.tensor(list(numbers.values()), device=device))  # [world, numbers]
    for name, values in zip(numbers, everyone.T.tolist()):
        if len(set(values)) > 1:
            raise UserError(
                f"the processes disagree about {name}: {sorted(set(values))}; do all hosts see the "
                "same data and the same --output-dir?"
            )


class ViewBatchNorm(nn.BatchNorm1d):
    """BatchNorm of the heads: x [V, N, C], statistics of each view over the N of all ranks.

    The V views are V batches that never mix; one collective serves them all, on any backend
    (nn.SyncBatchNorm refuses the CPU). Keys and defaults of BatchNorm1d. Statistics in fp32.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x.flatten(0, 1)).view_as(x)
        if world() == 1:  # the same mathematics in one fused kernel a view
            return torch.stack([super(ViewBatchNorm, self).forward(view) for view in x])

        var, mean = torch.var_mean(at_least_fp32(x), dim=1, correction=0)  # [V, C]
        means, variances = gather(torch.stack([mean, var])).unbind(1)  # [world, V, C]
        mean = means.mean(0)
        var = (variances + (means - mean) ** 2).mean(0)  # every rank holds as many rows
        self._track(mean.detach(), var.detach(), rows=x.shape[1] * world())

        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = -mean * scale
        if self.affine:
            shift = shift + self.bias
        return (x * scale[:, None] + shift[:, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean, var, rows):
        for view in range(len(mean)):  # one after the other, as V calls of BatchNorm1d would
            self.running_mean.lerp_(mean[view], self.momentum)
            self.running_var.lerp_(var[view] * rows / (rows - 1), self.momentum)
            self.num_batches_tracked += 1


class _BackboneBatchNorm(ViewBatchNorm):
    """The same for a backbone's on devices other than CUDA: [N, C, …], one view."""

    def __init__(self, bn):
        super().__init__(bn.num_features, bn.eps, bn.momentum, bn.affine)
        for name, part in bn.named_children():  # timm's have an activation inside
            self.add_module(name, part)
        self.load_state_dict(bn.state_dict())

    def forward(self, x):
        rows = x.movedim(1, -1)  # [N, …, C]
        x = super().forward(rows.flatten(0, -2)[None]).view(rows.shape).movedim(-1, 1)
        for part in self.children():
            x = part(x)
        return x


def synchronize_batchnorm(module, device):
    """Every BatchNorm in `module` made to see the batch of all ranks; one process: unchanged.

    On CUDA that is nn.SyncBatchNorm; elsewhere ours, slower, with the same mathematics.
    """
    if world() == 1:
        return module
    if device.type == "cuda":
        return convert_sync_batchnorm(module)  # timm's keeps its activations, torch's drops them
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            module.set_submodule(name, _BackboneBatchNorm(child))
    return module


def _amp_dtype(amp, device):
    if amp == "auto":
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            amp = "bf16" if device.type == "cpu" and _cpu_computes_bf16() else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA GPU: use bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def _cpu_computes_bf16():
    try:  # torch 2.6 has no public way to ask
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo))
