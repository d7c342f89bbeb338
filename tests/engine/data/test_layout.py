"""What the names of images tell: splits, classes, shards."""

import pytest

from engine.data import layout
from engine.errors import UserError


def names_of(*folders):
    """Two images in each folder; "" is the root."""
    return [f"{folder}/{i}.png".lstrip("/") for folder in folders for i in (1, 2)]


def splits_of(*folders):
    names = names_of(*folders)
    splits = layout.find_splits(names, "DIR")
    return {split: [names[i] for i in indices] for split, indices in splits.items()}


def test_names_of_splits():
    for split, names in (
        ("train", ["train", "Training", "TRAIN"]),
        ("val", ["val", "valid", "Validation", "VAL"]),
        ("test", ["test", "Testing"]),
        (None, ["trains", "evaluation", "train_shards", "x-val", "", "tràin"]),
    ):
        assert [layout.split_of(name) for name in names] == [split] * len(names)


def test_a_shard_names_its_split_by_one_word():
    for split, stems in (
        ("train", ["train", "imagenet1k-train-0001", "Set.TRAINING.7"]),
        ("val", ["imagenet1k-validation-63", "x_Val0"]),
        ("test", ["my_test_00"]),
        (None, ["trainval-00", "train-val-00", "00012", "strain-3"]),
    ):
        assert [layout.split_of_shard(stem) for stem in stems] == [split] * len(stems)


def test_shared_folders_are_those_of_all_names():
    assert layout.shared_folders(["a/b/1.png", "a/b/c/2.png"]) == ["a", "b"]
    assert layout.shared_folders(["a/1.png", "ab/2.png"]) == []
    assert layout.shared_folders(["a/1.png", "2.png"]) == []
    assert layout.shared_folders(["/data/1.png", "/data/2.png"]) == ["", "data"]
    names = ["a-b/1", "a/2", "a.png", "a/10/1"]
    assert layout.sort_by_folder(names) == ["a/10/1", "a/2", "a-b/1", "a.png"]


@pytest.mark.parametrize(
    "folders, splits",
    [
        (["train/a", "test/a"], {"train", "test"}),
        (["train/a", "val/a", "extra/a", "extra/b"], {"train", "val"}),
        (["train/a", "val/a", ""], {"train", "val"}),
        (["boat", "train"], set()),  # classes of COCO
        (["boat", "val/a"], set()),
        (["test/a", "test/b"], set()),  # nothing else to read
        (["a", "b"], set()),
        ([""], set()),
        (["set/train/a", "set/train/b"], {"train"}),
        (["x/.y/Train/a", "x/.y/valid/a"], {"train", "val"}),
        (["x/train/boat", "x/train/train", "x/train/val"], {"train"}),  # classes in train/
        (["val"], {"val"}),
        (["val/train", "val/cat"], {"val"}),  # classes in val/
    ],
)
def test_folders_are_splits_if_all_are_or_train_and_val_are_among_them(folders, splits):
    assert splits_of(*folders).keys() == splits


def test_two_folders_of_one_split_are_refused():
    with pytest.raises(UserError, match=r"DIR has Training and train: which one is train\?"):
        splits_of("train/a", "val/a", "Training/a")


def test_a_label_is_the_first_folder_below_the_shared_ones():
    assert layout.label_by_folder(names_of("x/a/deep", "x/b")) == (["a", "a", "b", "b"], "")
    assert layout.label_by_folder(names_of("x/a")) == (None, "")  # a single folder is no label
    assert layout.label_by_folder(names_of("")) == (None, "")
    labels, flaw = layout.label_by_folder(names_of("x/a", "x/b", "x"))
    assert labels is None and flaw == "there are class folders and 2 images beside them: x/1.png"
