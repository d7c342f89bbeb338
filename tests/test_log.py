"""What a run leaves behind: lines, averages, pictures, and the stop at a loss that is no number."""

import json
from types import SimpleNamespace

import pytest
import torch

from moco import UserError
from moco.log import Log, draw_curves, draw_views, read_rows, versions


def log(folder, epoch=0):
    args = SimpleNamespace(epochs=2, batch_size=4, print_freq=4, tensorboard=False)
    return Log(folder, args, epoch_steps=10, epoch=epoch, chance=5.5)


def test_rows_are_averages_since_the_row_before(tmp_path):
    run = log(tmp_path)
    for step in range(1, 11):
        run.step(step, dict(lr=0.1, m=0.99), loss=torch.tensor(float(step)), top1=torch.tensor(0.5))
    run.evaluation(10, "kNN 50.0 %", knn=50.0)
    rows = read_rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 10, 10]  # the end of an epoch counts as well
    assert [row["loss"] for row in rows[:3]] == [2.5, 6.5, 9.5]
    assert rows[2]["epoch"] == 1 and rows[3]["knn"] == 50.0
    assert {"chance", "top1", "lr", "m", "images_per_s", "data_wait"} <= rows[0].keys()


def test_resuming_drops_what_the_checkpoint_does_not_know(tmp_path):
    lines = [json.dumps({"epoch": s / 10, "step": s}) for s in (4, 8, 10, 14)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"epoch": 1.8, "st')
    log(tmp_path, epoch=1).evaluation(18, "")
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [4, 8, 10, 18]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_the_run_at_its_iteration(tmp_path, value):
    run = log(tmp_path)
    with pytest.raises(UserError) as stop:
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
