"""The pre-training script as its users run it."""

import json
import os

import pytest
import torch
from conftest import ROOT, TINY, interrupted_after_saving, launch
from torchvision.io import write_png

import main_moco
from moco import UserError, checkpoint, data
from moco.builder import MoCo
from moco.log import read_rows
from moco.optimizer import create_optimizer
from moco.sources import load_data


def weights(folder):
    return checkpoint.load(folder / checkpoint.LAST)["state_dict"]


def test_a_run_leaves_what_it_promises(script, tmp_path):
    code, out, _ = script("main_moco.py", *TINY, "--output-dir", tmp_path, "--tensorboard",
                          "--save-every", 1)  # fmt: skip
    assert code == 0
    files = {path.name for path in tmp_path.iterdir()}
    expected = {"args.json", "log.jsonl", "checkpoint.pth", "views.png", "curves.png"}
    assert expected | {"checkpoint_0001.pth", "checkpoint_0002.pth"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert json.loads((tmp_path / "args.json").read_text())["args"]["arch"] == "vit_nano"

    rows = read_rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows if "knn" in row] == [0, 5, 10]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert rows[1]["loss"] == pytest.approx(rows[1]["chance"], rel=0.1)
    assert "before training" in out and "1,437 images to train on, 360 to validate" in out

    state = checkpoint.load(tmp_path / checkpoint.LAST)
    assert {"epoch", "arch", "state_dict", "optimizer", "scaler", "args"} <= state.keys()
    assert (state["epoch"], state["iteration"], state["num_heads"]) == (2, 10, 4)


def test_interrupted_and_resumed_equals_uninterrupted(script, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert script("main_moco.py", *TINY, "--output-dir", whole)[0] == 0

    with interrupted_after_saving() as saved:
        code, _, err = script("main_moco.py", *TINY, "--output-dir", broken, "--resume", "auto")
    assert code == 130 and "--resume auto" in err and len(saved) == 1
    assert script("main_moco.py", *TINY, "--output-dir", broken, "--resume", "auto")[0] == 0
    resumed = weights(broken)
    for key, value in weights(whole).items():
        assert torch.equal(value, resumed[key]), key
    timing = {"images_per_s", "data_wait"}
    for row, other in zip(*(read_rows(folder / "log.jsonl") for folder in (whole, broken))):
        assert {k: v for k, v in row.items() if k not in timing} == {
            k: v for k, v in other.items() if k not in timing
        }
    code, out, _ = script("main_moco.py", *TINY, "--output-dir", broken, "--resume", "auto")
    assert code == 0 and "nothing left to do" in out


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("arch", ["vit_nano", "vit_conv_nano", "resnet18"])
def test_other_architectures_and_precisions_train(script, tmp_path, arch, amp):
    argv = " ".join(TINY).replace("vit_nano", arch)
    if arch == "resnet18":
        argv = argv.replace("--img-size 16 --patch-size 4", "--img-size 32")
    code, _, err = script(
        "main_moco.py", *argv.split(), "--output-dir", tmp_path, "--amp", amp, "--epochs", 1,
        "--optimizer", "lars", "--clip-grad", 1, "--knn-every", 0,
    )  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_chunks_change_nothing(script, tmp_path, amp):
    for chunk in (0, 100):
        argv = ("--output-dir", tmp_path / str(chunk), "--amp", amp, "--knn-every", 0)
        argv += ("--epochs", 1, "--moco-mlp-dim", 8, "--encode-chunk", chunk)  # as for ranks
        code, _, err = script("main_moco.py", *TINY, *argv)
        assert code == 0, err
    whole, chunked = (logged(tmp_path / str(chunk), "loss") for chunk in (0, 100))
    assert len(whole) == 5
    assert chunked == pytest.approx(whole, rel=1e-5 if amp == "off" else 1e-2)


def test_init_from_takes_the_weights_alone(script, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert script("main_moco.py", *TINY, "--output-dir", first)[0] == 0
    code, _, _ = script(
        "main_moco.py", *TINY, "--output-dir", second, "--init-from", first / checkpoint.LAST,
        "--epochs", 0, "--warmup-epochs", 0,
    )  # fmt: skip
    assert code == 0
    last = [row["knn"] for row in read_rows(first / "log.jsonl") if "knn" in row][-1]
    assert [row["knn"] for row in read_rows(second / "log.jsonl")] == [last]


def test_unlabelled_folder_trains_without_knn(script, tmp_path, image_file):
    for i in range(8):
        image_file(f"images/{i}.jpg")
    code, out, _ = script(
        "main_moco.py", tmp_path / "images", *TINY[1:], "--batch-size", 4, "--workers", 2,
        "--output-dir", tmp_path / "run", "--epochs", 1,
    )  # fmt: skip
    assert code == 0 and "kNN is off" in out
    assert not any("knn" in row for row in read_rows(tmp_path / "run" / "log.jsonl"))


BAD = {
    "missing DIR": ("nowhere {tiny}", 2, "nowhere does not exist"),
    "a file for DIR": ("{root}/README.md {tiny}", 2, "is a file, not a folder"),
    "empty DIR": ("{tmp} {tiny}", 2, "holds no images"),
    "no DIR": ("-a vit_nano", 2, "required: DIR"),
    "unknown arch": ("digits {tiny} -a vit_smol", 2, "did you mean 'vit_small'"),
    "batch larger than the data": ("digits {tiny} -b 5000", 2, "1437 images don't fill one"),
    "missing resume path": ("digits {tiny} --resume nope.pth", 2, "no checkpoint at nope.pth"),
    "missing init path": ("digits {tiny} --init-from nope.pth", 2, "no checkpoint at nope.pth"),
    "missing recipe": ("@nope.txt", 2, "nope.txt"),
    "unknown flag in a recipe": ("@{tmp}/bad.txt", 2, "unrecognized arguments: --lerning-rate 3"),
    "unknown flag": ("digits {tiny} --epoch 3", 2, "unrecognized arguments: --epoch 3"),
    "no number": ("digits {tiny} --epochs ten", 2, "'ten' is not a whole number"),
    "negative": ("digits {tiny} --lr -1", 2, "'-1' is not a number, 0 or more"),
    "not a number": ("digits {tiny} --moco-t nan", 2, "'nan' is not a number above 0"),
    "long warm-up": ("digits {tiny} --warmup-epochs 9", 2, "9 is more than --epochs 2"),
    "two beginnings": ("digits {tiny} --init-from a --resume b", 2, "give one of them"),
    "three sides": ("digits {tiny} --img-size 16 16 16", 2, "--img-size"),
    "fp16 on a CPU": ("digits {tiny} --amp fp16", 2, "--amp fp16 needs a CUDA GPU"),
    "a file for the output": ("digits {tiny} --output-dir {tmp}/bad.txt", 2, "can't write to"),
    "stop-grad on a ResNet": (
        "digits -b 64 -a resnet18 --stop-grad-conv1 --device cpu", 2, "is for ViTs",
    ),
    "a ResNet on tiny images in bf16": (
        "digits -b 64 -a resnet18 --img-size 16 --amp bf16 --device cpu", 2, "off, or a larger",
    ),
    "cifar without network": ("cifar10 {tiny} --data-root {root}/README.md", 2, "no cifar10"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(script, tmp_path, name):
    (tmp_path / "bad.txt").write_text("digits\n--lerning-rate 3  # mistyped\n")
    line, expected, words = BAD[name]
    line = line.format(tmp=tmp_path, root=ROOT, tiny=" ".join(TINY[1:]))
    run = tmp_path / "run"
    code, out, err = script("main_moco.py", "--output-dir", run, *line.split())
    assert (code, err.count("\n")) == (expected, 1), out + err
    assert err.startswith("main_moco.py: error: ") and words in err
    assert not run.exists()


def test_unreadable_image_stops_training_with_one_line(script, tmp_path, image_file):
    for i in range(30):
        image_file(f"images/{i}.jpg")
    (tmp_path / "images" / "29.jpg").write_bytes(b"no image")
    code, _, err = script(
        "main_moco.py", tmp_path / "images", *TINY[1:], "--batch-size", 10, "--workers", 1,
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert (code, err.count("\n")) == (1, 1) and "unreadable image" in err and "29.jpg" in err


def test_a_folder_with_a_run_is_not_overwritten(script, tmp_path):
    argv = (*TINY, "--epochs", 1, "--output-dir", tmp_path)
    assert script("main_moco.py", *argv)[0] == 0
    before = (tmp_path / checkpoint.LAST).read_bytes()
    code, _, err = script("main_moco.py", *argv)
    assert code == 2 and "holds a run: --resume auto" in err
    code, _, err = script("main_moco.py", *argv, "--resume", "auto", "--lr", 2, "--moco-t", 1)
    assert code == 2 and "--lr 0.001 → 2.0, --moco-t 0.2 → 1.0" in err
    assert (tmp_path / checkpoint.LAST).read_bytes() == before


def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(script, tmp_path, monkeypatch):
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
    code, _, err = script("main_moco.py", *argv)
    assert code == 1 and "weights are no numbers any more in epoch 0, iteration 4" in err


def test_resume_in_another_precision(script, tmp_path):
    argv = (*TINY, "--output-dir", tmp_path, "--resume", "auto")
    assert script("main_moco.py", *argv, "--amp", "off", "--epochs", 2)[0] == 0
    state = checkpoint.load(tmp_path / checkpoint.LAST)
    args = main_moco.parse_args([str(word) for word in argv])
    model = main_moco.create_model(args, torch.device("cpu"), None)
    optimizer = create_optimizer("adamw", model, 1e-3, 0)
    scaler = torch.amp.GradScaler("cpu", enabled=True)  # as for fp16
    paths = [tmp_path / checkpoint.LAST]
    parts = dict(optimizer=optimizer, scaler=scaler, batches=data.EpochBatches(1437, 256, 0))
    epoch, iteration, _ = checkpoint.resume(paths, args, model, **parts)
    assert (epoch, iteration) == (state["epoch"], state["iteration"]) == (2, 10)
    parts["batches"] = data.EpochBatches(1438, 256, 0)
    with pytest.raises(UserError, match="1437 images, DIR holds 1438"):
        checkpoint.resume(paths, args, model, **parts)


def test_a_loss_that_is_no_number_stops_the_run(script, tmp_path):
    code, _, err = script(
        "main_moco.py", *TINY, "--output-dir", tmp_path, "--amp", "off", "--lr", 1e30,
        "--warmup-epochs", 0,
    )  # fmt: skip
    assert code == 1 and "the loss became nan in epoch 0, iteration" in err
    assert "last good checkpoint: none yet" in err and err.count("\n") == 1


# Several processes.


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """A folder of 160 digits: float64 is slow."""
    folder, images = tmp_path_factory.mktemp("digits"), load_data("digits").train
    for i in range(160):
        write_png(images.read(i), str(folder / f"{i}.png"))
    return folder


def run_on(worlds, folder, name, *argv):
    """Runs the script with each number of processes: the folders it wrote to, one of one first."""
    tiny = " ".join(TINY[1:])
    if "resnet18" in argv:
        tiny = tiny.replace("--patch-size 4", "")
    for world in worlds:
        done = launch(world, name, *tiny.split(), "--amp", "off", "--epochs", 1, *argv,
                      "--output-dir", folder / str(world))  # fmt: skip
        assert done.returncode == 0, done.stderr
    return [folder / str(world) for world in worlds]


def logged(folder, key):
    return [row[key] for row in read_rows(folder / "log.jsonl") if key in row]


def differences(folder, other):
    """Relative differences of all weights and statistics; absolute where a norm is under 1e-5:
    what is 0 but for rounding (the last norm's bias, BN takes it out) has no relative one."""
    ours, theirs = weights(folder), weights(other)
    for key, value in ours.items():
        if value.is_floating_point():
            scale = value.norm() if value.norm() > 1e-5 else 1
            yield ((theirs[key] - value).norm() / scale).item(), key


def test_two_ranks_equal_one(tmp_path):
    # Few hidden units: that rounding switches one of them on or off (in_float64.py) is rare then.
    argv = ["digits", "--moco-mlp-dim", 8, "--optimizer", "lars", "--lr", 0.3, "--knn-every", 0]
    one, *others = run_on((1, 2, 4), tmp_path, "main_moco.py", *argv)
    assert len(logged(one, "loss")) == 5
    for other in others:
        assert logged(other, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
        assert max(differences(one, other))[0] < 1e-5, max(differences(one, other))


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_two_ranks_equal_one_in_float64(tmp_path, few_digits, arch):
    argv = [few_digits, "-a", arch, "-b", 32, "--knn-every", 0]
    one, two = run_on((1, 2), tmp_path, "tests/in_float64.py", *argv)
    assert logged(two, "loss") == logged(one, "loss")
    assert max(differences(one, two))[0] < 1e-9, max(differences(one, two))
    if arch == "vit_nano":  # chunks that divide no batch, of 32 or 16
        argv += ["--encode-chunk", 5]
        [chunked] = run_on((2,), tmp_path / "chunked", "tests/in_float64.py", *argv)
        assert max(differences(one, chunked))[0] < 1e-9, max(differences(one, chunked))


def test_batch_that_does_not_divide_is_refused_once(tmp_path):
    done = launch(2, "main_moco.py", *TINY, "--batch-size", 63, "--output-dir", tmp_path / "run")
    assert done.returncode != 0 and not os.path.exists(tmp_path / "run")
    assert done.stderr.count("main_moco.py: error: --batch-size 63") == 1
