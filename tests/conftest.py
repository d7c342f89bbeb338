"""Shared by all tests: the smallest runs, and two ways to run a script.

`script` runs it in the process of the tests. `launch` and `Child` run it in processes of its own.
These are forked from a server that has imported everything, so that none imports torch again.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import set_fused_attn
from torchvision.io import write_png

import main_moco
from engine import checkpoint
from engine.data.splits import load_splits, open_source
from engine.launch import Env, destroy_process_group, init_distributed

ROOT = Path(__file__).parents[1]

# torch.cuda.is_available() without CUDA itself, which no forked process could use afterwards.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=no_gpu)]

ENV = Env(torch.device("cpu"))
CPU = "--workers 0 --device cpu".split()
FP32 = (*CPU, "--amp", "off")

# The smallest runs that have everything: 5 steps an epoch of pre-training, probe and fine-tuning.
TINY = (
    "digits -a vit_nano --img-size 16 --patch-size 8 --batch-size 256 --optimizer adamw --lr 1e-3 "
    "--epochs 2 --warmup-epochs 1 --moco-dim 32 --moco-mlp-dim 64 --moco-t 0.2 --moco-m-cos "
    "--workers 0 --knn-every 1 --device cpu --print-freq 1"
).split()
PROBE = ("digits", *"--batch-size 256 --epochs 2".split(), *FP32)
TUNE = (*PROBE, *"--warmup-epochs 1 --ema 0.6 --lr 1e-3 --layer-decay 0.8 --clip-grad 5".split())

# The smallest runs of the scripts on few images, in batches of 8, without kNN.
SMALL = {
    "main_moco.py": (*TINY[1:], "--batch-size", 8, "--knn-every", 0),
    "main_lincls.py": ("--batch-size", 8, "--epochs", 2, *CPU),
    "main_finetune.py": ("--batch-size", 8, "--epochs", 2, "--lr", 1, "--warmup-epochs", 1, *CPU),
}


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # of pytest-xdist: the workers share the cores
        torch.set_num_threads(1)


def pytest_sessionfinish():
    """Ends what a test that failed has left running: Python would wait for it at its exit."""
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    set_fused_attn(True)  # init_distributed may have chosen otherwise


@pytest.fixture
def script(monkeypatch, capfd):
    """Runs a script of ours in this process, as `python NAME ARGS…` → exit code, stdout, stderr."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return stop.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def succeed(script):
    """Runs a script of ours that must succeed, with nothing on stderr → stdout."""

    def run(name, *args):
        code, out, err = script(name, *args)
        assert (code, err) == (0, ""), err or out
        return out

    return run


@pytest.fixture
def refusal(script):
    """Runs a script of ours that must end with a single line on stderr → that line."""

    def run(name, *args, code=2):
        found, out, err = script(name, *args)
        assert (found, err.count("\n")) == (code, 1), out + err
        assert err.startswith(f"{os.path.basename(name)}: error: ")
        return err

    return run


forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["conftest", "main_lincls", "main_finetune", "sklearn.datasets"])


def start_server():
    """Starts the server that forks, and waits until it has imported everything."""
    process = forkserver.Process(target=int)
    process.start()
    process.join()


class Child:
    """`python NAME ARGS…` in the background, its output in a file; one CPU thread.

    env: variables to add. stderr: another file for it. prepare: called in the process, first.
    """

    def __init__(self, folder, name, *args, env=None, stderr=None, prepare=None):
        self.output = Path(folder, "output.txt")
        self.output.write_text("")
        argv = [name, *map(str, args)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        files = str(self.output), str(stderr or self.output)
        settings = variables, os.getcwd(), multiprocessing.get_start_method(), prepare
        self.process = forkserver.Process(target=_run_child, args=(argv, *files, *settings))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout=120):
        """Its exit code; None if it still runs after that many seconds."""
        self.process.join(timeout)
        return self.process.exitcode

    def said(self):
        return self.output.read_text()


def _run_child(argv, stdout, stderr, env, folder, start_method, prepare):
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    multiprocessing.set_start_method(start_method, force=True)  # it would be "forkserver"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have ignored
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    path = str(ROOT / argv[0])
    sys.argv, sys.path[:0] = argv, [os.path.dirname(path)]
    runpy.run_path(path, run_name="__main__")


def launch(processes, name, *args, **env):
    """As `torchrun --nproc_per_node=PROCESSES NAME ARGS…`; one, as `python NAME ARGS…`.

    Returns a subprocess.CompletedProcess. When a process fails, the others are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = start(processes, folder, name, *args, **env)
        codes = wait_for_all(children, timeout=300)
        outputs = [child.said() for child in children]
        errors = [Path(child.output.parent, "stderr.txt").read_text() for child in children]
    failed = [code for code in codes if code != 0]
    code = failed[0] if processes == 1 and failed else int(bool(failed))
    return subprocess.CompletedProcess(args, code, "".join(outputs), "".join(errors))


def start(processes, folder, name, *args, **env):
    """The processes of `launch` in the background → [Child]."""
    children = []
    for variables in torchrun_variables(processes):
        rank_folder = Path(folder, f"rank{variables.get('RANK', '0')}")
        rank_folder.mkdir(parents=True, exist_ok=True)
        settings = dict(env=variables | env, stderr=rank_folder / "stderr.txt")
        children.append(Child(rank_folder, name, *args, **settings))
    return children


def torchrun_variables(processes):
    """The environment variables that torchrun sets for each process; none for a single one."""
    if processes == 1:
        return [{}]
    port = free_port()
    return [
        dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(processes)
    ]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_all(children, timeout):
    """Exit codes of the children; after the first failure or the timeout the rest is ended."""
    end = time.monotonic() + timeout
    while any(child.wait(0) is None for child in children):
        failed = any(child.wait(0) not in (None, 0) for child in children)
        if failed or time.monotonic() > end:
            break
        time.sleep(0.02)
    for child in children:
        if child.wait(1) is None:  # most end by themselves
            child.process.kill()
    return [child.wait() for child in children]


def on_two_ranks(check):
    """Runs check(rank) in two processes that communicate through gloo."""
    receivers = []
    for variables in torchrun_variables(2):
        receiver, sender = forkserver.Pipe(duplex=False)
        forkserver.Process(target=_check_on_rank, args=(check, variables, sender)).start()
        receivers.append(receiver)
    for receiver in receivers:
        assert receiver.poll(60), "no answer"
        failure = receiver.recv()
        assert failure is None, failure


def _check_on_rank(check, variables, sender):
    os.environ.update(variables)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        init_distributed("cpu", "off", timeout=30)
        check(int(variables["RANK"]))
        destroy_process_group()
        sender.send(None)
    except BaseException:
        sender.send(traceback.format_exc())
        raise


@contextmanager
def interrupted_after_saving():
    """Ctrl-C as soon as a checkpoint is written; yields the list of what was saved."""
    save, saved = checkpoint.save, []

    def save_and_stop(*args, **kwargs):
        save(*args, **kwargs)
        saved.append(args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        yield saved


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A checkpoint that one epoch of the smallest run left."""
    folder = tmp_path_factory.mktemp("pretrained")
    args = main_moco.parse_args([*TINY, "--epochs", "1", "--output-dir", str(folder)])
    main_moco.main(args)
    return folder / "checkpoint.pth"


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """A folder of 160 digits without labels."""
    folder, images = tmp_path_factory.mktemp("digits"), load_splits(open_source("digits")).train
    for i in range(160):
        write_png(images.read(i), str(folder / f"{i}.png"))
    return folder


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory):
    """A folder of two classes: 8 images of each to train on, 3 of each to validate; 24×24."""
    folder, rng = tmp_path_factory.mktemp("two_classes"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def image_file(tmp_path):
    """Writes an image of noise, [height, width, 3]: name, size → path."""

    def write(name, height=40, width=60, mode="RGB", **save):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path, **save)
        return path

    return write
