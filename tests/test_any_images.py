"""Gray, multispectral and oblong images, lists and Hugging Face's sets, through the scripts."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, launch
from PIL import Image

from moco import UserError, augment, checkpoint, distributed
from moco.augment import NOTHING, Pixels
from moco.log import draw_views, read_rows

RNG = np.random.default_rng(0)
# Two steps.
STEPS = (
    "-a vit_nano --img-size 16 --patch-size 4 --batch-size 16 --optimizer adamw --epochs 1 "
    "--warmup-epochs 0 --moco-dim 16 --moco-mlp-dim 32 --workers 0 --device cpu --print-freq 1"
).split()
SHORT = "-b 16 --epochs 1 --workers 0 --device cpu".split()


def noise(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def write_gray(path):
    Image.fromarray(noise(20, 24)).save(path.with_suffix(".png"))


def write_deep(path):
    """Six channels of 16 bits, by turns as .npy, as TIFF of pages, and of samples."""
    tifffile = pytest.importorskip("tifffile")
    array = noise(20, 24, 6, dtype=np.uint16) // 8
    if path.stem[-1] in "02468":
        np.save(path.with_suffix(".npy"), array)
    elif path.stem[-1] in "159":
        pages = array.transpose(2, 0, 1)
        tifffile.imwrite(path.with_suffix(".tif"), pages, photometric="minisblack")
    else:
        tifffile.imwrite(path.with_suffix(".tiff"), array, photometric="minisblack",
                         planarconfig="contig")  # fmt: skip


def folders(root, write, train=16, val=4):
    for part, n in (("train", train), ("val", val)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                write(root / part / name / f"{i}")
    return root


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("gray"), write_gray)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("deep"), write_deep)


def test_gray_images_through_all_scripts(script, gray, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    run = tmp_path / "run"
    code, out, err = script("main_moco.py", gray, *STEPS, "--in-chans", 1, "--output-dir", run)
    assert (code, err) == (0, "")
    [line] = [line for line in out.splitlines() if "without saturation, hue and grayscale" in line]
    assert "1 channel" in line
    assert len([row for row in read_rows(run / "log.jsonl") if "loss" in row]) == 2
    state = checkpoint.load(run / "checkpoint.pth")
    assert (state["in_chans"], state["mean"], state["std"]) == (1, (0.449,), (0.226,))
    assert state["state_dict"]["module.base_encoder.patch_embed.proj.weight"].shape[1] == 1

    given = gray, "--pretrained", run / "checkpoint.pth"
    for name, flags in (
        ("main_lincls.py", ["--knn"]),
        ("main_finetune.py", ["--warmup-epochs", 0]),
    ):
        folder = tmp_path / name
        code, out, err = script(name, *given, *SHORT, *flags, "--output-dir", folder)
        assert code == 0 and "top-1" in out, err
    code, out, err = script("main_lincls.py", gray, "--pretrained", folder / "checkpoint.pth",
                            "--evaluate", "--workers", 0)  # fmt: skip
    assert code == 0 and "on 8 images" in out, err
    cpu = ["--workers", 0, "--device", "cpu"]
    for picture in ("attention", "neighbours"):
        out = tmp_path / f"{picture}.png"
        assert script("tools/visualize.py", picture, *given, *cpu, "--out", out)[0] == 0
    assert script("tools/features.py", *given, *cpu, "--out", tmp_path / "f.npz")[0] == 0
    assert np.load(tmp_path / "f.npz")["features"].shape == (32, 128)

    code, _, err = script("main_lincls.py", *given, *SHORT, "--in-chans", 3)
    assert code == 2 and "is for 1 channel(s): drop --in-chans 3" in err and err.count("\n") == 1


def test_six_channels_through_all_scripts(script, deep, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    run, means = tmp_path / "run", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    flags = ["--in-chans", 6, "--mean", *means, "--std", *means, "--max-value", 8191]
    code, out, err = script("main_moco.py", deep, *STEPS, *flags, "--output-dir", run)
    assert (code, err) == (0, "") and "6 channel(s): without saturation" in out
    state = checkpoint.load(run / "checkpoint.pth")
    assert (state["mean"], state["max_value"]) == (tuple(means), 8191)

    given = deep, "--pretrained", run / "checkpoint.pth"
    code, out, err = script("main_lincls.py", *given, *SHORT, "--output-dir", tmp_path / "probe")
    assert code == 0 and "top-1" in out, err
    assert checkpoint.load(tmp_path / "probe" / "linear_lr0.1.pth")["mean"] == tuple(means)
    tune = [*given, *SHORT, "--warmup-epochs", 0, "--output-dir", tmp_path / "tuned"]
    code, _, err = script("main_finetune.py", *tune)
    assert code == 2 and "--aa none" in err and err.count("\n") == 1
    assert script("main_finetune.py", *tune, "--aa", "none")[0] == 0
    out = tmp_path / "n.png"
    code, _, err = script("tools/visualize.py", "neighbours", *given, "--workers", 0, "--out", out)
    assert code == 0 and Image.open(out).size[0] > 100, err


def test_oblong_images_and_a_labelled_list(script, image_file, tmp_path):
    for i in range(32):
        image_file(f"some images/{i} of 32.jpg", height=100, width=170)
    for part, numbers in (("train", range(32)), ("val", range(0, 32, 4))):
        lines = [f"some images/{i} of 32.jpg\tclass {i % 2}\n" for i in numbers]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    size = ["--img-size", 96, 160, "--patch-size", 16, 32]
    run = tmp_path / "run"
    code, out, err = script("main_moco.py", tmp_path, *STEPS, *size, "--output-dir", run)
    assert (code, err) == (0, "") and "32 images to train on, 8 to validate" in out
    code, out, err = script("main_lincls.py", tmp_path, *SHORT, "--pretrained",
                            run / "checkpoint.pth", "--output-dir", tmp_path / "probe")  # fmt: skip
    assert code == 0 and "8 to validate, 2 classes" in out, err
    code, _, err = script("tools/features.py", tmp_path / "train.txt", "--pretrained",
                          run / "checkpoint.pth", "--workers", 0, "--out",
                          tmp_path / "f.npz")  # fmt: skip
    found = np.load(tmp_path / "f.npz")
    assert code == 0 and found["paths"][9] == "some images/9 of 32.jpg", err
    assert found["classes"].tolist() == ["class 0", "class 1"] and found["labels"][9] == 1


def test_a_hugging_face_data_set(script, tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    kind = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def rows(n):
        images = [Image.fromarray(noise(20, 24, 3)) for _ in range(n)]
        labels = [i % 2 for i in range(n)]
        return datasets.Dataset.from_dict({"img": images, "label": labels}, features=kind)

    datasets.disable_progress_bars()
    datasets.DatasetDict(train=rows(32), test=rows(8)).save_to_disk(tmp_path / "set")
    where, run = f"hf:{tmp_path}/set", tmp_path / "run"
    code, out, err = script("main_moco.py", where, *STEPS, "--knn-every", 1, "--output-dir", run)
    assert (code, err) == (0, "") and "32 images to train on, 8 to validate" in out
    code, out, err = script("main_lincls.py", where, *SHORT, "--hf-columns", "img", "label",
                            "--hf-splits", "train", "test", "--workers", 1, "--pretrained",
                            run / "checkpoint.pth", "--output-dir", tmp_path / "p")  # fmt: skip
    assert code == 0 and "2 classes" in out, err
    for flags, words in (
        (["--hf-columns", "image"], "has no column image, but img label"),
        (["--hf-columns", "label"], "column label holds no images"),
        (["--hf-columns", "img", "img"], "column img holds no labels"),
        (["--hf-splits", "train", "val"], "has no val, but train test"),
        (["--hf-splits", "a", "b", "c"], "takes one word or two"),
    ):
        code, _, err = script("main_moco.py", where, *STEPS, *flags, "--output-dir", tmp_path / "x")
        assert code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "args, words",
    [
        (["digits", "--in-chans", 6], "digits is of 8-bit RGB"),
        (
            ["digits", "--in-chans", 1, "--mean", 0.1, 0.2, 0.3],
            "a number for each of 1 channels, not 3",
        ),
        (["digits", "--mean", 123.7, 116.3, 103.5], "'123.7' is not a number from 0 to 1"),
        (["digits", "--std", 0], "'0' is not a number above 0"),
        (["digits", "--hf-columns", "image"], "are for hf:NAME, not for digits"),
        (["hf:/no/where"], "can't load hf:/no/where"),
        (["no.txt"], "no.txt does not exist: give a folder of images, a list.txt, hf:NAME"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(script, tmp_path, args, words):
    if "hf:/no/where" in args:
        pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    code, _, err = script("main_moco.py", *args, *STEPS, "--output-dir", tmp_path)
    assert code == 2 and words in err and err.count("\n") == 1


def test_without_the_package_a_line_says_what_to_install(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = script("main_moco.py", "hf:x", *STEPS, "--output-dir", tmp_path)
    assert code == 2 and "pip install datasets" in err and err.count("\n") == 1


def test_channels_that_files_lack_stop_the_run_in_a_line(script, gray, tmp_path):
    code, _, err = script("main_moco.py", gray, *STEPS, "--in-chans", 6, "--output-dir", tmp_path)
    assert code == 1 and "it has 1 channel(s), not --in-chans 6" in err and err.count("\n") == 1


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_what_needs_colours_is_left_out_and_the_rest_acts(channels):
    pixels = Pixels(channels, (0.1,) * channels, (0.5,) * channels)
    images = torch.randint(0, 256, (2, channels, 12, 9), dtype=torch.uint8)
    x = images.float() / 255

    def augmented(**changes):
        row = torch.tensor(NOTHING, dtype=torch.float32).repeat(2, 1)
        for name, value in changes.items():
            row[:, getattr(augment, name)] = value
        return augment.denormalize(augment.augment(images, row, pixels), pixels)

    def same(found, expected):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    same(augmented(SATUR=1.2, HUE_SHIFT=0.1, GRAYSCALE=1), x)
    same(augmented(BRIGHT=1.3), (1.3 * x).clamp(0, 1))
    gray = x.mean((1, 2, 3), keepdim=True)
    same(augmented(CONTR=0.7), 0.7 * x + 0.3 * gray)
    same(augmented(SOLARIZE=1, FLIP=1), torch.where(x >= 128 / 255, 1 - x, x).flip(-1))
    sigma = torch.tensor([2.0, 2.0])
    three = augment.gaussian_blur(x[:, :1].expand(-1, 3, -1, -1), sigma)
    same(augmented(SIGMA=2)[:, :1], three[:, :1])


def test_views_of_any_channels_are_drawn(tmp_path):
    for channels in (1, 2, 6):
        pixels = Pixels(channels, (0.5,) * channels, (0.5,) * channels)
        draw_views(tmp_path, *torch.randn(2, 3, channels, 8, 12), pixels)
        assert (tmp_path / "views.png").read_bytes().startswith(b"\x89PNG")
        seen = augment.visible(torch.zeros(channels, 8, 12), pixels)
        assert seen.shape == (3, 8, 12) and (seen == 0.5).all()


def test_of_two_processes_one_says_what_is_missing(tmp_path):
    done = launch(2, "main_moco.py", tmp_path / "nowhere", *STEPS, "--output-dir", tmp_path / "x")
    said = [line for line in done.stderr.splitlines() if "does not exist" in line]
    assert done.returncode and len(said) == 1


def test_only_the_first_process_of_a_host_lists(tmp_path, monkeypatch):
    """Two processes, simulated: the second finds in the file what the first has found."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    paths = {}

    def gather(everyone, path):
        paths.setdefault("first", path)
        everyone[:] = [paths["first"], None]

    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    monkeypatch.setattr(distributed.os, "unlink", lambda path: None)
    for made in ([1, 2], UserError("nothing there")):
        paths.clear()
        for rank in (0, 1):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "local_rank", lambda rank=rank: rank)

            def make(rank=rank, made=made):
                assert rank == 0
                if isinstance(made, UserError):
                    raise made
                return made

            if isinstance(made, UserError):
                with pytest.raises(UserError, match="nothing there"):
                    distributed.once_per_host(make)
            else:
                assert distributed.once_per_host(make) == made
