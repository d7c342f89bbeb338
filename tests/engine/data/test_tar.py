"""Images in .tar archives: found, labelled, read at random, and refused when damaged."""

import gzip
import io
import json
import os
import subprocess
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from conftest import on_two_ranks
from PIL import Image

from engine.data.decode import decode_image
from engine.data.images import dataset_digest
from engine.data.splits import load_splits, load_val, open_source
from engine.errors import UserError


def jpeg(i):
    pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def pack(members, format=tarfile.PAX_FORMAT):
    """Name → content of each file → the bytes of a .tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pack(content))
    return path


def class_folders(n=3, prefix="", classes="ab"):
    names = [f"{prefix}{label}/{i}.jpg" for label in classes for i in range(n)]
    return {name: jpeg(i) for i, name in enumerate(names)}


def load(path):
    return load_splits(open_source(str(path)))


def train(path):
    return open_source(str(path)).train()


def labels(part):
    return [part.class_names[i] for i in part.dataset.labels.tolist()]


def shard(first, n=4, **fields):
    """Of WebDataset: images with a .cls of 9 or 10, and masks."""
    members = {}
    for i in range(first, first + n):
        members |= {f"{i:06}.jpg": jpeg(i), f"{i:06}.mask.png": b"no image to train on"}
        members |= {f"{i:06}.cls": str(9 + i % 2).encode()}
        if fields:
            members[f"{i:06}.json"] = json.dumps(fields).encode()
    return members


@pytest.mark.parametrize(
    "shards",
    [
        ("train/x-000000", "train/x-000002", "val/x-000000"),
        ("x-train-0000", "x-train-0001", "x-validation-00"),
        ("data/in1k_Train.0", "data/in1k_Train.1", "data/in1k_Val.0"),
        ("train-00", "train-01", "val/x-000000"),
    ],
)
def test_shards_of_webdataset_have_the_labels_beside_the_images(tmp_path, shards):
    for i, name in enumerate(shards):
        write(tmp_path / f"set/{name}.tar", shard(4 * i, label="not this one"))
    splits = load(tmp_path / "set")
    assert (len(splits.train), len(splits.val), splits.class_names) == (8, 4, ["10", "9"])
    assert splits.train.labels.tolist() == [1, 0] * 4 and splits.val.labels.tolist() == [1, 0] * 2
    assert splits.train.name(5).endswith(f"{shards[1]}.tar/000005.jpg")
    assert torch.equal(splits.train.read(5), decode_image(jpeg(5)))
    assert "ignored: 8 .png" in splits.remarks
    unlabelled = {name: content for name, content in shard(0).items() if ".cls" not in name}
    part = train(write(tmp_path / "unlabelled.tar", unlabelled | {"2024.5.jpg": jpeg(5)}))
    assert len(part.dataset) == 5 and part.remarks == ("ignored: 4 .png",)
    both = {f"train/{name}": content for name, content in shard(0).items()}
    both |= {f"val/{name}": content for name, content in shard(4, 2).items()}
    splits = load(write(tmp_path / "both.tar", both))  # not all of them, although all have labels
    assert (len(splits.train), len(splits.val), splits.class_names) == (4, 2, ["10", "9"])
    alone = tmp_path / f"set/{shards[2]}.tar"
    assert load_val(open_source(str(alone)), ["9", "10"], "x").val.labels.tolist() == [0, 1] * 2


def test_labels_in_json(tmp_path):
    members = {"1.jpg": jpeg(1), "1.json": b'{"label": "dog"}', "2.jpg": jpeg(2)}
    for label, expected in (
        ('{"label": "cat"}', "cat"),
        ('{"cls": 3}', "3"),
        ('{"label": 3.0}', "3"),  # as pandas writes integers
        ('{"label": null, "cls": 3}', "3"),
        ('{"label": "\\ud800"}', "\ud800"),  # half a character
    ):
        path = write(tmp_path / "json.tar", members | {"2.json": label.encode()})
        assert labels(train(path)) == ["dog", expected]
        assert dataset_digest(train(path).dataset, train(path).class_names)
    for label in ("{}", "[]", "{", '{"label": null}', '{"label": NaN}', "[" * 50_000):
        path = write(tmp_path / "json.tar", members | {"2.json": label.encode()})
        part = train(path)
        assert part.class_names is None and len(part.dataset) == 2
        assert part.flaw.endswith("1 of 2 images have no label: json.tar/2.jpg")


@pytest.mark.parametrize("label", ["[3]", '{"a": 1}', "3.5"])
def test_labels_in_json_that_are_no_names_are_refused(tmp_path, label):
    members = {f"{c}/{c}.jpg": jpeg(0) for c in "ab"}  # neither silence nor their folders
    members |= {f"{c}/{c}.json": f'{{"label": {label}}}'.encode() for c in "ab"}
    part = train(write(tmp_path / "json.tar", members))
    assert part.class_names is None and len(part.dataset) == 2
    assert "the .json of json.tar/a/a.jpg is neither a number nor a text" in part.flaw
    with pytest.raises(UserError, match="is neither a number nor a text"):
        load(tmp_path / "json.tar")


def test_classes_are_folders_in_archives_or_the_archives(tmp_path):
    names = ("n01440764", "n01443537")
    inner = {f"{name}.tar": pack({f"{name}_{i}.JPEG": jpeg(i) for i in (7, 12)}) for name in names}
    write(tmp_path / "ILSVRC2012_img_train.tar", inner)
    for name, content in inner.items():
        write(tmp_path / "classes" / name, content)
    write(tmp_path / "as_tar_makes_it.tar", class_folders(2, "./set/", names))
    write(tmp_path / "AS_WINDOWS_DOES.TAR", class_folders(2, "", names))
    for name in ("shards/x-00.tar", "shards/x-01.TAR", "of/x-0-of-2.tar", "of/x-1-of-2.tar"):
        write(tmp_path / name, class_folders(1, "", names))
    hidden = {"._n01.tar": b"of macOS", "n01440764/.x/1.jpg": b"", "__MACOSX/a/1.jpg": b""}
    hidden |= {name: pack(class_folders()) for name in (".trash.tar", ".old/c.tar")}
    write(tmp_path / "hidden.tar", class_folders(2, "", names) | hidden)
    for path in sorted(tmp_path.iterdir()):
        part = train(path)
        assert part.class_names == list(names) and sorted(part.dataset.labels) == [0, 0, 1, 1]
    for name in ("x-00", "x-07"):
        write(tmp_path / "unlabelled" / f"{name}.tar", {"1.jpg": jpeg(1)})
    assert train(tmp_path / "unlabelled").class_names is None
    write(tmp_path / "pets" / "cat.tar", class_folders(2, "deep/"))
    write(tmp_path / "pets" / "dog.TAR", class_folders(2))
    assert labels(train(tmp_path / "pets")) == ["cat"] * 4 + ["dog"] * 4
    nested = train(tmp_path / "ILSVRC2012_img_train.tar").dataset
    assert nested.name(1).endswith("ILSVRC2012_img_train.tar/n01440764.tar/n01440764_7.JPEG")
    assert torch.equal(nested.read(1), decode_image(jpeg(7)))


LONG, ODD = "n" * 200, "ü\n\x1b[31m"


@pytest.mark.parametrize("prefix", ["", "./", "/a/b/", "../", ".x/", f"{LONG}/{LONG}/"])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_an_archive_may_hold_train_and_val(tmp_path, prefix, format):
    members = class_folders(3, f"{prefix}Train/", ["b", "val", ODD])
    members |= class_folders(1, f"{prefix}valid/", "b")
    splits = load(write(tmp_path / f"{ODD}.tar", pack(members, format)))
    assert (len(splits.train), len(splits.val), splits.class_names) == (9, 1, ["b", "val", ODD])
    assert (
        splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        and splits.train.name(0).isprintable()
    )
    assert torch.equal(splits.train.read(4), decode_image(jpeg(4)))


def test_an_archive_is_read_as_the_folder_is(tmp_path):
    members = class_folders(3, "train/") | class_folders(1, "val/") | class_folders(2, "test/")
    for name in members:
        write(tmp_path / "set" / name, members[name])
    write(tmp_path / "set" / "train" / "a" / "1.tar.gz", b"")  # ignored beside images
    folder = load(tmp_path / "set")
    assert "ignored: 1 .gz" in folder.remarks
    archive = load(write(tmp_path / "set.tar", members | {"preview.jpg": jpeg(9)}))
    assert archive.remarks[0] == "images outside train/ and val/: 5 ignored"
    for mine, expected in ((archive.train, folder.train), (archive.val, folder.val)):
        assert torch.equal(mine.labels, expected.labels)
        for i in range(len(mine)):
            assert torch.equal(mine.read(i), expected.read(i))
    with pytest.raises(UserError, match=r"set\.tar has no train, only val"):
        train(write(tmp_path / "set.tar", class_folders(1, "val/")))


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_links_and_sparse_files_are_skipped_and_counted(tmp_path, format):
    write(tmp_path / "a" / "1.jpg", jpeg(1))
    os.symlink("1.jpg", tmp_path / "a" / "2.jpg")
    os.link(tmp_path / "a" / "1.jpg", tmp_path / "a" / "3.jpg")
    os.symlink("1.jpg", tmp_path / "a" / ".hidden")
    os.symlink("../a", tmp_path / "a" / "round")
    write(tmp_path / "a" / "4.jpg", b"")
    os.truncate(tmp_path / "a" / "4.jpg", 2**20)
    command = ["tar", "-S", f"--format={format}", "--sort=name", "-cf", "x.tar", "a"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("no GNU tar")
    part = train(tmp_path / "x.tar")
    assert len(part.dataset) == 1 and part.dataset.read(0).shape == (3, 20, 24)
    assert part.remarks == ("ignored: 4 links and sparse files",)


def test_an_archive_that_changes_ends_the_run(tmp_path):
    path = write(tmp_path / "set.tar", class_folders())
    dataset = train(path).dataset
    assert dataset.read(5).shape == (3, 20, 24)
    before = dataset_digest(dataset)
    members = class_folders()
    write(path, dict(zip(members, reversed(members.values()))))  # of the same size
    with pytest.raises(UserError, match=r"set\.tar has changed since the run began"):
        dataset.read(4)
    again = train(path).dataset
    assert torch.equal(again.read(0), decode_image(jpeg(5))) and dataset_digest(again) != before


def with_header(tar, size, kind=b"0"):
    """The first header with other bytes of its size and type, and the right sum."""
    tar = bytearray(tar)
    tar[124:136], tar[156:157], tar[148:156] = size, kind, b" " * 8
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    return bytes(tar)


def broken_archives():
    tar = pack(class_folders())
    second = len(pack({"x": jpeg(0)}).rstrip(b"\0")) // 512 * 512 + 512
    yield "cut in an image", tar[:3000], "unexpected end of data|cut short"
    yield "cut between images", tar[:second], "it is cut short"
    yield "bad header", tar[:second] + b"\xff" + tar[second + 1 :], f"damaged.* at byte {second}"
    yield "two in one", tar + tar, "damaged, or several in one"
    yield "nested, cut", pack({"a.tar": tar[:second], "b.tar": tar}), "it is cut short"
    yield "negative size", with_header(tar, b"\xff" * 12), "is not a whole"
    yield "huge names", with_header(tar, b"\x80" + b"\x7f" * 11, b"x"), "is not a whole"
    minus_512 = b"\xff" + (256**11 - 512).to_bytes(11, "big")
    yield "back to itself, for ever", with_header(tar, minus_512), "is not a whole"
    yield (
        "a terabyte of names",
        with_header(tar, b"\x80" + (2**40).to_bytes(11), b"x"),
        "is damaged",
    )
    yield "long name", pack({"n" * 5000: b""}), "is damaged"
    yield "empty", b"", "empty file"
    yield "without images", pack({"a.txt": b""}), r"holds no images .*1 \.txt"


@pytest.mark.parametrize("content, words", [c[1:] for c in broken_archives()])
def test_an_archive_that_is_not_whole_is_refused_in_a_line(tmp_path, content, words):
    path = write(tmp_path / "set.tar", content)
    with pytest.raises(UserError, match=words) as error:
        open_source(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_archives_called_as_splits(tmp_path):
    write(tmp_path / "train.tar", class_folders(3, "data/train/"))
    write(tmp_path / "val.tar", class_folders(1))
    write(tmp_path / "extra.tar", class_folders(1))  # neither read nor a class
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.val), splits.class_names) == (6, 2, ["a", "b"])
    assert splits.remarks == ("read from train.tar and val.tar", "not read: extra.tar")
    write(tmp_path / "train" / "1.jpg", jpeg(1))
    assert open_source(str(tmp_path)).remarks[0] == "read from train and val.tar"
    assert len(train(tmp_path).dataset) == 1


@pytest.mark.parametrize("name", ["set.tar.gz", "x-1.tgz", "val.tar.gz"])
def test_compressed_archives_are_refused_with_the_remedy(tmp_path, name):
    write(tmp_path / "set" / "x-train-0.tar", class_folders())
    path = write(tmp_path / "set" / name, gzip.compress(b""))
    for place in (path, path.parent):
        with pytest.raises(UserError, match=rf"{name} is compressed.*gunzip"):
            load(place)


def check_ranks(path, damaged, rank):
    splits = load(path)
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(splits.val) == 2
    assert torch.equal(splits.train.read(rank), decode_image(jpeg(rank)))
    for broken in (damaged, "missing"):
        with pytest.raises(UserError, match=r"is not a whole|does not exist"):
            open_source(str(broken))


def test_two_ranks_have_the_same_images_and_errors(tmp_path):
    path = write(tmp_path / "set.tar", class_folders(3, "train/") | class_folders(1, "val/"))
    damaged = write(tmp_path / "damaged.tar", pack(class_folders())[:3000])
    on_two_ranks(partial(check_ranks, path, damaged))
