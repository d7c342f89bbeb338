"""An image file becomes the picture that a careful viewer shows, or one line of refusal."""

import io
import itertools
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest
import tifffile
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from torch.utils.data import DataLoader

from engine.decode import MAX_PIXELS, PixelFormat, UnreadableImage, collect_warnings, decode_image

Y, X = np.mgrid[:40, :60]
PICTURE = np.stack([6 * Y, 4 * X, 2 * (Y + X)], -1).astype(np.uint8)
GRAY = PICTURE[..., 0]
GRAY_AS_RGB = np.stack([GRAY] * 3, -1)
RAMP = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
SIX_CHANNELS = np.random.default_rng(0).integers(0, 10_000, (40, 60, 6), dtype=np.uint16)


def decode(data, in_chans=3, **options):
    """A file's path or its bytes → [H, W, C]."""
    path, data = ("memory", data) if isinstance(data, bytes) else (str(data), None)
    image = decode_image(path, PixelFormat(in_chans, **options), data)
    assert image.dtype == torch.uint8 and len(image) == in_chans
    return image.permute(1, 2, 0).numpy()


def reason(data, *args, **options):
    with pytest.raises(UnreadableImage) as error:
        decode(data, *args, **options)
    return error.value.reason


def encoded(image, kind, **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def assert_equal(image, expected, tolerance=0):
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= tolerance


# What cameras and programs write.


@pytest.mark.parametrize(
    "name, mode, save",
    [
        ("a.png", "RGB", {}),
        ("gray.png", "L", {}),
        ("black_and_white.png", "1", {}),
        ("alpha.png", "RGBA", {}),
        ("gray_alpha.png", "LA", {}),
        ("palette.png", "P", {}),
        ("clear_color.png", "P", {"transparency": 3}),
        ("clear_colors.png", "P", {"transparency": bytes(range(0, 256, 2))}),
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
        ("a.jp2", "RGB", {"irreversible": False}),
        ("png_by_nature.jpg", "RGB", {"format": "PNG"}),
    ],
)
@pytest.mark.parametrize("max_value", [None, 1, 65535])
def test_lossless_8_bit_files_give_the_pixels_that_were_saved(
    tmp_path, name, mode, save, max_value, capfd, recwarn
):
    image = Image.fromarray(PICTURE)
    image = image.quantize(128) if mode == "P" else image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(Y.astype(np.uint8)))  # the top is transparent
    image.save(tmp_path / name, **save)
    recwarn.clear()
    with collect_warnings() as warned:
        found = decode(tmp_path / name, max_value=max_value)
    assert_equal(found, np.asarray(image.convert("RGB")))
    assert not warned and capfd.readouterr() == ("", "")
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
def test_jpegs_are_read_as_pil_reads_them(mode, save, change):
    data = encoded(Image.fromarray(PICTURE).convert(mode), "JPEG", **save)
    if change:
        data = change(data)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert_equal(decode(data), expected, tolerance=2)  # two decoders
    if mode != "L" and not change:
        assert np.abs(decode(data) - PICTURE.astype(int)).mean() < 6


@pytest.mark.parametrize("mode", ["La", "LAB"])
def test_modes_that_pil_converts_in_two_steps(mode):
    if mode == "La":
        expected = GRAY_AS_RGB.copy()
        expected[:20] = 0
        pair = np.dstack([expected[..., 0], 255 * (Y >= 20).astype(np.uint8)])
        data = tiff(pair, photometric="minisblack", extrasamples=["assocalpha"])
        assert_equal(decode(data), expected)
        assert_equal(decode(data, 1), expected[..., :1])
    else:
        lab = np.zeros((40, 60, 3), np.uint8)
        lab[..., 0] = GRAY  # a = b = 0
        data = encoded(Image.frombytes("LAB", (60, 40), lab.tobytes()), "TIFF")
        lightness = (GRAY / 2.55 + 16) / 116
        linear = np.where(lightness > 6 / 29, lightness**3, (lightness - 4 / 29) * 108 / 841)
        srgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
        expected = np.round(255 * srgb)[..., None]
        assert_equal(decode(data), expected.repeat(3, -1), tolerance=2)
        assert_equal(decode(data, 1), expected, tolerance=2)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_points_and_strips_are_read(height, width, kind):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = encoded(array, kind)
    assert_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))), tolerance=2)
    if kind == "TIFF":
        deep = tiff(array.astype(np.uint16) * 257, photometric="rgb")
        assert_equal(decode(deep, max_value=65535), array)


# The right way up.

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
def test_photographs_come_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(PICTURE)
    for kind, image in (
        ("JPEG", picture),
        ("PNG", picture),
        ("PNG", Image.fromarray(RAMP)),
        ("WEBP", picture),
        ("TIFF", picture),
        ("TIFF", picture.convert("L")),
        ("TIFF", Image.fromarray(RAMP)),
    ):
        stored = decode(encoded(image, kind))
        assert_equal(decode(encoded(image, kind, exif=exif)), UPRIGHT[orientation](stored))
    for array, options in ((PICTURE.astype(np.uint16) * 257, {"max_value": 65535}), (PICTURE, {})):
        data = tiff(array, photometric="rgb", extratags=[(0x0112, 3, 1, orientation, True)])
        assert_equal(decode(data, **options), UPRIGHT[orientation](PICTURE))
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    data = tiff(SIX_CHANNELS, extratags=[(0x0112, 3, 1, orientation, True)], **options)
    assert_equal(decode(data, 6), UPRIGHT[orientation](SIX_CHANNELS // 257))


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"


def exif_segment(orientation, kind=3, order="<"):
    """kind: the tag's type; 1, 3 and 4 are unsigned of 1, 2 and 4 bytes, 6, 8 and 9 signed."""
    integer = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}[kind]
    value = struct.pack(order + integer, orientation).ljust(4, b"\0")
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    tags = struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1)
    return b"Exif\0\0" + magic + tags + value + bytes(4)


def with_segments(jpeg, *contents):
    segments = [b"\xff\xe1" + struct.pack(">H", len(c) + 2) + c for c in contents]
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [1, 3, 4, 6, 8, 9])
@pytest.mark.parametrize("before", [(), (XMP,), (XMP, b"something else")])
def test_orientation_is_found_behind_xmp_and_in_any_integer_type(before, kind, order):
    jpeg = encoded(PICTURE, "JPEG")
    turned = with_segments(jpeg, *before, exif_segment(6, kind, order))
    assert_equal(decode(turned), UPRIGHT[6](decode(jpeg)))


def test_without_exif_xmp_tells_the_orientation():
    jpeg, xmp = encoded(PICTURE, "JPEG"), XMP.replace(b"/>", b' tiff:Orientation="8"/>')
    assert_equal(decode(with_segments(jpeg, xmp)), UPRIGHT[8](decode(jpeg)))
    both = with_segments(jpeg, xmp, exif_segment(3))
    assert_equal(decode(both), UPRIGHT[3](decode(jpeg)))


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_broken_exif_leaves_an_image_unturned():
    jpeg, png = encoded(PICTURE, "JPEG"), encoded(PICTURE, "PNG")
    for exif in (b"Lorem ipsum", b"II*\0", b"", exif_segment(6)[6:20], exif_segment(99)[6:]):
        assert_equal(decode(with_segments(jpeg, b"Exif\0\0" + exif)), decode(jpeg))
        assert_equal(decode(png[:33] + png_chunk(b"eXIf", exif) + png[33:]), PICTURE)
        assert_equal(decode(encoded(PICTURE, "WEBP", lossless=True, exif=exif)), PICTURE)


# More than 8 bits.


def png_of_16_bits(colors):
    """[h, w, 1, 2, 3 or 4] uint16 → the bytes of a PNG, which PIL can't write."""
    height, width, channels = colors.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in colors)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_a_color_keep_their_range(channels):
    deep = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1], RAMP], -1)[..., :channels]
    expected = deep[..., :3] if channels > 2 else deep[..., :1].repeat(3, -1)
    assert_equal(decode(png_of_16_bits(deep)), expected / 257, tolerance=1)


def test_max_value_is_white_in_deep_gray_files():
    twelve_bits = RAMP // 16
    for kind, in_chans in itertools.product(("PNG", "TIFF", "PPM"), (1, 3)):
        found = decode(encoded(twelve_bits, kind), in_chans, max_value=4095)
        assert_equal(found, (twelve_bits / 4095 * 255)[..., None].repeat(in_chans, 2), 1)
        assert found.max() == 255


def test_where_max_value_cannot_act_it_says_so():
    words = "--max-value can't act"
    assert words in reason(png_of_16_bits(np.stack([RAMP] * 3, -1)), max_value=4095)
    pgm = b"P5 60 40 4095\n" + (RAMP // 16).astype(">u2").tobytes()  # PIL scales by its 4095
    assert words in reason(pgm, max_value=4095)
    assert_equal(decode(pgm), (RAMP / 257)[..., None].repeat(3, -1), tolerance=1.1)
    assert words not in reason(pgm[:100])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("planar", [False, True])
def test_deep_tiffs_of_any_layout_keep_their_range(order, bigtiff, planar):
    layout = {"byteorder": order, "bigtiff": bigtiff}
    deep = PICTURE.astype(np.uint16) * 257
    planes = np.moveaxis(deep, 2, 0) if planar else deep
    colors = {"photometric": "rgb", "planarconfig": "separate" if planar else "contig", **layout}
    for max_value in (None, 65535):
        assert_equal(decode(tiff(planes, **colors), max_value=max_value), PICTURE, 1)
        white = tiff(65535 - deep[..., 0], photometric="miniswhite", **layout)
        assert_equal(decode(white, max_value=max_value), GRAY_AS_RGB, 1)
        black = tiff(deep[..., 0], photometric="minisblack", compression="zlib", **layout)
        assert_equal(decode(black, max_value=max_value), GRAY_AS_RGB, 1)
    floats = tiff((planes / 65535).astype(np.float32), **colors)
    assert_equal(decode(floats, max_value=1), PICTURE, 1)
    half = decode(tiff(planes // 2, **colors), max_value=32767)
    assert_equal(half, PICTURE, 1)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "float32", "float64"])
def test_types_whose_range_is_unknown_need_max_value(dtype):
    array = (GRAY // 2).astype(dtype)
    file = io.BytesIO()
    np.save(file, array)
    for data in (tiff(array, photometric="minisblack"), file.getvalue()):
        assert f"pixels are {dtype}, whose range is unknown: --max-value" in reason(data)
        assert_equal(decode(data, max_value=127.5), GRAY_AS_RGB // 2 * 2, tolerance=1)


def test_palettes_of_8_and_of_16_bits():
    index = ((X + Y) % 256).astype(np.uint8)
    ramp = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2]).astype(np.uint16)
    expected = np.moveaxis(ramp[:, index], 0, -1)
    for scale, max_value in itertools.product((1, 256, 257), (None, 1, 65535)):
        data = tiff(index, photometric="palette", colormap=ramp * scale)
        assert_equal(decode(data, max_value=max_value), expected)


def test_premultiplied_colors_are_divided_by_their_alpha():
    alpha = (X * 3 + 70).astype(np.float32)[..., None]
    for white in (255, 65535):
        colors = PICTURE * (alpha / 255) * (white / 255)
        rgba = np.concatenate([colors, alpha * (white / 255)], -1).round()
        rgba = rgba.astype(np.uint8 if white == 255 else np.uint16)
        for planar in (False, True):
            data = tiff(
                np.moveaxis(rgba, 2, 0) if planar else rgba,
                photometric="rgb",
                planarconfig="separate" if planar else "contig",
                extrasamples=["assocalpha"],
            )
            assert_equal(decode(data), PICTURE, tolerance=4)


# Other numbers of channels.


@pytest.mark.parametrize("name", ["pages.tif", "samples.tif", "planes.tif", "deflate.tif", "a.npy"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_multispectral_images_keep_channels_and_range(tmp_path, name, dtype):
    path, stored = tmp_path / name, SIX_CHANNELS.astype(dtype)
    if name == "a.npy":
        np.save(path, stored)
    else:
        tifffile.imwrite(
            path,
            np.moveaxis(stored, 2, 0) if name in ("pages.tif", "planes.tif") else stored,
            photometric="minisblack",
            compression="zlib" if name == "deflate.tif" else None,
            planarconfig={"pages.tif": None, "planes.tif": "separate"}.get(name, "contig"),
        )
    if dtype == np.uint8:
        assert_equal(decode(path, 6), stored)
        assert_equal(decode(path, 6, max_value=5000), stored)
    else:
        if dtype == np.uint16:
            assert_equal(decode(path, 6), stored // 257)
        else:
            assert "float32, whose range is unknown: --max-value" in reason(path, 6)
        expected = np.minimum(stored / (5000 / 255), 255)
        assert_equal(decode(path, 6, max_value=5000), expected, tolerance=1.001)
    assert "6 channel(s), not --in-chans 4" in reason(path, 4)


def test_gray_is_the_luminance_of_colors(tmp_path):
    picture = Image.fromarray(PICTURE)
    expected = np.asarray(picture.convert("L"))[..., None]
    for kind, image, tolerance in (
        ("PNG", picture, 0),
        ("PNG", picture.convert("RGBA"), 0),
        ("PNG", picture.convert("L"), 0),
        ("JPEG", picture.convert("L"), 12),
        ("TIFF", picture.convert("CMYK"), 1),
    ):
        assert_equal(decode(encoded(image, kind), 1), expected, tolerance)
    np.save(tmp_path / "rgb.npy", PICTURE)
    assert_equal(decode(tmp_path / "rgb.npy", 1), expected)
    np.save(tmp_path / "gray.npy", expected[..., 0])
    assert_equal(decode(tmp_path / "gray.npy", 3), expected.repeat(3, 2))


def test_four_channels_are_those_of_the_file():
    rgba = np.dstack([PICTURE, Y.astype(np.uint8)])
    assert_equal(decode(encoded(rgba, "PNG"), 4), rgba)
    assert_equal(decode(encoded(rgba, "TIFF"), 4), rgba)
    cmyk = Image.fromarray(PICTURE).convert("CMYK")
    for kind in ("TIFF", "JPEG"):  # they aren't red, green, blue and alpha
        assert reason(encoded(cmyk, kind), 4)


def test_of_several_pages_the_first_is_read_with_and_without_max_value():
    pages = np.stack([GRAY, 255 - GRAY, GRAY])
    for max_value in (None, 65535):
        data = tiff(pages, photometric="minisblack")
        assert_equal(decode(data, max_value=max_value), GRAY_AS_RGB)
        data = tiff(pages.astype(np.uint16) * 257, photometric="minisblack")
        assert_equal(decode(data, max_value=max_value), GRAY_AS_RGB)


# What is refused, by name.


def tiff_by_hand(pixels, bits, samples=1, photometric=1, compression=1):
    """A TIFF of 60 x 40 pixels with these bytes; photometric None: without that tag."""
    bits_per_sample = struct.pack(f"<{samples}H", *[bits] * samples).ljust(4, b"\0")
    shorts = {256: 60, 257: 40, 259: compression, 262: photometric, 273: 300, 277: samples}
    shorts = {
        tag: struct.pack("<HI", 3, 1) + struct.pack("<I", v) for tag, v in shorts.items() if v
    }
    if samples > 2:
        bits_per_sample = struct.pack("<I", 290)
    shorts[258] = struct.pack("<HI", 3, samples) + bits_per_sample
    shorts[279] = struct.pack("<HII", 4, 1, len(pixels))
    directory = b"".join(struct.pack("<H", tag) + shorts[tag] for tag in sorted(shorts))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(shorts)) + directory + bytes(4)
    return head.ljust(290, b"\0") + struct.pack("<5H", *[bits] * 5) + pixels


HAS_IMAGECODECS = tifffile.tifffile.imagecodecs.__name__ == "imagecodecs"


def test_12_bits_are_read_or_the_codec_is_named():
    values = (RAMP // 16).ravel().astype(int)
    pairs = (values[::2] << 12) | values[1::2]  # two in three bytes
    packed = b"".join(int(pair).to_bytes(3, "big") for pair in pairs)
    data = tiff_by_hand(packed, bits=12)
    if HAS_IMAGECODECS:
        assert_equal(decode(data), (RAMP / 257)[..., None].repeat(3, -1), tolerance=1.1)
    else:
        assert reason(data) == "a TIFF of 12-bit NONE compression: pip install imagecodecs"


def test_lzw_is_read_or_the_codec_is_named():
    image = Image.fromarray(RAMP)
    options = {"save_all": True, "append_images": [image], "compression": "tiff_lzw"}
    data, expected = encoded(image, "TIFF", **options), (RAMP / 257)[..., None]
    assert_equal(decode(data), expected.repeat(3, -1), tolerance=1)
    if HAS_IMAGECODECS:
        assert_equal(decode(data, 2), expected.repeat(2, -1), tolerance=1)
    else:
        assert reason(data, 2) == "a TIFF of 16-bit LZW compression: pip install imagecodecs"


@pytest.mark.parametrize(
    "data, words",
    [
        (tiff_by_hand(bytes(14400), 16, 3, photometric=6), "16-bit YCBCR pixels: convert it"),
        (tiff_by_hand(bytes(2400), 8, photometric=32803), "8-bit CFA pixels: convert it"),
        (tiff_by_hand(bytes(7200), 8, 3, photometric=9), "8-bit ICCLAB pixels: convert it"),
        (tiff_by_hand(bytes(4800), 16, photometric=3), "16-bit PALETTE pixels: convert it"),
        (tiff_by_hand(bytes(2400), 8, photometric=None), "8-bit unknown pixels: convert it"),
        (tiff_by_hand(bytes(12000), 8, 5), "it has 5 channel(s), not --in-chans 3"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "of the kind heic (HEIF or a video): convert it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a damaged or unsupported PNG file: broken PNG file"),
        (b"GIF89a" + bytes(100), "a damaged or unsupported GIF file: "),
        (b"P5 60 40 70000\n" + bytes(2400), "maxval must be greater than 0 and less than 65536"),
        (b"<html>404 not found</html>" * 20, "no image of a known format"),
        (np.random.default_rng(1).bytes(1000), "no image of a known format"),
        (b"", "no image of a known format"),
        (b"II", "no image of a known format"),
    ],
)
def test_a_format_that_is_known_is_named(data, words):
    assert words in reason(data)


def test_a_jpeg_of_12_bits_is_named():
    jpeg = bytearray(encoded(PICTURE, "JPEG"))
    jpeg[jpeg.index(b"\xff\xc0") + 4] = 12
    assert reason(bytes(jpeg)) == "a JPEG of 12 bits a channel: convert it to PNG or TIFF"


def test_damaged_arrays_and_tiffs_are_found_out(tmp_path, capfd):
    np.save(tmp_path / "whole.npy", SIX_CHANNELS)
    whole_tiff = tiff(SIX_CHANNELS, photometric="minisblack", compression="zlib")
    for whole in ((tmp_path / "whole.npy").read_bytes(), whole_tiff):
        for length in (8, 100, len(whole) // 2, len(whole) - 50):
            assert reason(whole[:length], 6)
    assert capfd.readouterr() == ("", "")
    for array in (np.array({}), np.zeros((2, 3, 4, 5)), np.zeros((0, 5, 6)), np.zeros((6, 9, 9))):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        assert reason(tmp_path / "a.npy", 6)
    array = np.full((4, 5, 6), 0.5)
    array[0] = np.nan
    np.save(tmp_path / "a.npy", array)
    found = decode(tmp_path / "a.npy", 6, max_value=1)
    assert found.flatten().tolist() == [0] * 30 + [127] * 90


# Sizes are checked before anything is unpacked.


def zeros_png(height, width):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (width + 1)), 1)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def test_max_pixels_is_the_largest_image_of_any_format():
    data = [encoded(PICTURE, kind) for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")]
    data.append(tiff(PICTURE.astype(np.uint16) * 257, photometric="rgb"))
    file = io.BytesIO()
    np.save(file, PICTURE)
    for image in [*data, file.getvalue()]:
        assert decode(image, max_pixels=2400).shape == (40, 60, 3)
        assert reason(image, max_pixels=2399) == "60 x 40 pixels exceed --max-pixels 2399"
    assert 102e6 < MAX_PIXELS < 150e6  # a medium-format camera's, and not much more


def test_max_pixels_may_exceed_pils_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encoded(PICTURE, "PNG")
    assert reason(data, max_pixels=2000) == "60 x 40 pixels exceed --max-pixels 2000"
    assert_equal(decode(data), PICTURE)


def test_what_is_too_large_takes_no_memory():
    """Of a PNG of 13,300 x 13,300 pixels, and 300 pages for six channels."""
    stack = tiff(
        np.zeros((300, 1200, 1000), np.uint8), photometric="minisblack", compression="zlib"
    )
    png = zeros_png(13_300, 13_300)
    tracemalloc.start()
    try:
        assert "13300 x 13300 pixels exceed --max-pixels" in reason(png)
        assert "it has 300 channel(s), not --in-chans 6" in reason(stack, 6)
        assert decode(stack).shape == (1200, 1000, 3)  # its first page
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


# The terminal shows our lines alone.

FLAWED = encoded(PICTURE, "JPEG")[:-2] + bytes(20) + b"\xff\xd9"


def test_what_a_decoder_prints_goes_to_a_dict_with_the_name_of_the_file(tmp_path, capfd):
    cut_exif = with_segments(encoded(PICTURE, "JPEG"), XMP)
    (tmp_path / "a\nb.jpg").write_bytes(FLAWED)
    webp = encoded(PICTURE, "WEBP", lossless=True, exif=b"Lorem ipsum")
    with collect_warnings() as warned:
        decode(cut_exif)
        decode(tmp_path / "a\nb.jpg")
        decode_image("b.webp", data=webp)
        decode_image("b.webp", data=webp)
        reason(FLAWED[:200])
    decode(FLAWED)
    assert list(warned) == [f"{tmp_path}/a\\nb.jpg", "b.webp"]
    assert "extraneous bytes before marker" in warned[f"{tmp_path}/a\\nb.jpg"]
    assert "broken EXIF" in warned["b.webp"]
    assert capfd.readouterr() == ("", "")


def run_with_capture(code, redirection=""):
    """Runs code that has captured_stderr → its stdout, its stderr."""
    code = "import os, sys\nfrom engine.capture import captured_stderr\n" + code
    command = f"exec '{sys.executable}' -c \"$0\" {redirection}"
    done = subprocess.run(["sh", "-c", command, code], capture_output=True, cwd=ROOT, text=True)
    return done.stdout, done.stderr


def test_our_own_lines_reach_the_terminal_meanwhile():
    code = """
with captured_stderr() as read_lines:
    print("ours", file=sys.stderr)
    os.write(sys.stderr.fileno(), b"a signal handler's\\n")
    os.write(2, b"a library's\\nand more\\n")
    print(read_lines(), read_lines())
    os.write(2, b"unread\\n")
os.write(2, b"later\\n")
"""
    expected = "[\"a library's\", 'and more'] []\n", "ours\na signal handler's\nlater\n"
    assert run_with_capture(code) == expected


def test_a_flood_of_messages_does_not_block():
    code = """
os.set_blocking(2, True)
with captured_stderr() as read_lines:
    for _ in range(100_000):
        try:
            os.write(2, b"Corrupt JPEG data\\n")
        except BlockingIOError:
            pass
    print(len(read_lines()) > 1000, read_lines())
"""
    assert run_with_capture(code) == ("True []\n", "")


def test_stderr_may_be_closed():
    code = "with captured_stderr() as read_lines: print(read_lines())"
    assert run_with_capture(code, "2>&-") == ("[]\n", "")


class FlawedImages(torch.utils.data.Dataset):
    def __getitems__(self, indices):
        sound = encoded(PICTURE, "JPEG")
        with collect_warnings() as warned:
            for i in indices:
                decode_image(str(i), data=FLAWED if i % 3 == 0 else sound)
        return warned

    def __len__(self):
        return 48


def test_each_worker_names_its_own_images(capfd):
    def as_is(batch):
        return batch

    with collect_warnings() as outer:  # the pipe of this process is not that of its children
        loader = DataLoader(FlawedImages(), 4, num_workers=2, collate_fn=as_is)
        names = [name for warned in loader for name in warned]
    assert names == [str(i) for i in range(0, 48, 3)] and not outer
    assert capfd.readouterr() == ("", "")


# All of Pillow's own test images, sound and broken, of every format that it knows.


@pytest.fixture(scope="session")
def pillow_images(tmp_path_factory):
    """Paths; PILLOW_SOURCE names an unpacked source distribution, else it is downloaded."""
    if "PILLOW_SOURCE" in os.environ:
        root = Path(os.environ["PILLOW_SOURCE"])
    else:
        root = tmp_path_factory.mktemp("pillow")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", root]
        download += ["--no-binary", ":all:", f"pillow=={PIL.__version__}"]
        try:
            subprocess.run(download, check=True, capture_output=True, timeout=120)
        except (subprocess.SubprocessError, OSError):
            pytest.skip("Pillow's source distribution can't be downloaded: set PILLOW_SOURCE")
        with tarfile.open(next(root.glob("*.tar.gz"))) as archive:
            archive.extractall(root, filter="data")
    paths = [path for path in sorted(root.glob("**/Tests/images/**/*")) if path.is_file()]
    assert len(paths) > 900
    return paths


@pytest.mark.slow
@pytest.mark.parametrize(
    "pixel_format", [PixelFormat(), PixelFormat(1, max_value=4095), PixelFormat(6)]
)
def test_pillows_images_are_read_or_refused_in_silence(pillow_images, pixel_format, capfd):
    num_read = 0
    for path in pillow_images:
        try:
            image = decode_image(str(path), pixel_format)
        except UnreadableImage as error:
            assert error.reason and str(path) not in error.reason
            continue
        num_read += 1
        assert image.dtype == torch.uint8 and len(image) == pixel_format.in_chans
    assert capfd.readouterr() == ("", "")
    assert num_read > 780 or pixel_format.in_chans == 6


def as_rgb(array):
    array = np.asarray(array)
    assert array.dtype in (np.uint8, float)
    if array.ndim == 4:  # an animation
        array = array[0]
    array = array.reshape(*array.shape[:2], -1)
    return array[..., :3] if array.shape[2] > 2 else array[..., :1].repeat(3, -1)


def by_torchvision(decoder, **options):
    def read(data):
        image = decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8), **options)
        return (image if image.ndim == 3 else image[0]).permute(1, 2, 0).numpy()

    return read


def by_tifffile(data):
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        array, bits = page.asarray(), page.bitspersample
        if page.photometric.name == "PALETTE":
            return (page.colormap[:, array] // 257).astype(np.uint8).transpose(1, 2, 0)
        assert page.photometric.name in ("MINISBLACK", "MINISWHITE", "RGB")
        assert page.sampleformat == 1 and page.extrasamples[:1] != (1,) and page.compression != 7
    if page.planarconfig == 2:
        array = array.transpose(1, 2, 0)
    array = array * (255 / (2**bits - 1))
    return 255 - array if page.photometric.name == "MINISWHITE" else array


# Each by another library than ours; without regard to the orientation.
READERS = {
    "JPEG": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
    "PNG": by_torchvision(torchvision.io.decode_png, mode=torchvision.io.ImageReadMode.RGB),
    "WEBP": by_torchvision(torchvision.io.decode_webp, mode=torchvision.io.ImageReadMode.RGB),
    "GIF": by_torchvision(torchvision.io.decode_gif),
    "TIFF": by_tifffile,
}
try:
    import imagecodecs
except ImportError:
    pass
else:
    READERS["AVIF"] = imagecodecs.avif_decode
    READERS["JPEG2000"] = imagecodecs.jpeg2k_decode


@pytest.mark.slow
def test_pillows_images_agree_with_an_independent_reader(pillow_images):
    num_compared, disagreements = Counter(), {}
    for path in pillow_images:
        data = path.read_bytes()
        try:
            found = decode(data)
        except UnreadableImage:
            continue
        image = Image.open(io.BytesIO(data))
        kind = "JPEG" if image.format == "MPO" else image.format
        try:
            expected = as_rgb(READERS[kind](data))
        except Exception:  # it reads fewer formats, or fewer of their variants
            continue
        expected = UPRIGHT[image.getexif().get(0x0112, 1)](expected)
        assert found.shape == expected.shape, path
        error = np.abs(found - expected.astype(float))
        if kind == "GIF":  # transparent pixels have any colour
            error *= np.asarray(image.convert("RGBA"))[..., 3:] > 0
        num_compared[kind] += 1
        if error.max() > 3:
            disagreements[path.name] = error.max()
    assert not disagreements
    assert num_compared.total() > 400
