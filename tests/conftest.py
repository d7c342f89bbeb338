import multiprocessing
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import set_fused_attn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import main_moco  # noqa: E402
from moco import checkpoint  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]  # fmt: skip  # noqa: E501

# The smallest run that has everything: 5 steps an epoch.
TINY = (
    "digits -a vit_nano --img-size 16 --patch-size 4 --batch-size 256 --optimizer adamw --lr 1e-3 "
    "--epochs 2 --warmup-epochs 1 --moco-dim 32 --moco-mlp-dim 64 --moco-t 0.2 --moco-m-cos "
    "--workers 0 --knn-every 1 --device cpu --print-freq 1"
).split()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    set_fused_attn(True)  # set_up may have chosen otherwise


@pytest.fixture
def script(monkeypatch, capfd):
    """Runs a script of ours in this process, as `python NAME ARGS…` → exit code, stdout, stderr."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return stop.value.code, *capfd.readouterr()

    return run


def launch(processes, name, *args, **env):
    """`torchrun --nproc_per_node=PROCESSES NAME ARGS…`, one as `python NAME ARGS…` → its result."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return subprocess.run(
        [sys.executable, *torchrun * (processes > 1), str(ROOT / name), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


# Forked from a process that has imported everything: to start and kill one takes no time.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["conftest", "main_lincls", "main_finetune", "sklearn.datasets"])


class Child:
    """`python NAME ARGS…` in the background, its output in a file; one CPU thread."""

    def __init__(self, folder, name, *args):
        self.output = Path(folder, "output.txt")
        self.output.write_text("")
        argv = [name, *map(str, args)]
        self.process = forkserver.Process(target=_run_child, args=(argv, str(self.output)))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout=120):
        """Its exit code; None if it still runs after that many seconds."""
        self.process.join(timeout)
        return self.process.exitcode

    def said(self):
        return self.output.read_text()


def _run_child(argv, output):
    file = os.open(output, os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


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
