"""What a user's folder becomes, and how an image is read."""

import hashlib
import os
import pickle
import struct
import time
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from moco import UserError
from moco.augment import Pixels
from moco.data import CentreCrop, TwoCrops
from moco.sources import Arrays, Unreadable, decode, load_data


def test_digits_are_split_four_to_one_without_overlap():
    digits = load_data("digits")
    assert len(digits.train) == 1437 and len(digits.val) == 360
    assert digits.train.read(0).shape == (3, 16, 16) and digits.train.read(0).dtype == torch.uint8
    assert digits.train.images.min() == 0 and digits.train.images.max() > 250


def test_class_folders(image_file, tmp_path):
    for name in ("train/a/1.png", "train/b/deep/2.png", "train/b/3.JPEG", "val/b/4.png"):
        image_file(name)
    (tmp_path / "train" / "b" / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.val), data.classes) == (3, 1, 2)
    assert data.train.labels.tolist() == [0, 1, 1] and data.val.labels.tolist() == [1]
    assert data.bank is data.train


def test_plain_folder_has_no_labels_and_says_so(image_file, tmp_path):
    for name in ("x.png", "some/where/deep/y.png"):
        image_file(name)
    data = load_data(str(tmp_path))
    assert len(data.train) == 2 and data.train.labels is None and data.val is None
    assert "kNN is off" in data.note


def test_folders_with_images_out_of_place_are_refused(image_file, tmp_path):
    for name in ("train/a/x.png", "val/y.png"):
        image_file(name)
    with pytest.raises(UserError, match="val has no class folders, while"):
        load_data(str(tmp_path))
    image_file("train/z.png")
    with pytest.raises(UserError, match="1 images beside them"):
        load_data(str(tmp_path))


def test_folder_without_val_has_no_knn(image_file, tmp_path):
    image_file("train/a/x.png")
    assert "no val/" in load_data(str(tmp_path)).note
    image_file("val/other/y.png")
    with pytest.raises(UserError, match="classes that train lacks: other"):
        load_data(str(tmp_path))


# What cameras and programs write, which is merely unusual.

Y, X = np.mgrid[:40, :60]
PICTURE = np.stack([6 * Y, 4 * X, 2 * (Y + X)], -1).astype(np.uint8)
RAMP = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)


def pixels(path):
    image = decode(str(path))
    assert image.dtype == torch.uint8 and len(image) == 3
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    "name, mode, save",
    [
        ("a.png", "RGB", {}),
        ("gray.png", "L", {}),
        ("black_and_white.png", "1", {}),
        ("alpha.png", "RGBA", {}),
        ("gray_alpha.png", "LA", {}),
        ("palette.png", "P", {}),
        ("clear_colour.png", "P", {"transparency": 3}),
        ("clear_colours.png", "P", {"transparency": bytes(range(0, 256, 2))}),
        ("a.webp", "RGB", {"lossless": True}),
        ("alpha.webp", "RGBA", {"lossless": True, "exact": True}),
        ("a.gif", "P", {}),
        ("animated.gif", "P", {"save_all": True, "append_images": [Image.new("P", (60, 40), 9)]}),
        ("a.tiff", "RGB", {}),
        ("lzw.tiff", "RGB", {"compression": "tiff_lzw"}),
        ("cmyk.tiff", "CMYK", {}),
        ("a.bmp", "RGB", {}),
        ("a.ppm", "RGB", {}),
        ("a.pgm", "L", {}),
        ("png_by_nature.jpg", "RGB", {"format": "PNG"}),
    ],
)
def test_lossless_formats_give_the_pixels_that_were_saved(tmp_path, name, mode, save, recwarn):
    image = Image.fromarray(PICTURE)
    image = image.quantize(128) if mode == "P" else image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(Y.astype(np.uint8)))  # at the top nothing can be seen
    image.save(tmp_path / name, **save)
    recwarn.clear()
    assert np.array_equal(pixels(tmp_path / name), np.asarray(image.convert("RGB")))
    assert all(w.category is DeprecationWarning for w in recwarn)  # torchvision's, of itself


def without_adobe(data):
    """A JPEG's bytes without the marker that says how its colours are meant."""
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def as_ycck(data):
    at = data.index(b"Adobe")
    return data[: at + 11] + b"\x02" + data[at + 12 :]


@pytest.mark.parametrize(
    "mode, save, change",
    [
        ("RGB", {}, None),
        ("RGB", {"subsampling": 0, "quality": 95}, None),
        ("RGB", {"progressive": True}, None),
        ("L", {}, None),
        ("CMYK", {}, None),  # inverted, as Adobe has it
        ("CMYK", {}, without_adobe),
        ("CMYK", {}, as_ycck),
    ],
)
def test_jpegs_are_read_as_pil_reads_them(tmp_path, mode, save, change):
    path = tmp_path / "a.jpg"
    Image.fromarray(PICTURE).convert(mode).save(path, **save)
    if change:
        path.write_bytes(change(path.read_bytes()))
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(pixels(path) - expected).max() <= 2  # two decoders
    if mode != "L" and not change:
        assert np.abs(pixels(path) - PICTURE.astype(int)).mean() < 6


UPRIGHT = {  # EXIF's orientation: what undoes it
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_come_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture, ramp = Image.fromarray(PICTURE), Image.fromarray(RAMP)
    gray = picture.convert("L")
    for name, image in (
        ("a.jpg", picture), ("a.png", picture), ("16.png", ramp),
        ("a.webp", picture), ("a.tif", picture), ("gray.tif", gray), ("16.tif", ramp),
    ):  # fmt: skip
        image.save(tmp_path / name)
        lying = pixels(tmp_path / name)
        image.save(tmp_path / name, exif=exif)
        assert np.array_equal(pixels(tmp_path / name), UPRIGHT[orientation](lying)), name


def png_of_16_bits(colours):
    """[h, w, 1, 2, 3 or 4] uint16 → the bytes of a PNG, which PIL can't write."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width, channels = colours.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_a_colour_keep_their_range(tmp_path, channels):
    deep = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1], RAMP], -1)[..., :channels]
    (tmp_path / "a.png").write_bytes(png_of_16_bits(deep))
    expected = deep[..., :3] if channels > 2 else deep[..., :1]
    assert np.abs(pixels(tmp_path / "a.png") - expected / 257).max() < 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiffs_keep_their_range(tmp_path, order):
    Image.fromarray(RAMP.astype(f"{order}u2")).save(tmp_path / "a.tiff")
    found = pixels(tmp_path / "a.tiff")
    assert np.abs(found - RAMP[..., None] / 257).max() < 1 and found.max() == 255


@pytest.mark.parametrize("height, width", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_points_and_strips_are_read_and_cropped(image_file, tmp_path, height, width, kind):
    path = image_file(f"images/a.{kind}", height, width)
    assert np.abs(pixels(path) - np.asarray(Image.open(path)).astype(int)).max() <= 2
    source = load_data(str(tmp_path / "images")).train
    crops, _ = TwoCrops(source, (224, 224), 0.08, 0).__getitems__([(0, 0)])
    assert crops.shape == (2, 1, 3, 224, 224)
    began = time.perf_counter()
    assert CentreCrop(source, (224, 224)).__getitems__([0])[0].shape == (1, 3, 224, 224)
    assert time.perf_counter() - began < 1  # not by way of 256 × 768,000 pixels


# Other numbers of channels.

DEEP = np.random.default_rng(0).integers(0, 10_000, (40, 60, 6), dtype=np.uint16)


def channels(path, n, max_value=None):
    """What is read, as [H, W, C]."""
    image = decode(str(path), Pixels(n, max_value=max_value))
    assert image.dtype == torch.uint8 and len(image) == n
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ["pages.tif", "samples.tif", "planes.tif", "deflate.tif", "a.npy"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_multispectral_images_keep_channels_and_range(tmp_path, name, dtype):
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, DEEP.astype(dtype))
    else:
        tifffile = pytest.importorskip("tifffile")
        pages = name in ("pages.tif", "planes.tif")
        tifffile.imwrite(
            path, np.moveaxis(DEEP, 2, 0).astype(dtype) if pages else DEEP.astype(dtype),
            photometric="minisblack", compression="zlib" if name == "deflate.tif" else None,
            planarconfig={"pages.tif": None, "planes.tif": "separate"}.get(name, "contig"),
        )  # fmt: skip
    stored = DEEP.astype(dtype)
    if dtype == np.uint8:
        assert np.array_equal(channels(path, 6), stored)
    elif dtype == np.uint16:
        assert np.array_equal(channels(path, 6), stored // 257)
    else:
        with pytest.raises(Unreadable, match="float32, whose range is unknown: --max-value"):
            channels(path, 6)
    if dtype != np.uint8:
        expected = np.minimum(stored / (5000 / 255), 255)
        assert np.abs(channels(path, 6, max_value=5000) - expected).max() < 1.001
    with pytest.raises(Unreadable, match=r"6 channel\(s\), not --in-chans 4"):
        channels(path, 4)


def test_gray_is_the_luminance_of_colours(tmp_path):
    picture = Image.fromarray(PICTURE)
    expected = np.asarray(picture.convert("L"))[..., None]
    for name, image, tolerance in (
        ("a.png", picture, 0),
        ("alpha.png", picture.convert("RGBA"), 0),
        ("gray.png", picture.convert("L"), 0),
        ("a.jpg", picture.convert("L"), 12),
        ("cmyk.tif", picture.convert("CMYK"), 1),
    ):
        image.save(tmp_path / name)
        error = np.abs(channels(tmp_path / name, 1) - expected.astype(int))
        assert error.max() <= tolerance, name
    np.save(tmp_path / "rgb.npy", PICTURE)
    assert np.array_equal(channels(tmp_path / "rgb.npy", 1), expected)
    np.save(tmp_path / "gray.npy", expected[..., 0])
    assert np.array_equal(channels(tmp_path / "gray.npy", 3), expected.repeat(3, 2))

    digits = load_data("digits", pixels=Pixels(1)).train
    assert torch.equal(digits.read(7), digits.images[7][:1])
    colour = Arrays(torch.from_numpy(PICTURE).permute(2, 0, 1)[None])
    colour.pixels = Pixels(1)
    assert np.abs(colour.read(0)[0].numpy() - expected[..., 0].astype(int)).max() <= 1


def test_four_channels_are_those_of_the_file(tmp_path):
    rgba = np.dstack([PICTURE, Y.astype(np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(channels(tmp_path / "a.png", 4), rgba)


def test_max_value_is_white_in_deep_gray_files(tmp_path):
    twelve_bits = RAMP // 16
    Image.fromarray(twelve_bits).save(tmp_path / "a.png")
    Image.fromarray(twelve_bits).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        for n in (1, 3):
            found = channels(tmp_path / name, n, max_value=4095)
            assert np.abs(found - twelve_bits[..., None] / 4095 * 255).max() < 1.001
            assert found.max() == 255
    (tmp_path / "rgb.png").write_bytes(png_of_16_bits(np.stack([RAMP] * 3, -1)))
    with pytest.raises(Unreadable, match="--max-value can't act"):
        channels(tmp_path / "rgb.png", 3, max_value=4095)


def test_damaged_arrays_and_tiffs_are_found_out(tmp_path, capfd):
    tifffile = pytest.importorskip("tifffile")
    np.save(tmp_path / "whole.npy", DEEP)
    tifffile.imwrite(tmp_path / "whole.tif", DEEP, photometric="minisblack", compression="zlib")
    for kind in ("npy", "tif"):
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        for length in (8, 100, len(whole) // 2, len(whole) - 50):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(Unreadable):
                channels(tmp_path / "cut", 6)
    assert not capfd.readouterr().err  # tifffile logs what it raises
    for array in (np.array({}), np.zeros((2, 3, 4, 5)), np.zeros((0, 5, 6)), np.zeros((6, 9, 9))):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        with pytest.raises(Unreadable):
            channels(tmp_path / "a.npy", 6)
    array = np.full((4, 5, 6), 0.5)
    array[0] = np.nan
    np.save(tmp_path / "a.npy", array)
    assert channels(tmp_path / "a.npy", 6, max_value=1).flatten().tolist() == [0] * 30 + [127] * 90


def test_arrays_are_listed_where_images_have_other_than_three_channels(image_file, tmp_path):
    image_file("a.png")
    np.save(tmp_path / "b.npy", DEEP)
    assert len(load_data(str(tmp_path)).train) == 1
    assert len(load_data(str(tmp_path), pixels=Pixels(6)).train) == 2


# Lists.


def test_a_list_names_paths_below_its_folder_and_labels_after_a_tab(image_file, tmp_path):
    for name in ("b c/x 1.png", "a.png", "d.png"):
        image_file(f"set/{name}")
    (tmp_path / "set" / "link.png").symlink_to(image_file("elsewhere.png"))
    path = tmp_path / "set" / "list.txt"
    path.write_bytes("\ufeffb c/x 1.png\t10\r\n\na.png\t9\n./b c/../link.png\t10 \n".encode())
    data = load_data(str(path))
    assert [os.fsdecode(p) for p in data.train.paths] == ["b c/x 1.png", "a.png", "link.png"]
    assert data.train.labels.tolist() == [1, 0, 1] and data.names == ["9", "10"]
    assert all(data.train.read(i).shape == (3, 40, 60) for i in range(3))
    assert "single list" in data.note and data.val is None
    path.write_text("a.png\nd.png\n")
    assert load_data(str(path)).train.labels is None

    (tmp_path / "set" / "train.txt").write_text("a.png\tcat\nd.png\ta dog\n")
    assert len(load_data(str(tmp_path / "set")).train) == 4  # one of the two files is no data set
    (tmp_path / "set" / "val.txt").write_text("b c/x 1.png\tcat\n")
    data = load_data(str(tmp_path / "set"))
    assert (data.names, data.classes) == (["a dog", "cat"], 2)
    assert data.bank.labels.tolist() == [1, 0] and data.val.labels.tolist() == [1]


@pytest.mark.parametrize(
    "lines, words",
    [
        ("a.png\n/etc/b.png", "line 2: /etc/b.png leads out of the folder of the list"),
        ("a.png\n\n../b.png", "line 3: ../b.png leads out"),
        ("x/../../b.png\t1", "line 1: ../b.png leads out"),
        ("a.png 3", "line 1: a.png 3 is no name of an image .* a label goes after a tab"),
        ("a.png\t1\nb.png", "line 2: either each line has a label, or none has"),
        ("\n \n", "names no images"),
    ],
)
def test_a_line_of_a_list_that_cannot_be_is_named(tmp_path, lines, words):
    path = tmp_path / "list.txt"
    path.write_text(lines)
    with pytest.raises(UserError, match=words):
        load_data(str(path))


def test_class_folders_are_in_the_order_of_the_alphabet(image_file, tmp_path):
    for name in ("a", "a-b", "10", "9"):
        image_file(f"train/{name}/x.png")
    data = load_data(str(tmp_path))
    assert data.names == ["10", "9", "a", "a-b"] and data.train.labels.tolist() == [0, 1, 2, 3]
    assert [os.fsdecode(p) for p in data.train.paths] == [f"{n}/x.png" for n in data.names]
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="train/empty holds no images"):
        load_data(str(tmp_path))


# Hugging Face's data sets.


def saved_set(folder, kind=None, **columns):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    datasets.disable_progress_bars()
    features = kind and datasets.Features(kind(datasets))
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
    return f"hf:{folder}"


def test_rows_are_read_as_files_are(image_file, tmp_path):
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
    assert load_data(where).train.labels is None  # a string may be anything
    data = load_data(where, hf_columns=["image", "label"])
    assert data.names == ["a", "b"] and data.train.labels.tolist() == [1, 0, 1, 1]
    assert "no split to validate" in data.note
    for i in range(2):
        assert torch.equal(data.train.read(i), decode(str(paths[i])))
    gray = load_data(where, pixels=Pixels(1)).train
    assert torch.equal(gray.read(0), decode(str(paths[0]), Pixels(1)))
    for i, words in ((2, "no image of a known format"), (3, "NoneType")):
        with pytest.raises(Unreadable, match=words) as error:
            data.train.read(i)
        assert error.value.path == f"{where} train, row {i}"


def test_labels_that_are_kept_secret_are_none(image_file, tmp_path):
    image = {"bytes": image_file("a.png").read_bytes(), "path": None}
    where = saved_set(
        tmp_path / "set",
        lambda d: {"image": d.Image(), "label": d.ClassLabel(names=["a", "b"])},
        image=[image, image], label=[-1, -1],
    )  # fmt: skip
    assert load_data(where).train.labels is None


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
    data = load_data(name, tmp_path)
    assert torch.equal(data.train.read(1), torch.from_numpy(pixels[1]))
    assert data.val.labels.tolist() == [0, 2, 1] and data.classes == 3


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
    data = load_data("stl10", tmp_path)
    assert (len(data.train), len(data.bank), len(data.val)) == (4, 2, 2)
    assert data.bank.labels.tolist() == [0, 9] and data.val.labels.tolist() == [9, 0]
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
    data = load_data("flowers102", tmp_path)
    assert (len(data.train), len(data.val), data.classes) == (4, 2, 102)
    assert data.bank.labels.tolist() == [2, 1, 0, 2] and data.val.labels.tolist() == [101, 3]
    assert data.train.read(2).shape == (3, 30, 40)  # the first of val: image 2, dark red
    assert data.train.read(2)[0].float().mean() == pytest.approx(40, abs=2)


def test_pets_files(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    _jpegs(folder / "images", ["cat_1", "dog_1", "dog_2"])
    notes = folder / "annotations"
    notes.mkdir()
    (notes / "trainval.txt").write_text("cat_1 1 1 1\ndog_1 37 2 1\n")
    (notes / "test.txt").write_text("dog_2 37 2 1\n")
    data = load_data("pets", tmp_path)
    assert (len(data.train), len(data.val), data.classes) == (2, 1, 37)
    assert data.bank.labels.tolist() == [0, 36] and data.val.labels.tolist() == [36]
    assert data.val.read(0).shape == (3, 30, 40)
