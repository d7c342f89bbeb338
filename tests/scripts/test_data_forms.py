"""What the scripts do with each form of DIR, with --val and with --knn-data."""

import itertools
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from engine.log import read_log

COLORS = {"red": (200, 0, 0), "green": (0, 200, 0)}
CPU = ["--workers", "0", "--device", "cpu"]
STEPS = "--img-size 16 --patch-size 4 --batch-size 8 --epochs 1 --print-freq 1".split() + CPU
MOCO = "-a vit_nano --optimizer adamw --warmup-epochs 0 --moco-dim 16 --moco-mlp-dim 32".split()
MOCO += STEPS
FINETUNE = "--warmup-epochs 0 --warmup-lr 0 --min-lr 0".split()


def colored(folder, n, classes=COLORS):
    """folder/CLASS/0.png …, of one color per class."""
    for label, color in classes.items():
        (folder / label).mkdir(parents=True)
        for i in range(n):
            image = np.full((16, 16, 3), color) + np.random.default_rng(i).integers(0, 20)
            Image.fromarray(image.astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


def both(folder, n_train=8, n_val=2):
    """folder/train and folder/val."""
    colored(folder / "train", n_train)
    colored(folder / "val", n_val)
    return folder


def pack(folder, path):
    """All of the folder in a .tar."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            tar.add(file, file.relative_to(folder))
    return path


def values(folder, name):
    return [line[name] for line in read_log(folder / "log.jsonl") if name in line]


def fails(done, words):
    """Whether a script failed before training, in a line with these words."""
    code, _, err = done
    return code == 2 and err.count("\n") == 1 and re.search(words, err) is not None


@pytest.fixture
def probe(script, tmp_path):
    """A linear classifier of red and green."""
    argv = "--from-scratch -a vit_nano --lr 10 --batchnorm --crop-min 0.9 --epochs 10".split()
    data = both(tmp_path / "set")
    done = script("main_lincls.py", data, *STEPS, *argv, "--output-dir", tmp_path / "probe")
    assert done[0] == 0, done[2]
    return tmp_path / "probe" / "linear_lr10.pth"


def test_pretraining_on_class_folders_says_what_it_found(script, tmp_path):
    data, run = both(tmp_path / "set"), tmp_path / "run"
    (data / "test").mkdir()
    code, out, err = script("main_moco.py", data, *MOCO, "--knn-every", 1, "--output-dir", run)
    assert (code, err) == (0, "") and len(values(run, "knn")) == 2
    line = f"{data}: 16 images to train on, 4 to validate, 2 classes: green, red; not read: test"
    assert f"data    {line}\n" in out
    for folder in (data / "train" / "x", data / "val"):
        done = script("main_moco.py", data, *MOCO, "--output-dir", folder)
        assert fails(done, f"--output-dir {folder} is among the images of {data}: move it")


def test_pretraining_says_why_there_is_no_knn(script, tmp_path):
    flat = colored(tmp_path / "flat", 8, {"one": (9, 9, 9)})
    classes, val = colored(tmp_path / "classes", 4), tmp_path / "only"
    colored(val / "val", 2)
    for data, reason in ((flat, "the images have no labels"), (classes, f"{classes} has no val")):
        argv = [data, *MOCO, "--output-dir", tmp_path / f"run_{data.name}"]
        code, out, err = script("main_moco.py", *argv)
        assert (code, err) == (0, "") and f"kNN is off: {reason}" in out
        assert not values(tmp_path / f"run_{data.name}", "knn")
    assert fails(script("main_moco.py", val, *MOCO), f"{val} has no train, only val")
    assert fails(script("main_moco.py", tmp_path / "no", *MOCO), "no does not exist: give a")
    (tmp_path / "cut.tar").write_bytes(pack(classes, tmp_path / "x.tar").read_bytes()[:3000])
    argv = [tmp_path / "cut.tar", *MOCO, "--output-dir", tmp_path / "cut"]
    assert fails(script("main_moco.py", *argv), r"cut\.tar is not a whole \.tar, copy it again")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("flaw", ["flat val", "extra class", "empty class", "beside", "val list"])
def test_pretraining_needs_no_labels_unless_knn_does(script, tmp_path, flaw):
    data = both(tmp_path / "set")
    image = (data / "val" / "red" / "0.png").read_bytes()
    if flaw == "flat val":
        (data / "val" / "1.png").write_bytes(image)
    elif flaw == "extra class":
        colored(data / "val", 1, {"x": (0, 0, 0)})
    elif flaw == "empty class":
        (data / "train" / "blue").mkdir()
    elif flaw == "beside":
        (data / "train" / "1.png").write_bytes(image)
    else:
        (data / "val.txt").write_text("train/red/0.png\n")
    argv = [data, *MOCO, "--output-dir", tmp_path / "run"]
    assert fails(script("main_moco.py", *argv), "; --knn-every 0 pre-trains without labels")
    code, out, err = script("main_moco.py", *argv, "--knn-every", 0)
    assert (code, err) == (0, "") and f"{16 + (flaw == 'beside')} images to train on" in out


def test_pretraining_without_labels_is_watched_on_a_labelled_set(script, tmp_path):
    images = colored(tmp_path / "images", 8, {"2023": (9, 9, 9), "2024": (99, 9, 9)})
    data, run = both(tmp_path / "set"), tmp_path / "run"
    argv = [images, *MOCO, "--knn-data", data, "--knn-every", 1, "--output-dir", run]
    code, out, err = script("main_moco.py", *argv)
    assert (code, err) == (0, "") and values(run, "knn")[-1] == 100
    classes = "2 classes: green, red"
    assert f"knn     {data}: 16 images to train on, 4 to validate, {classes}\n" in out
    assert f"data    {images}: 16 images to train on, 2 classes: 2023, 2024" in out
    # Another set may be watched when the run is resumed.
    other = both(tmp_path / "other", 2, 1)
    resume = ["--resume", "auto", "--knn-data", other]
    code, out, err = script("main_moco.py", images, *MOCO, *resume, "--output-dir", run)
    assert (code, err) == (0, "") and "nothing left to do" in out
    for flags, words in (
        (["--knn-data", images], "has the forms; --knn-data needs train and val"),
        (["--knn-data", "x", "--knn-every", 0], "is for kNN, which --knn-every 0 turns off"),
        (["--knn-data", tmp_path / "no"], f"{tmp_path}/no does not exist"),
        (["--knn-data", data, "--output-dir", data / "val" / "x"], "is among the images of"),
        (["--val", data], "unrecognized arguments: --val"),
    ):
        argv = [images, *MOCO, "--output-dir", tmp_path / "new", *flags]
        assert fails(script("main_moco.py", *argv), words)


def test_a_run_goes_on_without_knn_and_without_val(script, tmp_path):
    data, run = both(tmp_path / "set"), tmp_path / "run"
    argv = [data, *MOCO, "--output-dir", run, "--epochs", 2]
    assert script("main_moco.py", *argv, "--save-every", 1)[0] == 0
    (data / "val").rename(tmp_path / "val")
    argv += ["--output-dir", tmp_path / "again"]
    resume = ["--resume", run / "checkpoint_0001.pth", "--knn-every", 0]
    code, out, err = script("main_moco.py", *argv, *resume)
    assert (code, err) == (0, "") and "resumed after step 2 of 4" in out


@pytest.mark.parametrize("form", ["val", "flat", "list", "tar"])
def test_a_classifier_is_measured_without_training_images(script, probe, tmp_path, form):
    test = tmp_path / "test"
    colored(test / "val" if form == "val" else test, 3)
    if form == "list":
        paths = [f"{label}/{i}.png" for label in COLORS for i in range(3)]
        (test / "list.txt").write_text("".join(f"{path}\t{path.split('/')[0]}\n" for path in paths))
        test = test / "list.txt"
    elif form == "tar":
        test = pack(test, tmp_path / "test.tar")
    argv = [test, "--pretrained", probe, *CPU, "--evaluate"]
    for name in ("main_lincls.py", "main_finetune.py"):
        code, out, err = script(name, *argv)
        assert (code, err) == (0, "") and "top-1 100.00 % on 6 images" in out
        assert f"data    {test}: 6 images to validate, 2 classes: green, red" in out
    assert fails(script("main_lincls.py", *argv, "--knn"), "has no (train|val), (only|for) ")
    done = script("main_lincls.py", *argv, "--val", test)
    assert fails(done, "--evaluate measures the images in DIR: give them there, without --val")


def test_images_to_validate_may_be_elsewhere(script, probe, tmp_path):
    other = colored(tmp_path / "other", 3, {"green": COLORS["green"]})
    data = [tmp_path / "set" / "train", "--val", other]  # class folders themselves
    start = ["--pretrained", probe, *STEPS]
    for name, more in (("main_lincls.py", ["--knn"]), ("main_finetune.py", FINETUNE)):
        code, out, err = script(name, *data, *start, *more, "--output-dir", tmp_path / name)
        assert (code, err) == (0, "") and f"validated on {other}" in out
        assert "16 images to train on, 3 to validate, 2 classes: green, red" in out
        assert "1 of the 2 classes of" in out
    (other / "green").rename(other / "blue")
    colored(other, 1, {"white": (255, 255, 255)})
    words = f"--val {other} has classes that {data[0]} does not know: blue, white"
    assert fails(script("main_lincls.py", *data, *start), words)
    data[2] = tmp_path / "set" / "train" / "red"
    assert fails(script("main_finetune.py", *data, *start, *FINETUNE), f"--val {data[2]} has no")


@pytest.mark.slow
def test_a_run_on_archives_equals_that_on_files_and_resumes_exactly(script, tmp_path):
    files, more = both(tmp_path / "set"), ["--knn-every", 1, "--epochs", 2]
    archive = pack(files, tmp_path / "set.tar")

    def losses(data, name, *args):
        folder = tmp_path / name
        done = script("main_moco.py", data, *MOCO, *more, "--output-dir", folder, *args)
        assert done[0] == 0, done[2]
        return values(folder, "loss")

    expected = losses(files, "loose")
    assert len(expected) == 4 and losses(archive, "whole", "--workers", 2) == expected
    losses(archive, "parts", "--save-every", 1)
    resume = ["--resume", tmp_path / "parts" / "checkpoint_0001.pth", "--workers", 2]
    assert losses(archive, "resumed", *resume) == expected[2:]


def test_names_of_any_characters_write_nothing_else_to_the_terminal(script, tmp_path):
    evil = "\x1b]0;title\x07\nmain_moco.py: error\x1b[31m"
    for split, name in itertools.product(("train", "val"), ("a", evil)):
        folder = tmp_path / f"set{evil}" / split / name
        folder.mkdir(parents=True)
        for i in range(8):
            (folder / f"{evil}{i}.png").write_bytes(b"no image")
    argv = (tmp_path / f"set{evil}", *MOCO)
    code, out, err = script("main_moco.py", *argv, "--output-dir", tmp_path / f"run{evil}")
    assert code == 1 and err.count("\n") == 1 and "\x1b" not in out + err
    assert "\nmain_moco.py: error" not in out and "unreadable images" in err
