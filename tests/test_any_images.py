"""Gray, multispectral and oblong images, lists and Hugging Face's sets, through the scripts."""

import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from conftest import launch as launch_processes
from PIL import Image, ImageOps

import main_lincls
from engine import checkpoint, launch
from engine.decode import PixelFormat
from engine.errors import UserError
from engine.log import read_log
from engine.plots import plot_views, to_rgb
from moco.augmentation import IDENTITY_PARAMS, Param, augment, denormalize, gaussian_blur

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


def test_gray_images_through_all_scripts(script, gray, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    run = tmp_path / "run"
    code, out, err = script("main_moco.py", gray, *STEPS, "--in-chans", 1, "--output-dir", run)
    assert (code, err) == (0, "")
    assert "without saturation, hue and grayscale, which need RGB" in out
    assert len([line for line in read_log(run / "log.jsonl") if "loss" in line]) == 2
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
    evaluate = ["--pretrained", folder / "checkpoint.pth", "--evaluate", "--workers", 0]
    code, out, err = script("main_lincls.py", gray, *evaluate)
    assert code == 0 and "on 8 images" in out, err
    cpu = ["--workers", 0, "--device", "cpu"]
    for picture in ("attention", "neighbours"):
        out = tmp_path / f"{picture}.png"
        assert script("tools/visualize.py", picture, *given, *cpu, "--out", out)[0] == 0
    assert script("tools/features.py", *given, *cpu, "--out", tmp_path / "f.npz")[0] == 0
    assert np.load(tmp_path / "f.npz")["features"].shape == (32, 128)

    code, _, err = script("main_lincls.py", *given, *SHORT, "--in-chans", 3)
    assert code == 2 and "is for 1 channel(s): drop --in-chans 3" in err and err.count("\n") == 1


@pytest.mark.slow
def test_six_channels_through_all_scripts(script, deep, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    run, means = tmp_path / "run", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    flags = ["--in-chans", 6, "--mean", *means, "--std", *means, "--max-value", 8191]
    code, out, err = script("main_moco.py", deep, *STEPS, *flags, "--output-dir", run)
    assert (code, err) == (0, "") and "without saturation, hue and grayscale" in out
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


@pytest.mark.slow
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
    pretrained = ["--pretrained", run / "checkpoint.pth"]
    probe = ["--output-dir", tmp_path / "probe"]
    code, out, err = script("main_lincls.py", tmp_path, *SHORT, *pretrained, *probe)
    assert code == 0 and "8 to validate, 2 classes; read from train.txt and val.txt" in out, err
    out = ["--workers", 0, "--out", tmp_path / "f.npz"]
    code, _, err = script("tools/features.py", tmp_path / "train.txt", *pretrained, *out)
    features = np.load(tmp_path / "f.npz")
    assert code == 0 and features["paths"][9] == "some images/9 of 32.jpg", err
    assert features["classes"].tolist() == ["class 0", "class 1"] and features["labels"][9] == 1


def test_a_hugging_face_dataset(script, tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    kind = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def records(n):
        images = [Image.fromarray(noise(20, 24, 3)) for _ in range(n)]
        labels = [i % 2 for i in range(n)]
        return datasets.Dataset.from_dict({"img": images, "label": labels}, features=kind)

    datasets.disable_progress_bars()
    datasets.DatasetDict(train=records(32), test=records(8)).save_to_disk(str(tmp_path / "set"))
    where, run = f"hf:{tmp_path}/set", tmp_path / "run"
    code, out, err = script("main_moco.py", where, *STEPS, "--knn-every", 1, "--output-dir", run)
    assert (code, err) == (0, "") and "32 images to train on, 8 to validate" in out
    choice = "--hf-columns img label --hf-splits train test --workers 1".split()
    pretrained = ["--pretrained", run / "checkpoint.pth", "--output-dir", tmp_path / "p"]
    code, out, err = script("main_lincls.py", where, *SHORT, *choice, *pretrained)
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
    args += " --lr 10 --batchnorm --crop-min 0.9 --workers 0 --device cpu --output-dir"
    main_lincls.main(main_lincls.parse_args([str(root), *args.split(), str(root / "probe")]))
    return root, root / "probe" / "linear_lr10.pth"


@pytest.fixture
def evaluate(script):
    """Measures a saved classifier → top-1 in %, stdout."""

    def run(path, classifier, *more):
        args = ["--pretrained", classifier, "--evaluate", "--workers", 0, "--device", "cpu", *more]
        code, out, err = script("main_lincls.py", path, *args)
        assert (code, err) == (0, "")
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

    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    paths = [str(root / f"val/{c}/{i}.png") for c in range(12) for i in range(2)]
    labels = [c for c in range(12) for _ in range(2)]
    part = datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)
    datasets.disable_progress_bars()
    datasets.DatasetDict(test=part).save_to_disk(str(tmp_path / "set"))
    columns = ["--hf-columns", "image", "label"]
    assert evaluate(f"hf:{tmp_path}/set", classifier, *columns)[0] == expected


def test_a_part_of_the_classes_is_measured_among_all(evaluate, script, colors, tmp_path):
    root, classifier = colors
    for name in ("1", "5", "10"):
        shutil.copytree(root / "val" / name, tmp_path / "val" / name)
    acc1, out = evaluate(tmp_path, classifier)
    assert acc1 > 50 and "3 of the 12 classes" in out and "on 6 images" in out
    (tmp_path / "val" / "10").rename(tmp_path / "val" / "ten")
    args = ["--pretrained", classifier, "--evaluate", "--workers", 0]
    code, _, err = script("main_lincls.py", tmp_path, *args)
    assert code == 2 and "does not know: ten" in err and err.count("\n") == 1


def test_a_classifier_without_class_names_compares_their_number(evaluate, script, colors, tmp_path):
    root, classifier = colors
    state = checkpoint.load(classifier)
    del state["class_names"]
    torch.save(state, tmp_path / "old.pth")
    expected, _ = evaluate(root, classifier)
    acc1, out = evaluate(root, tmp_path / "old.pth")
    assert acc1 == expected and out.count("old.pth states no class names") == 1
    shutil.copytree(root / "val" / "1", tmp_path / "val" / "1")
    args = ["--pretrained", tmp_path / "old.pth", "--evaluate", "--workers", 0]
    code, _, err = script("main_lincls.py", tmp_path, *args)
    assert code == 2 and "12" in err and err.count("\n") == 1


def test_a_run_goes_on_with_its_own_images_alone(script, colors, tmp_path):
    root, _ = colors
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(root / "train", data / "train")
    shutil.copytree(root / "val", data / "val")
    argv = ["--output-dir", run, "--knn-every", 1]
    assert script("main_moco.py", data, *STEPS, *argv)[0] == 0
    for path in (data / "train").glob("*/*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    code, _, err = script("main_moco.py", data, *STEPS, *argv, "--resume", "auto")
    assert code == 2 and err.count("\n") == 1
    for path in (data / "train").glob("*/*.png"):
        shutil.copy(root / path.relative_to(data), path)
    data.rename(tmp_path / "moved")
    moved = [tmp_path / "moved", *STEPS, *argv, "--resume", "auto"]
    assert script("main_moco.py", *moved)[0] == 0


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
        rgb = to_rgb(torch.zeros(channels, 8, 12), pixel_format)
        assert rgb.shape == (3, 8, 12) and (rgb == 0.5).all()


def test_only_the_first_process_of_a_host_prints_an_error(script, tmp_path, monkeypatch):
    argv = ["main_moco.py", tmp_path / "nowhere", *STEPS, "--output-dir", tmp_path / "x"]
    assert "nowhere does not exist" in script(*argv)[2]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert script(*argv)[::2] == (2, "")


@pytest.mark.slow
def test_of_two_processes_one_says_what_is_missing(tmp_path):
    output = ["--output-dir", tmp_path / "x"]
    done = launch_processes(2, "main_moco.py", tmp_path / "nowhere", *STEPS, *output)
    lines = [line for line in done.stderr.splitlines() if "does not exist" in line]
    assert done.returncode and len(lines) == 1


def test_only_the_first_process_of_a_host_lists(tmp_path, monkeypatch):
    """Two processes, simulated: the second reads from the file what the first has listed."""
    monkeypatch.setattr(launch, "world_size", lambda: 2)
    monkeypatch.setattr(launch, "barrier", lambda: None)
    paths = {}

    def gather(path):
        paths.setdefault("first", path)
        return [paths["first"], None]

    monkeypatch.setattr(launch, "all_gather_object", gather)
    monkeypatch.setattr(launch.os, "unlink", lambda path: None)
    for made in ([1, 2], UserError("nothing there")):
        paths.clear()
        for rank in (0, 1):
            monkeypatch.setattr(launch, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(launch, "local_rank", lambda rank=rank: rank)

            def make(rank=rank, made=made):
                assert rank == 0
                if isinstance(made, UserError):
                    raise made
                return made

            if isinstance(made, UserError):
                with pytest.raises(UserError, match="nothing there"):
                    launch.run_once_per_host(make)
            else:
                assert launch.run_once_per_host(make) == made
