"""torchrun's process group, the device, the precision, and the collectives of the scripts."""

import inspect
import os
import platform
import re
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm, set_fused_attn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import UserError, join_some, print_line
from moco.batchnorm import ViewBatchNorm
from moco.distributed import is_main, world_size

HEARTBEAT_SECONDS = 0.2  # shorter than any --timeout

_store = None  # of the process group


@dataclass(frozen=True)
class Env:
    """What this process computes on; amp_dtype: of autocast, None for float32."""

    device: torch.device
    amp_dtype: torch.dtype | None = None

    def autocast(self):
        return torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        )

    def grad_scaler(self):
        """Loss scaling for fp16; disabled for every other precision."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    def to_device(self, *tensors):
        """The tensors on the device, without waiting for the copy; a single one as such."""
        moved = [x.to(self.device, non_blocking=self.device.type == "cuda") for x in tensors]
        return moved[0] if len(moved) == 1 else moved

    def wrap_ddp(self, model):
        """DistributedDataParallel over all processes; the model itself in a single process."""
        if world_size() == 1:
            return model
        # gloo's layout of a 1×1 convolution's gradient: a copy, not an error.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # Equal on all ranks, for BatchNorm sees their batch. The older name warns in new torch.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{sync: False},
        )

    def sync_batchnorm(self, module):
        """Makes every BatchNorm in `module` see the batch of all ranks.

        On CUDA that is nn.SyncBatchNorm; elsewhere ours, slower, with the same mathematics.
        """
        if world_size() == 1:
            return module
        if self.device.type == "cuda":
            return convert_sync_batchnorm(module)  # timm's keeps fused activations, torch's doesn't
        for name, child in list(module.named_modules()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                module.set_submodule(name, _SyncBatchNorm(child))
        return module

    def precision(self):
        if self.amp_dtype is None:
            return "float32"
        return f"{str(self.amp_dtype).removeprefix('torch.')} autocast"


def init_distributed(device="auto", amp="auto", timeout=600):
    """Joins torchrun's process group, if there is one → Env.

    timeout: seconds that a process waits for the others. amp "auto": bf16 where the hardware
    computes in it, fp16 on older CUDA, "off" elsewhere. "off" is float32, without TF32.
    """
    check_launcher()
    device = choose_device(device)
    if "RANK" in os.environ:
        init_process_group(device, timeout)
    amp_dtype = choose_amp_dtype(amp, device)
    if device.type == "cuda" and amp_dtype is None:
        # float32 throughout; torch's default for convolutions is TF32, of 10 bits.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    # In bf16 on a CPU torch's fused attention is slower than the explicit softmax, several times
    # over (benchmarks/attention.py).
    set_fused_attn(not (device.type == "cpu" and amp_dtype))
    return Env(device, amp_dtype)


def check_launcher():
    """UserError where processes were started side by side, but not by torchrun."""
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise UserError(f"RANK is set without {join_some(missing)}: start processes with torchrun")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE") or "1"
    # In `srun --pty` one task alone has a shell.
    if "RANK" not in os.environ and int(tasks) > 1 and "SLURM_PTY_PORT" not in os.environ:
        raise UserError(
            f"{tasks} processes were started without torchrun, and each would be a whole run: use "
            "srun torchrun …, one task per node (recipes/slurm.sh); in a shell that is one of them "
            "start the script with torchrun, too"
        )


def choose_device(device):
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available() and "RANK" not in os.environ
    if device == "auto":
        device = "cpu"
        if num_gpus or has_mps:
            device = "cuda" if num_gpus else "mps"
    if device == "cuda" and not num_gpus:
        raise UserError("--device cuda: torch sees no GPU here; --device cpu would run")
    if device == "mps" and not has_mps:
        raise UserError("--device mps needs an Apple GPU and runs one process, without torchrun")
    if device != "cuda":
        return torch.device(device)

    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > num_gpus:
        raise UserError(f"more processes than GPUs on this host: use --nproc_per_node={num_gpus}")
    torch.cuda.set_device(local_rank())
    torch.backends.cudnn.benchmark = True  # the shapes of training don't change
    return torch.device("cuda", local_rank())


def init_process_group(device, timeout):
    global _store
    on_gpu, limit = device.type == "cuda", timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    _store = _store_of_this_restart(store, rank, world_size, timeout)
    dist.init_process_group(
        # gloo on a GPU, too: all-reducing a few host integers must not wait for the device.
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=limit,
        store=_store,
        rank=rank,
        world_size=world_size,
        device_id=device if on_gpu else None,
    )
    if on_gpu:
        # NCCL's watchdog aborts the process. gloo's error, which is readable, shall come first.
        nccl = dist.group.WORLD._get_backend(device)
        set_timeout = getattr(nccl, "set_timeout", None) or nccl._set_default_timeout  # old torch
        set_timeout(2 * limit)


def _store_of_this_restart(store, rank, world_size, timeout):
    """The part of torchrun's store that belongs to the processes that run now → PrefixStore.

    torchrun keeps one store through its restarts. A process that finds an address of a killed
    predecessor in it would wait for an answer in vain. So rank 0 picks a new prefix:
        rank 0 sets    generation = its id          (the prefix)
        rank r sets    {generation}/{r} = its id    (again, if the generation was an old one)
        rank 0 sets    {generation}/{id of r}/admitted, for each r
    """
    own_id = uuid.uuid4().hex
    if rank == 0:
        store.set("generation", own_id)
        for other in range(1, world_size):
            other_id = store.get(f"{own_id}/{other}").decode()
            store.set(f"{own_id}/{other_id}/admitted", "")
        # All old processes are gone. NCCL's watchdogs leave a key that would end the new ones, too.
        innermost = store
        while isinstance(innermost, dist.PrefixStore):  # torchrun's
            innermost = innermost.underlying_store
        innermost.delete_key("exception_dump")
        return dist.PrefixStore(own_id, store)
    start = time.monotonic()
    while time.monotonic() - start < timeout:
        generation = store.get("generation").decode()
        store.set(f"{generation}/{rank}", own_id)
        if store.check([f"{generation}/{own_id}/admitted"]):
            return dist.PrefixStore(generation, store)
        time.sleep(0.01)
    raise dist.DistStoreError(f"rank 0 did not come within {timeout:g} seconds")


def choose_amp_dtype(amp, device):
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        amp = "bf16" if device.type == "cpu" and _cpu_computes_bf16() else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA GPU: use bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def _cpu_computes_bf16():
    cpuinfo = Path("/proc/cpuinfo")  # torch 2.6 has no public way to ask
    if not cpuinfo.exists():
        return False
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read_text()))


def destroy_process_group():
    """Leaves the group, all processes together, after a run that succeeded."""
    if dist.is_initialized():
        dist.barrier()
        # torch 2.6 destroys a gloo group with the GIL held, and waits forever for a thread of it
        # that frees the tensors of the last collective and needs the GIL for that.
        time.sleep(0.1)
        dist.destroy_process_group()


def local_rank():
    """Rank among the processes of this host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_to_print(text):
    """Whether this process prints a refusal: of each host, the first that comes to it."""
    if _store is not None:
        with suppress(RuntimeError):  # rank 0, which may hold the store, is gone
            return _store.add(f"printed/{platform.node()}/{text}", 1) == 1
    return local_rank() == 0


def print_rank0(text, file=None):
    """A line of text; names in it may contain anything."""
    if is_main():
        print_line(text, file)


def barrier():
    if world_size() > 1:
        dist.barrier()


def all_reduce_max(*numbers):
    """The largest of the ranks' numbers, for each; one number in, one number out."""
    if world_size() > 1:
        numbers = torch.tensor(numbers)  # through gloo: nothing waits for a GPU
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        numbers = numbers.tolist()
    return numbers[0] if len(numbers) == 1 else list(numbers)


def all_reduce_sum(x):
    """Sum of x over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_mean(x):
    """Mean of x over the ranks, in place."""
    return all_reduce_sum(x).div_(world_size())


def all_gather_object(value):
    """A list of every rank's picklable `value`, in rank order."""
    gathered = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def check_same_on_all_ranks(values, hint):
    """UserError, naming one that differs between ranks; all ranks call it.

    values: {name: what can be pickled and compared}. hint: what to look at.
    """
    first, *others = all_gather_object(values)
    for name, value in first.items():
        for other in others:
            if other[name] != value:
                raise UserError(
                    f"the processes disagree about {name}: {value} and {other[name]}; {hint}"
                )


def _while_others_wait(make):
    """make() of this rank; a UserError of any rank is raised on all. All ranks call it.

    Each waits for the slowest as long as it takes, while a thread beside make() tells the others
    that its process lives: --timeout is for one that doesn't.
    """
    done, result, error = threading.Event(), None, None

    def keep_in_step():
        while all_reduce_max(int(not done.wait(HEARTBEAT_SECONDS))):
            pass

    with ThreadPoolExecutor(1) as executor:
        others = executor.submit(keep_in_step)
        try:
            result = make()
        except UserError as raised:
            error = raised
        finally:
            done.set()
    others.result()  # raises if another process is gone
    for raised in all_gather_object(error):
        if raised is not None:
            raise raised
    return result


def _nothing():
    return None


def on_rank0(make):
    """make() on rank 0; its result, or its UserError, on every rank. All ranks call it."""
    if world_size() == 1:
        return make()
    results = [_while_others_wait(make if is_main() else _nothing)]
    dist.broadcast_object_list(results)
    return results[0]


def rank0_first(load):
    """load(download) on rank 0, then on one process of each other host, then on the others.

    The first two may download: hosts may share their files, or not. A UserError of one rank is
    raised on all.
    """
    if world_size() == 1:
        return load(download=True)
    own_turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    turns = [_nothing] * 3
    turns[own_turn] = partial(load, download=own_turn < 2)
    return [_while_others_wait(make) for make in turns][own_turn]


class _SyncBatchNorm(ViewBatchNorm):
    """BatchNorm of a backbone over all ranks, on devices other than CUDA: [N, C, …], one view."""

    def __init__(self, bn):
        super().__init__(bn.num_features, bn.eps, bn.momentum, bn.affine)
        for name, child in bn.named_children():  # timm's have an activation inside
            self.add_module(name, child)
        self.load_state_dict(bn.state_dict())

    def forward(self, x):
        channels_last = x.movedim(1, -1)  # [N, …, C]
        x = super().forward(channels_last.flatten(0, -2)[None])  # [1, N·…, C]
        x = x.view(channels_last.shape).movedim(-1, 1)
        for child in self.children():
            x = child(x)
        return x
