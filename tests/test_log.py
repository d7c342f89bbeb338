"""What a run leaves behind: lines, averages, pictures, and the stop at a loss that is no number."""

from types import SimpleNamespace

import pytest
import torch

from moco import UserError
from moco.data import BadImages
from moco.log import Log, draw_curves, draw_views, read_rows, versions


def log(folder):
    args = SimpleNamespace(epochs=2, batch_size=4, print_freq=4, tensorboard=False)
    return Log(folder, args, epoch_steps=10, bad=BadImages(0.001, 100), chance=5.5)


def train(run, first, last):
    for step in range(first, last + 1):
        run.step(step, dict(lr=0.1, m=0.99), loss=torch.tensor(float(step)), top1=torch.tensor(0.5))


def test_rows_are_averages_since_the_row_before(tmp_path):
    with log(tmp_path) as run:
        train(run, 1, 10)
        run.evaluation("kNN 50.0 %", knn=50.0)
    rows = read_rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 10, 10]  # the end of an epoch counts as well
    assert [row["loss"] for row in rows[:3]] == [2.5, 6.5, 9.5]
    assert rows[2]["epoch"] == 1 and rows[3]["knn"] == 50.0
    assert {"chance", "top1", "lr", "m", "images_per_s", "data_wait"} <= rows[0].keys()


def test_a_resumed_log_is_that_of_one_run(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    with log(whole) as run:
        train(run, 1, 14)
    with log(broken) as run:
        train(run, 1, 6)
        state = run.state_dict()  # two steps that no line tells yet
        train(run, 7, 9)  # lost
    with open(broken / "log.jsonl", "a") as file:
        file.write('{"epoch": 1.8, "st')
    run = log(broken)
    run.load_state_dict(state)
    with run:
        train(run, 7, 14)
    rows = [read_rows(folder / "log.jsonl") for folder in (whole, broken)]
    for row in (*rows[0], *rows[1]):
        del row["images_per_s"], row["data_wait"]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [4, 8, 10, 12]


def test_lines_that_a_full_disk_refused_follow_later(tmp_path):
    class Full:
        def write(self, text):
            if self.free < len(text):
                text = text[: self.free]
            self.free -= len(text)
            if not text:
                raise OSError("full")
            return file.write(text)

    full = Full()
    with log(tmp_path) as run:
        file, run.file, full.free = run.file, full, 20
        train(run, 1, 4)
        train(run, 5, 8)
        assert not read_rows(tmp_path / "log.jsonl")
        full.free = 10_000
        train(run, 9, 10)
        run.file = file
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [4, 8, 10]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_the_run_at_its_iteration(tmp_path, value):
    with pytest.raises(UserError) as stop, log(tmp_path) as run:
        for step in range(1, 21):
            loss = torch.tensor(float(value) if step > 13 else 1.0)
            run.step(step, dict(lr=0.1, m=0.99), loss=loss, top1=loss)
            (tmp_path / "checkpoint.pth").touch()
    assert stop.value.code == 1
    message = str(stop.value)
    assert f"{value} in epoch 1, iteration 3" in message and "checkpoint.pth" in message
    assert all(row["loss"] == 1 for row in read_rows(tmp_path / "log.jsonl"))


def test_pictures_are_written(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"epoch": 0, "step": 0, "knn": 40}\n'
        '{"epoch": 1, "step": 9, "loss": 3, "chance": 4, "top1": 0.1, "lr": 1, "m": 1}\n'
        '{"epoch": 1, "step": 9, "acc1 lr 0.1": 90, "acc1 lr 1": 95}\n'
    )
    draw_curves(tmp_path)
    draw_views(tmp_path, *torch.randn(2, 12, 3, 8, 12))
    for name in ("curves.png", "views.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_versions_name_what_a_run_stands_on():
    assert {"python", "torch", "torchvision", "timm", "git"} <= versions().keys()
