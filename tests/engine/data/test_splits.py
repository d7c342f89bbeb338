"""Labels of one set numbered as another's, and digests that tell sets from each other."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.decode import PixelFormat
from engine.data.images import ArrayDataset, Part, dataset_digest, evenly_spaced
from engine.data.splits import (
    Source,
    load_knn_splits,
    load_splits,
    load_val,
    match_classes,
    open_source,
)
from engine.errors import UserError


def part(names, class_names=None, **facts):
    """Of gray images, with the classes of these names; None: without labels."""
    images = torch.zeros(len(names), 3, 4, 4, dtype=torch.uint8)
    if class_names is None:
        return Part(ArrayDataset(images), **facts)
    return Part(ArrayDataset(images, [class_names.index(n) for n in names]), class_names, **facts)


def source(path="DIR", **parts):
    return Source(path, {split: (lambda p=p: p) for split, p in parts.items()})


def test_arrays_of_colors_as_one_channel_are_their_luminance():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    dataset = ArrayDataset(pixels.transpose(0, 3, 1, 2), pixel_format=PixelFormat(1))
    expected = np.asarray(Image.fromarray(pixels[1]).convert("L")).astype(int)
    assert dataset.read(1).shape == (1, 40, 60)
    assert np.abs(dataset.read(1)[0].numpy() - expected).max() <= 1


def test_labels_are_numbered_as_the_classifier_numbers_them():
    given = part("cab", list("abc"))
    new = match_classes(given, ["c", "a", "b"], "DIR", "probe.pth")
    assert new.dataset.labels.tolist() == [0, 1, 2] and not new.remarks
    assert new.class_names == ["c", "a", "b"]
    assert given.dataset.labels.tolist() == [2, 0, 1]  # what was given stays as it is
    new = match_classes(part("xcc", ["c", "x"]), ["x", "b", "a", "c"], "DIR", "probe.pth")
    assert new.dataset.labels.tolist() == [0, 3, 3] and len(new.class_names) == 4
    assert new.remarks[0].startswith(
        "2 of the 4 classes of probe.pth are measured, among the scores"
    )


def test_classes_that_the_classifier_does_not_know_are_named():
    given = part(["a", "dog"], ["a", "dog", "declared only"])
    words = r"DIR has classes that probe.pth does not know: dog \(it knows a, b\)"
    with pytest.raises(UserError, match=words):
        match_classes(given, ["a", "b"], "DIR", "probe.pth")
    new = match_classes(given, ["dog", "a"], "DIR", "probe.pth")
    assert new.dataset.labels.tolist() == [1, 0]


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(
        UserError, match="DIR has two classes called a: their labels would be merged"
    ):
        match_classes(part("ab", ["a", "b", "a"]), ["a", "b"], "DIR", "probe.pth")


def test_a_single_folder_is_a_class_that_is_called_like_it():
    given = part("..", shared_folders=("set", "cat"))
    assert match_classes(given, ["a", "cat"], "", "").dataset.labels.tolist() == [1, 1]
    for known in (["a", "b"], ["set", "cat"]):  # no class of that name, or two
        with pytest.raises(UserError, match="DIR has no labels"):
            match_classes(given, known, "DIR", "")
    with pytest.raises(UserError, match="two labels"):
        match_classes(given._replace(flaw="two labels"), ["cat"], "DIR", "")


@pytest.mark.parametrize("flaw, words", [("", "DIR has no labels"), ("F", "^F$")])
def test_labels_that_cannot_be_used_are_an_error_where_labels_are_needed(flaw, words):
    given, val = part("a", flaw=flaw), part("ab", ["a", "b"])
    with pytest.raises(UserError, match=words):
        load_splits(source(train=given, val=val))
    with pytest.raises(UserError, match=words):
        load_val(source(val=given), None, "old.pth")


def test_validation_images_of_another_source():
    train, val = part("ab", ["a", "b"]), part("b", ["b"], remarks=("2 files ignored",))
    splits = load_splits(source(all=train), source("OTHER", val=val))
    assert splits.train is train.dataset and splits.val.labels.tolist() == [1]
    assert splits.remarks[:2] == ("validated on OTHER", "2 files ignored")
    assert load_splits(source(train=train, val=train), source("OTHER", all=val)).val.labels == 1
    with pytest.raises(UserError, match="--val OTHER has classes that DIR does not know: c"):
        load_splits(source(all=train), source("OTHER", val=part("c", ["c"])))
    with pytest.raises(UserError, match="OTHER has no val, only train"):
        load_splits(source(all=train), source("OTHER", train=train))
    with pytest.raises(UserError, match="DIR holds a single class"):
        load_splits(source(train=val, val=val))


def test_images_to_validate_that_are_those_to_train_on_are_refused(image_file, tmp_path):
    for path in ("flat/a/0.png", "flat/b/0.png", "other/a/0.png", "other/b/1.png"):
        image_file(path)
    flat, other = (open_source(f"{tmp_path}/{name}") for name in ("flat", "other"))
    with pytest.raises(UserError, match=r"--val .*/flat has the same images as .*/flat: give oth"):
        load_splits(flat, flat)
    assert len(load_splits(flat, other).val) == 2


def test_when_knn_can_be_measured():
    two, one, none = part("ab", ["a", "b"]), part("a", ["a"]), part("a")
    assert load_knn_splits(source(train=two, val=one))[0].num_classes == 2
    for parts, reason in (
        (dict(train=none, val=two), "the images have no labels"),
        (dict(train=one, val=one), "all images are of one class, a"),
        (dict(train=two), "DIR has no val"),
    ):
        assert load_knn_splits(source(**parts)) == (None, reason)
    for val in (none, part("c", ["c"]), part("a", flaw="F")):
        with pytest.raises(UserError):
            load_knn_splits(source(train=two, val=val))


def test_images_to_validate_alone_suffice_to_evaluate():
    val = part("ba", ["a", "b"])
    splits = load_val(source(val=val), ["b", "a"], "probe.pth")
    assert splits.train is None and splits.val.labels.tolist() == [0, 1]
    assert str(splits) == "2 images to validate, 2 classes: b, a"
    splits = load_val(source(all=val), None, "old.pth")
    assert splits.val.labels.tolist() == [1, 0] and splits.class_names == ["a", "b"]
    assert "old.pth states no class names" in str(splits)


# Identity: other data has another digest, the same data in another place doesn't.


def digest(path):
    train = open_source(str(path)).train()
    return dataset_digest(train.dataset, train.class_names)


def test_a_digest_tells_other_images_and_other_classes(image_file, tmp_path):
    def make(name, labels):
        for n, label in enumerate(labels):
            for i in range(3):
                image_file(f"{name}/train/{label}/{i}.png", height=20 + i + 3 * n)
        return tmp_path / name

    original = digest(make("one", "ab"))
    assert len(original) == 16 and digest(tmp_path / "one") == original
    assert digest(make("other", "ac")) != original
    (tmp_path / "one").rename(tmp_path / "moved")
    assert digest(tmp_path / "moved") == original
    path = tmp_path / "moved" / "train" / "b" / "1.png"
    Image.eval(Image.open(path), lambda value: 255 - value).save(path)
    inverted = digest(tmp_path / "moved")
    path.unlink()
    os.mkfifo(path)  # reading it would block
    assert len({original, inverted, digest(tmp_path / "moved")}) == 3


def test_a_digest_tells_arrays_and_classes_but_not_their_order():
    given, images = part("abc", list("abc")), torch.arange(300).view(100, 3, 1, 1).byte()
    new = match_classes(given, ["c", "more", "b", "a"], "", "")
    original = dataset_digest(given.dataset, given.class_names)
    assert dataset_digest(new.dataset, new.class_names) == original
    others = [(part("acb", list("abc")).dataset, list("abc")), (given.dataset, list("abd"))]
    others += [(ArrayDataset(images), None), (ArrayDataset(255 - images), None)]
    others += [(ArrayDataset(images[:99]), None), (ArrayDataset(images, [0] * 100), None)]
    assert len({original, *(dataset_digest(*other) for other in others)}) == 7
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 100).tolist() == [0, 1, 2]
