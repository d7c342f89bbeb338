"""A folder belongs to one run at a time, and a run to its data, its arguments and its signals."""

import copy
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    CPU,
    SMALL,
    TINY,
    Child,
    interrupted_after_saving,
    on_two_ranks,
    torchrun_variables,
)
from PIL import Image

import engine.run
from engine import checkpoint
from engine.errors import UserError
from engine.log import read_log
from engine.run import Run, differences
from engine.signals import Interrupted
from moco import scaled_lr, warmup_cosine_lr

# Runs until it is stopped: an epoch has 44 steps.
ENDLESS = (*TINY, "--batch-size", 32, "--epochs", 1000, "--knn-every", 0)
PROBE = ("--batch-size", 256, "--epochs", 1, "--amp", "off", *CPU)


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
    for flags in ((), ("--resume", "auto")):
        code, out, err = script("main_moco.py", *ENDLESS, *flags, "--output-dir", run)
        assert (code, err.count("\n")) == (2, 1), out + err
        in_use = f"another run is using {run} (process {first.pid} on " in err
        # The first run saves after an epoch, which may be over.
        assert in_use or (not flags and f"{run} holds a run: --resume auto" in err), err
    assert set(before) <= {path.name for path in run.iterdir()}
    assert first.wait(0) is None

    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    argv = ("--batch-size", 256, "--epochs", 1, "--output-dir", run, "--resume", "auto")
    # Free again, although the worker of the killed process may live for some seconds.
    assert script("main_moco.py", *TINY, *argv)[0] == 0


def test_what_is_kept_of_a_cleared_run_is_not_overwritten(script, tmp_path):
    argv = (*TINY, "--epochs", 1, "--knn-every", 0, "--save-every", 1, "--output-dir", tmp_path)
    assert script("main_moco.py", *argv)[0] == 0
    kept = ("--resume", tmp_path / "checkpoint_0001.pth")
    code, _, err = script("main_moco.py", *argv, *kept)
    assert code == 2 and "holds a later checkpoint than checkpoint_0001.pth" in err
    code, _, err = script("main_moco.py", *argv, "--resume", "nope.pth")
    assert code == 2 and "no checkpoint at nope.pth" in err
    (tmp_path / checkpoint.LAST).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for flags in ((), ("--resume", "auto")):
        code, _, err = script("main_moco.py", *argv, *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{tmp_path} holds a run: --output-dir starts another" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / f"{checkpoint.LAST}.tmp").touch()  # instead, it was killed in its first save
    code, out, _ = script("main_moco.py", *argv, "--resume", "auto")
    begun_anew = f"no checkpoint in {tmp_path}: its log.jsonl of 5 steps is begun anew\n"
    assert code == 0 and begun_anew in out
    (tmp_path / checkpoint.LAST).unlink()
    code, out, err = script("main_moco.py", *argv, "--epochs", 2, *kept, "--allow-changed-args")
    assert code == 0 and "resumed after step 5" in out, err


def test_another_optimizer_does_not_resume(script, tmp_path):
    argv = (*TINY, "--epochs", 1, "--knn-every", 0, "--output-dir", tmp_path)
    assert script("main_moco.py", *argv)[0] == 0
    argv += ("--resume", "auto", "--allow-changed-args", "--epochs", 2, "--optimizer", "lars")
    code, _, err = script("main_moco.py", *argv)
    assert (code, err.count("\n")) == (2, 1)
    assert "--optimizer adamw → lars" in err and "can't be resumed with" in err


# 48 drops 16 of the 160 images.
@pytest.mark.parametrize("old, new", [(16, 32), (16, 8), (48, 16)])
def test_another_batch_size_continues_at_the_next_epoch(script, tmp_path, few_digits, old, new):
    argv = (few_digits, *TINY[1:], "--knn-every", 0, "--output-dir", tmp_path)
    with interrupted_after_saving():  # at the end of the first epoch
        assert script("main_moco.py", *argv, "--batch-size", old)[0] == 130
    before = read_log(tmp_path / "log.jsonl")
    flags = ("--batch-size", new, "--resume", "auto")
    code, _, err = script("main_moco.py", *argv, *flags)
    assert code == 2 and f"--batch-size {old} → {new}" in err

    code, out, err = script("main_moco.py", *argv, *flags, "--allow-changed-args")
    steps = 160 // new
    assert code == 0 and f"resumed after step {steps} of {2 * steps}" in out, err
    lines = read_log(tmp_path / "log.jsonl")
    assert lines[: len(before)] == before and len(lines) == len(before) + steps
    assert (lines[-1]["step"], lines[-1]["epoch"]) == (2 * steps, 2)
    lr = warmup_cosine_lr(2 - 1 / steps, 2, 1, scaled_lr(1e-3, new))
    assert lines[-1]["lr"] == pytest.approx(lr, rel=1e-4)


def test_another_batch_size_within_an_epoch_is_refused(script, tmp_path, few_digits):
    argv = (few_digits, *TINY[1:], "--knn-every", 0, "--output-dir", tmp_path)
    with interrupted_after_saving():
        often = ("--batch-size", 16, "--save-minutes", 1e-6)
        assert script("main_moco.py", *argv, *often)[0] == 130
    flags = ("--batch-size", 32, "--resume", "auto", "--allow-changed-args")
    code, out, err = script("main_moco.py", *argv, *flags)
    assert code == 2 and "saved within an epoch: resume it with --batch-size 16" in err, out


def test_a_refused_run_leaves_no_folder(script, tmp_path):
    run = tmp_path / "run"
    assert script("main_moco.py", *TINY, "-b", 5000, "--output-dir", run)[0] == 2
    assert not run.exists()


def test_what_another_run_has_written_meanwhile_is_not_overwritten(
    script, tmp_path, few_digits, monkeypatch
):
    def resume_while_another_run_writes(run):
        run.folder.mkdir()
        (run.folder / checkpoint.LAST).write_text("of another run")

    monkeypatch.setattr(Run, "resume", resume_while_another_run_writes)
    argv = (few_digits, *SMALL["main_moco.py"], "--output-dir", tmp_path / "run")
    code, out, err = script("main_moco.py", *argv)
    assert (code, err.count("\n")) == (2, 1) and "holds a run: --resume auto" in err, out + err
    assert (tmp_path / "run" / checkpoint.LAST).read_text() == "of another run"


@pytest.mark.parametrize("failures", [1, 2])
def test_a_run_whose_last_save_fails_does_not_end_well(
    script, tmp_path, few_digits, monkeypatch, failures
):
    save, tries = checkpoint.save, []

    def save_on_a_full_disk(folder, state, *args, **kwargs):
        tries.append(state["epoch"])
        if tries.count(2) in range(1, failures + 1):
            raise OSError("No space left on device")
        save(folder, state, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save_on_a_full_disk)
    argv = ("main_moco.py", few_digits, *SMALL["main_moco.py"], "--output-dir", tmp_path)
    code, _, err = script(*argv)
    assert tries == [1, 2, 2]
    assert err.count("can't save to") == failures
    if failures == 1:
        assert code == 0 and checkpoint.load(tmp_path / checkpoint.LAST)["epoch"] == 2
        return
    assert code == 1 and "two saves in a row failed: free some disk space" in err
    code, out, _ = script(*argv, "--resume", "auto")
    assert code == 0 and "resumed after step 20 of 40" in out


@pytest.mark.parametrize("failures", [1, 2])
def test_a_checkpoint_to_keep_is_written_or_the_run_ends(
    script, tmp_path, few_digits, monkeypatch, failures
):
    link, tries = checkpoint._link, []

    def link_on_a_full_disk(path, second_name):
        if second_name.name == "checkpoint_0001.pth":
            tries.append(path)
            if len(tries) <= failures:
                raise OSError("No space left on device")
        link(path, second_name)

    monkeypatch.setattr(checkpoint, "_link", link_on_a_full_disk)
    argv = (few_digits, *SMALL["main_moco.py"], "--save-every", 1, "--output-dir", tmp_path)
    code, _, err = script("main_moco.py", *argv)
    assert code == failures - 1 and len(tries) == 2, err
    assert (tmp_path / "checkpoint_0001.pth").exists() == (failures == 1)
    code, _, err = script("main_moco.py", *argv, "--resume", "auto")
    assert code == 0 and checkpoint.load(tmp_path / "checkpoint_0001.pth")["epoch"] == 1, err


@pytest.mark.parametrize("resume", ["auto", checkpoint.PREVIOUS])
def test_a_damaged_checkpoint_never_displaces_the_good_one_before(
    script, tmp_path, few_digits, monkeypatch, resume
):
    argv = (few_digits, *SMALL["main_moco.py"], "--output-dir", tmp_path, "--resume")
    assert script("main_moco.py", *argv, "auto")[0] == 0
    (tmp_path / checkpoint.LAST).write_bytes(b"damaged")
    replace = os.replace

    def lose_power(source, target):
        if Path(target).name == checkpoint.LAST:
            raise KeyboardInterrupt
        replace(source, target)

    path = resume if resume == "auto" else tmp_path / resume
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lose_power)
        assert script("main_moco.py", *argv, path)[0] == 130
    code, out, err = script("main_moco.py", *argv, "auto")
    assert code == 0 and "going back" in err and "resumed after step 20 of 40" in out
    assert [checkpoint.load(tmp_path / name)["epoch"] for name in checkpoint.NAMES] == [2, 1]


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_the_lock_is_no_link_to_a_file_of_the_user(script, tmp_path, few_digits, kind):
    (tmp_path / "mine").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (os.symlink if kind == "symbolic" else os.link)(tmp_path / "mine", run / "run.lock")
    argv = (few_digits, *SMALL["main_moco.py"], "--output-dir", run)
    code, out, err = script("main_moco.py", *argv)
    assert (code, err.count("\n")) == (2, 1) and "run.lock" in err, out + err
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_that_another_takes_the_place_of_is_not_written_to(
    script, tmp_path, few_digits, monkeypatch
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    print_config = Run.print_config

    def replace_folder(self, **lines):
        print_config(self, **lines)
        run.rename(tmp_path / "moved")
        run.symlink_to(elsewhere)

    monkeypatch.setattr(Run, "print_config", replace_folder)
    argv = (few_digits, *SMALL["main_moco.py"], "--output-dir", run)
    code, _, err = script("main_moco.py", *argv)
    assert code == 1 and "another folder has its name now" in err, err
    assert not (elsewhere / checkpoint.LAST).exists()


@pytest.mark.parametrize("line", ["mine", "[1]", "null", '{"epoch": "one"}', "[" * 10_000])
def test_a_foreign_line_in_the_log_does_not_end_a_resumed_run(script, tmp_path, few_digits, line):
    argv = (few_digits, *SMALL["main_moco.py"], "--output-dir", tmp_path, "--resume", "auto")
    with interrupted_after_saving():
        assert script("main_moco.py", *argv)[0] == 130
    log = tmp_path / "log.jsonl"
    first, rest = log.read_text().split("\n", 1)
    log.write_text(f"{first}\n{line}\n{rest}{line}\n")
    assert script("main_moco.py", *argv)[0] == 0
    assert [line["step"] for line in read_log(log)] == list(range(1, 41))


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


@pytest.mark.parametrize("step_seconds, every", [(3.0, 1), (0.45, 2), (0.0098, 102)])
def test_ranks_agree_on_signals_in_each_slow_step_and_once_a_second(
    monkeypatch, step_seconds, every
):
    clock, met = [0.0], []
    monkeypatch.setattr(engine.run, "world_size", lambda: 2)
    monkeypatch.setattr(engine.run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(engine.run, "unpack_batches", lambda *_: range(250))

    def all_reduce_max(exit_code, save_due, seconds):  # the other rank gets a signal in step 120
        met.append(run.step)
        return 75 * (run.step >= 120), save_due, seconds

    monkeypatch.setattr(engine.run, "all_reduce_max", all_reduce_max)
    run = object.__new__(Run)
    run.epoch, run.step, run.steps_per_epoch, run.print_freq = 0, 0, 250, 1000
    run.save_minutes, run.unreadable, run.scaler = 0, None, torch.amp.GradScaler(enabled=False)
    run.logger = Mock(waited=0)
    with pytest.raises(Interrupted):
        for _ in run.batches(Mock()):
            clock[0] += step_seconds
            run.end_step(loss=torch.zeros(()))
    assert met[0] == 1 and met[-1] == run.step < 120 + every
    assert {later - step for step, later in zip(met, met[1:])} == {every}


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
def photos(tmp_path, two_classes):
    """Two classes, a and b, of 8 images to train on and 3 to validate, to be changed."""
    return shutil.copytree(two_classes, tmp_path / "photos")


def replace_images(photos):
    for path in photos.rglob("*.png"):
        Image.open(path).rotate(90).save(path)


def rename_class(photos):
    for split in ("train", "val"):
        (photos / split / "a").rename(photos / split / "c")


def exchange_labels(photos):
    for i in (1, 2):
        a, b = photos / "train" / "a" / f"{i}.png", photos / "train" / "b" / f"{i}.png"
        a.rename(photos / "moved.png")
        b.rename(a)
        (photos / "moved.png").rename(b)


def rename_file(photos):
    (photos / "train" / "a" / "0.png").rename(photos / "train" / "a" / "x.png")


@pytest.mark.parametrize("change", [replace_images, rename_class, exchange_labels, rename_file])
def test_other_data_of_equal_size_is_refused(script, tmp_path, photos, change):
    argv = ("main_moco.py", photos, *SMALL["main_moco.py"], "--output-dir", tmp_path / "run")
    with interrupted_after_saving():
        assert script(*argv)[0] == 130
    saved = (tmp_path / "run" / checkpoint.LAST).read_bytes()
    change(photos)
    code, out, err = script(*argv, "--resume", "auto")
    assert (code, err.count("\n")) == (2, 1), out + err
    assert f"other images or labels in {photos}" in err or "other classes" in err
    assert (tmp_path / "run" / checkpoint.LAST).read_bytes() == saved


def test_args_json_states_the_identity_of_a_run(script, tmp_path, photos):
    argv = (*SMALL["main_moco.py"], "--epochs", 1, "--output-dir", tmp_path / "run")
    assert script("main_moco.py", photos, *argv)[0] == 0
    metadata = json.loads((tmp_path / "run" / "args.json").read_text())
    assert metadata["class_names"] == ["a", "b"] and len(metadata["data_digest"]) == 16
    assert metadata["args"]["batch_size"] == 8 and metadata["world_size"] == 1


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
    assert state["class_names"] == ["a", "b"]
    torch.save(state | dict(class_names=["b", "a"]), path)
    for flags in ((), ("--allow-changed-args",)):
        code, out, err = script(name, photos, *argv, "--resume", "auto", *flags)
        assert (code, err.count("\n")) == (2, 1), out + err
        assert "b, a → a, b" in err
    torch.save(state, path)
    assert script(name, photos, *argv, "--resume", "auto")[0] == 0


# Arguments


def test_whatever_differs_is_named():
    args = dict(data="digits", lr=0.1, workers=2)
    digests = dict(data_digest="a", val_digest=None, frozen_digest="b", world_size=2)
    old = dict(args=args, class_names=["x", "y"], **digests)
    assert differences(old, copy.deepcopy(old)) == {}
    new = dict(old, args=args | dict(lr=0.2, workers=3), data_digest="c", world_size=4)
    assert differences(old, new, ("workers", "world_size")) == {
        "lr": "--lr 0.1 → 0.2",
        "data_digest": "other images or labels in digits",
    }
    assert "2 → 4 processes" in differences(old, new)["world_size"]
    new = dict(new, class_names=["y", "x"], frozen_digest="d", val_digest="e")
    assert {"val_digest", "class_names", "frozen_digest"} <= differences(old, new).keys()


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
    argv = ("main_lincls.py", "digits", "--pretrained", pretrained, *PROBE)
    code, _, err = script(*argv, "--output-dir", tmp_path / "run")
    assert code == 0, err
    image_file("other/3/a.png", 16, 16)
    resumed = ("--output-dir", tmp_path / "run", "--resume", "auto")
    code, _, err = script(*argv, *resumed, "--val", tmp_path / "other")
    assert code == 2 and "other images to validate" in err and err.count("\n") == 1


def test_another_scripts_checkpoint_is_refused(script, pretrained, tmp_path):
    argv = ("digits", "--pretrained", pretrained, *PROBE, "--output-dir", tmp_path / "probe")
    code, _, err = script("main_lincls.py", *argv, "--resume", pretrained)
    assert code == 2 and "was written by another script" in err and err.count("\n") == 1


@pytest.mark.parametrize("flag, values", [("--lr", (0.1, 0.2)), ("--print-freq", (1, 2))])
def test_ranks_that_were_started_with_other_flags_are_refused(tmp_path, flag, values):
    """On two hosts, for example; they would train with two learning rates, or wait in vain."""
    children = []
    for value, variables in zip(values, torchrun_variables(2)):
        folder = tmp_path / f"rank{value}"
        folder.mkdir()
        argv = (*TINY, flag, value, "--output-dir", tmp_path / "run")
        children.append(Child(folder, "main_moco.py", *argv, env=variables))
    for child in children:
        assert child.wait() == 2
    outputs = [child.said() for child in children]
    words = f"the processes disagree about {flag}: {values[0]} and {values[1]}; start all"
    assert "".join(outputs).count(words) == 1, outputs
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_a_flag_resumes_when_it_is_allowed(script, tmp_path):
    argv = (*TINY, "--epochs", 1, "--knn-every", 0, "--output-dir", tmp_path)
    assert script("main_moco.py", *argv)[0] == 0
    path = tmp_path / checkpoint.LAST
    state = checkpoint.load(path)
    del state["args"]["no_predictor"]
    torch.save(state, path)
    code, _, err = script("main_moco.py", *argv, "--resume", "auto")
    assert code == 2 and "--no-predictor None → False; --allow-changed-args" in err
    flags = ("--resume", "auto", "--allow-changed-args")
    assert script("main_moco.py", *argv, *flags)[0] == 0


def check_saving_in_a_missing_folder(rank):
    run = object.__new__(Run)
    run.folder, run._weights = Path("/missing"), lambda model: {}
    with pytest.raises(UserError, match="can't save /missing/linear"):
        run.save_model("linear.pth", model=None)


def test_a_model_that_can_not_be_saved_is_an_error_on_all_ranks():
    on_two_ranks(check_saving_in_a_missing_folder)
