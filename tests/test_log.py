"""What a run leaves behind: lines of log.jsonl, averages and pictures."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from engine import plots
from engine.log import MetricLogger, read_log
from engine.plots import collect_curves, plot_curves, plot_views
from engine.run import versions

TIMES = ("images_per_s", "data_wait")


def create_logger(folder):
    args = SimpleNamespace(epochs=2, batch_size=4, print_freq=4, tensorboard=False)
    return MetricLogger(folder, args, steps_per_epoch=10)


@pytest.fixture
def logger(tmp_path):
    logger = create_logger(tmp_path)
    logger.open()
    yield logger
    logger.close()


def train(logger, first, last):
    for step in range(first, last + 1):
        metrics = dict(loss=torch.tensor(float(step)), top1=torch.tensor(0.5))
        logger.log_step(step, **metrics, chance=5.5, lr=0.1, m=0.99)


def test_lines_are_averages_since_the_line_before(logger, tmp_path):
    train(logger, 1, 10)
    logger.log_eval("kNN 50.0 %", knn=50.0)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 10, 10]  # the end of an epoch counts as well
    assert [line["loss"] for line in lines[:3]] == [2.5, 6.5, 9.5]
    assert lines[2]["epoch"] == 1 and lines[3]["knn"] == 50.0
    assert {"chance", "top1", "lr", "m", *TIMES} <= lines[0].keys()


def test_a_resumed_log_is_that_of_one_run(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    logger = create_logger(whole)
    logger.open()
    train(logger, 1, 14)
    logger.close()
    logger = create_logger(broken)
    logger.open()
    train(logger, 1, 6)
    logger.sync()
    state = logger.state_dict()  # with two steps that are in no line yet
    train(logger, 7, 9)  # lost
    logger.close()
    with open(broken / "log.jsonl", "a") as file:
        file.write('{"epoch": 1.8, "st')
    logger = create_logger(broken)
    logger.load_state_dict(state)
    logger.open()
    train(logger, 7, 14)
    logger.close()
    lines, resumed = (read_log(folder / "log.jsonl") for folder in (whole, broken))
    for line in (*lines, *resumed):
        for key in TIMES:
            del line[key]
    assert lines == resumed and [line["step"] for line in lines] == [4, 8, 10, 12]


def test_pending_steps_of_a_version_with_fewer_metrics_are_averaged(logger, tmp_path):
    pending = torch.tensor([[1.0, 0.1], [2.0, 0.2]])
    names = ("loss", "spread")
    state = dict(steps=2, rows=0, names=names, pending=pending, latest={}, measured="")
    logger.load_state_dict(state)
    for step in (3, 4):
        metrics = dict(loss=torch.tensor(float(step)), feature_std=torch.tensor(0.3))
        logger.log_step(step, top1=torch.tensor(0.5 * step), **metrics)
    [line] = read_log(tmp_path / "log.jsonl")
    assert line["loss"] == 2.5 and line["feature_std"] == pytest.approx(0.225)
    assert line["top1"] == (3 * 1.5 + 2) / 4


def test_lines_that_a_full_disk_refused_follow_later(logger, tmp_path):
    class FullDisk:
        free = 20

        def write(self, text):
            text = text[: self.free]
            self.free -= len(text)
            if not text:
                raise OSError("full")
            return file.write(text)

    file, logger.file = logger.file, FullDisk()
    train(logger, 1, 4)
    train(logger, 5, 8)
    assert not read_log(tmp_path / "log.jsonl")
    logger.file.free = 10_000
    train(logger, 9, 10)
    logger.file = file
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [4, 8, 10]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_losses_that_are_not_finite_are_returned_and_not_written(logger, tmp_path, value):
    for step in range(1, 9):
        loss = torch.tensor(float(value) if step > 6 else 1.0)
        values = logger.log_step(step, loss=loss, top1=torch.tensor(0.5), lr=0.1)
    assert values["loss"].isfinite().tolist() == [True, True, False, False]
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl")] == [1]


LINES = """
{"epoch": 0, "step": 0, "knn": 40}
{"epoch": 1, "step": 9, "loss": 3, "chance": 4, "top1": 0.1, "feature_std": 0.4, "lr": 1, "m": 1}
{"epoch": 1, "step": 9, "acc1/lr0.1": 90, "acc1/lr1": 95}
""".strip()


def test_curves_and_views_are_drawn(tmp_path):
    (tmp_path / "log.jsonl").write_text(LINES)
    plot_curves(tmp_path)
    plot_views(tmp_path, *torch.randn(2, 12, 3, 8, 12))
    for name in ("curves.png", "views.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("values", [(0.002, 3.0), (0.2, 0.3)])  # with and without powers of 10
def test_gradients_have_an_axis_of_plain_numbers(tmp_path, monkeypatch, values):
    lines = [{"epoch": i, "step": i, "grad_linf/first_max": v} for i, v in enumerate(values)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plot_curves(tmp_path)
    figures[0].canvas.draw()
    [axes] = figures[0].axes
    labels = axes.get_yticklabels(minor=True) + axes.get_yticklabels()
    labels = [label.get_text() for label in labels if label.get_text()]
    assert labels and all(float(label) > 0 for label in labels)


def test_logs_with_the_names_of_before_give_the_same_curves(tmp_path):
    before = LINES.replace("feature_std", "spread").replace("/lr", " lr ")
    curves = []
    for text in (LINES, before):
        (tmp_path / "log.jsonl").write_text(text)
        curves.append(collect_curves([read_log(tmp_path / "log.jsonl")]))
    new, old = curves
    assert new.keys() == old.keys() >= {"knn", "loss", "feature_std", "acc1"}
    assert new["feature_std"] == old["feature_std"] == {("feature_std", 0): [(1, 0.4)]}
    assert list(new["acc1"].values()) == list(old["acc1"].values()) == [[(1, 90)], [(1, 95)]]


def test_versions_name_the_packages_of_a_run():
    assert {"python", "torch", "torchvision", "timm", "git"} <= versions().keys()


def test_tensorboard_has_the_hyperparameters_and_the_views(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = SimpleNamespace(epochs=2, batch_size=4, print_freq=1, tensorboard=True, img_size=(8, 8))
    Image.new("RGB", (8, 8)).save(tmp_path / "views.png")
    logger = MetricLogger(tmp_path, args, steps_per_epoch=5)
    logger.open()
    logger.log_step(1, loss=torch.tensor(2.0), lr=0.1)
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["views"] and "loss" in events.Tags()["scalars"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_an_epoch_without_evaluation_shows_no_older_one(logger, capsys):
    logger.log_eval("kNN 40.0 %", knn=40.0)
    for step in range(1, 6):
        logger.log_step(step, loss=torch.tensor(1.0), lr=0.1)
    logger.print_epoch(1, evaluated=False)
    assert "kNN" not in capsys.readouterr().out
    logger.print_epoch(1, evaluated=True)
    assert "kNN 40.0 %" in capsys.readouterr().out


def test_the_line_of_an_epoch_is_the_mean_over_its_steps(logger, tmp_path, capsys):
    train(logger, 1, 17)
    logger.sync()
    resumed = create_logger(tmp_path)
    resumed.load_state_dict(logger.state_dict())
    resumed.open()
    for either in (logger, resumed):
        train(either, 18, 20)
        either.print_epoch(2)
        assert "loss 15.500 (chance 5.50)  top1 0.50" in capsys.readouterr().out
    resumed.close()


def test_numbers_that_json_lacks_are_left_out(logger, tmp_path):
    for step in range(1, 5):
        grad = torch.tensor(float("inf"))
        logger.log_step(step, loss=torch.tensor(1.0), lr=0.1, **{"grad_l2/first": grad})
    [line] = read_log(tmp_path / "log.jsonl")
    assert line["loss"] == 1 and "grad_l2/first" not in line
