"""What a run leaves behind: lines of log.jsonl, averages and pictures."""

import json

import pytest
import torch

from engine import log, plots
from engine.data.decode import PixelFormat, decode_image
from engine.log import MEASURED, MetricLogger, read_log
from engine.plots import collect_curves, plot_curves, plot_views
from engine.run import versions


def create_logger(folder, **options):
    return MetricLogger(folder, epochs=2, steps_per_epoch=10, batch_size=4, **options)


@pytest.fixture
def logger(tmp_path):
    logger = create_logger(tmp_path)
    logger.open()
    yield logger
    logger.close()


def train(logger, first, last, print_freq=4):
    """Steps with the loss of their number."""
    for step in range(first, last + 1):
        metrics = dict(loss=torch.tensor(float(step)), top1=torch.tensor(0.5))
        logger.add_step(step, **metrics, chance=5.5, lr=0.1, m=0.99)
        if step % print_freq == 0 or step % 10 == 0:
            logger.log_steps(logger.read_steps())


def test_lines_are_averages_since_the_line_before(logger, tmp_path):
    train(logger, 1, 10)
    logger.log_eval("kNN 50.0 %", knn=50.0)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 10, 10]  # the end of an epoch counts as well
    assert [line["loss"] for line in lines[:3]] == [2.5, 6.5, 9.5]
    assert lines[2]["epoch"] == 1 and lines[3]["knn"] == 50.0
    assert {"chance", "top1", "lr", "m", "images_per_s", "data_wait"} <= lines[0].keys()


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def write_log(folder, *steps, evaluated=()):
    lines = [dict(epoch=step / 10, step=step, loss=1) for step in steps]
    lines += [dict(epoch=step / 10, step=step, knn=50) for step in evaluated]
    lines.sort(key=lambda line: line["step"])
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_resumed_log_is_that_of_one_run(tmp_path):
    """With a line for each step. With fewer, a line after the resume has the steps since then."""
    logger = create_logger(tmp_path)
    logger.open()
    train(logger, 1, 14, print_freq=1)
    logger.close()
    whole = without_times(read_log(tmp_path / "log.jsonl"))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 1.8, "st')
    logger = create_logger(tmp_path)
    logger.open(step=6)
    train(logger, 7, 14, print_freq=1)
    logger.close()
    assert without_times(read_log(tmp_path / "log.jsonl")) == whole

    logger = create_logger(tmp_path)
    logger.open(step=6)
    train(logger, 7, 10)
    logger.close()
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 7), 8, 10]
    assert lines[-2]["loss"] == 7.5


@pytest.mark.parametrize(
    "step, evaluated, left",
    [
        (10, True, [0, 5, 10, 10]),
        (10, False, [0, 5, 10]),  # interrupted in the evaluation
        (7, False, [0, 5]),
        (0, False, []),  # a new run
    ],
)
def test_lines_after_the_checkpoint_are_dropped(tmp_path, step, evaluated, left):
    write_log(tmp_path, 5, 10, 15, evaluated=(0, 10, 15))
    logger = create_logger(tmp_path)
    logger.open(step, evaluated)
    logger.close()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == left


def test_lines_of_another_batch_size_are_kept(tmp_path):
    """Their steps have higher numbers, for there were more of them in an epoch."""
    write_log(tmp_path, 5, 10)  # the whole first epoch, of 10 steps
    logger = MetricLogger(tmp_path, epochs=2, steps_per_epoch=4, batch_size=8)
    logger.open(step=5)
    logger.close()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [5, 10]


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


def test_the_values_of_each_step_are_returned(logger):
    for step, loss in enumerate((1, 2, float("nan")), 1):
        logger.add_step(step, loss=torch.tensor(float(loss)), lr=0.1)
    assert logger.read_steps()["loss"].isfinite().tolist() == [True, True, False]


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
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plot_curves(tmp_path)
    figures[0].canvas.draw()
    [axes] = figures[0].axes
    labels = axes.get_yticklabels(minor=True) + axes.get_yticklabels()
    labels = [label.get_text() for label in labels if label.get_text()]
    assert labels and all(float(label) > 0 for label in labels)


def test_views_are_drawn_pixel_by_pixel_below_what_they_are(tmp_path):
    views = torch.randint(256, (2, 12, 3, 64, 96)) / 255
    plot_views(tmp_path, *views, PixelFormat(mean=(0,) * 3, std=(1,) * 3))
    drawn = decode_image((tmp_path / "views.png").read_bytes())[:, -260:, -1940:]
    rows = drawn.view(3, 2, 130, 10, 194)[:, :, :128, :, :192]  # enlarged twice, 2 apart
    expected = views[:, :10].permute(2, 0, 3, 1, 4).mul(255).round()
    assert (rows[:, :, ::2, :, ::2] == expected).all() and (
        rows[:, :, 1::2, :, 1::2] == expected
    ).all()


def test_of_a_sweep_the_loss_is_called_the_lowest_and_no_curve_is_hidden(
    tmp_path, monkeypatch, logger, capsys
):
    lrs = {f"lr/{i}": 1.0 for i in range(6)}
    logger.add_step(1, loss=torch.tensor(3.0), **lrs)
    logger.log_steps(logger.read_steps())
    logger.print_epoch(1)
    assert "lowest loss 3.000" in capsys.readouterr().out
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plot_curves(tmp_path)
    figures[0].canvas.draw()
    loss, lr = figures[0].axes
    assert "lowest" in loss.get_title() and loss.get_legend() is None
    assert lr.get_legend().get_window_extent().x0 >= lr.get_window_extent().x1
    assert [text.get_text() for text in lr.get_legend().get_texts()] == list("012345")


def test_a_key_with_a_rate_is_a_curve_of_its_panel():
    curves = collect_curves([json.loads(line) for line in LINES.splitlines()])
    assert curves["knn"] == {"knn": [(0, 40)]} and curves["loss"] == {"loss": [(1, 3)]}
    assert curves["acc1"] == {"acc1/lr0.1": [(1, 90)], "acc1/lr1": [(1, 95)]}


def test_versions_name_the_packages_of_a_run():
    assert {"python", "torch", "torchvision", "timm", "git"} <= versions().keys()


def test_tensorboard_has_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = create_logger(tmp_path, tensorboard=True)
    logger.open()
    train(logger, 1, 1, print_freq=1)
    logger.close()
    assert "loss" in EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]


def test_an_epoch_without_evaluation_shows_no_older_one(logger, capsys):
    logger.log_eval("kNN 40.0 %", knn=40.0)
    train(logger, 1, 10)
    logger.print_epoch(1, evaluated=False)
    assert "kNN" not in capsys.readouterr().out
    logger.print_epoch(1, evaluated=True)
    assert "kNN 40.0 %" in capsys.readouterr().out


def test_the_line_of_an_epoch_is_the_mean_over_its_steps(logger, tmp_path, capsys):
    train(logger, 1, 10)
    logger.print_epoch(1)
    train(logger, 11, 20)
    logger.print_epoch(2)
    assert "epoch 2/2  loss 15.500 (chance 5.50)  " in capsys.readouterr().out
    resumed = create_logger(tmp_path)
    resumed.open(step=20)  # only the evaluation was left
    resumed.log_eval("kNN 40.0 %", knn=40.0)
    resumed.print_epoch(2)
    assert capsys.readouterr().out == "epoch 2/2  kNN 40.0 %\n"
    resumed.close()


def test_numbers_that_json_lacks_are_left_out(logger, tmp_path):
    logger.add_step(1, loss=torch.tensor(1.0), lr=0.1, **{"grad_l2/first": torch.tensor(torch.inf)})
    logger.log_steps(logger.read_steps())
    [line] = read_log(tmp_path / "log.jsonl")
    assert line["loss"] == 1 and "grad_l2/first" not in line


def test_the_log_tells_what_a_gpu_does_and_the_time_that_is_left(monkeypatch, tmp_path, capsys):
    logger = create_logger(tmp_path, peak_images_per_s=4.0)
    monkeypatch.setattr(log.time, "perf_counter", lambda: 2.0 * logger.step)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    logger.start_timer()
    logger.open()
    train(logger, 1, 10, print_freq=5)
    logger.print_epoch(1)
    train(logger, 11, 20, print_freq=5)
    logger.print_epoch(2)
    logger.close()
    first, second, *_ = read_log(tmp_path / "log.jsonl")
    assert "seconds_left" not in first and first["mfu"] == 0.5 and first["peak_gib"] == 3
    assert second["seconds_left"] == 20
    line, last = capsys.readouterr().out.splitlines()
    speed = "2 images/s, MFU 50 %, 3.0 GiB, 0 % of the time waiting for data"
    assert line.endswith(f"{speed}, 00:20 left") and last.endswith(speed)


@pytest.mark.parametrize("place", ["__init__", "add_scalar", "close"])
def test_a_full_disk_ends_tensorboard_alone(tmp_path, monkeypatch, capsys, place):
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, place, fail)
    logger = create_logger(tmp_path, tensorboard=True)
    logger.open()
    train(logger, 1, 10)
    logger.close()
    assert len(read_log(tmp_path / "log.jsonl")) == 3
    words = "TensorBoard's file ends here: No space left on device; training continues\n"
    assert capsys.readouterr().err == words


def test_lines_that_a_full_disk_did_not_take_are_counted(tmp_path, capsys):
    logger = create_logger(tmp_path)
    logger.open()
    logger.file.close()
    logger.file = open("/dev/full", "ab", buffering=0)
    train(logger, 1, 10)
    logger.close()
    assert capsys.readouterr().err.endswith("log.jsonl lacks its last 3 lines: a full disk?\n")


def test_no_name_forges_a_line_or_reaches_the_terminal(logger, capsys):
    logger.print("data    a\n\x1b[2Kepoch 100/100  kNN 99 %\r\u202e")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "\x1b" not in out and "\r" not in out and "\u202e" not in out
