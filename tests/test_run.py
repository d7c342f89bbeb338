"""A folder belongs to one run at a time, and a run to its data, its arguments and its signals."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, Child, interrupted_after_saving, torchrun_variables
from PIL import Image

from engine import checkpoint, plots
from engine import run as run_module
from engine.loader import TwoCrops
from engine.log import read_log
from moco import scaled_lr, warmup_cosine_lr

# Runs until it is stopped: an epoch has 44 steps.
ENDLESS = (*TINY, "--batch-size", 32, "--epochs", 1000, "--knn-every", 0)


def wait_for_log(folder, child, lines=1):
    """Until the run has trained and written so many lines."""
    while len(read_log(folder / "log.jsonl")) < lines:
        assert child.wait(0.02) is None, child.said()


# One run in a folder


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(script, tmp_path):
    run = tmp_path / "run"
    first = Child(tmp_path, "main_moco.py", *ENDLESS, "--workers", 1, "--output-dir", run)
    wait_for_log(run, first)
    before = sorted(path.name for path in run.iterdir())
    for flags in ((), ("--resume", "auto"), ("--epochs", 1)):
        code, out, err = script("main_moco.py", *ENDLESS, *flags, "--output-dir", run)
        assert (code, err.count("\n")) == (2, 1), out + err
        assert f"another run is using {run} (process {first.pid} on " in err
        assert sorted(path.name for path in run.iterdir()) == before
    assert first.wait(0) is None

    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    argv = ("--batch-size", 256, "--epochs", 1, "--output-dir", run, "--resume", "auto")
    # Free again, although the worker of the killed process may live for some seconds.
    assert script("main_moco.py", *TINY, *argv)[0] == 0


def test_what_is_kept_of_a_cleared_run_is_not_overwritten(script, tmp_path):
    argv = (*TINY, "--epochs", 1, "--knn-every", 0, "--save-every", 1, "--output-dir", tmp_path)
    assert script("main_moco.py", *argv)[0] == 0
    (tmp_path / checkpoint.LAST).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for flags in ((), ("--resume", "auto")):
        code, _, err = script("main_moco.py", *argv, *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{tmp_path} holds checkpoint_0001.pth of a run: --output-dir starts" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / f"{checkpoint.LAST}.tmp").touch()  # instead, it was killed in its first save
    assert script("main_moco.py", *argv, "--resume", "auto")[0] == 0
    (tmp_path / checkpoint.LAST).unlink()
    kept = ("--resume", tmp_path / "checkpoint_0001.pth")
    code, out, err = script("main_moco.py", *argv, "--epochs", 2, *kept, "--allow-changed-args")
    assert code == 0 and "resumed after step 5" in out, err


def test_another_optimizer_does_not_resume(script, tmp_path):
    argv = (*TINY, "--epochs", 1, "--knn-every", 0, "--output-dir", tmp_path)
    assert script("main_moco.py", *argv)[0] == 0
    argv += ("--resume", "auto", "--allow-changed-args", "--optimizer", "lars", "--epochs", 2)
    code, _, err = script("main_moco.py", *argv)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds the state of adamw, which --optimizer lars can't continue" in err


def test_a_folder_that_a_refused_run_made_is_removed(script, tmp_path):
    run = tmp_path / "run"
    assert script("main_moco.py", *TINY, "-b", 5000, "--output-dir", run)[0] == 2
    assert not run.exists()
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert script("main_moco.py", *TINY, "-b", 5000, "--output-dir", run)[0] == 2
    assert (run / "notes.txt").exists()


# How processes are started


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_started_without_torchrun_are_refused(script, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    code, _, err = script("main_moco.py", *TINY, "--output-dir", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "2 processes were started without torchrun" in err and "use srun torchrun" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_single_task_and_torchrun_in_tasks_are_fine(script, tmp_path, monkeypatch):
    argv = (*TINY, "--epochs", 1, "--knn-every", 0, "--output-dir")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert script("main_moco.py", *argv, tmp_path / "one")[0] == 0
    env = dict(torchrun_variables(2)[0], WORLD_SIZE="1", SLURM_STEP_NUM_TASKS="2")
    child = Child(tmp_path, "main_moco.py", *argv, tmp_path / "two", env=env)
    assert child.wait() == 0, child.said()


def test_rank_without_the_other_variables_is_one_line(script, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, _, err = script("main_moco.py", *TINY, "--output-dir", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "RANK is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in err and "torchrun" in err


# Signals


def test_sighup_saves_and_stops(tmp_path):
    run = tmp_path / "run"
    child = Child(tmp_path, "main_moco.py", *ENDLESS, "--workers", 1, "--output-dir", run)
    wait_for_log(run, child)
    os.kill(child.pid, signal.SIGHUP)
    assert child.wait() == 75, child.said()
    said = child.said()
    assert "SIGHUP: stopping after this step" in said and "Traceback" not in said
    step = int(re.search(r"stopped: saved after step (\d+); --resume auto", said)[1])
    assert checkpoint.load(run / checkpoint.LAST)["iteration"] == step


def use_terminal(path):
    """Makes it the controlling terminal of this process, its input and its output."""
    os.setsid()
    terminal = os.open(path, os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))


def test_a_closed_terminal_saves_and_stops(tmp_path):
    """The progress bar is on the terminal: whatever is written there raises when it is gone."""
    run = tmp_path / "run"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))  # rows, columns
    prepare = partial(use_terminal, os.ttyname(slave))
    child = Child(tmp_path, "main_moco.py", *ENDLESS, "--output-dir", run, prepare=prepare)
    output = b""
    while b"loss" not in output:  # in the bar
        assert child.wait(0.02) is None, output
        if select.select([master], [], [], 0)[0]:
            output += os.read(master, 1000)
    os.close(slave)
    os.close(master)
    code = child.wait(30)
    if code is None:
        child.process.kill()
    assert code == 75, output
    assert checkpoint.load(run / checkpoint.LAST)["iteration"] > 0


def test_under_nohup_sighup_is_ignored(tmp_path):
    run = tmp_path / "run"
    argv = (*TINY, "--batch-size", 32, "--epochs", 1, "--knn-every", 0, "--output-dir", run)
    prepare = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    child = Child(tmp_path, "main_moco.py", *argv, prepare=prepare)
    wait_for_log(run, child)
    os.kill(child.pid, signal.SIGHUP)
    assert child.wait() == 0, child.said()


# Identity of data


@pytest.fixture
def photos(tmp_path):
    """Two classes of 8 images to train on and 4 to validate."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


SMALL = {
    "main_moco.py": (*TINY[1:], "--batch-size", 8, "--knn-every", 0),
    "main_lincls.py": tuple("--batch-size 8 --epochs 2 --workers 0 --device cpu".split()),
    "main_finetune.py": tuple(
        "--batch-size 8 --epochs 2 --workers 0 --device cpu --lr 1 --warmup-epochs 1".split()
    ),
}


def replace_images(photos):
    for path in photos.rglob("*.png"):
        Image.open(path).rotate(90).save(path)


def rename_class(photos):
    for split in ("train", "val"):
        (photos / split / "cat").rename(photos / split / "lynx")


def exchange_labels(photos):
    for i in (1, 2):
        cat, dog = photos / "train" / "cat" / f"{i}.png", photos / "train" / "dog" / f"{i}.png"
        cat.rename(photos / "moved.png")
        dog.rename(cat)
        (photos / "moved.png").rename(dog)


def rename_file(photos):
    (photos / "train" / "cat" / "0.png").rename(photos / "train" / "cat" / "x.png")


@pytest.mark.parametrize("change", [replace_images, rename_class, exchange_labels, rename_file])
def test_other_data_of_equal_size_is_refused(script, tmp_path, photos, change):
    argv = ("main_moco.py", photos, *SMALL["main_moco.py"], "--output-dir", tmp_path / "run")
    with interrupted_after_saving():
        assert script(*argv)[0] == 130
    saved = (tmp_path / "run" / checkpoint.LAST).read_bytes()
    change(photos)
    code, out, err = script(*argv, "--resume", "auto")
    assert (code, err.count("\n")) == (2, 1), out + err
    assert f"other images or labels in {photos}" in err or "was trained on other classes" in err
    assert (tmp_path / "run" / checkpoint.LAST).read_bytes() == saved


def test_args_json_states_the_identity_of_a_run(script, tmp_path, photos):
    argv = (*SMALL["main_moco.py"], "--epochs", 1, "--output-dir", tmp_path / "run")
    assert script("main_moco.py", photos, *argv)[0] == 0
    metadata = json.loads((tmp_path / "run" / "args.json").read_text())
    assert metadata["class_names"] == ["cat", "dog"] and len(metadata["data_digest"]) == 16
    assert metadata["args"]["batch_size"] == 8 and metadata["world_size"] == 1


def test_a_moved_folder_is_the_same_data(script, tmp_path, photos):
    argv = (*SMALL["main_moco.py"], "--output-dir", tmp_path / "run")
    with interrupted_after_saving():
        assert script("main_moco.py", photos, *argv)[0] == 130
    photos.rename(tmp_path / "elsewhere")
    code, out, err = script("main_moco.py", tmp_path / "elsewhere", *argv, "--resume", "auto")
    assert code == 0 and "resumed after step 2 of 4" in out, err


def test_other_images_may_be_allowed(script, tmp_path, photos):
    argv = ("main_moco.py", photos, *SMALL["main_moco.py"], "--output-dir", tmp_path / "run")
    with interrupted_after_saving():
        assert script(*argv)[0] == 130
    replace_images(photos)
    code, out, _ = script(*argv, "--resume", "auto", "--allow-changed-args")
    assert code == 0 and f"resuming with other arguments: other images or labels in {photos}" in out


@pytest.mark.parametrize("name", ["main_lincls.py", "main_finetune.py"])
def test_a_classifier_is_not_resumed_with_its_classes_in_another_order(
    script, tmp_path, photos, pretrained, name
):
    argv = (*SMALL[name], "--pretrained", pretrained, "--output-dir", tmp_path / "run")
    with interrupted_after_saving():
        assert script(name, photos, *argv)[0] == 130
    path = tmp_path / "run" / checkpoint.LAST
    state = torch.load(path, weights_only=True)
    assert state["class_names"] == ["cat", "dog"]
    torch.save(state | dict(class_names=["dog", "cat"]), path)
    for flags in ((), ("--allow-changed-args",)):
        code, out, err = script(name, photos, *argv, "--resume", "auto", *flags)
        assert (code, err.count("\n")) == (2, 1), out + err
        assert "it has dog, cat, the images cat, dog" in err
    torch.save(state, path)
    assert script(name, photos, *argv, "--resume", "auto")[0] == 0


# Another batch size


@pytest.fixture
def shown(monkeypatch):
    """The keys (epoch, index) of the images that main_moco.py shows, in order."""
    keys, make_batch = [], TwoCrops.make_batch

    def record(crops, batch, unreadable):
        keys.extend(batch)
        return make_batch(crops, batch, unreadable)

    monkeypatch.setattr(TwoCrops, "make_batch", record)
    monkeypatch.setattr(plots, "plot_views", lambda *_: keys.clear())  # of the first images
    return keys


def stop_after(script, step, argv):
    """Runs main_moco.py, and stops it by a signal after `step` steps."""
    codes = iter([0] * (step - 1) + [75])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "pending_exit_code", lambda: next(codes))
        code, _, err = script("main_moco.py", *argv)
    assert code == 75 and f"saved after step {step}" in err


@pytest.mark.parametrize(
    "batch_size, step, new_batch_size, new_step, new_total",
    [
        (16, 10, 32, 5, 10),  # after an epoch, before its end is noted
        (16, 4, 32, 2, 10),  # within an epoch, after 64 images
        (16, 14, 8, 28, 40),
    ],
)
def test_another_batch_size_continues_at_the_same_images(
    script, tmp_path, few_digits, shown, batch_size, step, new_batch_size, new_step, new_total
):
    argv = (few_digits, *TINY[1:], "--knn-every", 0, "--output-dir")
    batch = ("--batch-size", batch_size)
    assert script("main_moco.py", *argv, tmp_path / "whole", *batch)[0] == 0
    whole = shown.copy()
    stop_after(script, step, (*argv, tmp_path / "run", *batch))
    assert shown == whole[: step * batch_size]
    batch = ("--batch-size", new_batch_size, "--resume", "auto")
    code, _, err = script("main_moco.py", *argv, tmp_path / "run", *batch)
    assert code == 2 and f"--batch-size {batch_size} → {new_batch_size}" in err

    code, out, err = script("main_moco.py", *argv, tmp_path / "run", *batch, "--allow-changed-args")
    assert code == 0, err
    assert f"resumed after step {new_step} of {new_total}" in out
    assert shown == whole[step * batch_size :]
    last = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "lr" in line][-1]
    assert (last["step"], last["epoch"]) == (new_total, 2)
    t = 2 * (new_total - 1) / new_total
    lr = warmup_cosine_lr(t, 2, 1, scaled_lr(1e-3, new_batch_size))
    assert last["lr"] == pytest.approx(lr, rel=1e-4)


def test_a_batch_size_that_does_not_divide_what_was_seen_is_refused(script, tmp_path, few_digits):
    argv = (few_digits, *TINY[1:], "--knn-every", 0, "--output-dir", tmp_path)
    stop_after(script, 5, (*argv, "--batch-size", 16))
    flags = ("--batch-size", 32, "--resume", "auto", "--allow-changed-args")
    code, _, err = script("main_moco.py", *argv, *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert "after 80 images of an epoch, which --batch-size 32 does not divide" in err


def test_batch_sizes_that_drop_other_images_continue_at_the_epoch(script, tmp_path, few_digits):
    argv = (few_digits, *TINY[1:], "--knn-every", 0, "--output-dir", tmp_path)
    with interrupted_after_saving():  # after 3 steps of 48 images; 16 are dropped
        assert script("main_moco.py", *argv, "--batch-size", 48)[0] == 130
    flags = ("--batch-size", 16, "--resume", "auto", "--allow-changed-args")
    code, out, err = script("main_moco.py", *argv, *flags)
    assert code == 0 and "resumed after step 10 of 20" in out, err


# Arguments


def test_a_flag_that_an_older_checkpoint_lacks_counts_as_its_default(script, tmp_path):
    argv = ("main_moco.py", *TINY, "--knn-every", 0, "--output-dir", tmp_path, "--resume", "auto")
    with interrupted_after_saving():
        assert script(*argv)[0] == 130
    path = tmp_path / checkpoint.LAST
    state = torch.load(path, weights_only=True)
    for name in ("clip_grad", "crop_min", "max_pixels"):
        del state["args"][name]
    torch.save(state, path)
    code, _, err = script(*argv, "--crop-min", 0.5)
    assert code == 2 and "--crop-min 0.08 → 0.5" in err and "clip" not in err
    assert script(*argv)[0] == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--epochs 0 --warmup-epochs 0", "--epochs 0 trains nothing"),
        ("-b 1000 --epochs 1", "the only step would be at learning rate 0: --warmup-epochs 0"),
    ],
)
def test_a_schedule_that_trains_nothing_is_refused(script, tmp_path, flags, words):
    argv = ("main_moco.py", *TINY, *flags.split(), "--output-dir", tmp_path / "run")
    code, _, err = script(*argv)
    assert (code, err.count("\n")) == (2, 1) and words in err
    assert not (tmp_path / "run").exists()


def test_a_probe_goes_on_with_its_own_images_to_validate(script, pretrained, image_file, tmp_path):
    flags = "--batch-size 256 --epochs 1 --workers 0 --device cpu --amp off".split()
    argv = ("main_lincls.py", "digits", "--pretrained", pretrained, *flags)
    code, _, err = script(*argv, "--output-dir", tmp_path / "run")
    assert code == 0, err
    image_file("other/3/a.png", 16, 16)
    resumed = ("--output-dir", tmp_path / "run", "--resume", "auto")
    code, _, err = script(*argv, *resumed, "--val", tmp_path / "other")
    assert code == 2 and "other images to validate" in err and err.count("\n") == 1


def test_another_scripts_checkpoint_is_refused(script, pretrained, tmp_path):
    flags = "--batch-size 256 --epochs 1 --workers 0 --device cpu --amp off".split()
    argv = ("digits", "--pretrained", pretrained, *flags, "--output-dir", tmp_path / "probe")
    code, _, err = script("main_lincls.py", *argv, "--resume", pretrained)
    assert code == 2 and "was written by another script" in err and err.count("\n") == 1
