"""Random command lines: each runs, or is refused in one line."""

import argparse
import math
import os
import re
import resource
import shutil
import string
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

import main_finetune
import main_lincls
import main_moco
from engine import cli
from engine.errors import UserError

MEMORY = 4 * 2**30  # bytes that a line may allocate; that more are refused is one line, too

# The smallest runs, on 8 images; random flags come after these and win.
BASE = "photos --img-size 16 --batch-size 4 --epochs 1 --workers 0 --device cpu --output-dir out"
SCRIPTS = {
    "main_moco.py": (
        main_moco,
        f"{BASE} -a vit_nano --patch-size 4 --warmup-epochs 0 --optimizer adamw --moco-dim 8 "
        "--moco-mlp-dim 16",
    ),
    "main_lincls.py": (main_lincls, f"{BASE} --pretrained moco/checkpoint.pth"),
    "main_finetune.py": (
        main_finetune,
        f"{BASE} --pretrained moco/checkpoint.pth --warmup-epochs 0 --lr 1",
    ),
}

PRINTABLE = string.printable.replace("/", "")  # no path outside the folder

NUMBERS = (
    "0 1 2 3 4 5 6 8 12 16 17 32 255 256 65535 65536 1000000 1000000000 2147483647 2147483648 "
    "4294967295 4294967296 9223372036854775807 9223372036854775808 1" + 30 * "0" + " 0.0 0.1 0.5 "
    "0.99 1.0 1.5 1e-3 1e-9 1e-30 1e-45 1e-308 5e-324 1e9 1e15 3.4e38 1e39 1e308"
).split()
NONSENSE = [
    "", " ", "-", "--", "-1", "-0.5", "-1e9", "nan", "-nan", "inf", "-inf", "1e309", "0x10", "1_0",
    "١٢", "½", "1,5", "1 2", " 3 ", "two", "None", "True", "ü", "\N{PILE OF POO}", "a\nb", "a\tb",
    "\x1b[31m", "%s", "%(prog)s", "{}", "\udcff", "@", "@nowhere.txt", "@photos", "@notes.txt",
    "@recipe.txt", "@itself.txt", "x" * 300, "*", "..",
]  # fmt: skip
PATHS = (
    "photos photos/train empty nowhere nowhere/deep notes.txt notes.txt/below auto out moco linear "
    "tuned moco/checkpoint.pth linear/checkpoint.pth linear/linear_lr0.1.pth tuned/best.pth digits"
).split()
NAMES = (
    "vit_nano vit_conv_nano resnet18 timm/resnet10t timm/levit_128s vit_nono timm/ "
    "timm/resnet18.a1_in1k RESNET50 none rand-m9-mstd0.5-inc1 rand-m10-n1 augmix-m3 original "
    "rand-m9-mstd0.5-inc1-x rand-m rand-nx original-mstdx rand-m99 v0"
).split()


def flags(script):
    """The actions of the script's own parser, so that a new flag is tested without a line here."""
    actions = []

    def record(parser, *_):
        actions.extend(parser._actions)
        raise UserError("recorded")

    with pytest.MonkeyPatch.context() as patch, suppress(UserError):
        patch.setattr(cli.Parser, "parse_args", record)
        script.parse_args([])
    return actions


def accepts(action, word):
    try:
        return action.type(word) is not None
    except (argparse.ArgumentTypeError, ValueError):
        return False


def random_word(action, rng):
    """A value of a flag, mostly of its kind."""
    if rng.random() < 0.12:
        signs = "".join(rng.choices(PRINTABLE, k=rng.randrange(5)))
        return rng.choice([*NONSENSE, *NONSENSE, *NUMBERS, *PATHS, signs])
    if action.type:
        words = [word for word in NUMBERS + PATHS + NAMES if accepts(action, word)]
        return rng.choice(words or NUMBERS)
    return rng.choice(list(action.choices or PATHS + NAMES))


def random_line(name, rng):
    """The smallest run, or rarely nothing, and one to five flags."""
    script, base = SCRIPTS[name]
    words = base.split() if rng.random() < 0.95 else []
    for action in rng.choices(flags(script), k=rng.randint(1, 5)):
        if action.option_strings:
            words.append(rng.choice(action.option_strings))
        if action.nargs != 0:
            several = rng.randrange(4) if action.nargs else 1
            words += [random_word(action, rng) for _ in range(several)]
    return words


def takes_long(args):
    """Whether a valid line would run too long for a test, which then checks its flags alone."""
    large = args.img_size and math.prod(args.img_size) > 64**2
    return args.epochs > 2 or args.workers > 1 or large or getattr(args, "compile", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, checkpoints of each script, and other files."""
    root = tmp_path_factory.mktemp("folder")
    for i in range(16):
        path = root / ("photos/train/a", "photos/train/b", "photos/val/a", "photos/val/b")[i % 4]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 16 * i, np.uint8)).save(path / f"{i}.png")
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("no checkpoint, no image\n")
    (root / "recipe.txt").write_text("--seed 1  # the only flag\n")
    (root / "itself.txt").write_text("@itself.txt\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, folder in zip(SCRIPTS, ("moco", "linear", "tuned")):
            script, base = SCRIPTS[name]
            script.main(script.parse_args([*base.split(), "--output-dir", folder]))
    return root


@pytest.fixture
def run_line(folder, tmp_path, monkeypatch, script):
    """Runs a script in a copy of the folder, with limited memory → exit code, stderr, the copy.

    None if it would take long and its flags are right.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the same everywhere
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # what takes most of the time

    def run(name, words):
        here = tmp_path / "above" / "here"
        shutil.rmtree(here.parent, ignore_errors=True)
        shutil.copytree(folder, here, copy_function=os.link)
        monkeypatch.chdir(here)
        with suppress(UserError, SystemExit):  # the script itself will print it
            if takes_long(SCRIPTS[name][0].parse_args(words)):
                return None
        code, _, err = script(name, *words)
        return code, err, here

    before = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(FileNotFoundError):  # Linux has it
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield run
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_line_runs_or_is_refused_in_one_line(name, run_line, count):
    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),  # it is slow, and knows of one tmp_path
    )
    # Drawn by hypothesis alone, most of 100 lines were --help.
    @given(st.randoms(use_true_random=True).map(lambda rng: random_line(name, rng)))
    def check(words):
        ran = run_line(name, words)
        if ran is None:
            return
        code, err, here = ran
        if code:
            assert code in (1, 2) and err.count("\n") == 1 and err.startswith(f"{name}: error: ")
        for log in here.rglob("log.jsonl"):
            assert not re.search("NaN|Infinity", log.read_text())
        ends.append(code)

    ends = []
    check()
    if count == 100:
        assert ends.count(0) > 5 and len(ends) - ends.count(0) > 5


SENSELESS = {
    "run below a file": ("main_moco.py", "--output-dir notes.txt/out", "can't write to"),
    "resume a folder": ("main_moco.py", "--resume moco", "no checkpoint at moco"),
    "variable not set": ("main_moco.py", "--resume=", "--resume is an empty text"),
    "recipe names itself": ("main_moco.py", "@itself.txt", "it names itself"),
    "flag does nothing": ("main_lincls.py", "--knn-bank 5", "--knn-bank needs --knn"),
    "nothing moves": ("main_finetune.py", "--ema 1", "'1' is not a number from 0, below 1"),
    "backbone stands still": ("main_finetune.py", "--layer-decay 0", "main_lincls.py"),
    "one image a batch": ("main_finetune.py", "--repeated-aug 5", "more than --batch-size 4"),
    "policy that never works": ("main_finetune.py", "--aa augmix-a0", "timm knows no augmentation"),
}


@pytest.mark.parametrize("what", SENSELESS)
def test_flags_that_make_no_sense_are_refused(what, run_line):
    name, words, message = SENSELESS[what]
    code, err, _ = run_line(name, [*SCRIPTS[name][1].split(), *words.split()])
    assert code == 2 and message in err and err.count("\n") == 1
