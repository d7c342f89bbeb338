"""A run's folder: who may write there, and what a run that is resumed must have in common."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import TINY, Child, launch

from engine import checkpoint
from engine.log import read_log

RUN = (*TINY, "--knn-every", 0)  # 5 steps an epoch
LONG = (*RUN, "--epochs", 200)


def start(folder, *args):
    """A run in the background, once it trains."""
    child = Child(folder.parent, "main_moco.py", *LONG, "--output-dir", folder, *args)
    while not read_log(folder / "log.jsonl"):
        assert child.wait(0.05) is None, child.said()
    return child


def state(folder):
    return checkpoint.load(folder / checkpoint.LAST)


def test_a_folder_belongs_to_one_run_until_its_process_ends(tmp_path):
    folder = tmp_path / "run"
    first = start(folder)
    done = launch(1, "main_moco.py", *LONG, "--output-dir", folder, "--resume", "auto")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"another run is using {folder} (process {first.pid} on " in done.stderr

    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = launch(1, "main_moco.py", *RUN, "--epochs", 1, "--output-dir", folder, "--resume",
                  "auto", "--allow-changed-args")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_refused_run_leaves_no_folder(script, tmp_path):
    code, _, error = script("main_moco.py", *RUN, "-a", "vit_smal", "--output-dir", tmp_path / "x")
    assert code == 2 and "did you mean 'vit_small'" in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_side_by_side_without_torchrun_are_refused(
    script, monkeypatch, tmp_path, variable
):
    monkeypatch.setenv(variable, "2")
    code, _, error = script("main_moco.py", *RUN, "--output-dir", tmp_path / "x")
    assert code == 2 and error.count("\n") == 1
    assert "2 processes were started without torchrun" in error and "srun torchrun" in error


def test_rank_without_its_companions_is_a_line(script, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    code, _, error = script("main_moco.py", *RUN, "--output-dir", tmp_path / "x")
    assert code == 2 and error.count("\n") == 1
    assert "RANK is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in error


def test_when_the_terminal_closes_the_run_saves_and_stops(tmp_path):
    folder = tmp_path / "run"
    child = start(folder)
    os.kill(child.pid, signal.SIGHUP)
    assert child.wait() == 75
    assert "SIGHUP: stopping after this step" in child.said()
    assert state(folder)["iteration"] == read_log(folder / "log.jsonl")[-1]["step"]


def test_under_nohup_a_closed_terminal_changes_nothing(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        from engine.signals import catch_signals

        with catch_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """A run of two epochs on images of 2 × 64 colours, interrupted after the first one."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "data", seed=0)
    args = (*RUN[1:], "--batch-size", 16, "--epochs", 3, "--warmup-epochs", 0, "--save-every", 1)
    done = launch(1, "main_moco.py", folder / "data", *args, "--output-dir", folder / "run")
    assert done.returncode == 0, done.stderr
    run = folder / "run"
    (run / "checkpoint_0001.pth").replace(run / checkpoint.LAST)
    (run / checkpoint.PREVIOUS).unlink()
    return folder, args


def write_images(folder, seed):
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(32):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "train" / name / f"{i}.png")


def resume(script, two_epochs, tmp_path, data, *args):
    """Resumes a copy of the run on `data` → exit code, stdout, stderr, the folder."""
    folder, flags = two_epochs
    shutil.copytree(folder / "run", tmp_path / "run")
    command = (data, *flags, "--output-dir", tmp_path / "run", "--resume", "auto", *args)
    return *script("main_moco.py", *command), tmp_path / "run"


def test_other_images_of_equal_names_are_refused(script, two_epochs, tmp_path):
    write_images(tmp_path / "other", seed=1)
    code, _, error, _ = resume(script, two_epochs, tmp_path, tmp_path / "other")
    assert code == 2 and "other images or labels in" in error and error.count("\n") == 1


def test_a_renamed_class_is_refused(script, two_epochs, tmp_path):
    shutil.copytree(two_epochs[0] / "data", tmp_path / "data")
    (tmp_path / "data/train/b").rename(tmp_path / "data/train/c")
    code, _, error, _ = resume(script, two_epochs, tmp_path, tmp_path / "data")
    assert code == 2 and "it has a, b, the images a, c" in error


def test_a_moved_folder_is_the_same_data(script, two_epochs, tmp_path):
    shutil.copytree(two_epochs[0] / "data", tmp_path / "moved")
    code, out, error, _ = resume(script, two_epochs, tmp_path, tmp_path / "moved")
    assert code == 0, error
    assert "resumed after step 4 of 12" in out


def test_another_batch_size_goes_on_with_the_next_epoch(script, two_epochs, tmp_path):
    data = two_epochs[0] / "data"
    args = ("--batch-size", 32, "--allow-changed-args")
    code, out, error, run = resume(script, two_epochs, tmp_path, data, *args)
    assert code == 0, error
    assert "resumed after step 2 of 6" in out  # 64 images: one epoch of two steps
    training = [line for line in read_log(run / "log.jsonl") if "loss" in line][-4:]
    assert [line["epoch"] for line in training] == [1.5, 2.0, 2.5, 3.0]
    assert training[-1]["lr"] == pytest.approx(
        1e-3 * 32 / 256 * (1 + torch.cos(torch.tensor(torch.pi * 2.5 / 3)).item()) / 2, rel=1e-4
    )


@pytest.mark.parametrize(("batch_size", "resumes_at"), [(32, 3), (64, None)])
def test_another_batch_size_goes_on_after_the_same_images(
    script, two_epochs, tmp_path, batch_size, resumes_at
):
    folder, flags = two_epochs
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    whole = checkpoint.load(run / checkpoint.LAST)
    whole["iteration"] += 2  # half of the second epoch: 32 of 64 images
    whole["logger"]["steps"] += 2
    torch.save(whole, run / checkpoint.LAST)
    code, out, error = script(
        "main_moco.py", folder / "data", *flags, "--output-dir", run, "--resume", "auto",
        "--batch-size", batch_size, "--allow-changed-args",
    )  # fmt: skip
    if resumes_at is None:
        assert code == 2 and "after 32 images of an epoch, which --batch-size 64" in error
    else:
        assert code == 0 and f"resumed after step {resumes_at} of 6" in out, error


def test_a_flag_that_an_older_run_did_not_know_counts_as_its_default(script, two_epochs, tmp_path):
    folder, flags = two_epochs
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    older = checkpoint.load(run / checkpoint.LAST)
    del older["args"]["clip_grad"]
    torch.save(older, run / checkpoint.LAST)
    command = (folder / "data", *flags, "--output-dir", run, "--resume", "auto")
    code, _, error = script("main_moco.py", *command, "--clip-grad", 1)
    assert code == 2 and "--clip-grad None → 1.0" in error
    code, _, error = script("main_moco.py", *command)
    assert code == 0, error


def test_a_classifiers_classes_may_not_change_their_order(script, pretrained, tmp_path):
    flags = "--batch-size 256 --epochs 2 --workers 0 --device cpu --amp off".split()
    args = ("digits", "--pretrained", pretrained, *flags, "--output-dir", tmp_path / "run")
    code, _, error = script("main_lincls.py", *args)
    assert code == 0, error
    permuted = checkpoint.load(tmp_path / "run" / checkpoint.LAST)
    permuted["class_names"] = permuted["class_names"][::-1]
    torch.save(permuted, tmp_path / "run" / checkpoint.LAST)
    code, _, error = script("main_lincls.py", *args, "--resume", "auto")
    assert code == 2 and "or the same in another order: it has 9, 8, 7, …" in error


def test_what_a_run_is_stands_in_args_json(two_epochs):
    about = json.loads((two_epochs[0] / "run" / "args.json").read_text())
    assert about["class_names"] == ["a", "b"] and len(about["data_digest"]) == 16
    assert about["args"]["batch_size"] == 16 and about["world_size"] == 1


@pytest.mark.slow
def test_the_lock_dies_with_its_process(tmp_path):
    """POSIX locks aren't inherited: data-loading workers don't keep a dead run's folder."""
    folder = tmp_path / "run"
    child = start(folder, "--workers", 2)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    start_time = time.monotonic()
    done = launch(1, "main_moco.py", *RUN, "--epochs", 1, "--output-dir", folder, "--resume",
                  "auto", "--allow-changed-args")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start_time < 60
