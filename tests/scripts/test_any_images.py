"""Gray, multispectral and oblong images, lists and Hugging Face's sets, through the scripts."""

import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SMALL
from PIL import Image

import main_lincls
from engine import checkpoint
from engine.data.decode import PixelFormat
from engine.plots import plot_views, to_rgb
from main_moco import warn_of_value_range
from moco.augmentation import IDENTITY_PARAMS, Param, augment, denormalize, gaussian_blur

RNG = np.random.default_rng(0)
STEPS = (*SMALL["main_moco.py"], "--batch-size", 16, "--patch-size", 4)  # two an epoch
SHORT = ("-b", 16, "--epochs", 1, *CPU)


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
        tifffile.imwrite(
            path.with_suffix(".tiff"), array, photometric="minisblack", planarconfig="contig"
        )


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


def test_gray_images_through_all_scripts(succeed, refusal, gray, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    run = tmp_path / "run"
    out = succeed("main_moco.py", gray, *STEPS, "--in-chans", 1, "--output-dir", run)
    assert "without saturation, hue and grayscale, which need RGB" in out
    state = checkpoint.load(run / "checkpoint.pth")
    assert (state["in_chans"], state["mean"], state["std"]) == (1, (0.449,), (0.226,))
    assert state["state_dict"]["module.base_encoder.patch_embed.proj.weight"].shape[1] == 1

    given = (gray, "--pretrained", run / "checkpoint.pth")
    for name, more in (("main_lincls.py", ["--knn"]), ("main_finetune.py", ["--warmup-epochs", 0])):
        folder = tmp_path / name
        assert "top-1" in succeed(name, *given, *SHORT, *more, "--output-dir", folder)
    evaluate = ("--pretrained", folder / "checkpoint.pth", "--evaluate", *CPU)
    assert "on 8 images" in succeed("main_lincls.py", gray, *evaluate)
    for picture in ("attention", "neighbours"):
        out = ("--out", tmp_path / f"{picture}.png")
        succeed("tools/visualize.py", picture, *given, *CPU, *out)
    succeed("tools/features.py", *given, *CPU, "--out", tmp_path / "f.npz")
    assert np.load(tmp_path / "f.npz")["features"].shape == (32, 128)
    err = refusal("main_lincls.py", *given, *SHORT, "--in-chans", 3)
    assert "is for 1 channel(s): drop --in-chans 3" in err


@pytest.mark.slow
def test_six_channels_through_all_scripts(succeed, refusal, deep, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    run, means = tmp_path / "run", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    flags = ["--in-chans", 6, "--mean", *means, "--std", *means, "--value-range", 0, 8191]
    out = succeed("main_moco.py", deep, *STEPS, *flags, "--output-dir", run)
    assert "without saturation, hue and grayscale" in out
    state = checkpoint.load(run / "checkpoint.pth")
    assert (state["mean"], state["value_range"]) == (tuple(means), (0, 8191))

    given = (deep, "--pretrained", run / "checkpoint.pth")
    assert "top-1" in succeed("main_lincls.py", *given, *SHORT, "--output-dir", tmp_path / "probe")
    assert checkpoint.load(tmp_path / "probe" / "linear_lr0.1.pth")["mean"] == tuple(means)
    tune = (*given, *SHORT, "--warmup-epochs", 0, "--output-dir", tmp_path / "tuned")
    assert "--aa none" in refusal("main_finetune.py", *tune)
    succeed("main_finetune.py", *tune, "--aa", "none")
    out = tmp_path / "n.png"
    succeed("tools/visualize.py", "neighbours", *given, "--workers", 0, "--out", out)
    assert Image.open(out).size[0] > 100


@pytest.mark.slow
def test_oblong_images_and_a_labelled_list(succeed, image_file, tmp_path):
    data = tmp_path / "set"
    for i in range(32):
        image_file(f"set/some images/{i} of 32.jpg", height=100, width=170)
    for part, numbers in (("train", range(32)), ("val", range(0, 32, 4))):
        lines = [f"some images/{i} of 32.jpg\tclass {i % 2}\n" for i in numbers]
        (data / f"{part}.txt").write_text("".join(lines))
    size = ["--img-size", 96, 160, "--patch-size", 16, 32]
    run = tmp_path / "run"
    out = succeed("main_moco.py", data, *STEPS, *size, "--output-dir", run)
    assert "32 images to train on" in out
    pretrained = ["--pretrained", run / "checkpoint.pth"]
    probe = ["--output-dir", tmp_path / "probe"]
    out = succeed("main_lincls.py", data, *SHORT, *pretrained, *probe)
    assert "32 images to train on, 8 to validate, 2 classes: class 0, class 1" in out
    out = ["--workers", 0, "--out", tmp_path / "f.npz"]
    succeed("tools/features.py", data / "train.txt", *pretrained, *out)
    features = np.load(tmp_path / "f.npz")
    assert features["paths"][9] == "some images/9 of 32.jpg"
    assert features["classes"].tolist() == ["class 0", "class 1"] and features["labels"][9] == 1


def save_huggingface(folder, class_names, **splits):
    """splits: name → images or paths, their labels → DIR."""
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    columns = dict(img=datasets.Image(), label=datasets.ClassLabel(names=class_names))
    datasets.disable_progress_bars()
    parts = {}
    for name, (images, labels) in splits.items():
        content, features = dict(img=images, label=labels), datasets.Features(columns)
        parts[name] = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return f"hf:{folder}"


def test_a_hugging_face_dataset(succeed, tmp_path):
    def records(n):
        return [Image.fromarray(noise(20, 24, 3)) for _ in range(n)], [i % 2 for i in range(n)]

    splits = dict(train=records(32), test=records(8))
    where = save_huggingface(tmp_path / "set", ["cat", "dog"], **splits)
    run = tmp_path / "run"
    out = succeed("main_moco.py", where, *STEPS, "--knn-every", 1, "--output-dir", run)
    assert "32 images to train on, 8 to validate, 2 classes: cat, dog" in out
    argv = ("--workers", 1, "--pretrained", run / "checkpoint.pth", "--output-dir", tmp_path / "p")
    assert "2 classes" in succeed("main_lincls.py", where, *SHORT, *argv)


# A saved classifier and other data.

COLORS = [(20 * c, 255 - 20 * c, 128 + 120 * (-1) ** c) for c in range(12)]


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Class folders 0 … 11, of one color each, and a linear classifier trained on them."""
    root = tmp_path_factory.mktemp("colors")
    for split, n in (("train", 8), ("val", 2)):
        for label, color in enumerate(COLORS):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(np.array(color) + RNG.integers(-9, 10, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    args = "--from-scratch -a vit_nano --img-size 16 --patch-size 4 --batch-size 32 --epochs 5"
    args += f" --lr 10 --batchnorm --crop-min 0.9 {' '.join(CPU)} --output-dir"
    folder = tmp_path_factory.mktemp("probe")
    main_lincls.main(main_lincls.parse_args([str(root), *args.split(), str(folder)]))
    return root, folder / "linear_lr10.pth"


@pytest.fixture
def evaluate(succeed):
    """Measures a saved classifier → top-1 in %, stdout."""

    def run(path, classifier, *more):
        out = succeed("main_lincls.py", path, "--pretrained", classifier, "--evaluate", *CPU, *more)
        return float(re.search(r"top-1 ([\d.]+) %", out)[1]), out

    return run


def test_accuracy_is_the_same_whatever_the_form_of_the_data(evaluate, colors, tmp_path):
    root, classifier = colors
    expected, out = evaluate(root, classifier)
    assert expected > 50 and "of the 12 classes" not in out
    images = tmp_path / "lists"
    shutil.copytree(root / "val", images / "im")
    for split in ("train", "val"):
        lines = [f"im/{c}/{i}.png\t{c}\n" for c in range(12) for i in range(2)]
        (images / f"{split}.txt").write_text("".join(lines))
    assert evaluate(images, classifier)[0] == expected
    assert evaluate(images / "val.txt", classifier)[0] == expected

    paths = [str(root / f"val/{c}/{i}.png") for c in range(12) for i in range(2)]
    labels = [c for c in range(12) for _ in range(2)]
    names = [str(c) for c in range(12)]
    where = save_huggingface(tmp_path / "set", names, test=(paths, labels))
    assert evaluate(where, classifier)[0] == expected


def test_a_classifier_without_class_names_compares_their_number(
    evaluate, refusal, colors, tmp_path
):
    root, classifier = colors
    state, path = checkpoint.load(classifier), tmp_path / "unnamed.pth"
    del state["class_names"]
    torch.save(state, path)
    expected, _ = evaluate(root, classifier)
    acc1, out = evaluate(root, path)
    assert acc1 == expected and out.count("unnamed.pth states no class names") == 1
    for name in ("1", "10"):
        shutil.copytree(root / "val" / name, tmp_path / "val" / name)
    err = refusal("main_lincls.py", tmp_path, "--pretrained", path, "--evaluate", *CPU)
    assert "has 12 classes, the images have 2" in err


@pytest.mark.parametrize(
    "args, words",
    [
        (["digits", "--in-chans", 6], "digits is of 8-bit RGB"),
        (
            ["digits", "--in-chans", 1, "--mean", 0.1, 0.2, 0.3],
            "--mean takes one number per channel: 1, not 3",
        ),
        (["digits", "--mean", 123.7, 116.3, 103.5], "'123.7' is not a number from 0 to 1"),
        (["digits", "--std", 0], "'0' is not a number above 0"),
        (["hf:/no/where"], "can't load hf:/no/where"),
        (["no.txt"], "no.txt does not exist: give a folder of images"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(refusal, tmp_path, args, words):
    if "hf:/no/where" in args:
        pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    assert words in refusal("main_moco.py", *args, *STEPS, "--output-dir", tmp_path)


def test_without_the_package_a_line_says_what_to_install(refusal, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    argv = ("hf:x", *STEPS, "--output-dir", tmp_path)
    assert "pip install datasets" in refusal("main_moco.py", *argv)


def test_channels_that_files_lack_stop_the_run_in_a_line(refusal, gray, tmp_path):
    argv = (gray, *STEPS, "--in-chans", 6, "--output-dir", tmp_path)
    assert "L pixels, not --in-chans 6" in refusal("main_moco.py", *argv, code=1)


def test_a_value_range_that_clips_the_files_is_noticed(succeed, tmp_path):
    for i in range(16):
        np.save(tmp_path / f"{i}.npy", np.full((20, 24, 1), 256 + i, np.uint16))
    argv = (tmp_path, *STEPS, "--in-chans", 1, "--value-range", 0, 255)
    out = succeed("main_moco.py", *argv, "--output-dir", tmp_path.parent / "run")
    assert "warning: 100 % of the pixels lie at an end of --value-range 0 255\n" in out


@pytest.mark.parametrize(
    "high, black, warning",
    [
        (17, 0, "warning: the pixels take 6 % of --value-range 0 65535"),
        (256, 0.85, None),  # black background
        (40, 0, None),  # dark
        (256, 0.95, "warning: 95 % of the pixels lie at an end of --value-range 0 65535"),
    ],
)
def test_a_value_range_that_is_not_the_files_is_noticed(high, black, warning):
    crops, lines = torch.randint(0, high, (2, 4, 1, 100, 100), dtype=torch.uint8), []
    crops[..., : int(100 * black), :] = 0
    warn_of_value_range(SimpleNamespace(print=lines.append), crops, (0, 65535))
    assert lines == ([] if warning is None else [warning])


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_what_needs_colours_is_left_out_and_the_rest_acts(channels):
    mean, std = (0.1,) * channels, (0.5,) * channels
    images = torch.randint(0, 256, (2, channels, 12, 9), dtype=torch.uint8)
    x = images.float() / 255

    def augmented(**changes):
        params = torch.tensor(IDENTITY_PARAMS, dtype=torch.float32).repeat(2, 1)
        for name, value in changes.items():
            params[:, Param[name]] = value
        return denormalize(augment(images, params, mean, std), mean, std)

    def same(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)

    same(augmented(SATURATION=1.2, HUE=0.1, GRAYSCALE=1), x)
    same(augmented(BRIGHTNESS=1.3), (1.3 * x).clamp(0, 1))
    gray = x.mean((1, 2, 3), keepdim=True)
    same(augmented(CONTRAST=0.7), 0.7 * x + 0.3 * gray)
    same(augmented(SOLARIZE=1, FLIP=1), torch.where(x >= 128 / 255, 1 - x, x).flip(-1))
    sigma = torch.tensor([2.0, 2.0])
    three = gaussian_blur(x[:, :1].expand(-1, 3, -1, -1), sigma)
    same(augmented(SIGMA=2)[:, :1], three[:, :1])


def test_views_of_any_channels_are_drawn(tmp_path):
    for channels in (1, 2, 6):
        pixel_format = PixelFormat(channels, (0.5,) * channels, (0.5,) * channels)
        plot_views(tmp_path, *torch.randn(2, 3, channels, 8, 12), pixel_format)
        assert (tmp_path / "views.png").read_bytes().startswith(b"\x89PNG")
        x = torch.linspace(-1, 1, channels)[:, None, None].expand(-1, 8, 12)
        rgb = to_rgb(x, pixel_format)
        shown = {1: [0, 0, 0], 2: [0, 1, 0], 6: [0, 0.2, 0.4]}[channels]
        torch.testing.assert_close(rgb[:, 3, 5], torch.tensor(shown, dtype=torch.float32))
        assert rgb.shape == (3, 8, 12)
