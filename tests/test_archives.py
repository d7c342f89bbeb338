"""Images in .tar archives: found, labelled, read at random, and refused when damaged."""

import gzip
import io
import json
import os
import re
import tarfile

import numpy as np
import pytest
import torch
from conftest import launch
from PIL import Image

from engine import archives
from engine.datasets import dataset_digest, load_splits, require_labels
from engine.decode import UnreadableImage, decode_image
from engine.errors import UserError
from engine.log import read_log

STEPS = (
    "-a vit_nano --img-size 16 --patch-size 4 --batch-size 8 --optimizer adamw --lr 1e-3 "
    "--epochs 2 --warmup-epochs 0 --moco-dim 16 --moco-mlp-dim 32 --device cpu --print-freq 1"
).split()


def jpeg(i):
    pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def pack(members):
    """Name → content of each file → the bytes of a .tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pack(content))
    return path


def as_gnu_tar_stores_holes(content):
    """In a header of its own. One without a list of parts is as good to test with."""
    tar = bytearray(pack({"a/holes.jpg": content}))
    tar[156:157] = tarfile.GNUTYPE_SPARSE
    return _sum_again(tar)


def as_posix_tar_stores_holes(content):
    file, info = io.BytesIO(), tarfile.TarInfo("a/holes.jpg")
    info.size = len(content)
    holes = f"0,{len(content)}"
    info.pax_headers = {"GNU.sparse.map": holes, "GNU.sparse.size": str(2 * len(content))}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _sum_again(tar):
    tar[148:156] = b" " * 8
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    return bytes(tar)


def class_folders(n=3, prefix="", classes="ab"):
    names = [f"{prefix}{label}/{i}.jpg" for label in classes for i in range(n)]
    return {name: jpeg(i) for i, name in enumerate(names)}


@pytest.fixture
def load(tmp_path):
    def load_from(path, **options):
        return load_splits(str(path), str(tmp_path / "data_root"), **options)

    return load_from


def shard(first, n=4, **fields):
    members = {}
    for i in range(first, first + n):
        members |= {f"{i:06}.jpg": jpeg(i), f"{i:06}.mask.png": b"no image to train on"}
        members |= {f"{i:06}.cls": str(9 + i % 2).encode()}
        if fields:
            members[f"{i:06}.json"] = json.dumps(fields).encode()
    return members


def test_shards_of_webdataset_have_the_labels_beside_the_images(load, tmp_path):
    for name, first in (("train/x-000000", 0), ("train/x-000002", 4), ("val/x-000000", 8)):
        write(tmp_path / f"set/{name}.tar", shard(first, label="not this one"))
    splits = load(tmp_path / "set")
    assert (len(splits.train), len(splits.val), splits.class_names) == (8, 4, ["10", "9"])
    assert splits.train.labels.tolist() == [1, 0] * 4 and splits.val.labels.tolist() == [1, 0] * 2
    assert splits.train.name(5) == "x-000002.tar/000005.jpg"
    assert torch.equal(splits.train.read(5), decode_image("5", data=jpeg(5)))
    assert splits.remarks == ("12 files with other extensions ignored (.png 12)",)
    alone = load(tmp_path / "set/val/x-000000.tar", need="val")
    assert alone.train is None and alone.val.labels.tolist() == [1, 0] * 2

    members = {"1.jpg": jpeg(1), "1.json": b'{"label": "dog"}', "2.jpg": jpeg(2)}
    for label, expected in (
        ('{"label": "cat"}', ["cat", "dog"]),
        ('{"cls": 3}', ["3", "dog"]),
        ('{"label": null, "cls": 3}', ["3", "dog"]),
    ):
        write(tmp_path / "json.tar", members | {"2.json": label.encode()})
        assert load(tmp_path / "json.tar").class_names == expected
    for label in ("{}", "[]", "{", '{"label": null}'):
        write(tmp_path / "json.tar", members | {"2.json": label.encode()})
        with pytest.raises(UserError, match=r"1 of 2 images have no label: json\.tar/2\.jpg"):
            load(tmp_path / "json.tar")
        assert load(tmp_path / "json.tar", need="images").train.labels is None


def test_classes_are_folders_in_archives_or_the_archives(load, tmp_path):
    names = ("n01440764", "n01443537")
    inner = {f"{name}.tar": pack({f"{name}_{i}.JPEG": jpeg(i) for i in (7, 12)}) for name in names}
    write(tmp_path / "ILSVRC2012_img_train.tar", inner)
    for name, content in inner.items():
        write(tmp_path / "classes" / name, content)
    write(tmp_path / "as_tar_makes_it.tar", class_folders(2, "./set/", names))
    write(tmp_path / "shards" / "x-00.tar", class_folders(1, "", names))
    write(tmp_path / "shards" / "x-01.tar", class_folders(1, "", names))
    write(tmp_path / "pets" / "cat.tar", class_folders(2, "deep/"))
    write(tmp_path / "pets" / "dog.tar", class_folders(2))
    for path in ("ILSVRC2012_img_train.tar", "classes", "as_tar_makes_it.tar", "shards"):
        splits = load(tmp_path / path)
        assert splits.class_names == list(names) and "kNN is off" in str(splits)
        assert sorted(splits.train.labels.tolist()) == [0, 0, 1, 1]
    assert load(tmp_path / "pets").class_names == ["cat", "dog"]
    nested = load(tmp_path / "ILSVRC2012_img_train.tar").train
    assert nested.name(1) == "ILSVRC2012_img_train.tar/n01440764.tar/n01440764_7.JPEG"
    assert torch.equal(nested.read(1), decode_image("7", data=jpeg(7)))


def test_an_archive_may_hold_train_and_val_or_be_one_of_them(load, tmp_path):
    both = class_folders(3, "set/train/") | class_folders(1, "set/val/")
    write(tmp_path / "set.tar", both)
    write(tmp_path / "two" / "train.tar", class_folders(3, "train/"))
    write(tmp_path / "two" / "val.tar", class_folders(1))
    for path in ("set.tar", "two"):
        splits = load(tmp_path / path)
        assert (len(splits.train), len(splits.val), splits.class_names) == (6, 2, ["a", "b"])
        assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "read from train.tar and val.tar" in str(splits)
    image = write(tmp_path / "two" / "train" / "c" / "1.jpg", jpeg(1))
    with pytest.raises(UserError, match="val has classes that train lacks: a b"):
        load(tmp_path / "two")  # train/ is taken rather than train.tar
    assert load(image.parent.parent, need="train").class_names == ["c"]


def test_an_archive_with_train_and_test_has_nothing_to_validate(load, tmp_path):
    path = write(tmp_path / "set.tar", class_folders(3, "train/") | class_folders(2, "test/"))
    assert len(load(path, need="images").train) == 6
    with pytest.raises(UserError, match="has train/ in it, but no val/ to validate"):
        load(path, need="val")


def test_an_archive_with_more_than_train_and_val_is_read_as_the_folder_is(load, tmp_path):
    test = class_folders(2, "test/") | {"preview.jpg": jpeg(9)}
    members = class_folders(3, "train/") | class_folders(1, "val/") | test
    for prefix in ("", "set/"):
        write(tmp_path / "set.tar", {f"{prefix}{name}": members[name] for name in members})
        assert str(load(tmp_path / "set.tar")) == (
            "6 images to train on, 2 to validate; images outside train/ and val/: 5 ignored"
        )
    for name in members:
        write(tmp_path / "set" / name, members[name])
    for need in ("both", "val", "train", "images"):
        splits = load(tmp_path / "set.tar", need=need), load(tmp_path / "set", need=need)
        for mine, expected in zip(splits[0][:3], splits[1][:3]):
            assert (mine is None) == (expected is None)
            assert mine is None or mine.labels.tolist() == expected.labels.tolist()
    write(tmp_path / "set.tar", class_folders(3, "train/") | test)
    splits = load(tmp_path / "set.tar")
    assert len(splits.train) == 6 and splits.note == "no val/ in it"
    # Of the classes of COCO one is called train.
    write(tmp_path / "set.tar", class_folders(3, "", ["boat", "train"]))
    assert load(tmp_path / "set.tar").class_names == ["boat", "train"]


def test_a_val_tar_that_is_trained_on_is_named(load, tmp_path):
    write(tmp_path / "set" / "val.tar", class_folders(2))
    assert str(load(tmp_path / "set")) == (
        "4 images to train on, no train/ or train.txt beside val.tar; kNN is off; 4 of them are "
        "those of val.tar"
    )
    assert "4 images to validate" in str(load(tmp_path / "set", need="val"))
    write(tmp_path / "set" / "1.jpg", jpeg(1))
    assert "of them" not in str(load(tmp_path / "set"))


def test_archives_beside_images_are_ignored_as_before(load, tmp_path):
    write(tmp_path / "set" / "1.jpg", jpeg(1))
    write(tmp_path / "set" / "backup.tar", class_folders())
    assert str(load(tmp_path / "set")).endswith("1 file with another extension ignored (.tar 1)")


def test_numbered_shards_without_labels_are_no_classes(load, tmp_path):
    for name in ("x-00", "x-07"):
        write(
            tmp_path / "set" / f"{name}.tar",
            {"1.jpg": jpeg(1), "._1.jpg": b"", "a/.git/2.jpg": b""},
        )
    splits = load(tmp_path / "set")
    assert len(splits.train) == 2 and splits.train.labels is None
    assert "neither .cls or .json nor class folders; kNN is off" in str(splits)
    with pytest.raises(UserError, match=r"needs labelled images: .* neither \.cls"):
        require_labels(load(tmp_path / "set", need="val"), "set", train=False)


def linked_folders(root):
    """train/ and val/ that are links for the most part, all to what is below root."""
    write(root / ".objects" / "1", jpeg(1))
    write(root / "all" / "cat" / "2.jpg", jpeg(2))
    write(root / "all" / "._hidden" / "3.jpg", jpeg(3))
    write(root / "train" / "dog" / "4.jpg", jpeg(4))
    (root / "train" / "cat").symlink_to("../all/cat")
    (root / "all" / "cat" / "1.jpg").symlink_to("../../.objects/1")
    (root / "all" / "cat" / "more").symlink_to("../../train/dog")
    os.link(root / "train" / "dog" / "4.jpg", root / "train" / "dog" / "5.jpg")
    (root / "train" / "dog" / "6.jpg").symlink_to("5.jpg")
    (root / "train" / "dog" / "7.jpg").symlink_to("../cat/2.jpg")  # through a link
    (root / "val").symlink_to("train")
    return root


def test_links_in_an_archive_are_what_they_lead_to_as_in_a_folder(load, tmp_path):
    root = linked_folders(tmp_path / "set")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(root, "set")
    folder, archive = load(root), load(tmp_path / "set.tar")
    assert folder.class_names == archive.class_names == ["cat", "dog"]
    for name in ("train", "val"):
        expected, actual = getattr(folder, name), getattr(archive, name)
        prefix = f"set.tar/set/{name}/"
        assert [actual.name(i).removeprefix(prefix) for i in range(len(actual))] == [
            expected.name(i) for i in range(len(expected))
        ]
        assert len(actual) == 10 and actual.labels.tolist() == expected.labels.tolist()
        for i in range(len(actual)):
            assert torch.equal(actual.read(i), expected.read(i))


def add_links(path, links):
    with tarfile.open(path, "a") as tar:
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)


def test_links_that_lead_out_of_an_archive_are_counted(load, tmp_path):
    path = write(tmp_path / "set.tar", class_folders(2) | {"x.tar": pack(class_folders(1))})
    outside = {"b/2.jpg": "/data/2.jpg", "c": "../c", "a/3.jpg": "3.jpg", "a/.4.jpg": "/data/4.jpg"}
    add_links(path, outside | {"a/round": "../a", "b/1.jpg": "../a/1.jpg"})
    for _ in range(2):  # the second time from the index
        splits = load(path, need="images")
        assert "links to nothing in the archive: 3 ignored (tar -h packs the files" in str(splits)
    names = [splits.train.name(i).removeprefix("set.tar/") for i in range(len(splits.train))]
    once = ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg", "x.tar/a/0.jpg", "x.tar/b/0.jpg"]
    assert [name for name in names if "round" not in name] == once
    assert torch.equal(splits.train.read(names.index("b/1.jpg")), decode_image("1", data=jpeg(1)))
    write(path, {})
    add_links(path, {"a/1.jpg": "../../1.jpg"})
    with pytest.raises(UserError, match=r"holds no images .*links to nothing .*: 1 ignored"):
        load(path)


def test_hidden_archives_in_an_archive_are_skipped(load, tmp_path):
    hidden = {name: pack(class_folders()) for name in (".trash.tar", ".old/c.tar")}
    path = write(tmp_path / "set.tar", class_folders(1) | hidden | {"._n01.tar": b"of macOS"})
    splits = load(path)
    assert len(splits.train) == 2 and splits.class_names == ["a", "b"] and not splits.remarks


def test_an_index_is_made_once_and_again_when_an_archive_changes(load, tmp_path, monkeypatch):
    read, made = archives._index_tar, []

    def count(path, *args):
        made.append(path)
        return read(path, *args)

    monkeypatch.setattr(archives, "_index_tar", count)
    path = write(tmp_path / "set.tar", class_folders())
    splits = [load(path) for _ in range(2)]
    assert len(made) == 1 and len(os.listdir(tmp_path / "data_root" / "tar_index")) == 1
    assert dataset_digest(splits[0].train) == dataset_digest(splits[1].train)
    assert torch.equal(splits[0].train.read(3), splits[1].train.read(3))

    members = class_folders()
    changed = dict(zip(members, reversed(members.values())))
    write(path, changed)  # of the same size
    with pytest.raises(UnreadableImage, match="changed since the run began"):
        splits[0].train.read(4)
    again = load(path).train
    assert len(made) == 2 and torch.equal(again.read(0), decode_image("5", data=jpeg(5)))
    assert dataset_digest(again) != dataset_digest(
        load_splits(str(path), str(tmp_path)).train, "ab"
    )
    for index in (tmp_path / "data_root" / "tar_index").iterdir():
        index.write_bytes(b"damaged")
    assert len(load(path).train) == 6 and len(made) == 4
    blocked = write(tmp_path / "a file", b"")
    assert len(load_splits(str(path), str(blocked)).train) == 6


def broken_archives():
    tar = pack(class_folders())
    second = len(pack({"x": jpeg(0)}).rstrip(b"\0")) // 512 * 512 + 512
    yield "cut in an image", tar[:3000], "unexpected end of data|cut short"
    yield "cut between images", tar[:second], "it is cut short"
    yield "cut in a header", tar[: second + 99], "it is cut short"
    yield "bad header", tar[:second] + b"\xff" + tar[second + 1 :], f"damaged.* at byte {second}"
    yield "two in one", tar + tar, "damaged, or several in one"
    yield "nested, cut", pack({"a.tar": tar[:second], "b.tar": tar}), "it is cut short"
    yield "text", b"hello", "truncated header"
    yield "empty", b"", "empty file"
    yield "compressed", gzip.compress(tar), "is compressed.*gunzip"
    yield "GNU's sparse", as_gnu_tar_stores_holes(jpeg(0)), "tar -S.* holes of a/holes.jpg: pack"
    yield "posix' sparse", as_posix_tar_stores_holes(jpeg(0)), "tar -S.* holes of a/holes.jpg: pack"
    yield "without images", pack({"a.txt": b""}), r"holds no images .*\.txt 1"


@pytest.mark.parametrize(
    "content, words", [pytest.param(*c[1:], id=c[0]) for c in broken_archives()]
)
def test_an_archive_that_is_not_whole_is_refused_in_a_line(script, tmp_path, content, words):
    path = write(tmp_path / "set.tar", content)
    argv = ["main_moco.py", path, *STEPS, "--data-root", tmp_path, "--output-dir", tmp_path / "run"]
    code, _, err = script(*argv)
    assert code == 2 and re.search(words, err) and str(path) in err and err.count("\n") == 1


def test_compressed_archives_are_refused_with_the_remedy(load, tmp_path):
    write(tmp_path / "set" / "train.tar.gz", gzip.compress(b""))
    for path in (tmp_path / "set", tmp_path / "set" / "train.tar.gz"):
        with pytest.raises(UserError, match=r"train\.tar\.gz is compressed.*gunzip"):
            load(path)


def test_an_archive_that_is_cut_short_later_has_unreadable_images(load, tmp_path):
    path = write(tmp_path / "set.tar", class_folders())
    dataset = load(path).train
    dataset.read(5)
    os.truncate(path, int(dataset.spans[5, 1]) + 20)
    with pytest.raises(UnreadableImage, match="has changed since the run began") as error:
        dataset.read(5)
    assert error.value.path.endswith("set.tar/b/2.jpg")


def losses(folder):
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


@pytest.mark.slow
def test_a_run_on_archives_equals_that_on_files_and_resumes_exactly(script, tmp_path):
    members = class_folders(8, "train/") | class_folders(2, "val/")
    path = write(tmp_path / "set.tar", members)
    for name, content in members.items():
        write(tmp_path / "files" / name, content)
    more = ["--knn-every", 1, "--data-root", tmp_path / "data_root"]

    def run(data, name, *args):
        folder = tmp_path / name
        done = script("main_moco.py", data, *STEPS, *more, "--output-dir", folder, *args)
        assert done[0] == 0, done[2]
        return losses(folder)

    expected = run(tmp_path / "files", "loose", "--workers", 0)
    assert len(expected) == 4 and run(path, "whole", "--workers", 2) == expected
    run(path, "parts", "--workers", 0, "--save-every", 1)
    resumed = tmp_path / "parts" / "checkpoint_0001.pth"
    assert run(path, "resumed", "--workers", 2, "--resume", resumed) == expected[2:]


@pytest.mark.slow
def test_two_processes_share_an_index(tmp_path):
    path = write(tmp_path / "set.tar", class_folders(8, "train/") | class_folders(2, "val/"))
    runs = []
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        flags = ["--workers", 1, "--amp", "off", "--data-root", tmp_path / f"root{processes}"]
        done = launch(processes, "main_moco.py", path, *STEPS, *flags, "--output-dir", folder)
        assert done.returncode == 0, done.stderr
        assert len(os.listdir(tmp_path / f"root{processes}" / "tar_index")) == 1
        runs.append(losses(folder))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
