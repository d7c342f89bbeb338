"""What a folder or a list becomes: images, labels, splits, and what is said of the rest."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from engine.data.decode import PixelFormat, UnreadableImage
from engine.data.places import image_folders
from engine.data.splits import load_knn_splits, load_splits, open_source
from engine.errors import UserError


@pytest.fixture
def make(image_file, tmp_path):
    """make("a/1.png", …) writes images below tmp_path/set → its path."""

    def write(*names):
        (tmp_path / "set").mkdir(exist_ok=True)
        for name in names:
            image_file(f"set/{name}", height=9, width=8)
        return str(tmp_path / "set")

    return write


def names(part):
    """Of its images, below the dataset's root."""
    return list(part.dataset.paths)


def labels(part):
    """The name of each image's class."""
    return [part.class_names[i] for i in part.dataset.labels.tolist()]


def test_class_folders_are_sorted_as_strings(make):
    path = make(*(f"train/{name}/x.png" for name in ("a", "a-b", "10", "9/deep")), "val/a/y.JPEG")
    source = open_source(path)
    train = source.train()
    assert names(train) == ["10/x.png", "9/deep/x.png", "a/x.png", "a-b/x.png"]
    assert train.class_names == ["10", "9", "a", "a-b"] == labels(train)
    assert train.class_names == torchvision.datasets.ImageFolder(f"{path}/train").classes
    assert train is source.train_labelled() and source.has_val() and source.remarks == ()
    assert train.dataset.read(0).shape == (3, 9, 8) and train.dataset.read(0).dtype == torch.uint8
    assert train.dataset.name(2) == f"{path}/train/a/x.png"
    splits = load_splits(source)  # a single folder in val/ is a class of train's
    assert splits.val.labels.tolist() == [2]
    said = "1 of the 4 classes of train are measured, among the scores of all"
    assert str(splits) == f"4 images to train on, 1 to validate, 4 classes: 10, 9, a, …; {said}"
    os.mkdir(f"{path}/train/empty")
    part = open_source(path).train()
    assert part.class_names is None and part.flaw == f"{path}/train: empty/ holds no images"


@pytest.mark.parametrize("split", ["valid", "validation", "Val"])
@pytest.mark.parametrize("above", ["", "ILSVRC/Data/", "d/" * 200])
def test_splits_have_several_names_and_may_lie_below_leading_folders(make, split, above):
    splits = (("Train", "a"), ("Train", "b"), (split, "a"), (split, "b"))
    path = make(*(f"{above}{folder}/{label}/1.png" for folder, label in splits))
    splits = load_splits(open_source(path))
    assert (len(splits.train), len(splits.val), splits.class_names) == (2, 2, ["a", "b"])


@pytest.mark.parametrize("above", ["", "deep/er/"])
def test_images_in_no_split_are_all_taken(make, above):
    path = make(f"{above}a/1.png", f"{above}b/x/2.png")
    source = open_source(path)
    assert source.train() is source.val_or_all() and labels(source.train()) == ["a", "b"]
    assert load_knn_splits(source) == (None, f"{path} has no val")
    with pytest.raises(UserError, match="has no val, for it is not split"):
        load_splits(source)


def test_a_single_folder_is_no_label(make):
    path = make("some/where/1.png", "some/where/2.png")
    part = open_source(path).train()
    assert part.class_names is None and part.dataset.labels is None and not part.flaw
    assert load_knn_splits(open_source(path)) == (None, "the images have no labels")
    part = open_source(make("some/where/cat/3.png")).train()
    assert len(part.dataset) == 3 and part.class_names is part.dataset.labels is None
    assert part.flaw.endswith("there are class folders and 2 images beside them: some/where/1.png")


def test_classes_may_be_called_as_splits_unless_all_are(make):
    assert labels(open_source(make("boat/1.png", "train/2.png")).train()) == ["boat", "train"]
    path = make("in/train/train/1.png", "in/train/val/2.png", "in/test/3.png")
    with pytest.raises(UserError, match=r"train/train/1\.png: are train, val splits or classes"):
        open_source(f"{path}/in").train()
    make(*(f"one/{s}/{label}/1.png" for s in ("train", "val") for label in ("train", "val", "x")))
    splits = load_splits(open_source(f"{path}/one"))
    assert splits.class_names == ["train", "val", "x"] and len(splits.val) == 3


def test_what_is_not_read_is_said(make):
    path = make("train/a/1.png", "train/b/2.png", "val/a/3.png", "test/4.png", "x/5.png", "6.png")
    source = open_source(path)
    assert source.remarks == ("not read: test, x, 1 images",)
    assert len(source.train().dataset) == 2 and len(source.val().dataset) == 1
    with pytest.raises(UserError, match="x has no train, only val"):
        open_source(make("x/val/1.png") + "/x").train()
    with pytest.raises(UserError, match=r"set has Val and val: which one is val\?"):
        open_source(make("Val/1.png"))
    for file in ("notes.txt", "x.TXT", "y.txt", "x.json", "LICENSE", "TODO"):
        open(f"{path}/train/a/{file}", "w").close()
    remark = "ignored: 3 .txt, 2 without extension, 1 .json"
    assert open_source(f"{path}/train").train().remarks == (remark,)


def test_hidden_files_and_folders_are_skipped_at_every_level(make):
    path = make("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    make("train/.ipynb_checkpoints/1.png", "train/b/.ipynb_checkpoints/2.png", "val/.git/x.png")
    make("train/__MACOSX/1.png", "train/a/@eaDir/1.png/thumbnail.jpg", "train/a/._1.png")
    make("train/.hidden.png", ".trash/train/1.png", "._2.png")
    splits = load_splits(open_source(path))
    assert splits.class_names == ["a", "b"] and (len(splits.train), len(splits.val)) == (2, 2)
    assert splits.remarks == ()


def test_links_are_followed_but_each_folder_is_read_once(make):
    path = make("all/a/1.png", "all/b/2.png")
    os.symlink("all", f"{path}/train")
    os.symlink("all", f"{path}/val")
    os.symlink("../b/2.png", f"{path}/all/a/3.png")
    assert labels(open_source(path).train()) == ["a", "a", "b"]
    os.symlink("nowhere", f"{path}/all/b/4.png")
    os.mkfifo(f"{path}/all/b/5.png")  # opening it would block
    train = open_source(path).train()
    assert train.remarks == ("ignored: 1 broken links",)
    with pytest.raises(UnreadableImage, match="no regular file") as error:
        train.dataset.read(3)
    assert error.value.path == f"{path}/train/b/5.png"
    for target in ("..", "../b", "../../val/a"):
        os.symlink(target, f"{path}/all/b/x")
        with pytest.raises(UserError, match=r"is a link to .*, which is read, too"):
            open_source(path).train()
        os.unlink(f"{path}/all/b/x")


def test_a_long_name_costs_its_own_length(make):
    path = make("1.png")
    names = [f"{i}.png" for i in range(1000)] + ["n" * 3000 + ".png"]
    Path(path, "list.txt").write_text("\n".join(names))
    paths = open_source(f"{path}/list.txt").train().dataset.paths
    assert list(paths) == names and paths.characters.nbytes < 20_000
    for line in ("n" * 5000 + ".png", "1.png\t" + "n" * 5000):
        Path(path, "list.txt").write_text(line)
        with pytest.raises(UserError, match="line 1: a name or label of more than 4096"):
            open_source(f"{path}/list.txt").train()


def test_names_of_any_characters(make):
    odd = ["a\nb", "c\x1b[31m", os.fsdecode(b"\xff"), "ä\u202e"]
    path = make(*(f"{split}/{name}/{name}.png" for split in ("train", "val") for name in odd))
    splits = load_splits(open_source(path))
    assert splits.class_names == sorted(odd) and str(splits).isprintable()
    assert splits.train.name(0).isprintable() and splits.train.read(0).shape == (3, 9, 8)


def test_a_folder_may_be_called_as_a_file(make):
    for name in ("set.txt", "set.tar", "train.TAR"):
        path = make(f"{name}/a/1.png", f"{name}/b/2.png")
        assert labels(open_source(f"{path}/{name}").train()) == ["a", "b"]


def test_folders_that_hold_nothing_are_refused(make, tmp_path):
    path = make("only/x.heic.png")
    os.rename(f"{path}/only/x.heic.png", f"{path}/only/x.heic")
    with pytest.raises(UserError, match=r"holds no images .*; ignored: 1 \.heic"):
        open_source(path)
    (tmp_path / "set" / "train").mkdir()
    with pytest.raises(UserError, match="set holds no images"):
        open_source(path).train()
    for missing in (f"{path}/no", "x" * 300):
        with pytest.raises(UserError, match=r"does not exist: give a folder of images"):
            open_source(missing)
    (tmp_path / "x.csv").touch()
    with pytest.raises(UserError, match=r"x\.csv is neither a folder nor a \.txt or \.tar"):
        open_source(str(tmp_path / "x.csv"))


def test_image_folders_are_those_that_are_searched(make, tmp_path):
    path, root = make("train/a/1.png", "val/a/2.png"), tmp_path / "set"
    assert image_folders(path) == [root / "train", root / "val"]
    (root / "train.txt").write_text("train/a/1.png\ta\n")
    assert image_folders(path) == [root / "val"]
    assert image_folders(f"{path}/val/a") == [root / "val" / "a"]
    assert image_folders(f"{path}/train.txt") == []
    np.save(f"{path}/val/a/x.npy", np.zeros((4, 5, 6), np.uint16))
    assert len(open_source(path).val().dataset) == 1
    assert len(open_source(path, PixelFormat(6)).val().dataset) == 2


# Lists


def test_a_list_names_paths_below_its_folder_and_labels_after_a_tab(make, image_file, tmp_path):
    root = make("b c/x 1.png", "a.png")
    os.symlink(image_file("elsewhere.png", height=9, width=8), f"{root}/link.png")
    path = tmp_path / "set" / "list.txt"
    path.write_bytes("\ufeffb c/x 1.png\t10\r\n\na.png\t9\n./b c/../link.png\t10 \n".encode())
    part = open_source(str(path)).train()
    assert names(part) == ["b c/x 1.png", "a.png", "link.png"]
    assert labels(part) == ["10", "9", "10"] and part.class_names == ["10", "9"]
    assert all(part.dataset.read(i).shape == (3, 9, 8) for i in range(3))
    path.write_bytes(b"a.png\r\nb c/x 1.png\r\n")  # as Windows ends lines
    part = open_source(str(path)).train()
    assert names(part) == ["a.png", "b c/x 1.png"] and part.class_names is None


@pytest.mark.parametrize(
    "lines, words",
    [
        ("a.png\n/etc/b.png", "line 2: /etc/b.png leads out of the folder of the list"),
        ("a.png\n\n../b.png", "line 3: ../b.png leads out"),
        ("x/../../b.png\t1", "line 1: ../b.png leads out"),
        ("a.png 3", "line 1: a.png 3 is not the name of an image .* a label goes after a tab"),
        ("a.png\t1\t0\t15", "line 1: one tab at most, before the label"),  # Tiny ImageNet's
        ("a.png\t1\nb.png", "line 2: either each line has a label, or none has"),
        ("\n \n", "names no images"),
    ],
)
def test_a_line_of_a_list_that_cannot_be_is_named(tmp_path, lines, words):
    path = tmp_path / "list.txt"
    path.write_text(lines)
    with pytest.raises(UserError, match=words):
        open_source(str(path)).train()


def test_labels_of_an_image_that_contradict_are_a_flaw(tmp_path):
    (tmp_path / "x.txt").write_text("a.png\t01\nb.png\t1\n\n./a.png\t01\n")
    assert labels(open_source(f"{tmp_path}/x.txt").train()) == ["01", "1", "01"]
    (tmp_path / "x.txt").write_text("a.png\t01\nb.png\t1\n\n./a.png\t1\n")
    part = open_source(f"{tmp_path}/x.txt").train()
    assert len(part.dataset) == 3 and part.class_names is None
    assert part.flaw.endswith("x.txt gives a.png the labels 01 and 1")


def test_lists_are_taken_rather_than_the_folders_beside_them(make, tmp_path):
    path = make(*(f"{s}/{label}/{i}.png" for s in ("train", "val") for label in "ab" for i in "01"))
    train_txt, val_txt = tmp_path / "set" / "train.txt", tmp_path / "set" / "val.txt"
    train_txt.write_text("train/b/1.png\tb\ntrain/a/0.png\ta\n")
    splits = load_splits(open_source(path))
    assert (len(splits.train), len(splits.val)) == (2, 4)
    assert splits.train.labels.tolist() == [1, 0] and splits.val.labels.tolist() == [0, 0, 1, 1]
    assert splits.remarks == ("read from train.txt and val", "not read: train")
    val_txt.write_text("val/b/0.png\tb\n")
    splits = load_splits(open_source(path))
    assert splits.remarks[:2] == ("read from train.txt and val.txt", "not read: train, val")
    assert splits.val.labels.tolist() == [1]
    for line, words in (
        ("val/b/0.png\tc\n", r"val has classes that train does not know: c \(it knows a, b\)"),
        ("val/b/0.png\n", "set: val has no labels"),  # although b is a class of train's
        ("val/b/0.png 1\n", "line 1: .*; rename the file if it is no list"),
    ):
        val_txt.write_text(line)
        with pytest.raises(UserError, match=words):
            load_splits(open_source(path))


@pytest.mark.parametrize("beside", ["stray.png", "b/train/2.png"])
def test_splits_further_down_are_not_trained_on_in_silence(image_file, tmp_path, beside):
    for name in ("a/train/1.png", "a/val/1.png", beside):
        image_file(name)
    with pytest.raises(UserError, match="has train and val in a/, and other images beside"):
        open_source(str(tmp_path)).train()
