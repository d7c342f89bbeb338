"""The named sets: digits, and the published ones in their own formats, three images large."""

import gzip
import hashlib
import io
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_tar import pack

from engine.data import named
from engine.data.decode import RGB, PixelFormat
from engine.data.splits import load_splits, open_source
from engine.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)


def open_set(name, root, pixel_format=RGB):
    return open_source(name, pixel_format, str(root))


def write(path, content):
    """→ its checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def write_jpegs(folder, names):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(folder / f"{name}.jpg")


def test_digits_are_split_four_to_one_without_overlap():
    splits = load_splits(open_source("digits"))
    assert len(splits.train) == 1437 and len(splits.val) == 360
    assert splits.train.images.shape[1:] == (3, 16, 16) and splits.train.images.max() > 250
    assert splits.class_names == list("0123456789")
    gray = open_source("digits", PixelFormat(1)).train().dataset
    assert torch.equal(gray.read(7), splits.train.images[7][:1])
    with pytest.raises(UserError, match="digits is of 8-bit RGB: --in-chans 3 or 1"):
        open_source("digits", PixelFormat(4))


@pytest.mark.parametrize("name", ["digits", "imagenet"])
def test_a_named_set_that_may_be_a_folder_is_refused(name, image_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_file(f"{name}/x.png")
    with pytest.raises(
        UserError, match=rf"\./{name} is here: give \./{name}, or start in another folder"
    ):
        open_source(name)
    for path in (f"./{name}", f"{name}/"):
        assert len(open_source(path).train().dataset) == 1
    if name == "imagenet":  # which --data-root . has there
        with pytest.raises(UserError, match=r"no imagenet under --data-root \."):
            open_set(name, ".").train()
    if name == "digits":
        assert open_set(name, "digits").has_val()
        (tmp_path / "digits" / "run.lock").touch()  # of --output-dir digits
        assert open_source(name).has_val()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files(name, tmp_path, monkeypatch):
    pixels, key = PIXELS[..., :32, :32], "labels" if name == "cifar10" else "fine_labels"
    batch = pickle.dumps({"data": pixels.reshape(3, -1), key: [0, 2, 1]})
    kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    folder = tmp_path / kind.base_folder
    meta = write(folder / "meta", pickle.dumps({kind.meta["key"]: ["a", "b", "c"]}))
    monkeypatch.setattr(kind, "train_list", [["train", write(folder / "train", batch)]])
    monkeypatch.setattr(kind, "test_list", [["test", write(folder / "test", batch)]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": "meta", "md5": meta})
    splits = load_splits(open_set(name, tmp_path))
    assert torch.equal(splits.train.read(1), torch.from_numpy(pixels[1]))
    assert splits.val.labels.tolist() == [0, 2, 1] and splits.class_names == ["a", "b", "c"]


def test_stl10_trains_on_the_unlabelled_images_too(tmp_path, monkeypatch):
    kind = torchvision.datasets.STL10
    files = dict(train_X=PIXELS[:2].tobytes(), train_y=b"\1\n", unlabeled_X=PIXELS[:2].tobytes())
    files |= dict(test_X=PIXELS[:2].tobytes(), test_y=b"\n\1")
    sums = [[f"{n}.bin", write(tmp_path / kind.base_folder / f"{n}.bin", files[n])] for n in files]
    write(tmp_path / kind.base_folder / "class_names.txt", "\n".join("abcdefghij").encode())
    monkeypatch.setattr(kind, "train_list", sums[:3])
    monkeypatch.setattr(kind, "test_list", sums[3:])
    source = open_set("stl10", tmp_path)
    splits, train = load_splits(source), source.train()
    assert (len(train.dataset), len(splits.train), len(splits.val)) == (4, 2, 2)
    assert splits.train.labels.tolist() == [0, 9] and splits.val.labels.tolist() == [9, 0]
    assert train.dataset.labels is train.class_names is None
    assert splits.class_names == list("abcdefghij")
    # On disk an image lies column by column.
    assert torch.equal(train.dataset.read(3), torch.from_numpy(PIXELS[1]).mT)


def test_flowers102_trains_on_train_and_val(tmp_path, monkeypatch):
    from scipy.io import savemat

    kind, folder = torchvision.datasets.Flowers102, tmp_path / "flowers-102"
    write_jpegs(folder / "jpg", [f"image_{n:05}" for n in range(1, 7)])
    savemat(folder / "imagelabels.mat", {"labels": [[3, 1, 102, 2, 3, 4]]})
    savemat(folder / "setid.mat", {"trnid": [[1, 4]], "valid": [[2, 5]], "tstid": [[3, 6]]})
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    for key in ("label", "setid"):
        path = folder / kind._file_dict[key][0]
        files = kind._file_dict | {key: (path.name, hashlib.md5(path.read_bytes()).hexdigest())}
        monkeypatch.setattr(kind, "_file_dict", files)
    splits = load_splits(open_set("flowers102", tmp_path))
    assert (len(splits.train), len(splits.val), splits.num_classes) == (4, 2, 102)
    assert splits.class_names[2] in ("canterbury bells", "2")
    assert splits.train.labels.tolist() == [2, 1, 0, 2] and splits.val.labels.tolist() == [101, 3]
    assert splits.train.read(2).shape == (3, 30, 40)  # the first of val: image 2, dark red
    assert splits.train.read(2)[0].float().mean() == pytest.approx(40, abs=2)


def test_pets_files(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    write_jpegs(folder / "images", ["cat_1", "dog_1", "dog_2", "cat_2"])
    write(folder / "annotations" / "trainval.txt", b"cat_1 1 1 1\ndog_1 2 2 1\n")
    write(folder / "annotations" / "test.txt", b"dog_2 2 2 1\ncat_2 1 1 1\n")
    splits = load_splits(open_set("pets", tmp_path))
    assert splits.train.labels.tolist() == [0, 1] and splits.val.labels.tolist() == [1, 0]
    assert splits.class_names == ["Cat", "Dog"] and splits.val.read(0).shape == (3, 30, 40)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("place", ["raw", "files themselves"])
def test_mnist_files(name, place, tmp_path, monkeypatch):
    kind = torchvision.datasets.MNIST if name == "mnist" else torchvision.datasets.FashionMNIST
    pixels, sums = PIXELS[:, 0, :28, :28], []
    for file, _ in kind.resources:
        header = [2051, 3, 28, 28] if "images" in file else [2049, 3]
        content = pixels.tobytes() if "images" in file else bytes([1, 9, 0])
        content = gzip.compress(np.array(header, ">i4").tobytes() + content)
        folder = tmp_path / kind.__name__ / "raw" if place == "raw" else tmp_path
        # Those who package the files themselves compress them anew.
        sums.append((file, write(folder / file, content) if place == "raw" else "0" * 32))
        write(folder / file, content)
    monkeypatch.setattr(kind, "resources", sums)
    with pytest.raises(UserError, match=f"are not those of {name}"):
        open_set(name, tmp_path).train()  # but of a set whose files have the same names
    monkeypatch.setattr(named, "FIRST_LABELS", {name: [1, 9, 0]})
    splits = load_splits(open_set(name, tmp_path))
    assert splits.train.labels.tolist() == splits.val.labels.tolist() == [1, 9, 0]
    assert splits.num_classes == 10 and len(os.listdir(tmp_path)) == (1 if place == "raw" else 4)
    gray = open_set(name, tmp_path, PixelFormat(1)).train().dataset
    for i in range(3):
        assert torch.equal(gray.read(i), torch.from_numpy(pixels[i : i + 1]))
        assert torch.equal(splits.train.read(i), gray.read(i).expand(3, -1, -1))


def test_imagenette_is_named_by_wordnet(tmp_path):
    wnids = ["n01440764", "n02102040"]
    for split, count in (("train", 3), ("val", 2)):
        for wnid in wnids:
            write_jpegs(tmp_path / "imagenette2" / split / wnid, map(str, range(count)))
    for path in tmp_path.rglob("*.jpg"):
        path.rename(path.with_suffix(".JPEG"))
    splits = load_splits(open_set("imagenette", tmp_path))
    assert splits.class_names == wnids and splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(splits.val) == 4 and splits.val.read(3).shape == (3, 30, 40)


def test_imagenet_is_unpacked_from_its_own_archives(tmp_path, monkeypatch):
    imagenet, root = torchvision.datasets.imagenet, tmp_path / "imagenet"
    wnids, file = ["n01440764", "n01443537"], io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "JPEG")
    image = file.getvalue()
    classes = {f"{n}.tar": pack({f"{n}_{i}.JPEG": image for i in range(2)}) for n in wnids}
    val = pack({f"{i}.JPEG": image for i in range(3)})
    sums = {"train": ("train.tar", write(root / "train.tar", pack(classes)))}
    sums |= {"val": ("val.tar", write(root / "val.tar", val))}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", imagenet.ARCHIVE_META | sums)
    with pytest.raises(UserError, match=r"no imagenet under .*ILSVRC2012_devkit_t12"):
        open_set("imagenet", tmp_path).val()
    names = {wnid: (f"the name of {wnid}",) for wnid in wnids}
    torch.save((names, [wnids[1], wnids[0], wnids[1]]), root / "meta.bin")
    monkeypatch.setattr(named, "NUM_IMAGENET", {"train": 4, "val": 3})
    assert len(open_set("imagenet", tmp_path).val_or_all().dataset) == 3
    assert not (root / "train").exists()
    splits = load_splits(open_set("imagenet", tmp_path))
    assert splits.class_names == wnids and splits.train.labels.tolist() == [0, 0, 1, 1]
    assert splits.val.labels.tolist() == [0, 1, 1] and splits.val.read(0).shape == (3, 6, 8)
    (root / "train" / wnids[0] / f"{wnids[0]}_1.JPEG").unlink()
    with pytest.raises(UserError, match="train is not whole: delete it"):
        open_set("imagenet", tmp_path).train()
