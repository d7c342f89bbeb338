"""An image file becomes the picture that a careful viewer shows, or one line of refusal."""

import io
import itertools
import logging
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from functools import partial

import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT
from PIL import Image

from engine.data.decode import EXTENSIONS, MAX_PIXELS, PixelFormat, convert_pil_image, decode_image
from engine.data.quiet import quiet_libraries
from engine.errors import first_line

Y, X = np.mgrid[:40, :60]
PICTURE = np.stack([6 * Y, 4 * X, 2 * (Y + X)], -1).astype(np.uint8)
GRAY = PICTURE[..., 0]
GRAY_AS_RGB = np.stack([GRAY] * 3, -1)
DEEP = PICTURE.astype(np.uint16) * 257
RAMP = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
SIX_CHANNELS = np.random.default_rng(0).integers(0, 10_000, (40, 60, 6), dtype=np.uint16)


def decode(data, in_chans=3, high=None, **options):
    """A file's bytes → [H, W, C]; high: --value-range 0 HIGH."""
    if high is not None:
        options["value_range"] = (0, high)
    with quiet_libraries():
        image = decode_image(data, PixelFormat(in_chans, **options))
    assert image.dtype == torch.uint8 and len(image) == in_chans
    return image.permute(1, 2, 0).numpy()


def reason(data, *args, **options):
    with pytest.raises(Exception) as error:
        decode(data, *args, **options)
    return first_line(error.value)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def assert_equal(image, expected, tolerance=0):
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= tolerance


# What cameras and programs write.


ALPHAS = bytes(range(0, 256, 2))  # of the colors of a palette
LOSSLESS = [
    *(("PNG", mode, {}) for mode in ("RGB", "L", "1", "RGBA", "LA", "P")),
    *(("PNG", "P", {"transparency": alpha}) for alpha in (3, ALPHAS)),
    *(("WEBP", mode, {"lossless": True, "exact": True}) for mode in ("RGB", "RGBA")),
    ("GIF", "P", {}),
    ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (60, 40), 9)]}),
    *(("TIFF", mode, {}) for mode in ("RGB", "L", "1", "RGBA", "LA", "P", "CMYK")),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("BMP", "RGB", {}),
]
RESCALED = [  # --value-range is refused
    *(("PPM", mode, {}) for mode in ("RGB", "L", "1")),
    ("JPEG2000", "RGB", {"irreversible": False}),
]
LOSSLESS = [(*file, value) for file in LOSSLESS for value in (None, 1, 65535)]
LOSSLESS += [(*file, None) for file in RESCALED]


@pytest.mark.parametrize("kind, mode, save, high", LOSSLESS)
def test_lossless_8_bit_files_give_the_pixels_that_were_saved(kind, mode, save, high, capfd):
    image = Image.fromarray(PICTURE)
    image = image.quantize(128) if mode == "P" else image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(Y.astype(np.uint8)))  # the top is transparent
    found = decode(encoded(image, kind, **save), high=high)
    assert_equal(found, np.asarray(image.convert("RGB")))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "mode, save",
    [
        ("RGB", {}),
        ("RGB", {"subsampling": 0, "quality": 95}),
        ("RGB", {"progressive": True}),
        ("L", {}),
        ("CMYK", {}),  # inverted, as Adobe has it
    ],
)
def test_jpegs_are_read_as_pil_reads_them(mode, save):
    data = encoded(Image.fromarray(PICTURE).convert(mode), "JPEG", **save)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert_equal(decode(data), expected, tolerance=2)  # two decoders


def test_torchcodec_gives_the_pixels_of_torchvision(monkeypatch):
    decoders = pytest.importorskip("torchcodec.decoders", reason="torchcodec is not installed")
    jpeg, xmp = encoded(PICTURE, "JPEG"), XMP.replace(b"/>", b' tiff:Orientation="8"/>')
    segments = [(), (exif_segment(6),), (XMP, exif_segment(6)), (exif_segment(6, 1),), (xmp,)]
    jpegs = [with_segments(jpeg, *before) for before in segments]
    jpegs += [encoded(PICTURE, "JPEG", progressive=True), encoded(GRAY, "JPEG")]
    jpegs.append(encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"))
    expected = [decode(data, in_chans) for data in jpegs for in_chans in (1, 3)]
    monkeypatch.setattr("engine.data.decode.decode_jpeg", decoders.decode_jpeg)
    monkeypatch.setattr("engine.data.decode.JPEG_MODES", {3: "RGB", 1: "GRAY"})
    found = [decode(data, in_chans) for data in jpegs for in_chans in (1, 3)]
    for image, expected_image in zip(found, expected, strict=True):
        assert_equal(image, expected_image)
    assert reason(jpeg[:300])


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


ORIENTED = [(kind, mode) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for mode in ("RGB", "L")]
ORIENTED += [("PNG", "I;16"), ("TIFF", "I;16")]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind, mode", ORIENTED)
def test_photographs_come_upright(kind, mode, orientation):
    image = Image.fromarray(RAMP) if mode == "I;16" else Image.fromarray(PICTURE).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    expected = UPRIGHT[orientation](decode(encoded(image, kind), high=65535))
    assert_equal(decode(data, high=65535), expected)
    with Image.open(io.BytesIO(data)) as image:  # not loaded yet
        deep = PixelFormat(value_range=(0, 65535))
        found = convert_pil_image(image, deep).permute(1, 2, 0).numpy()
    assert_equal(found, expected, tolerance=2)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_tiffs_come_upright(orientation):
    for array, colors in ((PICTURE, "rgb"), (DEEP, "rgb"), (SIX_CHANNELS, "minisblack")):
        options, in_chans = {"photometric": colors, "planarconfig": "contig"}, array.shape[2]
        data = tiff(array, extratags=[(0x0112, 3, 1, orientation, True)], **options)
        expected = UPRIGHT[orientation](decode(tiff(array, **options), in_chans, 65535))
        assert_equal(decode(data, in_chans, 65535), expected)


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
    assert_equal(decode(with_segments(jpeg, *[b""] * 100_000)), decode(jpeg))  # in linear time
    for exif in (b"Lorem ipsum", b"II*\0", b"", exif_segment(6)[6:20], exif_segment(99)[6:]):
        assert_equal(decode(with_segments(jpeg, b"Exif\0\0" + exif)), decode(jpeg))
        assert_equal(decode(png[:33] + png_chunk(b"eXIf", exif) + png[33:]), PICTURE)
        assert_equal(decode(encoded(PICTURE, "WEBP", lossless=True, exif=exif)), PICTURE)


# More than 8 bits.


def png(height, width, bits, kind, lines):
    """kind: PNG's number for the channels."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_of_16_bits(colors):
    """[h, w, 1, 2, 3 or 4] uint16 → the bytes of a PNG, which PIL can't write."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in colors)
    return png(*colors.shape[:2], 16, {1: 0, 2: 4, 3: 2, 4: 6}[colors.shape[2]], lines)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_a_color_keep_their_range(channels):
    deep = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1], RAMP], -1)[..., :channels]
    expected = deep[..., :3] if channels > 2 else deep[..., :1].repeat(3, -1)
    high = 65535 if channels == 1 else None  # PIL keeps 8 bits of colors
    assert_equal(decode(png_of_16_bits(deep), high=high), expected / 257, tolerance=1)


def test_the_end_of_the_range_is_white_in_deep_gray_files():
    twelve_bits = RAMP // 16
    for kind, in_chans in itertools.product(("PNG", "TIFF"), (1, 3)):
        found = decode(encoded(twelve_bits, kind), in_chans, high=4095)
        assert_equal(found, (twelve_bits / 4095 * 255)[..., None].repeat(in_chans, 2), 1)
        assert found.max() == 255


def test_where_the_range_cannot_act_it_says_so():
    deep_png = png_of_16_bits(np.stack([RAMP] * 3, -1))
    pgm = b"P5 60 40 4095\n" + (RAMP // 16).astype(">u2").tobytes()  # PIL scales by its 4095
    for data in (deep_png, pgm, encoded(PICTURE, "JPEG2000")):
        assert "--value-range can't act" in reason(data, high=4095)
    assert_equal(decode(pgm), (RAMP / 257)[..., None].repeat(3, -1), tolerance=1.1)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("planar", [False, True])
def test_deep_tiffs_of_any_layout_keep_their_range(order, bigtiff, planar):
    layout = {"byteorder": order, "bigtiff": bigtiff}
    planes = np.moveaxis(DEEP, 2, 0) if planar else DEEP
    colors = {"photometric": "rgb", "planarconfig": "separate" if planar else "contig", **layout}
    assert_equal(decode(tiff(planes, **colors), high=65535), PICTURE, 1)
    white = tiff(65535 - DEEP[..., 0], photometric="miniswhite", **layout)
    assert_equal(decode(white, high=65535), GRAY_AS_RGB, 1)
    black = tiff(DEEP[..., 0], photometric="minisblack", compression="zlib", **layout)
    assert_equal(decode(black, high=65535), GRAY_AS_RGB, 1)
    floats = tiff((planes / 65535).astype(np.float32), **colors)
    assert_equal(decode(floats, high=1), PICTURE, 1)
    half = decode(tiff(planes // 2, **colors), high=32767)
    assert_equal(half, PICTURE, 1)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int16", "int32", "uint32", "float32"])
def test_types_whose_range_is_unknown_need_value_range(dtype):
    array = (GRAY // 2).astype(dtype)
    for data in (tiff(array, photometric="minisblack"), npy(array)):
        in_chans = 1 if data.startswith(b"\x93") else 3
        words = f"pixels are {dtype}, 0 to 117, of unknown range: --value-range LOW HIGH"
        assert reason(data, in_chans) == words
        found = decode(data, in_chans, high=127.5)
        assert_equal(found, GRAY_AS_RGB[..., :in_chans] // 2 * 2, tolerance=1)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_the_range_may_be_negative_and_ends_where_it_says(dtype):
    array = np.array([[-32_000, -1000, -500, 0, 30_000]], dtype)
    for write in (npy, partial(tiff, photometric="minisblack")):
        found = decode(write(array), 1, value_range=(-1000, 0))
        assert found.ravel().tolist() == [0, 0, 127, 255, 255]
        assert decode(write(array), 1, high=30_000).ravel().tolist() == [0, 0, 0, 0, 255]


def test_pixels_without_data_are_black():
    array = np.array([[np.nan, np.inf, 0.5]])
    for data in (npy(array), tiff(array, photometric="minisblack")):
        assert decode(data, 1, value_range=(-1, 1)).ravel().tolist() == [0, 255, 191]


@pytest.mark.parametrize("high", [None, 1, 65535])
def test_palettes_have_16_bits(high):
    index = ((X + Y) % 256).astype(np.uint8)
    ramp = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2]).astype(np.uint16)
    for scale in (256, 257):
        data = tiff(index, photometric="palette", colormap=ramp * scale)
        assert_equal(decode(data, high=high), np.moveaxis(ramp[:, index], 0, -1))
    data = tiff(index, photometric="palette", colormap=ramp)
    assert "palette has 8 bits in place of 16: convert it" in reason(data, high=high)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_colors_multiplied_by_alpha_are_refused(dtype, in_chans):
    rgba = np.dstack([PICTURE, GRAY]).astype(dtype)
    data = tiff(rgba, photometric="rgb", extrasamples=["assocalpha"])
    assert "multiplied by alpha: convert it to RGB" in reason(data, in_chans)


# Other numbers of channels.


MULTISPECTRAL = {
    "pages": {},
    "samples": {"planarconfig": "contig"},
    "planes": {"planarconfig": "separate"},
    "deflate": {"planarconfig": "contig", "compression": "zlib"},
}


@pytest.mark.parametrize("name", [*MULTISPECTRAL, "npy"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_multispectral_images_keep_channels_and_range(name, dtype):
    stored = SIX_CHANNELS.astype(dtype)
    if name == "npy":
        data = npy(stored)
    else:
        array = np.moveaxis(stored, 2, 0) if name in ("pages", "planes") else stored
        data = tiff(array, photometric="minisblack", **MULTISPECTRAL[name])
    expected = np.minimum(stored / (5000 / 255), 255)
    if dtype == np.uint8:  # --value-range does not act
        expected = stored
        assert_equal(decode(data, 6), stored)
    else:
        assert "of unknown range: --value-range" in reason(data, 6)
    assert_equal(decode(data, 6, high=5000), expected, tolerance=1.001)
    assert "6 channel(s), not --in-chans 4" in reason(data, 4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "npy"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_gray_is_the_luminance_of_colors(kind, mode):
    picture = Image.fromarray(PICTURE)
    expected = np.asarray(picture.convert("L"))[..., None]
    image = picture.convert(mode)
    data = npy(np.asarray(image)) if kind == "npy" else encoded(image, kind)
    assert_equal(decode(data, 1), expected)
    if mode == "L":
        assert_equal(decode(data, 3), expected.repeat(3, 2))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["npy", "contig", "separate"])
def test_of_two_channels_none_is_dropped_unasked(kind, dtype):
    pair = np.dstack([GRAY, 255 - GRAY]).astype(dtype) * (257 if dtype == np.uint16 else 1)
    data = npy(pair)
    if kind != "npy":
        array = np.moveaxis(pair, 2, 0) if kind == "separate" else pair
        options = {"photometric": "minisblack", "planarconfig": kind}
        data = tiff(array, **options)
        alpha = tiff(array, extrasamples=["unassalpha"], **options)
        assert_equal(decode(alpha, high=65535), GRAY_AS_RGB)
    words = "it has 2 channels: --in-chans 2 reads both, --in-chans 1 the first"
    assert reason(data) == words
    assert_equal(decode(data, 1, 65535), GRAY[..., None])
    assert_equal(decode(data, 2, 65535), np.dstack([GRAY, 255 - GRAY]))


def test_a_fourth_channel_that_may_not_be_alpha_is_not_dropped():
    four = np.dstack([PICTURE, GRAY])
    for deep in (four, four.astype(np.uint16) * 257):
        data = tiff(deep, photometric="rgb", extrasamples=["unspecified"])
        for in_chans in (1, 3):
            assert reason(data, in_chans) == f"it has 4 channel(s), not --in-chans {in_chans}"
            assert reason(npy(deep), in_chans)
        assert_equal(decode(data, 4, 65535), four)
        data = tiff(deep, photometric="rgb", extrasamples=["unassalpha"])
        assert_equal(decode(data, 3, 65535), PICTURE)


def test_four_channels_are_those_of_the_file():
    rgba = np.dstack([PICTURE, Y.astype(np.uint8)])
    assert_equal(decode(encoded(rgba, "PNG"), 4), rgba)
    assert_equal(decode(encoded(rgba, "TIFF"), 4), rgba)
    cmyk = Image.fromarray(PICTURE).convert("CMYK")
    for kind in ("TIFF", "JPEG"):  # they aren't red, green, blue and alpha
        assert reason(encoded(cmyk, kind), 4)


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"ome": True}])
def test_gray_pages_are_channels_and_of_colored_ones_the_first_is_read(options):
    pages = np.moveaxis(PICTURE, 2, 0)
    for array in (pages, pages.astype(np.uint16) * 257):
        data = tiff(array, photometric="minisblack", **options)
        assert_equal(decode(data, 3, 65535), PICTURE)
        assert_equal(decode(data, 1, 65535), PICTURE[..., :1])
        two = tiff(array[:2], photometric="minisblack", **options)
        assert reason(two).startswith("it has 2 channels: --in-chans 2 reads both")
    colored = tiff(np.stack([PICTURE, 255 - PICTURE]), photometric="rgb")
    assert_equal(decode(colored), PICTURE)


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


def test_a_rare_compression_is_read_or_its_codec_is_named():
    data = encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw")
    if tifffile.tifffile.imagecodecs.__name__ == "imagecodecs":
        expected = (RAMP / 257)[..., None].repeat(3, -1)
        assert_equal(decode(data, high=65535), expected, tolerance=1.1)
    else:
        assert "imagecodecs" in reason(data)


JPEG_OF_12_BITS = encoded(PICTURE, "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")


@pytest.mark.parametrize(
    "data, words",
    [
        (tiff_by_hand(bytes(14400), 16, 3, photometric=6), "16-bit YCBCR pixels: convert it"),
        (tiff_by_hand(bytes(2400), 8, photometric=32803), "8-bit CFA pixels: convert it"),
        (tiff_by_hand(bytes(7200), 8, 3, photometric=9), "8-bit ICCLAB pixels: convert it"),
        (tiff_by_hand(bytes(7200), 8, 3, photometric=8), "8-bit CIELAB pixels: convert it"),
        (tiff_by_hand(bytes(19200), 16, 4, photometric=5), "16-bit SEPARATED pixels: convert it"),
        (tiff_by_hand(bytes(4800), 16, photometric=3), "16-bit PALETTE pixels: convert it"),
        (tiff_by_hand(bytes(2400), 8, photometric=None), "8-bit unknown pixels: convert it"),
        (tiff_by_hand(bytes(12000), 8, 5), "it has 5 channel(s), not --in-chans 3"),
        (JPEG_OF_12_BITS, "damaged, or no image of a known format"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "HEIF, or a video: convert it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "damaged, or no image of a known format"),
        (b"P5 60 40 70000\n" + bytes(2400), "maxval must be greater than 0 and less than 65536"),
        (b"<html>404 not found</html>" * 20, "no image of a known format"),
        (np.random.default_rng(1).bytes(1000), "no image of a known format"),
        (b"", "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no image of a known format"),  # PIL would run Ghostscript
        (b"II", "no image of a known format"),
    ],
)
def test_a_format_that_is_known_is_named(data, words):
    assert words in reason(data)


def test_damaged_arrays_and_tiffs_are_found_out():
    whole_tiff = tiff(SIX_CHANNELS, photometric="minisblack", compression="zlib")
    for whole in (npy(SIX_CHANNELS), whole_tiff):
        for length in (8, 100, len(whole) // 2, len(whole) - 50):
            assert reason(whole[:length], 6)
    for array in (np.array({}), np.zeros((2, 3, 4, 5)), np.zeros((0, 5, 6)), np.zeros((6, 9, 9))):
        assert reason(npy(array), 6)


def test_a_tiff_without_some_of_its_strips_is_refused():
    whole = tiff(RAMP, photometric="minisblack", rowsperstrip=10)
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        at = file.pages[0].tags[278].valueoffset
    cut = whole[:at] + struct.pack("<H", 5) + whole[at + 2 :]
    assert reason(cut, high=65535) == "it lacks a part of its pixels"


def test_extensions_are_those_of_the_formats():
    known = ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split()
    assert set(known) <= set(EXTENSIONS)
    assert not {".eps", ".pdf", ".ico", ".psd"} & set(EXTENSIONS)


# Sizes are checked before anything is unpacked.


def test_max_pixels_is_the_largest_image_of_any_format(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL's own limit
    data = [encoded(PICTURE, kind) for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")]
    data.append(tiff(DEEP, photometric="rgb"))
    for image in [*data, npy(PICTURE)]:
        assert decode(image, 3, 65535, max_pixels=2400).shape == (40, 60, 3)
        assert reason(image, max_pixels=2399) == "60 x 40 pixels exceed --max-pixels 2399"
    assert 102e6 < MAX_PIXELS < 150e6  # a medium-format camera's, and not much more


def test_what_is_too_large_takes_no_memory():
    """Of a PNG of 13,300 x 13,300 pixels, and 300 pages for six channels."""
    stack = tiff(
        np.zeros((300, 1200, 1000), np.uint8), photometric="minisblack", compression="zlib"
    )
    zeros = png(13_300, 13_300, 8, 0, bytes(13_300 * 13_301))
    tracemalloc.start()
    try:
        assert "13300 x 13300 pixels exceed --max-pixels" in reason(zeros)
        assert "it has 300 channel(s), not --in-chans 6" in reason(stack, 6)
        assert "it has 300 channel(s), not --in-chans 3" in reason(stack)
        assert decode(stack, 1).shape == (1200, 1000, 1)  # its first page
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_a_tile_is_no_larger_than_max_pixels():
    tags = {256: 16, 257: 16, 322: 40_000, 323: 40_000, 324: 200, 325: 100}
    tags |= {258: 32, 259: 8, 262: 1, 277: 1, 339: 3}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    data = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries)
    assert "40000 x 40000 pixels exceed --max-pixels" in reason(data.ljust(300, b"\0"))


def test_what_inflates_beyond_its_size_is_refused(monkeypatch):
    """A strip of zeros, a .npy that announces a terabyte, and a JPEG of too many scans."""
    whole = tiff(np.zeros((64, 64), np.float32), photometric="minisblack", compression="zlib")
    strip = zlib.compress(bytes(2**26), 9)
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        at, count = (file.pages[0].tags[tag].valueoffset for tag in (273, 279))
    bomb = bytearray(whole + strip)
    bomb[at : at + 4], bomb[count : count + 4] = (
        struct.pack("<I", n) for n in (len(whole), len(strip))
    )
    huge = npy(np.zeros((4, 4))).replace(b"(4, 4), }" + b" " * 10, b"(400000, 400000), }")
    progressive = encoded(PICTURE, "JPEG", progressive=True)
    scan, end = progressive.rindex(b"\xff\xda"), progressive.rindex(b"\xff\xd9")
    scans = progressive[:end] + progressive[scan:end] * 100 + progressive[end:]
    appended = progressive + progressive[scan:end] * 200  # after the end, as a phone's video
    tracemalloc.start()
    try:
        assert reason(bytes(bomb), high=1)
        assert reason(huge, 1, high=1) == "it is cut short"
        assert reason(scans) == "a JPEG of more than 100 scans"
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert_equal(decode(appended + b"\xff\xd9"), decode(progressive))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install imagecodecs" in reason(whole, high=1)


# The terminal shows our lines alone.


def test_flawed_images_are_read_in_silence(capfd):
    jpeg = encoded(PICTURE, "JPEG")
    flawed = jpeg[:-2] + bytes(20) + b"\xff\xd9"
    decode_image(flawed)
    assert "extraneous bytes before marker" in capfd.readouterr().err
    assert_equal(decode(flawed), decode(jpeg))
    assert reason(flawed[:200])
    decode(encoded(PICTURE, "WEBP", lossless=True, exif=b"Lorem ipsum"))
    with quiet_libraries():
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("PIL.PngImagePlugin").error("a record")
        logging.getLogger("tifffile").error("a record")
    assert capfd.readouterr() == ("", "")
    logging.getLogger("tifffile").error("later")
    with pytest.warns(UserWarning, match="later"):
        warnings.warn("later", stacklevel=1)


def run_quietly(code, redirection=""):
    """Runs code that has quiet_libraries → its stdout, its stderr."""
    code = "import os, sys\nfrom engine.data.quiet import quiet_libraries\n" + code
    command = f"exec '{sys.executable}' -c \"$0\" {redirection}"
    done = subprocess.run(["sh", "-c", command, code], capture_output=True, cwd=ROOT, text=True)
    return done.stdout, done.stderr


def test_our_own_lines_reach_the_terminal_meanwhile():
    code = """
with quiet_libraries(), quiet_libraries():
    print("ours", file=sys.stderr)
    os.write(sys.stderr.fileno(), b"a signal handler's\\n")
    os.write(2, b"a library's\\n")
    if not os.fork():
        os.write(2, b"of a worker's library\\n")
        print("a worker's", file=sys.stderr)
        os._exit(0)
    os.wait()
os.write(2, b"later\\n")
print("and later", file=sys.stderr)
"""
    expected = ["ours", "a signal handler's", "a worker's", "later", "and later"]
    assert run_quietly(code) == ("", "\n".join(expected) + "\n")


def test_stderr_may_be_closed():
    assert run_quietly("with quiet_libraries(): print('ours')", "2>&-") == ("ours\n", "")


def test_a_thread_leaves_stderr_as_it_is(capfd):
    def work():
        with quiet_libraries():
            os.write(2, b"a library's\n")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert capfd.readouterr().err == "a library's\n"
