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


def decode(data, in_chans=3, **options):
    """A file's bytes → [H, W, C]."""
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
RESCALED = [  # --max-value is refused
    *(("PPM", mode, {}) for mode in ("RGB", "L", "1")),
    ("JPEG2000", "RGB", {"irreversible": False}),
]
LOSSLESS = [(*file, value) for file in LOSSLESS for value in (None, 1, 65535)]
LOSSLESS += [(*file, None) for file in RESCALED]


@pytest.mark.parametrize("kind, mode, save, max_value", LOSSLESS)
def test_lossless_8_bit_files_give_the_pixels_that_were_saved(kind, mode, save, max_value, capfd):
    image = Image.fromarray(PICTURE)
    image = image.quantize(128) if mode == "P" else image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(Y.astype(np.uint8)))  # the top is transparent
    found = decode(encoded(image, kind, **save), max_value=max_value)
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
    expected = UPRIGHT[orientation](decode(encoded(image, kind)))
    assert_equal(decode(data), expected)
    with Image.open(io.BytesIO(data)) as image:  # not loaded yet
        found = convert_pil_image(image, PixelFormat()).permute(1, 2, 0).numpy()
    assert_equal(found, expected, tolerance=2)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_tiffs_come_upright(orientation):
    for array, colors in ((PICTURE, "rgb"), (DEEP, "rgb"), (SIX_CHANNELS, "minisblack")):
        options, in_chans = {"photometric": colors, "planarconfig": "contig"}, array.shape[2]
        data = tiff(array, extratags=[(0x0112, 3, 1, orientation, True)], **options)
        expected = UPRIGHT[orientation](decode(tiff(array, **options), in_chans))
        assert_equal(decode(data, in_chans), expected)


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
    assert_equal(decode(png_of_16_bits(deep)), expected / 257, tolerance=1)


def test_max_value_is_white_in_deep_gray_files():
    twelve_bits = RAMP // 16
    for kind, in_chans in itertools.product(("PNG", "TIFF"), (1, 3)):
        found = decode(encoded(twelve_bits, kind), in_chans, max_value=4095)
        assert_equal(found, (twelve_bits / 4095 * 255)[..., None].repeat(in_chans, 2), 1)
        assert found.max() == 255


def test_where_max_value_cannot_act_it_says_so():
    deep_png = png_of_16_bits(np.stack([RAMP] * 3, -1))
    pgm = b"P5 60 40 4095\n" + (RAMP // 16).astype(">u2").tobytes()  # PIL scales by its 4095
    for data in (deep_png, pgm, encoded(PICTURE, "JPEG2000")):
        assert "--max-value can't act" in reason(data, max_value=4095)
    assert_equal(decode(pgm), (RAMP / 257)[..., None].repeat(3, -1), tolerance=1.1)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("planar", [False, True])
def test_deep_tiffs_of_any_layout_keep_their_range(order, bigtiff, planar):
    layout = {"byteorder": order, "bigtiff": bigtiff}
    planes = np.moveaxis(DEEP, 2, 0) if planar else DEEP
    colors = {"photometric": "rgb", "planarconfig": "separate" if planar else "contig", **layout}
    for max_value in (None, 65535):
        assert_equal(decode(tiff(planes, **colors), max_value=max_value), PICTURE, 1)
        white = tiff(65535 - DEEP[..., 0], photometric="miniswhite", **layout)
        assert_equal(decode(white, max_value=max_value), GRAY_AS_RGB, 1)
        black = tiff(DEEP[..., 0], photometric="minisblack", compression="zlib", **layout)
        assert_equal(decode(black, max_value=max_value), GRAY_AS_RGB, 1)
    floats = tiff((planes / 65535).astype(np.float32), **colors)
    assert_equal(decode(floats, max_value=1), PICTURE, 1)
    half = decode(tiff(planes // 2, **colors), max_value=32767)
    assert_equal(half, PICTURE, 1)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "float32", "float64"])
def test_types_whose_range_is_unknown_need_max_value(dtype):
    array = (GRAY // 2).astype(dtype)
    for data in (tiff(array, photometric="minisblack"), npy(array)):
        in_chans = 1 if data.startswith(b"\x93") else 3
        words = f"pixels are {dtype}, whose range is unknown: --max-value"
        assert words in reason(data, in_chans)
        found = decode(data, in_chans, max_value=127.5)
        assert_equal(found, GRAY_AS_RGB[..., :in_chans] // 2 * 2, tolerance=1)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_negative_pixels_are_refused_and_large_ones_are_white(dtype):
    array = np.array([[0, 50, 100, 30_000]], dtype)
    for write in (npy, partial(tiff, photometric="minisblack")):
        assert decode(write(array), 1, max_value=100).ravel().tolist() == [0, 127, 255, 255]
        array[0, 0] = -9
        assert "pixels down to -9: make negative ones 0 or NaN" in reason(
            write(array), 1, max_value=100
        )
        array[0, 0] = 0


def test_pixels_without_data_are_black():
    array = np.array([[np.nan, np.inf, 0.5]])
    for data in (npy(array), tiff(array, photometric="minisblack")):
        assert decode(data, 1, max_value=1).ravel().tolist() == [0, 255, 127]


@pytest.mark.parametrize("max_value", [None, 1, 65535])
def test_palettes_have_16_bits(max_value):
    index = ((X + Y) % 256).astype(np.uint8)
    ramp = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2]).astype(np.uint16)
    for scale in (256, 257):
        data = tiff(index, photometric="palette", colormap=ramp * scale)
        assert_equal(decode(data, max_value=max_value), np.moveaxis(ramp[:, index], 0, -1))
    data = tiff(index, photometric="palette", colormap=ramp)
    assert "palette has 8 bits in place of 16: convert it" in reason(data, max_value=max_value)


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
    if dtype == np.uint8:  # --max-value does not act
        expected = stored
        assert_equal(decode(data, 6), stored)
    elif dtype == np.uint16:
        assert_equal(decode(data, 6), stored // 257)
    else:
        assert "float32, whose range is unknown: --max-value" in reason(data, 6)
    assert_equal(decode(data, 6, max_value=5000), expected, tolerance=1.001)
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
        assert_equal(decode(alpha), GRAY_AS_RGB)
    words = "it has 2 channels: --in-chans 2 reads both, --in-chans 1 the first"
    assert reason(data) == words
    assert_equal(decode(data, 1), GRAY[..., None])
    assert_equal(decode(data, 2), np.dstack([GRAY, 255 - GRAY]))


def test_a_fourth_channel_that_may_not_be_alpha_is_not_dropped():
    four = np.dstack([PICTURE, GRAY])
    for deep in (four, four.astype(np.uint16) * 257):
        data = tiff(deep, photometric="rgb", extrasamples=["unspecified"])
        for in_chans in (1, 3):
            assert reason(data, in_chans) == f"it has 4 channel(s), not --in-chans {in_chans}"
            assert reason(npy(deep), in_chans)
        assert_equal(decode(data, 4), four)
        data = tiff(deep, photometric="rgb", extrasamples=["unassalpha"])
        assert_equal(decode(data), PICTURE)


def test_four_channels_are_those_of_the_file():
    rgba = np.dstack([PICTURE, Y.astype(np.uint8)])
    assert_equal(decode(encoded(rgba, "PNG"), 4), rgba)
    assert_equal(decode(encoded(rgba, "TIFF"), 4), rgba)
    cmyk = Image.fromarray(PICTURE).convert("CMYK")
    for kind in ("TIFF", "JPEG"):  # they aren't red, green, blue and alpha
        assert reason(encoded(cmyk, kind), 4)


@pytest.mark.parametrize("max_value", [None, 65535])
def test_of_several_pages_the_first_is_read(max_value):
    pages = np.stack([GRAY, 255 - GRAY, GRAY])
    for array in (pages, pages.astype(np.uint16) * 257):
        data = tiff(array, photometric="minisblack")
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


def test_a_rare_compression_is_read_or_its_codec_is_named():
    data = encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw")
    if tifffile.tifffile.imagecodecs.__name__ == "imagecodecs":
        assert_equal(decode(data), (RAMP / 257)[..., None].repeat(3, -1), tolerance=1.1)
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
        assert decode(image, max_pixels=2400).shape == (40, 60, 3)
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
        assert decode(stack).shape == (1200, 1000, 3)  # its first page
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_a_tile_is_no_larger_than_max_pixels():
    tags = {256: 16, 257: 16, 322: 40_000, 323: 40_000, 324: 200, 325: 100}
    tags |= {258: 32, 259: 8, 262: 1, 277: 1, 339: 3}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    data = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries)
    assert "40000 x 40000 pixels exceed --max-pixels" in reason(data.ljust(300, b"\0"))


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
