"""What a path or a name becomes: images, labels, and the names of the classes in order."""

import gzip
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from test_archives import pack

from engine import named_sets
from engine.datasets import (
    ArrayDataset,
    ImageFileDataset,
    LabelError,
    Splits,
    dataset_digest,
    evenly_spaced,
    load_splits,
    relabel,
    require_labels,
)
from engine.decode import PixelFormat, UnreadableImage, decode_image
from engine.errors import UserError
from engine.folders import image_folders
from engine.log import read_log


def test_digits_are_split_four_to_one_without_overlap():
    digits = load_splits("digits")
    assert len(digits.train) == 1437 and len(digits.val) == 360
    assert digits.train.read(0).shape == (3, 16, 16) and digits.train.read(0).dtype == torch.uint8
    assert digits.train.images.min() == 0 and digits.train.images.max() > 250
    assert digits.class_names == list("0123456789") and digits.num_classes == 10
    gray = load_splits("digits", pixel_format=PixelFormat(1)).train
    assert torch.equal(gray.read(7), digits.train.images[7][:1])


@pytest.mark.parametrize("name", ["digits", "pets", "imagenet"])
def test_a_named_set_that_may_be_a_folder_is_refused(name, image_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_file(f"runs/{name}/x.png")
    image_file(f"{name}/x.png")
    if name == "digits":
        (tmp_path / "digits" / "run.lock").touch()  # of --output-dir digits
        assert len(load_splits(name).train) == 1437
        (tmp_path / "digits" / "run.lock").unlink()
    with pytest.raises(UserError, match=rf"a folder here: give \./{name} for the folder; for"):
        load_splits(name)
    assert len(load_splits(f"./{name}").train) == len(load_splits(f"{name}/").train) == 1
    if name == "imagenet":  # which --data-root . has there
        with pytest.raises(UserError, match=r"no imagenet under --data-root \."):
            load_splits(name, ".")


def test_arrays_of_colors_as_one_channel_are_their_luminance():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    dataset = ArrayDataset(pixels.transpose(0, 3, 1, 2), pixel_format=PixelFormat(1))
    expected = np.asarray(Image.fromarray(pixels[1]).convert("L")).astype(int)
    assert dataset.read(1).shape == (1, 40, 60)
    assert np.abs(dataset.read(1)[0].numpy() - expected).max() <= 1


def test_class_folders(image_file, tmp_path):
    for name in ("train/a/1.png", "train/b/deep/2.png", "train/b/3.JPEG", "val/b/4.png"):
        image_file(name)
    (tmp_path / "train" / "b" / "notes.txt").write_text("no image")
    data = load_splits(str(tmp_path))
    assert (len(data.train), len(data.val), data.num_classes) == (3, 1, 2)
    assert data.train.labels.tolist() == [0, 1, 1] and data.val.labels.tolist() == [1]
    assert data.train_labelled is data.train


def test_plain_folder_has_no_labels_and_says_so(image_file, tmp_path):
    for name in ("x.png", "some/where/deep/y.png"):
        image_file(name)
    data = load_splits(str(tmp_path))
    assert len(data.train) == 2 and data.train.labels is None and data.val is None
    assert "kNN is off" in str(data)


def test_folders_with_images_out_of_place_are_refused(image_file, tmp_path):
    for name in ("train/a/x.png", "val/y.png"):
        image_file(name)
    with pytest.raises(UserError, match="val has no class folders, while"):
        load_splits(str(tmp_path))
    image_file("train/z.png")
    with pytest.raises(UserError, match="1 images beside them"):
        load_splits(str(tmp_path))


def test_images_of_val_that_are_trained_on_are_counted(image_file, tmp_path):
    for name in ("a/x.png", "val/a/y.png", "val/b/z.png", "value/w.png"):
        image_file(name)
    assert str(load_splits(str(tmp_path))) == (
        "4 images to train on, the training images have no train/ above them: all are taken, "
        "without labels; kNN is off; 2 of them are those of val/"
    )
    images = load_splits(str(tmp_path), need="images")
    assert str(images) == "4 images to train on; 2 of them are those of val/"
    assert str(load_splits(str(tmp_path), need="val")) == "2 images to validate"


def test_folder_without_val_has_no_knn(image_file, tmp_path):
    image_file("train/a/x.png")
    assert "no val/" in load_splits(str(tmp_path)).note
    image_file("val/other/y.png")
    with pytest.raises(UserError, match="classes that train lacks: other"):
        load_splits(str(tmp_path))


def test_arrays_are_listed_where_images_have_other_than_three_channels(image_file, tmp_path):
    image_file("a.png")
    np.save(tmp_path / "b.npy", np.zeros((4, 5, 6), np.uint16))
    assert len(load_splits(str(tmp_path)).train) == 1
    assert len(load_splits(str(tmp_path), pixel_format=PixelFormat(6)).train) == 2


# Lists.


def test_a_list_names_paths_below_its_folder_and_labels_after_a_tab(image_file, tmp_path):
    for name in ("b c/x 1.png", "a.png", "d.png"):
        image_file(f"set/{name}")
    (tmp_path / "set" / "link.png").symlink_to(image_file("elsewhere.png"))
    path = tmp_path / "set" / "list.txt"
    path.write_bytes("\ufeffb c/x 1.png\t10\r\n\na.png\t9\n./b c/../link.png\t10 \n".encode())
    data = load_splits(str(path))
    assert [os.fsdecode(p) for p in data.train.paths] == ["b c/x 1.png", "a.png", "link.png"]
    assert data.train.labels.tolist() == [0, 1, 0] and data.class_names == ["10", "9"]
    assert all(data.train.read(i).shape == (3, 40, 60) for i in range(3))
    assert "single list" in data.note and data.val is None
    path.write_text("a.png\nd.png\n")
    assert load_splits(str(path)).train.labels is None and load_splits(str(path)).num_classes == 0

    (tmp_path / "set" / "train.txt").write_text("a.png\tcat\nd.png\ta dog\n")
    data = load_splits(str(tmp_path / "set"))
    assert len(data.train) == 2 and "no val/" in data.note
    (tmp_path / "set" / "val.txt").write_text("b c/x 1.png\tcat\n")
    data = load_splits(str(tmp_path / "set"))
    assert (data.class_names, data.num_classes) == (["a dog", "cat"], 2)
    assert data.train_labelled.labels.tolist() == [1, 0] and data.val.labels.tolist() == [1]


def test_pretraining_does_without_labels_that_contradict(image_file, tmp_path):
    image_file("a.png")
    path = tmp_path / "list.txt"
    path.write_text("a.png\tcat\na.png\tdog\n")
    splits = load_splits(str(path), need="images")
    assert len(splits.train) == 2 and splits.train.labels is None
    with pytest.raises(LabelError):
        load_splits(str(path))


def test_folders_of_runs_and_of_data_do_not_hide_a_named_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits" / "run").mkdir(parents=True)
    with pytest.raises(UserError, match="digits is a data set and a folder here"):
        load_splits("digits")
    assert load_splits("digits", data_root="digits").num_classes == 10
    (tmp_path / "digits" / "run" / "run.lock").touch()
    assert load_splits("digits").num_classes == 10


@pytest.mark.parametrize(
    "lines, words",
    [
        ("a.png\n/etc/b.png", "line 2: /etc/b.png leads out of the folder of the list"),
        ("a.png\n\n../b.png", "line 3: ../b.png leads out"),
        ("x/../../b.png\t1", "line 1: ../b.png leads out"),
        ("a.png 3", "line 1: a.png 3 is not the name of an image .* a label goes after a tab"),
        (
            "a.png\tcat\nb.png\tdog\n\n./a.png\tdog",
            "line 4: a.png has the label dog, and in line 1 the label cat",
        ),
        ("a.png\t1\nb.png", "line 2: either each line has a label, or none has"),
        ("\n \n", "names no images"),
    ],
)
def test_a_line_of_a_list_that_cannot_be_is_named(tmp_path, lines, words):
    path = tmp_path / "list.txt"
    path.write_text(lines)
    with pytest.raises(UserError, match=words):
        load_splits(str(path))


def test_a_list_may_name_an_image_twice(image_file, tmp_path):
    image_file("a.png")
    image_file("b.png")
    path = tmp_path / "list.txt"
    path.write_text("a.png\tcat\nb.png\tdog\na.png\tcat\n")
    assert load_splits(str(path)).train.labels.tolist() == [0, 1, 0]
    path.write_text("a.png\nb.png\na.png\n")
    assert len(load_splits(str(path)).train) == 3


def test_class_folders_are_sorted_as_strings(image_file, tmp_path):
    for name in ("a", "a-b", "10", "9"):
        image_file(f"train/{name}/x.png")
    data = load_splits(str(tmp_path))
    assert data.class_names == ["10", "9", "a", "a-b"] and data.train.labels.tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert [os.fsdecode(p) for p in data.train.paths] == [f"{n}/x.png" for n in data.class_names]
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="train/empty holds no images"):
        load_splits(str(tmp_path))


# Lists and folders side by side.


def folders_and_lists(image_file, tmp_path, train=None, val=None):
    """train/a, train/b with 3 images each, val/a, val/b with 1; and the lists that are given."""
    for name in ("a", "b"):
        for i in range(3):
            image_file(f"set/train/{name}/{i}.png")
        image_file(f"set/val/{name}/0.png")
    for split, lines in (("train", train), ("val", val)):
        if lines is not None:
            (tmp_path / "set" / f"{split}.txt").write_text("".join(f"{s}\n" for s in lines))
    return str(tmp_path / "set")


def test_lists_are_taken_rather_than_the_folders_beside_them(image_file, tmp_path):
    train = ["train/b/1.png\tb", "train/a/2.png\ta"]
    path = folders_and_lists(image_file, tmp_path, train, ["val/b/0.png\tb"])
    splits = load_splits(path)
    assert (len(splits.train), len(splits.val)) == (2, 1)
    assert splits.class_names == ["a", "b"] and splits.train.labels.tolist() == [1, 0]
    assert str(splits) == (
        "2 images to train on, 1 to validate; read from train.txt (not train/) and val.txt "
        "(not val/)"
    )
    assert "read from train.txt" in splits.labelled_str()


def test_a_list_that_lacks_classes_of_the_folder_is_named_in_the_refusal(image_file, tmp_path):
    path = folders_and_lists(image_file, tmp_path, ["train/b/1.png\tb"])
    with pytest.raises(UserError, match=r"that train lacks: a \(read from train\.txt \(not train/"):
        load_splits(path)


def test_one_list_goes_with_the_other_folder_and_classes_match_by_name(image_file, tmp_path):
    path = folders_and_lists(image_file, tmp_path, ["train/b/1.png\tb", "train/a/2.png\ta"])
    splits = load_splits(path)
    assert (len(splits.train), len(splits.val)) == (2, 2)
    assert splits.train.labels.tolist() == [1, 0] and splits.val.labels.tolist() == [0, 1]
    assert "read from train.txt (not train/) and val/" in str(splits)
    os.remove(f"{path}/train.txt")
    (tmp_path / "set" / "val.txt").write_text("train/b/2.png\tb\n")
    splits = load_splits(path)
    assert (len(splits.train), len(splits.val)) == (6, 1) and splits.val.labels.tolist() == [1]
    assert "read from train/ and val.txt (not val/)" in str(splits)
    (tmp_path / "set" / "val.txt").write_text("train/b/2.png\tc\n")
    with pytest.raises(UserError, match="val has classes that train lacks: c"):
        load_splits(path)
    (tmp_path / "set" / "val.txt").write_text("train/b/2.png\n")
    with pytest.raises(UserError, match="val has no labels, while train has 2 classes"):
        load_splits(path)


def test_a_train_txt_of_another_kind_is_refused_and_says_what_to_do(image_file, tmp_path):
    path = folders_and_lists(image_file, tmp_path, ["train/b/1.png 1"])
    with pytest.raises(UserError, match=r"line 1: .* is read as a list .*: rename it if it is"):
        load_splits(path)


def test_a_val_txt_alone_is_refused(image_file, tmp_path):
    image_file("a.png")
    (tmp_path / "val.txt").write_text("a.png\n")
    with pytest.raises(UserError, match=r"has val\.txt, but neither train\.txt nor train/"):
        load_splits(str(tmp_path))


def test_image_folders_are_those_that_are_searched(image_file, tmp_path):
    path = folders_and_lists(image_file, tmp_path)
    root = tmp_path / "set"
    assert image_folders(path) == [root / "train", root / "val"]
    (root / "train.txt").write_text("train/a/0.png\ta\n")
    assert image_folders(path) == [root / "val"]
    assert image_folders(str(root / "val" / "a")) == [root / "val" / "a"]
    assert image_folders("digits") == image_folders(str(root / "train.txt")) == []


# Classes have the same order whatever the form of the data.


@pytest.fixture
def equal_numbers(image_file, tmp_path):
    """A list whose labels are equal as numbers."""
    labels = ["2", "01", "1", "10", "001", "02"]
    for label in labels:
        image_file(f"{label}.png")
    (tmp_path / "list.txt").write_text("".join(f"{label}.png\t{label}\n" for label in labels))
    return str(tmp_path / "list.txt")


def test_labels_that_are_equal_as_numbers_are_classes_sorted_as_strings(equal_numbers):
    splits = load_splits(equal_numbers)
    assert splits.class_names == ["001", "01", "02", "1", "10", "2"]
    assert splits.train.labels.tolist() == [5, 1, 3, 4, 0, 2]


@pytest.mark.slow
def test_the_order_of_classes_does_not_depend_on_the_seed_of_hashes(equal_numbers):
    code = "import sys; from engine.datasets import load_splits; "
    code += "s = load_splits(sys.argv[1]); print(s.class_names, s.train.labels.tolist())"
    command, outputs = [sys.executable, "-c", code, equal_numbers], set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.add(subprocess.check_output(command, cwd=ROOT, env=env, text=True))
    assert len(outputs) == 1


def test_folders_lists_and_hugging_face_values_agree_on_the_order(image_file, tmp_path):
    names = [str(i) for i in range(12)]
    paths = [image_file(f"set/train/{name}/x.png") for name in names]
    (tmp_path / "set" / "list.txt").write_text(
        "".join(f"train/{name}/x.png\t{name}\n" for name in names)
    )
    expected = torchvision.datasets.ImageFolder(tmp_path / "set" / "train").classes
    assert load_splits(str(tmp_path / "set")).class_names == expected
    by_list = load_splits(str(tmp_path / "set" / "list.txt"))
    assert by_list.class_names == expected
    where = saved_set(
        tmp_path / "hf",
        lambda d: {"image": d.Image(), "label": d.Value("int64")},
        image=[{"bytes": path.read_bytes(), "path": None} for path in paths],
        label=list(range(12)),
    )
    by_value = load_splits(where, hf_columns=["image", "label"])
    assert by_value.class_names == expected
    assert by_value.train.labels.tolist() == by_list.train.labels.tolist()


def labelled_splits(train, val, class_names):
    def dataset(labels):
        images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
        return ArrayDataset(images, [class_names.index(label) for label in labels])

    train = dataset(train)
    return Splits(train, train, dataset(val), class_names)


def test_labels_are_numbered_as_the_classifier_numbers_them():
    splits = labelled_splits(["a", "b", "c"], ["c", "a", "b"], ["a", "b", "c"])
    new, message = relabel(splits, ["c", "a", "b"], "probe.pth")
    assert new.val.labels.tolist() == [0, 1, 2] and new.train.labels.tolist() == [1, 2, 0]
    assert new.class_names == ["c", "a", "b"] and new.train is new.train_labelled and not message
    assert splits.val.labels.tolist() == [2, 0, 1]  # what was given stays as it is
    assert torch.equal(new.val.images, splits.val.images)
    same, message = relabel(splits, ["a", "b", "c"], "probe.pth")
    assert same.val.labels.tolist() == [2, 0, 1] and not message


def test_some_of_the_classifiers_classes_are_measured_and_it_says_so():
    splits = labelled_splits(["c", "x"], ["x", "c", "c"], ["c", "x"])
    new, message = relabel(splits, ["x", "b", "a", "c"], "probe.pth")
    assert new.val.labels.tolist() == [0, 3, 3] and new.num_classes == 4
    assert message.startswith("2 of the 4 classes of probe.pth are measured")


def test_classes_that_the_classifier_does_not_know_are_named():
    splits = labelled_splits(["a", "dog"], ["a", "dog"], ["a", "dog", "declared only"])
    with pytest.raises(UserError, match=r"that probe.pth does not know: dog \(it knows a, b\)"):
        relabel(splits, ["a", "b"], "probe.pth")
    new, _ = relabel(splits, ["dog", "a"], "probe.pth")
    assert new.val.labels.tolist() == [1, 0]


def test_a_checkpoint_without_class_names_is_said_to_have_none():
    splits = labelled_splits(["a", "b"], ["a", "b"], ["a", "b"])
    same, message = relabel(splits, None, "old.pth")
    assert same is splits and "old.pth states no class names" in message


def test_numbers_whose_order_was_another_one_are_refused_without_class_names(image_file, tmp_path):
    for name in ("9", "10"):
        image_file(f"set/val/{name}/x.png")
    path = tmp_path / "set" / "val.txt"
    by_folder = load_splits(str(tmp_path / "set"), need="val")
    assert relabel(by_folder, None, "old.pth")[0] is by_folder  # in this order before, too
    path.write_text("val/9/x.png\t9\nval/10/x.png\t10\n")
    splits = load_splits(str(path), need="val")
    with pytest.raises(UserError, match=r"the order of its classes .* now it is 10 9 …"):
        relabel(splits, None, "old.pth")
    assert relabel(splits, ["9", "10"], "new.pth")[0].val.labels.tolist() == [0, 1]
    path.write_text("val/9/x.png\t09\nval/10/x.png\t10\n")
    assert relabel(load_splits(str(path), need="val"), None, "old.pth")[1]


def test_images_to_validate_alone_suffice_to_evaluate(image_file, tmp_path):
    for name in ("9", "10"):
        image_file(f"set/val/{name}/x.png")
    path = str(tmp_path / "set")
    splits = load_splits(path, need="val")
    assert splits.train is None and splits.val.labels.tolist() == [0, 1]
    assert splits.class_names == ["10", "9"] and str(splits) == "2 images to validate"
    assert splits.labelled_str() == "2 images to validate, 2 classes"
    assert require_labels(splits, path, train=False) is splits
    with pytest.raises(UserError, match="needs labelled images to train on and to validate"):
        require_labels(load_splits(path), path)
    with pytest.raises(UserError, match="train on and to validate: it has none to train on"):
        require_labels(splits, path)
    (tmp_path / "set" / "few.txt").write_text("val/9/x.png\t9\n")
    splits = load_splits(f"{path}/few.txt", need="val")
    assert len(splits.val) == 1 and splits.class_names == ["9"]
    (tmp_path / "set" / "few.txt").write_text("val/9/x.png\n")
    with pytest.raises(UserError, match="needs labelled images: the images have no labels"):
        splits = load_splits(f"{path}/few.txt", need="val")
        require_labels(splits, "few.txt", train=False)


# Identity: other data has another digest, the same data in another place doesn't.


def tree(image_file, tmp_path, name, labels=("a", "b")):
    for n, label in enumerate(labels):
        for i in range(3):
            image_file(f"{name}/train/{label}/{i}.png", height=20 + i + 3 * n)
    return load_splits(str(tmp_path / name))


def digest(splits):
    return dataset_digest(splits.train, splits.class_names)


def test_a_digest_tells_other_images_and_other_classes(image_file, tmp_path):
    original = digest(tree(image_file, tmp_path, "one"))
    assert len(original) == 16 and int(original, 16) > 0
    assert digest(load_splits(str(tmp_path / "one"))) == original
    (tmp_path / "one").rename(tmp_path / "moved")
    assert digest(load_splits(str(tmp_path / "moved"))) == original
    assert digest(tree(image_file, tmp_path, "other", labels=("a", "c"))) != original
    inverted = tree(image_file, tmp_path, "inverted")
    assert digest(inverted) == original
    path = tmp_path / "inverted" / "train" / "b" / "1.png"
    Image.eval(Image.open(path), lambda value: 255 - value).save(path)
    assert digest(inverted) != original
    path.unlink()
    os.mkfifo(path)  # reading it would block
    assert digest(inverted) != original


def test_a_digest_tells_renamed_labels_of_a_list(image_file, tmp_path):
    image_file("a.png")
    image_file("b.png")

    def of_labels(*labels):
        lines = [f"{name}.png\t{label}\n" for name, label in zip("ab", labels)]
        (tmp_path / "list.txt").write_text("".join(lines))
        return digest(load_splits(str(tmp_path / "list.txt")))

    digests = [of_labels("1", "2"), of_labels("2", "1"), of_labels("1", "3"), of_labels("1", "1")]
    assert len(set(digests)) == 4 and of_labels("1", "2") == digests[0]


def test_a_digest_does_not_depend_on_the_order_of_classes():
    splits = labelled_splits(["a", "b", "c"], ["a"], ["a", "b", "c"])
    new, _ = relabel(splits, ["c", "more", "b", "a"], "probe.pth")
    assert digest(new) == digest(splits)
    other = labelled_splits(["a", "c", "b"], ["a"], ["a", "b", "c"])
    assert digest(other) != digest(splits)


def test_a_digest_tells_arrays_and_records(image_file, tmp_path):
    images = torch.randint(0, 256, (100, 3, 4, 4), dtype=torch.uint8)
    original = dataset_digest(ArrayDataset(images))
    assert dataset_digest(ArrayDataset(255 - images)) != original
    assert dataset_digest(ArrayDataset(images[:99])) != original
    assert dataset_digest(ArrayDataset(images, [0] * 100)) != original

    paths = [image_file("x.png", height=9), image_file("y.png", height=12)]
    one, other = ({"bytes": path.read_bytes(), "path": None} for path in paths)

    def of_records(*images):
        folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        return digest(load_splits(saved_set(folder, lambda d: {"image": d.Image()}, image=images)))

    assert of_records(one) == of_records(one) != of_records(other)
    assert of_records(one, None) != of_records(one)  # a record without an image


def test_a_digest_of_200_000_files_takes_less_than_a_second():
    names = [f"n{i % 100:08}/n{i % 100:08}_{i}.JPEG" for i in range(200_000)]
    dataset = ImageFileDataset("/nowhere", names, torch.arange(200_000) % 100)
    began = time.perf_counter()
    dataset_digest(dataset, [f"n{i:08}" for i in range(100)])
    assert time.perf_counter() - began < 1


def test_evenly_spaced_indices_are_distinct_and_begin_at_0():
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 100).tolist() == [0, 1, 2]


# What tools leave beside the images.


def test_hidden_files_and_folders_are_skipped(image_file, tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png"):
        image_file(name)
    for name in (
        "train/.ipynb_checkpoints/1.png",
        "train/b/.ipynb_checkpoints/2.png",
        "train/__MACOSX/1.png",
        "train/a/@eaDir/1.png/thumbnail.jpg",
        "train/a/._1.png",
        "train/.hidden.png",
        "val/.git/x.png",
    ):
        image_file(name)
    splits = load_splits(str(tmp_path))
    assert splits.class_names == ["a", "b"] and (len(splits.train), len(splits.val)) == (2, 1)
    assert splits.remarks == ()
    assert len(load_splits(str(tmp_path / "train" / "a")).train) == 1


def test_files_with_other_extensions_are_counted_and_said_once(image_file, tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png"):
        image_file(name)
    for name in ("train/a/notes.txt", "train/b/x.TXT", "val/a/x.json", "val/a/LICENSE"):
        (tmp_path / name).write_text("")
    remark = "4 files with other extensions ignored (.txt 2, .json 1, none 1)"
    assert str(load_splits(str(tmp_path))) == f"2 images to train on, 1 to validate; {remark}"
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.heic").write_text("")
    with pytest.raises(UserError, match=r"holds no images .* 1 file with another .*\.heic 1"):
        load_splits(str(tmp_path / "only"))


@pytest.mark.parametrize("extension", ["jfif", "jpe", "avif", "jp2", "JFIF"])
def test_images_of_rarer_extensions_are_found_and_read(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    kind = {"avif": "AVIF", "jp2": "JPEG2000"}.get(extension, "JPEG")
    try:
        Image.new("RGB", (12, 10), (200, 0, 0)).save(path, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow can't write {kind}")
    dataset = load_splits(str(tmp_path)).train
    assert len(dataset) == 1 and dataset.read(0).shape == (3, 10, 12)
    assert dataset.name(0) == f"a.{extension}"


# Hugging Face's data sets.


def saved_set(folder, kind=None, **columns):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    datasets.disable_progress_bars()
    features = kind and datasets.Features(kind(datasets))
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    return f"hf:{folder}"


def test_records_are_read_as_files_are(image_file, tmp_path):
    paths = [image_file(f"{i}.png", height=20 + i) for i in range(3)]
    images = [
        {"bytes": paths[0].read_bytes(), "path": None},
        {"bytes": None, "path": str(paths[1])},
        {"bytes": b"no image", "path": "2.png"},
        None,
    ]
    where = saved_set(
        tmp_path / "set",
        lambda d: {"image": d.Image(), "label": d.Value("string")},
        image=images, label=["b", "a", "b", "b"],
    )  # fmt: skip
    assert load_splits(where).train.labels is None  # a string may be anything
    data = load_splits(where, hf_columns=["image", "label"])
    assert data.class_names == ["a", "b"] and data.train.labels.tolist() == [1, 0, 1, 1]
    assert "no split to validate" in data.note
    for i in range(2):
        assert torch.equal(data.train.read(i), decode_image(str(paths[i])))
    gray = load_splits(where, pixel_format=PixelFormat(1)).train
    assert torch.equal(gray.read(0), decode_image(str(paths[0]), PixelFormat(1)))
    for i, words in ((2, "no image of a known format"), (3, "NoneType")):
        with pytest.raises(UnreadableImage, match=words) as error:
            data.train.read(i)
        assert error.value.path == f"{where} train, record {i}"


def test_labels_that_are_kept_secret_are_none(image_file, tmp_path):
    image = {"bytes": image_file("a.png").read_bytes(), "path": None}
    where = saved_set(
        tmp_path / "set",
        lambda d: {"image": d.Image(), "label": d.ClassLabel(names=["a", "b"])},
        image=[image, image], label=[-1, -1],
    )  # fmt: skip
    assert load_splits(where).train.labels is None


def test_records_without_a_label_are_no_class(image_file, tmp_path):
    image = {"bytes": image_file("a.png").read_bytes(), "path": None}

    def load(folder, kind, labels):
        where = saved_set(
            tmp_path / folder,
            lambda d: {"image": d.Image(), "label": kind(d)},
            image=[image] * len(labels),
            label=labels,
        )
        return load_splits(where, hf_columns=["image", "label"])

    def value(d):
        return d.Value("string")

    def number(d):
        return d.Value("int64")

    def class_label(d):
        return d.ClassLabel(names=["a", "b"])

    with pytest.raises(UserError, match=r"train: 1 of 3 records have no label .*IMAGE alone"):
        load("1", value, ["a", None, "b"])
    with pytest.raises(UserError, match="2 of 3 records have no label"):
        load("2", number, [None, 7, None])
    with pytest.raises(UserError, match="1 of 2 records have no label"):
        load("3", class_label, [0, None])
    with pytest.raises(UserError, match="1 of 2 records have no label"):
        load("4", class_label, [-1, 1])
    for n, kind in enumerate((value, number, class_label)):
        splits = load(f"all {n}", kind, [None, None])
        assert splits.train.labels is None and splits.class_names is None
    assert load("5", number, [7, 10]).class_names == ["10", "7"]


def test_the_one_split_of_a_test_set_can_be_evaluated(image_file, tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    image = {"bytes": image_file("a.png").read_bytes(), "path": None}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])}
    part = datasets.Dataset.from_dict(
        {"image": [image], "label": [1]}, features=datasets.Features(features)
    )
    datasets.disable_progress_bars()
    datasets.DatasetDict(test=part, extra=part).save_to_disk(str(tmp_path / "set"))
    where = f"hf:{tmp_path}/set"
    with pytest.raises(UserError, match="has no train, but test extra: choose by --hf-splits"):
        load_splits(where)
    for names in (None, ["extra"]):
        splits = load_splits(where, hf_splits=names, need="val")
        assert splits.train is None and splits.val.labels.tolist() == [1]
        assert splits.class_names == ["b", "a"]  # as declared


# The published sets, in their own formats, three images large.


def _known(monkeypatch, dataset, **lists):
    """Tells torchvision's integrity check the sums of the files that the test wrote."""
    for attribute, value in lists.items():
        monkeypatch.setattr(dataset, attribute, value)


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files(name, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    key = "labels" if name == "cifar10" else "fine_labels"
    batch = pickle.dumps({"data": pixels.reshape(3, -1), key: [0, 2, 1]})
    dataset = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    folder = tmp_path / dataset.base_folder
    meta_key = dataset.meta["key"]
    meta = _write(folder / "meta", pickle.dumps({meta_key: ["a", "b", "c"]}))
    _known(
        monkeypatch,
        dataset,
        train_list=[["train", _write(folder / "train", batch)]],
        test_list=[["test", _write(folder / "test", batch)]],
        meta={"filename": "meta", "key": meta_key, "md5": meta},
    )
    data = load_splits(name, tmp_path)
    assert torch.equal(data.train.read(1), torch.from_numpy(pixels[1]))
    assert data.val.labels.tolist() == [0, 2, 1] and data.class_names == ["a", "b", "c"]


def test_stl10_trains_on_the_unlabelled_images_too(tmp_path, monkeypatch):
    dataset = torchvision.datasets.STL10
    folder = tmp_path / dataset.base_folder
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    sums = {
        name: _write(folder / name, content)
        for name, content in {
            "train_X.bin": pixels.tobytes(),
            "train_y.bin": bytes([1, 10]),
            "unlabeled_X.bin": pixels.tobytes(),
            "test_X.bin": pixels.tobytes(),
            "test_y.bin": bytes([10, 1]),
        }.items()
    }
    names = "\n".join("abcdefghij").encode()
    sums["class_names.txt"] = _write(folder / "class_names.txt", names)
    _known(
        monkeypatch,
        dataset,
        class_names_file="class_names.txt",
        train_list=[[n, sums[n]] for n in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")],
        test_list=[[n, sums[n]] for n in ("test_X.bin", "test_y.bin")],
    )
    data = load_splits("stl10", tmp_path)
    assert (len(data.train), len(data.train_labelled), len(data.val)) == (4, 2, 2)
    assert data.train_labelled.labels.tolist() == [0, 9] and data.val.labels.tolist() == [9, 0]
    assert data.train.labels is None and data.class_names == list("abcdefghij")
    # On disk an image lies column by column.
    assert torch.equal(data.train.read(3), torch.from_numpy(pixels[1]).mT)


def _jpegs(folder, names):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(folder / f"{name}.jpg")


def test_flowers102_trains_on_train_and_val(tmp_path, monkeypatch):
    from scipy.io import savemat

    dataset = torchvision.datasets.Flowers102
    folder = tmp_path / "flowers-102"
    _jpegs(folder / "jpg", [f"image_{n:05}" for n in range(1, 7)])
    savemat(folder / "imagelabels.mat", {"labels": [[3, 1, 102, 2, 3, 4]]})
    savemat(folder / "setid.mat", {"trnid": [[1, 4]], "valid": [[2, 5]], "tstid": [[3, 6]]})
    monkeypatch.setattr(dataset, "_check_integrity", lambda self: True)
    for key in ("label", "setid"):
        path = folder / dataset._file_dict[key][0]
        files = dataset._file_dict | {key: (path.name, hashlib.md5(path.read_bytes()).hexdigest())}
        monkeypatch.setattr(dataset, "_file_dict", files)
    data = load_splits("flowers102", tmp_path)
    assert (len(data.train), len(data.val), data.num_classes) == (4, 2, 102)
    assert len(data.class_names) == 102 and data.class_names[2] in ("canterbury bells", "2")
    assert data.train_labelled.labels.tolist() == [2, 1, 0, 2] and data.val.labels.tolist() == [
        101,
        3,
    ]
    assert data.train.read(2).shape == (3, 30, 40)  # the first of val: image 2, dark red
    assert data.train.read(2)[0].float().mean() == pytest.approx(40, abs=2)


def test_pets_files(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    _jpegs(folder / "images", ["cat_1", "dog_1", "dog_2"])
    notes = folder / "annotations"
    notes.mkdir()
    (notes / "trainval.txt").write_text("cat_1 1 1 1\ndog_1 37 2 1\n")
    (notes / "test.txt").write_text("dog_2 37 2 1\n")
    data = load_splits("pets", tmp_path)
    assert (len(data.train), len(data.val), data.num_classes) == (2, 1, 37)
    assert data.train_labelled.labels.tolist() == [0, 36] and data.val.labels.tolist() == [36]
    assert data.val.read(0).shape == (3, 30, 40)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("place", ["raw", "files themselves"])
def test_mnist_files(name, place, tmp_path, monkeypatch):
    dataset = torchvision.datasets.MNIST if name == "mnist" else torchvision.datasets.FashionMNIST
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    folder = tmp_path / dataset.__name__ / "raw" if place == "raw" else tmp_path
    sums = []
    for file, _ in dataset.resources:
        header = [2051, 3, 28, 28] if "images" in file else [2049, 3]
        content = pixels.tobytes() if "images" in file else bytes([1, 9, 0])
        content = gzip.compress(np.array(header, ">i4").tobytes() + content)
        sums.append((file, _write(folder / file, content)))
    monkeypatch.setattr(dataset, "resources", sums)
    with pytest.raises(UserError, match=f"are not those of {name}"):
        load_splits(name, tmp_path)  # but of a set whose files have the same names
    monkeypatch.setattr(named_sets, "FIRST_LABELS", {name: [1, 9, 0]})
    if place == "files themselves":  # compressed anew
        monkeypatch.setattr(dataset, "resources", [(file, "0" * 32) for file, _ in sums])
    data = load_splits(name, tmp_path)
    assert data.train.labels.tolist() == data.val.labels.tolist() == [1, 9, 0]
    assert data.num_classes == 10 and len(os.listdir(tmp_path)) == (1 if place == "raw" else 4)
    gray = load_splits(name, tmp_path, PixelFormat(1)).train
    for i in range(3):
        assert torch.equal(gray.read(i), torch.from_numpy(pixels[i : i + 1]))
        assert torch.equal(data.train.read(i), gray.read(i).expand(3, -1, -1))


def test_imagenet_is_unpacked_from_its_own_archives(tmp_path, monkeypatch):
    imagenet, root = torchvision.datasets.imagenet, tmp_path / "imagenet"
    wnids, image = ["n01440764", "n01443537"], io.BytesIO()
    Image.new("RGB", (8, 6)).save(image, "JPEG")
    image = image.getvalue()
    classes = {f"{n}.tar": pack({f"{n}_{i}.JPEG": image for i in range(2)}) for n in wnids}
    sums = {
        "train": ("train.tar", _write(root / "train.tar", pack(classes))),
        "val": ("val.tar", _write(root / "val.tar", pack({f"{i}.JPEG": image for i in range(3)}))),
    }
    monkeypatch.setattr(imagenet, "ARCHIVE_META", imagenet.ARCHIVE_META | sums)
    with pytest.raises(UserError, match=r"no imagenet under .*ILSVRC2012_devkit_t12"):
        load_splits("imagenet", tmp_path)
    names = {wnid: (f"the name of {wnid}",) for wnid in wnids}
    torch.save((names, [wnids[1], wnids[0], wnids[1]]), root / "meta.bin")
    monkeypatch.setattr(named_sets, "NUM_IMAGENET", {"train": 4, "val": 3})
    alone = load_splits("imagenet", tmp_path, need="val")
    assert alone.train is None and len(alone.val) == 3 and not (root / "train").exists()
    data = load_splits("imagenet", tmp_path)
    assert data.class_names == wnids and data.train_labelled.labels.tolist() == [0, 0, 1, 1]
    assert data.val.labels.tolist() == [0, 1, 1] and data.val.read(0).shape == (3, 6, 8)
    (root / "train" / wnids[0] / f"{wnids[0]}_1.JPEG").unlink()
    with pytest.raises(UserError, match="train holds 3 images, not 4: delete it"):
        load_splits("imagenet", tmp_path)


# Images to validate from another place, and pre-training that needs no labels.


def colored(folder, classes, n, size=16):
    """folder/CLASS/0.png …, of one color per class."""
    for label, color in classes.items():
        (folder / label).mkdir(parents=True)
        for i in range(n):
            image = np.full((size, size, 3), color) + np.random.default_rng(i).integers(0, 20)
            Image.fromarray(image.astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


COLORS = {"red": (200, 0, 0), "green": (0, 200, 0)}
CPU = ["--workers", "0", "--device", "cpu"]
STEPS = "--img-size 16 --patch-size 4 --batch-size 8 --epochs 1 --print-freq 1".split() + CPU
MOCO = [*STEPS, *"-a vit_nano --optimizer adamw --warmup-epochs 0 --moco-dim 16".split()]
MOCO += ["--moco-mlp-dim", "32"]


@pytest.mark.parametrize("form", ["val", "flat", "list", "tar"])
def test_a_classifier_is_measured_without_training_images(script, pretrained, tmp_path, form):
    colored(tmp_path / "train", COLORS, 8)
    colored(tmp_path / "val", COLORS, 2)
    probe = "--from-scratch -a vit_nano --lr 10 --batchnorm --crop-min 0.9 --epochs 10".split()
    argv = [tmp_path, *STEPS, *probe, "--output-dir", tmp_path / "probe"]
    assert script("main_lincls.py", *argv)[0] == 0
    test = tmp_path / "test"
    paths = [f"{label}/{i}.png" for label in COLORS for i in range(3)]
    colored(test / "val" if form == "val" else test, COLORS, 3)
    if form == "list":
        (test / "list.txt").write_text("".join(f"{path}\t{path.split('/')[0]}\n" for path in paths))
        test = test / "list.txt"
    elif form == "tar":
        _write(tmp_path / "test.tar", pack({path: (test / path).read_bytes() for path in paths}))
        test = tmp_path / "test.tar"
    saved = ["--pretrained", tmp_path / "probe" / "linear_lr10.pth", *CPU]
    argv = [test, *saved, "--evaluate", "--data-root", tmp_path / "root"]
    code, out, err = script("main_lincls.py", *argv)
    assert (code, err) == (0, "") and "top-1 100.00 % on 6 images" in out
    code, out, err = script("main_finetune.py", *argv)
    assert (code, err) == (0, "") and "on 6 images" in out
    code, _, err = script("main_lincls.py", *argv, "--knn")
    assert code == 2 and err.count("\n") == 1
    assert re.search(r"labelled images to train on(, which --knn| and to validate: \w)", err)
    code, _, err = script("main_lincls.py", *argv, "--val", test)
    assert code == 2 and "--evaluate measures the images in DIR" in err and err.count("\n") == 1
    out, argv = tmp_path / "features.npz", [test, "--pretrained", pretrained, *CPU]
    argv += ["--data-root", tmp_path / "root"]
    code, _, err = script("tools/features.py", *argv, "--split", "val", "--out", out)
    features = np.load(out)
    assert code == 0 and sorted(features["labels"]) == [0, 0, 0, 1, 1, 1], err
    assert features["classes"].tolist() == ["green", "red"]


def test_images_to_validate_may_be_elsewhere(script, tmp_path):
    colored(tmp_path / "set" / "train", COLORS, 8)
    colored(tmp_path / "set" / "val" / "not read", {"x": (0, 0, 0)}, 1)
    other = colored(tmp_path / "other", COLORS, 3)
    val = ["--val", other, "--output-dir", tmp_path / "run"]
    code, out, err = script("main_moco.py", tmp_path / "set", *MOCO, *val, "--knn-every", 1)
    assert (code, err) == (0, "")
    assert f"16 images to train on, 6 to validate; validated on {other}" in out
    assert len([r for r in read_log(tmp_path / "run" / "log.jsonl") if "knn" in r]) == 2
    # The training images may then be the class folders themselves; a part of the classes will do.
    (other / "red").rename(tmp_path / "red")
    for name in ("main_lincls.py", "main_finetune.py"):
        data = [tmp_path / "set" / "train", "--val", other]
        start = ["--pretrained", tmp_path / "run" / "checkpoint.pth", *STEPS]
        more = ["--knn"]
        if name == "main_finetune.py":
            more = "--warmup-epochs 0 --warmup-lr 0 --min-lr 0".split()
        code, out, err = script(name, *data, *start, *more, "--output-dir", tmp_path / name)
        assert (code, err) == (0, "") and "1 of the 2 classes of" in out
        assert "16 images to train on, 3 to validate" in out
    resume = ["--resume", "auto", "--knn-data", tmp_path / "both", "--epochs", 1]
    colored(tmp_path / "both" / "train", COLORS, 2)
    colored(tmp_path / "both" / "val", COLORS, 2)
    argv = [tmp_path / "set", *MOCO, *resume, "--output-dir", tmp_path / "run"]
    code, out, err = script("main_moco.py", *argv)
    assert (code, err) == (0, "") and "nothing left to do" in out

    (other / "green").rename(other / "blue")
    code, _, err = script("main_moco.py", tmp_path / "set", *MOCO, *val[:2])
    assert code == 2 and f"--val {other} has classes that {tmp_path}/set does not know: blue" in err


def test_pretraining_without_labels_is_watched_on_a_labelled_set(script, tmp_path):
    colored(tmp_path / "images", {"2023": (9, 9, 9), "2024": (99, 9, 9)}, 8)
    colored(tmp_path / "set" / "train", COLORS, 8)
    colored(tmp_path / "set" / "val", COLORS, 2)
    run = ["--output-dir", tmp_path / "run"]
    argv = [tmp_path / "images", *MOCO, "--knn-data", tmp_path / "set", "--knn-every", 1, *run]
    code, out, err = script("main_moco.py", *argv)
    assert (code, err) == (0, "")
    assert f"knn     {tmp_path}/set: 16 images to train on, 4 to validate, 2 classes" in out
    assert "data    " in out and "16 images to train on\n" in out
    assert [r["knn"] for r in read_log(tmp_path / "run" / "log.jsonl") if "knn" in r][-1] == 100
    for flags, words in (
        (["--val", tmp_path / "set"], "has none: pre-training takes --knn-data DIR with train and"),
        (["--knn-data", tmp_path / "images"], "needs labelled images to train on and to validate"),
        (["--knn-data", "x", "--val", "y"], "give it or --val"),
        (["--knn-data", "x", "--knn-every", 0], "are for kNN, which --knn-every 0 turns off"),
        (["--knn-data", tmp_path / "no"], f"{tmp_path}/no does not exist"),
        (["--knn-data", tmp_path / "set", "--output-dir", tmp_path / "set/val/x"], "is among the"),
    ):
        data = tmp_path / "images" / "2023" if flags[0] == "--val" else tmp_path / "images"
        code, _, err = script("main_moco.py", data, *MOCO, *run, "--resume", "auto", *flags)
        assert code == 2 and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize("flaw", ["flat val", "extra class", "empty class", "beside", "val list"])
def test_pretraining_needs_no_labels_unless_knn_does(script, image_file, tmp_path, flaw):
    colored(tmp_path / "set" / "train", COLORS, 8)
    if flaw == "flat val":
        image_file("set/val/1.png")
    else:
        more = {"x": (0, 0, 0)} if flaw == "extra class" else {}
        colored(tmp_path / "set" / "val", COLORS | more, 1)
    if flaw == "empty class":
        (tmp_path / "set" / "train" / "blue").mkdir()
    elif flaw == "beside":
        image_file("set/train/1.png")
    elif flaw == "val list":
        (tmp_path / "set" / "val.txt").write_text("train/red/0.png\n")
    argv = [tmp_path / "set", *MOCO, "--output-dir", tmp_path / "run"]
    code, _, err = script("main_moco.py", *argv)
    assert code == 2 and "--knn-every 0 pre-trains without labels" in err and err.count("\n") == 1
    code, out, err = script("main_moco.py", *argv, "--knn-every", 0)
    assert (code, err) == (0, "") and f"{16 + (flaw == 'beside')} images to train on\n" in out


def test_a_run_goes_on_without_knn_and_without_val(script, tmp_path):
    colored(tmp_path / "set" / "train", COLORS, 8)
    val = colored(tmp_path / "set" / "val", COLORS, 1)
    argv = [tmp_path / "set", *MOCO, "--output-dir", tmp_path / "run", "--epochs", 2]
    assert script("main_moco.py", *argv, "--save-every", 1)[0] == 0
    val.rename(tmp_path / "val")
    resume = ["--resume", tmp_path / "run" / "checkpoint_0001.pth", "--knn-every", 0]
    code, out, err = script("main_moco.py", *argv, *resume)
    assert (code, err) == (0, "") and "resumed after step 2 of 4" in out


def test_hugging_face_names_take_what_load_dataset_takes(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    colored(tmp_path / "set" / "one" / "train", COLORS, 2)
    colored(tmp_path / "set" / "one" / "test", COLORS, 1)
    colored(tmp_path / "set" / "two", COLORS, 3)
    configs = "".join(f"- config_name: {n}\n  data_dir: {n}\n" for n in ("one", "two"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    where = f"hf:{tmp_path}/set"

    def sizes(path, **options):
        splits = load_splits(path, **options)
        return len(splits.train), splits.val and len(splits.val)

    assert sizes(f"{where}:one") == sizes(f"{where}:name=one") == (4, 2)
    assert sizes(f"hf:imagefolder:data_dir={tmp_path}/set/one") == (4, 2)
    assert sizes(f"hf:imagefolder:data_files={tmp_path}/set/two/*/*.png") == (6, None)
    assert sizes(f"{where}:one", need="images") == (4, None)
    for path, words in (
        (where, r"pick one among the available configs: \['one', 'two'\]$"),
        (f"{where}:three", r"'three' not found\. Available: \['one', 'two'\]"),
        (f"{where}:colour=red", "'colour=red' is not CONFIG, nor one of name=VALUE revision="),
        (f"{where}:one:name=two", "'name=two' is not CONFIG"),
        (f"{where}:revision=main", "is a folder, it has no revision"),
    ):
        with pytest.raises(UserError, match=words):
            load_splits(path)
    calls = []

    def note(*args, **options):
        calls.append((args, options))
        return {}

    monkeypatch.setattr(datasets, "load_dataset", note)
    with pytest.raises(UserError, match="has no train"):
        load_splits("hf:org/set:en:revision=v1:data_files=hf://x/*.jpg")
    options = dict(name="en", revision="v1", data_files="hf://x/*.jpg")
    assert calls == [(("org/set",), options)]
