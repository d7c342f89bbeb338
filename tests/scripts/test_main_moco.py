"""The pre-training script as its users run it."""

import json
import multiprocessing
import os
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY, interrupted_after_saving, launch

import main_moco
from engine import checkpoint, flags, plots
from engine.launch import Env
from engine.log import MEASURED, read_log
from moco import PAPER, MoCo, Policy


def weights(folder):
    return checkpoint.load(folder / checkpoint.LAST)["state_dict"]


def logged(folder, key):
    return [line[key] for line in read_log(folder / "log.jsonl") if key in line]


def test_a_run_leaves_what_it_promises(succeed, tmp_path):
    more = ("--tensorboard", "--save-every", 1)
    out = succeed("main_moco.py", *TINY, "--output-dir", tmp_path, *more)
    files = {path.name for path in tmp_path.iterdir()}
    expected = {"args.json", "log.jsonl", "checkpoint.pth", "views.png", "curves.png"}
    assert expected | {"checkpoint_0001.pth", "checkpoint_0002.pth"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert json.loads((tmp_path / "args.json").read_text())["args"]["arch"] == "vit_nano"

    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines if "knn" in line] == [0, 5, 10]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert lines[1]["loss"] == pytest.approx(lines[1]["chance"], rel=0.1)
    assert "before training" in out and "1,437 images to train on, 360 to validate" in out

    state = checkpoint.load(tmp_path / checkpoint.LAST)
    assert {"epoch", "arch", "state_dict", "optimizer", "scaler", "args"} <= state.keys()
    assert (state["epoch"], state["iteration"], state["num_heads"]) == (2, 10, 4)


def test_interrupted_and_resumed_equals_uninterrupted(script, succeed, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed("main_moco.py", *TINY, "--output-dir", whole)

    argv = ("main_moco.py", *TINY, "--output-dir", broken, "--resume", "auto")
    with interrupted_after_saving() as saved:
        code, _, err = script(*argv)
    assert code == 130 and "--resume auto" in err and len(saved) == 1
    succeed(*argv)
    resumed = weights(broken)
    for key, value in weights(whole).items():
        assert torch.equal(value, resumed[key]), key
    for line, other in zip(*(read_log(folder / "log.jsonl") for folder in (whole, broken))):
        assert {k: v for k, v in line.items() if k not in MEASURED} == {
            k: v for k, v in other.items() if k not in MEASURED
        }
    assert "nothing left to do" in succeed(*argv)


@pytest.mark.parametrize("amp", ["bf16", pytest.param("off", marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ["vit_nano", "vit_conv_nano", "resnet18"])
def test_other_architectures_and_precisions_train(succeed, tmp_path, few_digits, arch, amp):
    argv = " ".join(TINY[1:]).replace("vit_nano", arch)
    if arch == "resnet18":
        argv = argv.replace("--img-size 16 --patch-size 8", "--img-size 32")
    argv = (*argv.split(), "--amp", amp, "-b", 32, "--optimizer", "lars", "--clip-grad", 1)
    succeed("main_moco.py", few_digits, *argv, "--epochs", 1, "--output-dir", tmp_path)


def test_augmentation_flags_become_the_policy():
    assert flags.augmentation_policy(main_moco.parse_args(["digits"])) == PAPER
    argv = "digits --color-jitter .8 .8 .4 .2 --jitter-p .5 --grayscale-p .1 --blur-p 0 "
    argv += "--solarize-p 0 .3 --hflip-p .4 --vflip-p .5"
    expected = Policy(0.8, 0.8, 0.4, 0.2, 0.5, 0.1, (0, 0), (0, 0.3), 0.4, 0.5)
    assert flags.augmentation_policy(main_moco.parse_args(argv.split())) == expected


def test_augmentation_flags_change_the_views(succeed, refusal, tmp_path, few_digits):
    argv = ("main_moco.py", few_digits, *TINY[1:], "-b", 32, "--knn-every", 0, "--epochs", 1)
    views = []
    for i, flags_ in enumerate([[], ["--vflip-p", 1]]):
        succeed(*argv, *flags_, "--output-dir", tmp_path / str(i))
        views.append((tmp_path / str(i) / "views.png").read_bytes())
    assert views[0] != views[1]
    assert "half a turn" in refusal(*argv, "--color-jitter", 0, 0, 0, 1, "--output-dir", tmp_path)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_chunks_change_nothing(succeed, tmp_path, few_digits, amp):
    for chunk in (0, 12):
        argv = ("--output-dir", tmp_path / str(chunk), "--amp", amp, "--knn-every", 0, "-b", 32)
        argv += ("--epochs", 1, "--moco-mlp-dim", 8, "--encode-chunk", chunk)  # as for ranks
        succeed("main_moco.py", few_digits, *TINY[1:], *argv)
    whole, chunked = (logged(tmp_path / str(chunk), "loss") for chunk in (0, 12))
    assert len(whole) == 5
    assert chunked == pytest.approx(whole, rel=1e-5 if amp == "off" else 1e-2)


def test_the_bank_of_knn_changes_knn_alone(succeed, tmp_path):
    argv = (*TINY, "--lr", 0, "--moco-m", 1, "--output-dir", tmp_path, "--save-every", 1)
    succeed("main_moco.py", *argv, "--epochs", 1)
    flags = ("--epochs", 2, "--resume", "auto", "--allow-changed-args", "--knn-bank", 20)
    assert "dips" not in succeed("main_moco.py", *argv, *flags)
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "knn" in line]
    assert lines[-1]["knn"] < lines[-2]["knn"] - 5
    assert lines[-1]["rankme"] == pytest.approx(lines[-2]["rankme"], rel=1e-3)


def test_init_from_takes_the_weights_alone(succeed, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    succeed("main_moco.py", *TINY, "--epochs", 1, "--output-dir", first)
    init = ("--init-from", first / checkpoint.LAST)
    succeed("main_moco.py", *TINY, "--epochs", 1, "--output-dir", second, *init)
    begun = read_log(second / "log.jsonl")[0]
    assert (begun["step"], begun["knn"]) == (0, logged(first, "knn")[-1])


def test_images_without_labels_have_a_rankme_and_no_knn(succeed, tmp_path, image_file):
    for i in range(8):
        image_file(f"images/{i}.jpg")
    argv = (*TINY[1:], "--batch-size", 4, "--workers", 2, "--output-dir", tmp_path / "run")
    out = succeed("main_moco.py", tmp_path / "images", *argv)
    assert "kNN is off: the images have no labels" in out and "before training: RankMe " in out
    assert len(logged(tmp_path / "run", "rankme")) == 3 and not logged(tmp_path / "run", "knn")


BAD = {
    "missing DIR": ("nowhere {tiny}", "nowhere does not exist"),
    "a file for DIR": ("{root}/README.md {tiny}", "is neither a folder nor a .txt"),
    "empty DIR": ("{tmp}/empty {tiny}", "holds no images"),
    "no DIR": ("-a vit_nano", "required: DIR"),
    "unknown arch": ("digits {tiny} -a vit_smol", "did you mean 'vit_small'"),
    "batch larger than the data": ("digits {tiny} -b 5000", "1437 images don't fill one"),
    "missing resume path": ("digits {tiny} --resume nope.pth", "no checkpoint at nope.pth"),
    "missing init path": ("digits {tiny} --init-from nope.pth", "no checkpoint at nope.pth"),
    "missing recipe": ("@nope.txt", "nope.txt"),
    "unknown flag in a recipe": ("@{tmp}/bad.txt", "unrecognized arguments: --lerning-rate 3"),
    "no number": ("digits {tiny} --epochs ten", "'ten' is not a whole number"),
    "negative": ("digits {tiny} --lr -1", "'-1' is not a number, 0 or more"),
    "long warm-up": ("digits {tiny} --warmup-epochs 9", "9 is more than --epochs 2"),
    "two beginnings": ("digits {tiny} --init-from a --resume b", "give one of them"),
    "fp16 on a CPU": ("digits {tiny} --amp fp16", "--amp fp16 needs a CUDA GPU"),
    "a file for the output": ("digits {tiny} --output-dir {tmp}/bad.txt", "can't write to"),
    "stop-grad on a ResNet": (
        "digits -b 64 -a resnet18 --stop-grad-conv1 --device cpu", "is for ViTs",
    ),
    "a ResNet on tiny images in bf16": (
        "digits -b 64 -a resnet18 --img-size 16 --amp bf16 --device cpu", "off, or a larger",
    ),
    "cifar without network": ("cifar10 {tiny} --data-root {root}/README.md", "no cifar10"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(refusal, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_text("digits\n--lerning-rate 3  # mistyped\n")
    line, words = BAD[name]
    line = line.format(tmp=tmp_path, root=ROOT, tiny=" ".join(TINY[1:]))
    run = tmp_path / "run"
    assert words in refusal("main_moco.py", "--output-dir", run, *line.split())
    assert not run.exists()


def test_the_workers_of_the_loader_end_with_the_training(succeed, tmp_path, monkeypatch):
    frames = []  # one that a library keeps holds all that called it, main() and its loader, too
    monkeypatch.setattr(plots, "plot_curves", lambda folder: frames.append(sys._getframe()))
    argv = (*TINY, "--epochs", 1, "--knn-every", 0, "--workers", 2, "--output-dir", tmp_path)
    succeed("main_moco.py", *argv)
    assert frames and not multiprocessing.active_children()


@pytest.mark.slow
def test_a_folder_with_a_run_is_not_overwritten(succeed, refusal, tmp_path):
    argv = ("main_moco.py", *TINY, "--epochs", 1, "--output-dir", tmp_path)
    succeed(*argv)
    before = (tmp_path / checkpoint.LAST).read_bytes()
    assert "holds a run: --resume auto" in refusal(*argv)
    changed = refusal(*argv, "--resume", "auto", "--lr", 2, "--moco-t", 1)
    assert "--lr 0.001 → 2.0, --moco-t 0.2 → 1.0" in changed
    assert (tmp_path / checkpoint.LAST).read_bytes() == before


def test_weights_that_are_not_finite_are_never_saved(refusal, tmp_path, monkeypatch):
    argv = (*TINY, "--output-dir", tmp_path, "--resume", "auto")
    monkeypatch.setattr(checkpoint, "save", lambda *args: None)
    update = MoCo.update_momentum_encoder

    def poisoned(model, m):  # the last step of the first epoch
        update(model, m)
        poisoned.steps += 1
        if poisoned.steps == 5:
            model.momentum_encoder.cls_token.data.fill_(torch.nan)

    poisoned.steps = 0
    monkeypatch.setattr(MoCo, "update_momentum_encoder", poisoned)
    err = refusal("main_moco.py", *argv, code=1)
    assert "weights are no longer finite in step 5 (epoch 1" in err


def test_a_run_continues_in_another_precision(script, succeed, tmp_path):
    argv = (*TINY, "--knn-every", 0, "--output-dir", tmp_path, "--resume", "auto")
    with interrupted_after_saving():
        assert script("main_moco.py", *argv, "--amp", "off")[0] == 130
    assert "resumed after step 5 of 10" in succeed("main_moco.py", *argv, "--amp", "bf16")
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    scale = torch.amp.GradScaler("cpu", enabled=True).state_dict()  # as a run in fp16 left it
    torch.save(saved | dict(scaler=scale), tmp_path / checkpoint.LAST)
    succeed("main_moco.py", *argv, "--amp", "off")


def test_a_loss_that_is_not_finite_stops_the_run(refusal, tmp_path):
    argv = ("--output-dir", tmp_path, "--amp", "off", "--lr", 1e30, "--warmup-epochs", 0)
    err = refusal("main_moco.py", *TINY, *argv, code=1)
    assert "the loss became nan in step" in err and "last good checkpoint: none yet" in err


def test_fp16_that_skips_every_step_stops_the_run(succeed, refusal, tmp_path, monkeypatch):
    def scaled(model, *views, forward=MoCo.forward):
        loss, metrics = forward(model, *views)
        loss.register_hook(lambda grad: grad * factor)
        return loss, metrics

    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=2.0**-4)
    monkeypatch.setattr(Env, "grad_scaler", lambda env: scaler())
    monkeypatch.setattr(MoCo, "forward", scaled)
    argv = (*TINY, "--knn-every", 0, "--output-dir")
    factor = 1
    succeed("main_moco.py", *argv, tmp_path / "healthy")
    assert set(logged(tmp_path / "healthy", "loss_scale")) == {2.0**-4}

    factor = torch.inf
    err = refusal("main_moco.py", *argv, tmp_path / "overflowing", code=1)
    assert "gradients overflow in fp16 at a loss scale of 0.000488281 in step 7 (epoch 2" in err


# Several processes.


def run_on(world_sizes, folder, name, *argv):
    """Runs the script with each number of processes → the folders that it wrote to."""
    tiny = " ".join(TINY[1:])
    if "resnet18" in argv:
        tiny = tiny.replace("--patch-size 8", "")
    argv = (*tiny.split(), "--amp", "off", "--epochs", 1, *argv)
    for world_size in world_sizes:
        done = launch(world_size, name, *argv, "--output-dir", folder / str(world_size))
        assert done.returncode == 0, done.stderr
    return [folder / str(world_size) for world_size in world_sizes]


def differences(folder, other):
    """Relative differences of all weights and statistics, absolute where a norm is below 1e-5.

    What is 0 but for rounding, as a bias before a BatchNorm, has no relative one.
    """
    theirs = weights(other)
    for key, value in weights(folder).items():
        if value.is_floating_point():
            scale = value.norm() if value.norm() > 1e-5 else 1
            yield ((theirs[key] - value).norm() / scale).item(), key


@pytest.mark.parametrize("world_sizes", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, world_sizes):
    # Few hidden units: that rounding switches one of them on or off (in_float64.py) is rare then.
    argv = ["digits", "--moco-mlp-dim", 8, "--optimizer", "lars", "--lr", 0.3, "--knn-every", 0]
    one, *others = run_on(world_sizes, tmp_path, "main_moco.py", *argv)
    assert len(logged(one, "loss")) == 5
    for other in others:
        assert logged(other, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
        assert max(differences(one, other))[0] < 1e-5, max(differences(one, other))


@pytest.mark.parametrize("arch", ["vit_nano", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_two_ranks_equal_one_in_float64(tmp_path, few_digits, arch):
    argv = [few_digits, "-a", arch, "-b", 32, "--knn-every", 0]
    one, two = run_on((1, 2), tmp_path, "tests/moco/in_float64.py", *argv)
    assert logged(two, "loss") == logged(one, "loss")
    assert max(differences(one, two))[0] < 1e-9, max(differences(one, two))
    if arch == "vit_nano":  # chunks that divide no batch, of 32 or 16
        argv += ["--encode-chunk", 5]
        [chunked] = run_on((2,), tmp_path / "chunked", "tests/moco/in_float64.py", *argv)
        assert max(differences(one, chunked))[0] < 1e-9, max(differences(one, chunked))


def test_batch_that_does_not_divide_is_refused_once(tmp_path):
    done = launch(2, "main_moco.py", *TINY, "--batch-size", 63, "--output-dir", tmp_path / "run")
    assert done.returncode != 0 and not os.path.exists(tmp_path / "run")
    assert done.stderr.count("main_moco.py: error: --batch-size 63") == 1
