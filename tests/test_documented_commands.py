"""Each command of README, docs/ and the docstrings runs as a user would run it, on tiny images.

The commands run in one folder: what one writes is what a later one reads, under the documented
name. Flags that make a run small are appended. Single processes stand in for those of one host.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import official
import pytest
import sklearn.datasets
import timm
import torch
from conftest import CPU, ROOT, launch
from PIL import Image
from sklearn.datasets import load_digits
from test_readme import DOCUMENTS, SCRIPTS, docstrings, read, shell_lines
from torch.distributed.run import get_args_parser

import vits
from engine.data.named import NAMED_SETS

# Commands that do not run here, and why. All others do.
NOT_RUN = {
    r"pip install .*(?<!digits\.txt)$": "it downloads; .ci/run sets up and tests",
    r"-m pytest|bin/ruff|measure_official\.py": ".ci/run runs them; the official code is elsewhere",
    r"benchmarks/\w+\.py": "tests/scripts/test_benchmarks.py runs them",
    r"^sbatch ": "tests/scripts/test_slurm.py runs it with stand-ins for Slurm",
    r"^apt-get |^hf upload |hf-hub:": "they need a network, or an account of the Hub",
    r"load_dataset|DatasetDict": "Python of another library, on a data set of the Hub",
    r"^\d+ gradient spikes|^epoch \d": "they are the output of a command",
}
# Names of the documents, and what they stand for here; /data/… and /my/… lie in the folder.
PLACES = {
    **dict.fromkeys(["DIR", *NAMED_SETS], "data/imagenet"),
    "CKPT": "runs/vit_small_300/checkpoint.pth",
    "linear_lr3.pth": "runs/vit_small_300_lincls/linear_lr3.pth",
    "runs/RUN_lincls/linear_lr3.pth": "runs/vit_small_300_lincls/linear_lr3.pth",
}
del PLACES["digits"]  # it is here
ARCHS = {  # the first that a name contains
    "resnet": ("-a", "resnet18"),
    "timm/convnext": ("-a", "timm/convnext_atto"),
    "timm/vit": ("-a", "timm/vit_tiny_patch16_224"),
    "vit_conv": ("-a", "vit_conv_nano"),
    "vit": ("-a", "vit_nano"),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with recipes/, images, and weights of other projects; 150 digits."""
    monkeypatch.chdir(tmp_path)
    digits, labels = load_digits(return_X_y=True)
    few = digits[:150], labels[:150]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda return_X_y: few)
    Path("recipes").symlink_to(ROOT / "recipes")
    Path("docs").mkdir()
    Path("docs/imagenet100.txt").symlink_to(ROOT / "docs/imagenet100.txt")
    names = read(ROOT / "docs/imagenet100.txt").split()[:3]
    rng = np.random.default_rng(0)
    for i in range(18):
        path = Path("data/imagenet", "val" if i < 6 else "train", names[i % 3], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    Path("my/tiles").mkdir(parents=True)
    for i in range(4):
        np.save(f"my/tiles/{i}.npy", rng.integers(0, 10000, (40, 40, 6), dtype=np.uint16))
    Path("data/imagenet_v2").mkdir()
    links = {"my/labelled": "", "my/train_classes": "train", "my/test_classes": "val",
             "my/images": f"train/{names[0]}", "my/unlabelled": f"train/{names[0]}",
             "data/imagenet_a": "val", "data/imagenet_v2/val": "val"}  # fmt: skip
    for link, place in links.items():
        Path(link).symlink_to(tmp_path / "data/imagenet" / place)
    weights = vits.vit_nano().state_dict()
    for name in ("deit_base.pth", "mae_pretrain_vit_base.pth"):
        torch.save({"model": weights}, name)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), "dino_deitsmall16.pth")
    torch.save({"state_dict": official.mmpretrain_names(weights)}, "mmselfsup.pth")


def documented_commands():
    """(script, words, number of hosts) of each, once: pre-training first, the shortest first."""
    found = set()
    for text in (*map(read, DOCUMENTS), *docstrings()):
        for line in shell_lines(text):
            match = re.search(r"(?:(torchrun .*)|python )\b(main_\w+|tools/\w+)\.py (.*)", line)
            if match:
                words = shlex.split(match[3], comments=True)
                words = (PLACES.get(word, word).removeprefix("/") for word in words)
                hosts = 2 if "nnodes=2" in (match[1] or "") else 1
                found.add((match[2], tuple(words), hosts))

    def key(command):
        name, words, _ = command
        training = name.startswith("main_") and "--evaluate" not in words
        return name != "main_moco", not training, "--resume" in words, len(words), words

    return sorted(found, key=key)


def make_small(name, words, runs):
    """The words of a command with flags that make it small. runs: what earlier ones trained."""
    args = SCRIPTS[name].parse_args(words)
    if name.startswith("tools/"):
        Path(getattr(args, "out", "none")).unlink(missing_ok=True)
        device = () if name == "tools/convert" or "curves" in words else CPU
        return [*words, *device, *small_arch(args, img_size=bool(device))]
    flags = [*CPU, *small_arch(args), "--batch-size", 60 if args.data == "digits" else 4]
    if args.data in PLACES:  # that of a recipe, whose paths stay
        flags += [PLACES[args.data], "--output-dir", args.output_dir]
        flags += ["--pretrained", args.pretrained] if vars(args).get("pretrained") else []
    if not args.epochs or getattr(args, "evaluate", False):
        return [*words, *flags]
    run = args.output_dir or (name, args.arch, vars(args).get("pretrained"))
    if run in runs and not args.resume:
        flags += ["--output-dir", f"runs/{len(runs)}"]
    runs.append(run)
    flags += ["--epochs", 1]
    if name != "main_lincls":
        flags += ["--warmup-epochs", 0]
    if name == "main_finetune":
        flags += ["--min-lr", 0, *(("--ema", 0.1) if args.ema else ())]
    if name == "main_moco":
        flags += ["--moco-dim", 16, "--moco-mlp-dim", 32]
    return [*words, *flags]


def small_arch(args, img_size=True):
    arch = vars(args).get("arch") or "none"
    flags = next((flags for part, flags in ARCHS.items() if part in arch), ())
    return [*flags, *(("--img-size", 32) if flags and img_size else ())]


def other_lines():
    """The lines of each document that call no script of ours, as one text."""
    for document in DOCUMENTS:
        lines = [line for line in shell_lines(read(document)) if not line.startswith("#")]
        lines = [line for line in lines if not re.search(r"(main_\w+|tools/\w+)\.py ", line)]
        lines = [line for line in lines if not any(re.search(kind, line) for kind in NOT_RUN)]
        if lines:
            yield "\n".join(lines).replace("/data/imagenet", f"{os.getcwd()}/data/imagenet")


@pytest.mark.slow
def test_every_documented_command_runs(script, workplace):
    """Failures are collected: a command may need what an earlier one should have written."""
    failures, runs = [], []

    def check(words, code, out, err):
        if code or err:
            failures.append(f"{shlex.join(map(str, words))}\n{err}")

    def run_in_bash(text):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, "PATH": path}
        done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
        check([text], done.returncode, done.stdout, done.stderr)

    first, *last = sorted(other_lines(), key=lambda text: "python" in text)
    run_in_bash(first)
    for name, words, hosts in documented_commands():
        argv = f"{name}.py", *make_small(name, words, runs)
        if hosts == 1:
            check(argv, *script(*argv))
        else:
            done = launch(hosts, *argv)
            check(argv, done.returncode, done.stdout, done.stderr)
    for text in last:
        run_in_bash(text)
    assert not failures, "\n".join(failures)


def found(pattern):
    """What the groups of a pattern match in the lines of all commands."""
    texts = (*map(read, DOCUMENTS), *docstrings())
    lines = "\n".join(line for text in texts for line in shell_lines(text))
    return sorted(set(re.findall(pattern, lines)))


def test_torchrun_knows_its_documented_flags():
    for words in found(r"torchrun (.*)"):
        get_args_parser().parse_args(shlex.split(words))


@pytest.mark.parametrize("name, words", found(r"(benchmarks/\w+\.py) +(\S.*)"))
def test_a_benchmark_knows_its_documented_flags(script, monkeypatch, name, words):
    """Its own parser reads them, and then ends it; accuracy.py passes others on."""
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse_and_end(self, *args, **kwargs):
        _, unknown = parse_known_args(self, *args, **kwargs)
        monkeypatch.undo()
        if unknown and "accuracy" in name:
            SCRIPTS["main_moco"].parse_args(["DIR", *unknown])
            unknown = []
        sys.exit(f"unknown: {unknown}" if unknown else "understood")

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_end)
    assert script(name, *shlex.split(words))[0] == "understood"


def test_the_code_for_another_logger_reads_a_log(tmp_path, monkeypatch):
    """That of docs/troubleshooting.md, with a stand-in for mlflow."""
    logged = []
    mlflow = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.chdir(tmp_path)
    Path("runs/digits").mkdir(parents=True)
    Path("runs/digits/log.jsonl").write_text('{"epoch": 0.5, "step": 7, "loss": 3.2}\n')
    [code] = re.findall(
        r"^```python\n(.*?)^```$", read(ROOT / "docs/troubleshooting.md"), re.M | re.S
    )
    exec(code, {})
    assert logged == [(7, {"epoch": 0.5, "loss": 3.2})]
