"""Images that can't be read: found out, replaced, counted, listed, and too many of them."""

import errno
import io
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import ENV, SMALL, launch
from PIL import Image
from torch import nn

import engine.data.unreadable
from engine.data import images
from engine.data.crops import CenterCrops, LabelledCrops, TwoCrops
from engine.data.decode import RGB, UnreadableImage, decode_image
from engine.data.images import ArrayDataset, ImageFileDataset, dataset_digest, read_image
from engine.data.loader import create_loader, unpack_batches
from engine.data.quiet import quiet_libraries
from engine.data.splits import Splits, open_source
from engine.data.timm_crops import TransformedCrops, create_training_transform
from engine.data.unreadable import UnreadableImages
from engine.errors import UserError
from engine.evaluation import KNN, measure_accuracy
from moco.augmentation import normalize

CPU = ENV.device
RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))


def written(kind, image=PICTURE, **save):
    file = io.BytesIO()
    image.save(file, kind, **save)
    return file.getvalue()


JPEG, PNG = written("JPEG", quality=90), written("PNG")
HALF = len(JPEG) // 2
FRAME = JPEG.index(b"\xff\xc0")


def announcing(height, width):
    """The JPEG, with another size in its header."""
    return JPEG[: FRAME + 5] + struct.pack(">HH", height, width) + JPEG[FRAME + 9 :]


def bomb():
    """A PNG of 60 bytes that announces 3.6 billion pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:60]


THUMBNAIL = b"\xff\xe1" + struct.pack(">H", len(JPEG) + 2) + JPEG  # with an end of its own

DAMAGE = {
    "empty.jpg": b"",
    "text.jpg": b"<html>404 not found</html>\n" * 20,
    "cut_early.jpg": JPEG[:300],
    "cut_late.jpg": JPEG[:-20],
    "zeros_at_the_end.jpg": JPEG[:HALF] + bytes(len(JPEG) - HALF),
    "garbage_inside.jpg": JPEG[:HALF] + b"\xff\xaf\x12\xff\xd1" * 200 + JPEG[HALF + 1000 :],
    "absurd_size.jpg": announcing(65_000, 65_000),
    "zip_by_nature.png": b"PK\x03\x04" + RNG.bytes(2000),
    "cut.png": PNG[: len(PNG) // 2],
    "bomb.png": bomb(),
    "floats.tiff": written("TIFF", Image.fromarray(np.full((8, 8), 0.5, np.float32))),
    "empty.webp": b"",
}
MORE_DAMAGE = {
    "no_pixels.jpg": announcing(0, 64),
    "progressive.jpg": written("JPEG", progressive=True)[:-300],
    "thumbnail.jpg": JPEG[:2] + THUMBNAIL + JPEG[2:HALF] + bytes(HALF),
    "cut.gif": written("GIF")[:1000],
    "cut.tiff": written("TIFF")[:2000],
    "cut.webp": written("WEBP")[:200],
    "wide.tiff": written("TIFF", Image.fromarray(np.full((8, 8), 70_000, np.int32))),
}


@pytest.mark.parametrize("name", DAMAGE | MORE_DAMAGE)
@pytest.mark.parametrize("fast", [True, False])
def test_damage_is_found_out(tmp_path, name, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr("engine.data.decode.decode_jpeg", None)
    (tmp_path / name).write_bytes((DAMAGE | MORE_DAMAGE)[name])
    with pytest.raises(UnreadableImage) as error, quiet_libraries():
        ImageFileDataset(tmp_path, [name]).read(0)
    assert error.value.path == str(tmp_path / name) and error.value.reason
    assert "object at" not in error.value.reason and str(tmp_path) not in error.value.reason


def test_what_is_no_file_is_unreadable(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "a.jpg").write_bytes(JPEG)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "folder.jpg" / "a.jpg")
    dataset = open_source(str(tmp_path)).train().dataset
    assert len(dataset) == 2 and dataset.read(0).shape == (3, 64, 64)
    os.mkfifo(tmp_path / "pipe.jpg")  # which would be waited for
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    for path in ("folder.jpg", "pipe.jpg", "endless.jpg"):
        with pytest.raises(UnreadableImage, match="no regular file"):
            ImageFileDataset(tmp_path, [path]).read(0)


# What the machine fails at is no fault of the image.


class Outage:
    """Reads of a file that fail with each of the errors in turn."""

    def __init__(self, monkeypatch, *errors):
        self.errors, self.read = list(errors), images.read_file
        monkeypatch.setattr(images, "read_file", self)
        monkeypatch.setattr(images, "RETRY_SECONDS", (0.01, 0.01))

    def __call__(self, path):
        if self.errors:
            raise self.errors.pop(0)
        return self.read(path)


FAILURES = [MemoryError()] + [
    OSError(number, os.strerror(number))
    for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT, errno.EACCES)
]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_failure_of_the_system_is_retried_then_ends_the_run(tmp_path, monkeypatch, failure):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    dataset = ImageFileDataset(tmp_path, ["a.jpg"])
    digest = dataset_digest(dataset)
    outage = Outage(monkeypatch, failure, failure)
    assert dataset.read(0).shape == (3, 64, 64)
    outage.errors = [failure, failure]
    assert dataset_digest(dataset) == digest
    outage.errors = [failure] * 100
    for read in (lambda: dataset.read(0), lambda: read_image(tmp_path / "a.jpg")):
        with pytest.raises(UserError, match=r"can't read .*a\.jpg: .*\(tried for ") as error:
            read()
        assert error.value.exit_code == 1 and error.value.rank_local


def test_a_missing_file_is_a_failure_of_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "RETRY_SECONDS", ())
    with pytest.raises(UserError, match=r"can't read .*gone\.jpg: No such file"):
        ImageFileDataset(tmp_path, ["gone.jpg"]).read(0)


def test_a_file_that_is_missing_beside_others_is_not_waited_for(tmp_path, monkeypatch):
    for name in ("a.jpg", "share/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "share" / "b.jpg")
    (tmp_path / "list.txt").write_text("typo.jpg\nshare/b.jpg\nlink.jpg\n")
    dataset, waits = open_source(f"{tmp_path}/list.txt").train().dataset, []
    monkeypatch.setattr(images.time, "sleep", waits.append)
    hint = f"put it there, or remove it from {tmp_path}/list.txt"
    with pytest.raises(UserError, match=rf"can't read .*/typo\.jpg: No such file.*: {hint}$"):
        dataset.read(0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"can't read typo\.jpg: No such file or directory$"):
        read_image("typo.jpg")
    assert not waits
    (tmp_path / "share" / "b.jpg").unlink()  # a share that is gone leaves an empty folder
    for i in (1, 2):
        with pytest.raises(UserError, match=r"No such file or directory \(tried for 30 s\)$"):
            dataset.read(i)
        assert sum(waits) == 30 * i


def test_after_an_outage_the_run_goes_on(refusal, succeed, few_digits, tmp_path, monkeypatch):
    argv = ("main_moco.py", few_digits, *SMALL["main_moco.py"], "--output-dir", tmp_path / "run")
    outage = Outage(monkeypatch)
    saved, read = tmp_path / "run" / "checkpoint.pth", outage.read
    with monkeypatch.context() as patch:
        patch.setattr(outage, "read", lambda path: os.stat("/no/share"))
        assert "--resume auto" not in refusal(*argv, code=1)  # there is nothing to continue
        outage.read = lambda path: os.stat("/no/share") if saved.exists() else read(path)
        err = refusal(*argv, code=1)
        assert err.endswith("(tried for 0.02 s); --resume auto continues\n")
    assert not (tmp_path / "run" / "bad_images.txt").exists()
    succeed(*argv, "--resume", "auto")


def test_names_and_reasons_fit_on_a_line():
    error = UnreadableImage("a\nb\tc\udcff ü.jpg", "no\tway")
    assert (error.path, error.reason) == ("a\\nb\\tc\\udcff ü.jpg", "no\\tway")


def test_a_thumbnail_is_not_the_image():
    image = decode_image(JPEG[:2] + THUMBNAIL + announcing(300, 200)[2:])
    assert image.shape == (3, 300, 200)


# Another image is read in its place.


class BrokenDataset(ArrayDataset):
    """Images in memory, of which some can't be read; a name and a reason for each."""

    def __init__(self, images, labels, broken):
        super().__init__(images, labels)
        self.broken = set(broken)

    def read(self, i):
        if int(i) in self.broken:
            raise UnreadableImage(f"{int(i)}.jpg", "broken")
        return super().read(i)


def numbered(n, broken=()):
    """Image i is of color i, and has label i."""
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    return BrokenDataset(images, torch.arange(n), broken)


def transformed(dataset):
    transform = create_training_transform((8, 8), RGB, 0.08, "none", 0, "bicubic")
    return TransformedCrops(dataset, transform, 0)


DATASETS = {
    "TwoCrops": lambda dataset: TwoCrops(dataset, (8, 8), 0.2, 0),
    "LabelledCrops": lambda dataset: LabelledCrops(dataset, (8, 8), 0.2, 0),
    "TransformedCrops": transformed,
}
KEYS = [(epoch, i) for epoch in range(3) for i in range(20)]


@pytest.mark.parametrize("name", DATASETS)
def test_a_replacement_depends_on_seed_epoch_and_index_alone(name):
    broken = {3, 4, 11, 17}

    def load(keys, workers, broken=broken):
        batches = [keys[i : i + 5] for i in range(0, len(keys), 5)]
        dataset = DATASETS[name](numbered(20, broken))
        unreadable = UnreadableImages(1)
        loader = create_loader(dataset, batches, workers, CPU)
        loader = unpack_batches(loader, unreadable, range(20))
        first, second = zip(*((a.clone(), b) for a, b in loader))
        unreadable.sync(range(20))
        dim = 1 if name == "TwoCrops" else 0
        return torch.cat(first, dim).transpose(0, dim), torch.cat(second, dim), unreadable.all

    images, second, unreadable = load(KEYS, 0)
    assert unreadable == {f"{i}.jpg": "broken" for i in broken}
    again, _, same = load(KEYS[::-1], 2)
    assert torch.equal(again.flip(0), images) and same == unreadable
    whole, whole_second, none = load(KEYS, 0, broken=())
    untouched = torch.tensor([i not in broken for _, i in KEYS])
    assert torch.equal(images[untouched], whole[untouched]) and not none
    if name == "TwoCrops":
        assert torch.equal(second, whole_second)  # the augmentation stays that of the index
        labels = images[:, 0, 0, 0, 0]
    else:
        labels = second
    assert not set(labels.tolist()) & broken
    if name == "LabelledCrops":  # the label is that of the replacement
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    in_place = labels.view(3, 20)[:, sorted(broken)]
    assert len(in_place.unique()) > 4  # not the same one for all


def test_where_nothing_can_be_read_one_line_says_so():
    dataset = TwoCrops(numbered(20, range(20)), (8, 8), 0.2, 0)
    batch = dataset.__getitems__([(0, 7)])
    assert len(batch[1]) > 10
    for found in (UnreadableImages(1), None):
        with pytest.raises(UserError, match=r"unreadable images in a row.* 7.jpg: broken") as error:
            next(unpack_batches([batch], found, dataset))
        assert error.value.exit_code == 1 and error.value.rank_local
    with pytest.raises(UserError, match=r"7.jpg: broken"):
        next(unpack_batches(create_loader(dataset, [[(0, 7)]], 1, CPU)))


# Evaluation: nothing is replaced.


class ColorEncoder(nn.Module):
    """An encoder whose features tell the color."""

    num_features = 2

    def forward(self, x):
        angle = x.mean((1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], 1)


def test_center_crops_of_what_can_be_read():
    crops = CenterCrops(numbered(20, [3, 5]), (8, 8))
    (images, positions), unreadable = crops.__getitems__([2, 3, 4, 5])
    assert images[:, 0, 0, 0].tolist() == [2, 4] and positions.tolist() == [0, 2]
    assert unreadable == {"3.jpg": "broken", "5.jpg": "broken"}
    images, positions = crops.__getitems__([3, 5])[0]
    assert images.shape == (0, 3, 8, 8) and len(positions) == 0
    with pytest.raises(UserError, match=r"3.jpg: broken"):
        next(unpack_batches([crops.__getitems__([3])]))


def test_a_batch_without_a_readable_image_ends_an_evaluation_in_one_line(capfd):
    def measure(broken, max_fraction):
        classify, found = lambda images: [ColorEncoder()(images)], UnreadableImages(max_fraction)
        return measure_accuracy(classify, 1, numbered(257, broken), (8, 8), 0, ENV, found)

    message = r"^256 unreadable images in a row, the last is .*255\.jpg: broken$"
    with pytest.raises(UserError, match=message) as error:
        measure(range(256), 0.5)
    assert error.value.exit_code == 1 and capfd.readouterr().err == ""
    measure(range(256), 1)
    capfd.readouterr()
    with pytest.raises(UserError, match=r"2 unreadable images, .* allows 0 of 257"):
        measure((3, 256), 0)  # the last batch has one image
    assert capfd.readouterr().err.count("\n") == 2


def test_knn_searches_what_can_be_read_and_counts_every_image():
    def measure(train, val):
        unreadable = UnreadableImages(1)
        splits = Splits(train, val, [str(i) for i in range(200)])
        knn = KNN(splits, (8, 8), 1000, 0, ENV)
        [accuracy] = knn(ColorEncoder(), unreadable, [1])
        return accuracy, unreadable.all

    val, broken = numbered(200), range(5, 200, 9)
    assert measure(numbered(200), val) == (100, {})
    accuracy, unreadable = measure(numbered(200, broken), val)
    assert accuracy == 100 - len(broken) / 2 and len(unreadable) == len(broken)
    rest = torch.tensor([i for i in range(200) if i not in broken])
    smaller = ArrayDataset(numbered(200).images[rest], rest)
    assert measure(smaller, val) == (accuracy, {})
    assert measure(numbered(200), numbered(200, broken))[0] == 100 - len(broken) / 2
    with pytest.raises(UserError, match="kNN has no image to search"):
        measure(numbered(200, range(200)), val)
    with pytest.raises(UserError, match="none of the 200 images to validate could be read"):
        measure(val, numbered(200, range(200)))


def test_an_image_that_cannot_be_read_is_not_recognised():
    dataset = numbered(600, range(256, 512))  # a whole batch of one rank, and more

    known = normalize(numbered(256).images.float() / 255).mean((1, 2, 3))

    def classify(images):
        return [-(images.mean((1, 2, 3))[:, None] - known).abs()]

    dataset.labels = dataset.labels % 256
    unreadable = UnreadableImages(1)
    [(acc1, _)] = measure_accuracy(classify, 1, dataset, (8, 8), 0, ENV, unreadable)
    assert acc1 == pytest.approx(100 * (600 - 256) / 600) and len(unreadable.all) == 256
    nothing = numbered(600, range(600))
    with pytest.raises(
        UserError, match="none of the 600 images to validate could be read"
    ) as error:
        measure_accuracy(classify, 1, nothing, (8, 8), 0, ENV, UnreadableImages(1))
    assert error.value.exit_code == 1


# The list and the limit.


def test_the_list_has_each_once_and_a_resumed_run_goes_on(tmp_path):
    printed = []
    unreadable = UnreadableImages(0.01, tmp_path, print_fn=printed.append)
    for new in ({"a.jpg": "empty"}, {"a.jpg": "empty"}, {}, {"b.jpg": "cut", "a.jpg": "empty"}):
        assert list(unpack_batches([("data", new)], unreadable, range(300))) == ["data"]
        unreadable.sync(range(300))
    path = tmp_path / "bad_images.txt"
    assert path.read_text() == "a.jpg\tempty\nb.jpg\tcut\n"
    assert len(printed) == 1 and "a.jpg: empty" in printed[0]
    assert str(unreadable) == f"2 unreadable images skipped: {path}"

    train, val = range(300), range(100)
    resumed = UnreadableImages(0.01, tmp_path, resumed=True)
    resumed.add({"b.jpg": "cut", "c.jpg": "text"}, train)
    resumed.sync(train)
    assert path.read_text() == "a.jpg\tempty\nb.jpg\tcut\nc.jpg\ttext\n"
    resumed.add({"d.jpg": "text"}, train)  # the third that this process has found
    resumed.add({"1.jpg": "text"}, val)
    for dataset in (train, val):
        resumed.sync(dataset)
    assert (resumed.count(train), resumed.remark(val)) == (
        3,
        " (1 unreadable image counted as wrong)",
    )
    resumed.add({"2.jpg": "cut"}, val)
    with pytest.raises(UserError, match=r"2 unreadable images.*0\.01 allows 1 of 100: 1\.jpg") as e:
        resumed.sync(val)
    assert e.value.exit_code == 1 and str(path) in str(e.value) and not e.value.rank_local
    assert "2.jpg" in path.read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_decoder_prints_is_dropped(tmp_path, capfd, workers):
    (tmp_path / "a.jpg").write_bytes(JPEG[:-2] + bytes(50) + JPEG[-2:])
    crops = TwoCrops(ImageFileDataset(tmp_path, ["a.jpg"]), (8, 8), 0.2, 0)
    loader = create_loader(crops, [[(0, 0)], [(1, 0)]], workers, CPU)
    assert len(list(unpack_batches(loader))) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "fraction, num_images, allowed", [(0.29, 100, 29), (0.001, 999, 0), (0.001, 1000, 1), (1, 7, 7)]
)
def test_the_fraction_is_allowed_and_no_more(fraction, num_images, allowed):
    unreadable = UnreadableImages(fraction)
    unreadable.add({f"{i}.jpg": "" for i in range(allowed)}, range(num_images))
    unreadable.sync(range(num_images))
    unreadable.add({"one more.jpg": ""}, range(num_images))
    with pytest.raises(UserError, match=f"allows {allowed} of"):
        unreadable.sync(range(num_images))


# The scripts.


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """120 training images of two classes, 12 of them damaged; 40 to validate."""
    folder = tmp_path_factory.mktemp("damaged")
    images = [
        written("JPEG", Image.fromarray(RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)))
        for _ in range(12)
    ]
    for part, count in (("train", 54), ("val", 20)):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                (folder / part / name / f"{i:03}.jpg").write_bytes(images[i % 12])
    for n, (name, content) in enumerate(DAMAGE.items()):
        (folder / "train" / "ab"[n % 2] / name).write_bytes(content)
    return folder


THREE_STEPS = "--batch-size 40 --workers 2 --print-freq 1".split()  # an epoch of all images


def names(run):
    listed = (run / "bad_images.txt").read_text().splitlines()
    return sorted(os.path.basename(line.split("\t")[0]) for line in listed)


@pytest.mark.parametrize(
    "name",
    [
        "main_moco.py",
        pytest.param("main_lincls.py", marks=pytest.mark.slow),
        pytest.param("main_finetune.py", marks=pytest.mark.slow),
    ],
)
def test_a_set_with_damaged_files_is_trained_on_and_they_are_counted(
    succeed, refusal, name, damaged, pretrained, tmp_path
):
    weights = () if name == "main_moco.py" else ("--pretrained", pretrained)
    argv = (name, damaged, *SMALL[name], *THREE_STEPS, *weights, "--output-dir")
    out = succeed(*argv, tmp_path / "run", "--max-bad-images", 0.1)
    assert names(tmp_path / "run") == sorted(DAMAGE)
    assert "12 unreadable images skipped" in out
    assert len(re.findall(r"^unreadable image ", out, re.MULTILINE)) == 1

    succeed(*argv, tmp_path / "run", "--resume", "auto")  # the limit may change
    assert names(tmp_path / "run") == sorted(DAMAGE)

    err = refusal(*argv, tmp_path / "strict", "--max-bad-images", 0, code=1)
    assert "--max-bad-images 0 allows 0 of 120" in err
    first = (tmp_path / "strict" / "bad_images.txt").read_text().split("\t")[0]
    assert os.path.basename(first) in DAMAGE and f": {first} (" in err
    assert str(tmp_path / "strict" / "bad_images.txt") in err


def test_ranks_share_what_each_has_found(tmp_path, monkeypatch):
    """Two processes, simulated: rank 0 lists what both found, and both stop at the limit."""
    others = {"b.jpg": "cut", "a.jpg": "empty"}
    monkeypatch.setattr(engine.data.unreadable, "all_gather_object", lambda own: [own, others])
    for is_main in (True, False):
        monkeypatch.setattr(engine.data.unreadable, "is_main", lambda is_main=is_main: is_main)
        folder = tmp_path / str(is_main)
        folder.mkdir()
        unreadable = UnreadableImages(0.01, folder)
        unreadable.add({"a.jpg": "empty"}, range(200))
        unreadable.sync(range(200))
        assert unreadable.all == {"a.jpg": "empty", "b.jpg": "cut"}
        unreadable.add({"d.jpg": "text"}, range(200))
        with pytest.raises(UserError, match="3 unreadable images"):
            unreadable.sync(range(200))
        assert (folder / "bad_images.txt").exists() == is_main
    assert len((tmp_path / "True" / "bad_images.txt").read_text().splitlines()) == 3


@pytest.mark.slow
def test_two_processes_find_what_one_finds(damaged, tmp_path):
    argv = ("main_moco.py", damaged, *SMALL["main_moco.py"], *THREE_STEPS, "--output-dir")
    run = launch(2, *argv, tmp_path / "run", "--max-bad-images", 0.1)
    assert run.returncode == 0, run.stderr
    assert names(tmp_path / "run") == sorted(DAMAGE)
    assert run.stdout.count("12 unreadable images skipped") == 1
    run = launch(2, *argv, tmp_path / "strict", "--max-bad-images", 0)
    assert run.returncode == 1 and run.stderr.count("main_moco.py: error: ") == 1
    assert "--max-bad-images 0 allows 0 of 120" in run.stderr


def test_measuring_alone_tells_each_on_stderr(
    script, succeed, refusal, damaged, pretrained, tmp_path
):
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "train").symlink_to(damaged / "train")
    for i in range(4):
        shutil.copy(damaged / "val" / "a" / f"{i:03}.jpg", tmp_path / "val" / "a")
    argv = (*SMALL["main_lincls.py"], *THREE_STEPS, "--max-bad-images", 0.5, "--pretrained")
    succeed("main_lincls.py", damaged, *argv, pretrained, "--output-dir", tmp_path / "run")
    (tmp_path / "val" / "a" / "000.jpg").write_bytes(b"no image")
    argv = ("main_lincls.py", tmp_path, *argv)
    code, out, err = script(*argv, tmp_path / "run" / "linear_lr0.1.pth", "--evaluate")
    assert code == 0 and "on 4 images (1 unreadable image counted as wrong)" in out
    assert err.count("\n") == 1 and "unreadable image" in err and "000.jpg" in err
    top1 = float(re.search(r"top-1 ([\d.]+) %", out)[1])
    assert top1 in (0, 25, 50, 75)

    code, out, err = script(*argv, pretrained, "--knn", "--epochs", 0)
    assert code == 0 and err.count("unreadable image ") == 13
    code, _, err = script(*argv, pretrained, "--knn", "--epochs", 0, "--max-bad-images", 0)
    assert code == 1 and "12 unreadable images, --max-bad-images 0 allows 0 of 120" in err

    for path in (tmp_path / "val" / "a").iterdir():
        path.write_bytes(b"no image")
    argv = (*argv, pretrained, "--epochs", 1, "--max-bad-images", 0.2)
    err = refusal(*argv, "--output-dir", tmp_path / "blind", code=1)
    assert "4 unreadable images in a row, the last is" in err
    code, _, err = script(*argv, "--max-bad-images", 1, "--output-dir", tmp_path / "blinder")
    assert code == 1 and "none of the 4 images to validate could be read" in err
