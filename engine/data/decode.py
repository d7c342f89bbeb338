"""The bytes of an image file → uint8 [C, H, W].

The format is told by the content: JPEG (torchvision), NumPy's .npy, TIFF (PIL for 8 bits, tifffile
for more), and the others of PIL_FORMATS. What can't be read without a guess is refused.
"""

import io
import math
import re
import struct
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tv

from engine.errors import printable
from moco.augmentation import IMAGENET_MEAN, IMAGENET_STD

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated in torchvision 0.29; PIL reads everything, more slowly
    decode_jpeg = None
else:
    JPEG_MODES = {3: ImageReadMode.RGB, 1: ImageReadMode.GRAY}

# What else PIL reads is left out: the plugin of EPS runs a program, for example.
PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = tuple(e for e, name in Image.registered_extensions().items() if name in PIL_FORMATS)
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of so many channels
ORIENTATION = 0x0112  # EXIF's tag, and TIFF's
MAX_PIXELS = 2**27  # 134 million; medium-format cameras have 102 million


class PixelFormat(NamedTuple):
    """Channels of an image and how their values are normalized.

    mean, std: of each channel, in [0, 1]. max_value: the value that becomes 1 in files of more
    than 8 bits a channel; None: 65535 for unsigned 16 bits, and wider, signed and float types are
    refused. max_pixels: the largest height × width that is decoded.
    """

    in_chans: int = 3
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    max_value: float | None = None
    max_pixels: int = MAX_PIXELS


RGB = PixelFormat()


class UnreadableImage(Exception):
    """An image that can't be read: its path, printable and on one line, and the reason."""

    def __init__(self, path, reason):
        super().__init__(path, reason)
        self.path, self.reason = printable(path), printable(reason)


def decode_image(data, pixel_format=RGB):
    """The bytes of an image file → uint8 [C, H, W], upright, of several images the first.

    RGB and gray become each other, and alpha is dropped; any other number of channels must be that
    of the file: a TIFF's pages or samples, or a .npy of [H, W, C]. More than 8 bits a channel are
    scaled by pixel_format.max_value: larger values become white, NaN black.
    ValueError, or any exception of a decoder, for a file that is damaged, truncated, larger than
    max_pixels, of another number of channels, of an unknown range, or with negative values.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _decode_jpeg(data, pixel_format)
        if data.startswith(b"\x93NUMPY"):
            return _to_chw(np.load(io.BytesIO(data)), pixel_format)
        if data.startswith(TIFF_MAGIC):
            return _decode_tiff(data, pixel_format)
        return _decode_with_pil(data, pixel_format)
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp":
            raise ValueError("HEIF, or a video: convert it to JPEG or PNG") from None
        raise ValueError("damaged, or no image of a known format") from None


def _check_size(height, width, pixel_format):
    """Before anything of that size is allocated: a small file can fill the memory."""
    limit = pixel_format.max_pixels
    if height * width > limit:
        raise ValueError(f"{width} x {height} pixels exceed --max-pixels {limit}")


def _decode_jpeg(data, pixel_format):
    """By torchvision; by PIL what torchvision can't decode."""
    frame, app1 = _find_jpeg_frame(data)
    # Zeros at the end, as an interrupted copy leaves them, would be decoded as gray.
    if data.rfind(b"\xff\xd9") < frame:
        raise ValueError("the end of the JPEG is missing")
    if frame and decode_jpeg is not None and pixel_format.in_chans in JPEG_MODES:
        _check_size(*struct.unpack_from(">HH", data, frame + 5), pixel_format)
        view = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # of bytes it would warn
        with suppress(RuntimeError):  # PIL has the better error message
            image = decode_jpeg(view, JPEG_MODES[pixel_format.in_chans])
            return _upright(image, _jpeg_orientation(app1)) if app1 else image
    return _decode_with_pil(data, pixel_format)


def _find_jpeg_frame(data):
    """→ offset of the frame header or 0, the APP1 segments before it (ITU T.81, B.1, B.2.2)."""
    at, app1 = 2, []
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return at, app1
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1:
            app1.append(data[at + 4 : end])
        at = end
    return 0, app1


def _jpeg_orientation(segments):
    """By EXIF, else by XMP, in any order; as PIL has it for other formats, but faster."""
    with suppress(Exception):  # no EXIF, or a broken one: the pixels are whole
        exif = Image.Exif()
        exif.load(next(segment for segment in segments if segment.startswith(b"Exif\0\0")))
        value = exif[ORIENTATION]
        return value[0] if isinstance(value, bytes) else value  # of the type BYTE
    found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', b"".join(segments))
    return int(found[1]) if found else 1


def _upright(image, orientation):
    """[..., H, W] as stored → as it is to be seen; orientation: EXIF's, other values do nothing."""
    if orientation in (5, 6, 7, 8):
        image = image.mT
    if orientation in (2, 6):
        return image.flip(-1)
    if orientation in (4, 8):
        return image.flip(-2)
    return image.flip(-2, -1) if orientation in (3, 7) else image


# The colors that are read, and their samples without alpha.
TIFF_COLORS = dict(MINISBLACK=1, MINISWHITE=1, PALETTE=1, RGB=3, YCBCR=3, SEPARATED=4)
PREMULTIPLIED, UNASSOCIATED = 1, 2  # alpha, among the kinds of extra samples
WEBP = 50001  # a compression that PIL's libtiff lacks


def _decode_tiff(data, pixel_format):
    """For 1 and 3 channels its first page; for other numbers its pages or its samples."""
    import tifffile

    in_chans, max_value = pixel_format.in_chans, pixel_format.max_value
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        colors, bits = getattr(page.photometric, "name", "unknown"), page.bitspersample
        has_alpha = page.extrasamples == (UNASSOCIATED,)
        height, width = page.imagelength, page.imagewidth
        # A small image may have a large tile.
        _check_size(max(height, page.tilelength), max(width, page.tilewidth), pixel_format)
        if PREMULTIPLIED in page.extrasamples:
            raise ValueError("a TIFF whose colors are multiplied by alpha: convert it to RGB")
        part = page if in_chans in (1, 3) else file.series[0]
        # Before they are read: hundreds of pages can be packed into little.
        channels = math.prod(part.shape) // (height * width)
        is_known = page.samplesperpixel == TIFF_COLORS.get(colors, 0) + has_alpha
        if colors in TIFF_COLORS:
            _check_channels(channels, in_chans, converts=is_known)
        # PIL mistakes some planes for strips, and is wrong on big-endian BigTIFF.
        is_plain = page.planarconfig == 1 and page.compression != WEBP and not file.is_bigtiff
        if part is page and bits <= 8 and page.sampleformat == 1 and is_plain and is_known:
            with suppress(UnidentifiedImageError):
                return _decode_with_pil(data, pixel_format)
        if colors not in ("MINISBLACK", "MINISWHITE", "RGB") or bits < 8:
            raise ValueError(f"a TIFF of {bits}-bit {colors} pixels: convert it to RGB")
        array = part.asarray(maxworkers=1)  # threads: the loader's workers are enough

    array = np.moveaxis(array, [part.axes.index("Y"), part.axes.index("X")], [0, 1])
    if part is page and has_alpha:
        array = array[..., :-1]
    if max_value is None and page.sampleformat == 1 and bits <= 16:
        max_value = 2**bits - 1
    array = _to_uint8(array, max_value)
    if colors == "MINISWHITE":
        array = 255 - array
    return _upright(_to_chw(array, pixel_format), page.tags.valueof(ORIENTATION, 1))


def _decode_with_pil(data, pixel_format):
    Image.MAX_IMAGE_PIXELS = pixel_format.max_pixels  # PIL's own limit, for all that it opens
    with Image.open(io.BytesIO(data), formats=PIL_FORMATS) as image:
        _check_size(image.height, image.width, pixel_format)
        if image.format == "TIFF" and image.mode == "P" and max(image.tag_v2[320]) < 256:
            raise ValueError("a TIFF whose palette has 8 bits in place of 16: convert it to RGB")
        # PIL rescales what has more than 8 bits in these.
        is_deep = image.format == "PNG" and data[24] == 16 and not image.mode.startswith("I")
        if pixel_format.max_value and (is_deep or image.format in ("PPM", "JPEG2000", "AVIF")):
            raise ValueError(f"--max-value can't act on this {image.format}: convert it to TIFF")
        return convert_pil_image(image, pixel_format)


def convert_pil_image(image, pixel_format):
    """PIL's image → uint8 [C, H, W], upright; ValueError for what decode_image refuses."""
    image.load()  # this turns TIFFs upright
    orientation = 1
    with suppress(Exception):  # broken EXIF: the pixels are whole
        orientation = image.getexif().get(ORIENTATION, 1)
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip at 255
        array = np.asarray(image)
        if image.format in ("PNG", "PPM") and image.mode == "I":  # PIL makes 32 bits of 16
            array = array.astype(np.uint16)
        image = Image.fromarray(_to_uint8(array, pixel_format.max_value))
    mode = PIL_MODES.get(pixel_format.in_chans)
    if mode in ("L", "RGB"):
        image = image.convert(mode)
    elif image.mode != mode:
        raise ValueError(f"{image.mode} pixels, not --in-chans {pixel_format.in_chans}")
    return _upright(tv.pil_to_tensor(image), orientation)


def _to_chw(array, pixel_format):
    """[H, W] or [H, W, C] of any numeric type → uint8 [in_chans, H, W]."""
    in_chans = pixel_format.in_chans
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"its shape is {array.shape}, not height, width, {in_chans}")
    _check_size(*array.shape[:2], pixel_format)
    array = array.reshape(*array.shape[:2], -1)
    channels = array.shape[2]
    _check_channels(channels, in_chans, converts=channels in (1, 3))
    array = _to_uint8(array, pixel_format.max_value)
    if channels in (1, 3) and channels != in_chans:
        image = Image.fromarray(array.squeeze(2) if channels == 1 else array)
        return tv.pil_to_tensor(image.convert(PIL_MODES[in_chans]))
    return torch.from_numpy(array[..., :in_chans].copy()).permute(2, 0, 1)


def _check_channels(channels, in_chans, converts):
    """converts: whether the file's channels can be made gray or RGB."""
    if channels == in_chans or (converts and in_chans in (1, 3)):
        return
    if channels == 2 and in_chans == 3:
        raise ValueError("it has 2 channels: --in-chans 2 reads both, --in-chans 1 the first")
    if (channels, in_chans) != (2, 1):
        raise ValueError(f"it has {channels} channel(s), not --in-chans {in_chans}")


def _to_uint8(array, max_value):
    """Numbers of any type → uint8; in types of more than 8 bits max_value becomes 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iuf":
        raise ValueError(f"pixels are {array.dtype}")
    if max_value is None:
        if array.dtype.kind != "u" or array.dtype.itemsize != 2:
            raise ValueError(f"pixels are {array.dtype}, whose range is unknown: --max-value V")
        max_value = 65535
    if (array < 0).any():
        raise ValueError(f"pixels down to {np.nanmin(array):g}: make negative ones 0 or NaN first")
    # NaN marks pixels without data in remote sensing: they become 0.
    return (np.nan_to_num(array).clip(0, max_value) / (max_value / 255)).astype(np.uint8)
