"""Image files → uint8 [C, H, W].

The format is told by a file's content, never by its name: JPEG (torchvision), NumPy's .npy, TIFF
(PIL where it is right, tifffile elsewhere), everything else that PIL reads. What isn't plainly
gray, RGB, palette or n-channel is refused by name rather than guessed.
"""

import io
import math
import os
import re
import stat
import struct
import warnings
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tv

from engine.capture import captured_stderr, captured_warnings
from engine.errors import first_line, printable
from moco.augmentation import IMAGENET_MEAN, IMAGENET_STD

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated in torchvision 0.29; PIL reads everything, more slowly
    decode_jpeg = None
else:
    JPEG_MODES = {3: ImageReadMode.RGB, 1: ImageReadMode.GRAY}

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 0x0112  # EXIF's tag, and TIFF's
INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # EXIF's types, as struct names them
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


_collector = ContextVar("collector", default=None)


@contextmanager
def collect_warnings():
    """Yields a dict that receives name → first message of images that decode with warnings.

    libjpeg, libtiff, PIL and tifffile tell of flaws that they read past. Enter it once for a batch:
    file descriptor 2 is redirected meanwhile.
    """
    warned = {}
    with captured_stderr() as read_lines:
        token = _collector.set((warned, read_lines))
        try:
            yield warned
        finally:
            _collector.reset(token)


def decode_image(path, pixel_format=RGB, data=None):
    """An image file, or its bytes `data` → uint8 [C, H, W], upright, of several images the first.

    RGB and gray become each other, alpha is dropped; any other number of channels must be that of
    the file: a TIFF's pages or samples, or a .npy of [H, W, C]. More than 8 bits a channel are
    scaled by pixel_format.max_value. Raises UnreadableImage for a file that is damaged, truncated,
    larger than max_pixels, of another number of channels, or of an unknown range. What the
    decoding libraries print goes to collect_warnings, or nowhere.
    """
    if _collector.get() is None:
        with collect_warnings():
            return decode_image(path, pixel_format, data)
    warned, read_lines = _collector.get()
    messages = []
    try:
        data = bytearray(_read_file(path) if data is None else data)
        image = _decode_jpeg(data, pixel_format) if data.startswith(b"\xff\xd8") else None
        if image is None:
            with captured_warnings() as messages:
                image = _decode(data, pixel_format)
    except Exception as error:  # PIL raises nearly anything on a broken file
        read_lines()  # the reason is enough
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UnreadableImage(path, reason) from None
    messages = read_lines() + messages
    if messages:
        warned.setdefault(printable(path), printable(messages[0]))
    return image


def _read_file(path):
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe blocks, a device may never end
        raise ValueError("no regular file")
    return Path(path).read_bytes()


def _decode(data, pixel_format):
    if data.startswith(b"\x93NUMPY"):
        return _to_chw(np.load(io.BytesIO(data)), pixel_format)
    if data.startswith(TIFF_MAGIC):
        return _decode_tiff(data, pixel_format)
    try:
        return _decode_with_pil(data, pixel_format)
    except UnidentifiedImageError:
        raise ValueError(_explain_unidentified(data)) from None


def _check_size(height, width, pixel_format):
    """Before anything of that size is allocated: a small file can fill the memory."""
    limit = pixel_format.max_pixels
    if height * width > limit:
        raise ValueError(f"{width} x {height} pixels exceed --max-pixels {limit}")


# JPEG


class _JpegHeader(NamedTuple):
    frame: int = 0  # offset of the frame header; 0 if none was found
    height: int = 0
    width: int = 0
    bits: int = 8
    app1: tuple = ()  # contents of the APP1 segments: EXIF and XMP


def _decode_jpeg(data, pixel_format):
    """By torchvision → uint8 [C, H, W]; None if PIL has to try."""
    header = _read_jpeg_header(data)
    # Zeros at the end, as an interrupted copy leaves them, would be decoded as gray.
    if data.rfind(b"\xff\xd9") < header.frame:
        raise ValueError("the end of the JPEG is missing")
    _check_size(header.height, header.width, pixel_format)
    if header.bits != 8:
        raise ValueError(f"a JPEG of {header.bits} bits a channel: convert it to PNG or TIFF")
    if decode_jpeg is None or not header.frame or pixel_format.in_chans not in JPEG_MODES:
        return None
    try:
        view = torch.frombuffer(data, dtype=torch.uint8)
        image = decode_jpeg(view, JPEG_MODES[pixel_format.in_chans])
    except RuntimeError:  # PIL has the better error message
        return None
    return _upright(image, _jpeg_orientation(header.app1)) if header.app1 else image


def _read_jpeg_header(data):
    """A JPEG's bytes → _JpegHeader (ITU T.81, B.1, B.2.2)."""
    data, at, app1 = memoryview(data), 2, ()
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[at + 5 : at + 7], data[at + 7 : at + 9]
            height, width = int.from_bytes(height, "big"), int.from_bytes(width, "big")
            return _JpegHeader(at, height, width, data[at + 4], app1)
        if marker == 0xE1:
            app1 += (data[at + 4 : at + 2 + length],)
        at += 2 + length
    return _JpegHeader()


def _jpeg_orientation(segments):
    """By EXIF, else by XMP, wherever in the file they are; as PIL has it for other formats."""
    for segment in segments:
        if segment[:6] == b"Exif\0\0":
            with suppress(struct.error, KeyError):  # broken EXIF: the image is whole
                return _exif_orientation(segment[6:])
    for segment in segments:
        if segment[:28] == b"http://ns.adobe.com/xap/1.0/":
            found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', segment)
            if found:
                return int(found[1])
    return 1


def _exif_orientation(exif):
    """A TIFF header and one directory; PIL would take as long as for a small image."""
    order = {b"II": "<", b"MM": ">"}[bytes(exif[:2])]
    (start,) = struct.unpack_from(order + "I", exif, 4)
    (num_tags,) = struct.unpack_from(order + "H", exif, start)
    for at in range(start + 2, start + 2 + 12 * num_tags, 12):
        tag, kind = struct.unpack_from(order + "HH", exif, at)
        if tag == ORIENTATION:
            return struct.unpack_from(order + INTEGERS[kind], exif, at + 8)[0]
    raise KeyError(ORIENTATION)


def _upright(image, orientation):
    """[..., H, W] as stored → as it is to be seen; orientation: EXIF's, other values do nothing."""
    if orientation in (5, 6, 7, 8):
        image = image.mT
    if orientation in (2, 6):
        return image.flip(-1)
    if orientation in (4, 8):
        return image.flip(-2)
    return image.flip(-2, -1) if orientation in (3, 7) else image


# TIFF

WEBP = 50001  # the compression that PIL's libtiff lacks
PREMULTIPLIED = 1  # alpha, among the kinds of extra samples
PIL_TIFF_COLORS = ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "SEPARATED", "YCBCR", "CIELAB")


def _decode_tiff(data, pixel_format):
    """For 1 and 3 channels its first page; for other numbers its pages or its samples."""
    import tifffile

    in_chans, max_value = pixel_format.in_chans, pixel_format.max_value
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        _check_size(page.imagelength, page.imagewidth, pixel_format)
        colors = getattr(page.photometric, "name", "unknown")
        if in_chans in (1, 3) and _pil_is_right(page, colors, max_value):
            with suppress(UnidentifiedImageError):
                return _decode_with_pil(data, pixel_format)
        known_type = page.dtype is not None and page.bitspersample in range(8, 65)
        if colors not in ("MINISBLACK", "MINISWHITE", "RGB") or not known_type:
            kind = f"{page.bitspersample}-bit {colors} pixels"
            raise ValueError(f"a TIFF of {kind}: convert it to 8-bit gray or RGB")
        array = _read_tiff_array(page if in_chans in (1, 3) else file.series[0], page, in_chans)

    bits = page.bitspersample
    if page.sampleformat == 1 and (bits == 8 or (bits <= 16 and max_value is None)):
        max_value = 2**bits - 1
    if page.extrasamples[:1] == (PREMULTIPLIED,) and array.shape[2] in (2, 4) and max_value:
        array = _divide_by_alpha(array, max_value)
    array = _to_uint8(array, max_value)
    if colors == "MINISWHITE":
        array = 255 - array
    if in_chans in (1, 3) and colors == "RGB":
        array = array[..., :3]
    return _upright(_to_chw(array, pixel_format), page.tags.valueof(ORIENTATION, 1))


def _pil_is_right(page, colors, max_value):
    """Whether PIL, whose libtiff has most codecs, decodes a page rightly if it knows it at all."""
    big_endian_bigtiff = page.parent.is_bigtiff and page.parent.byteorder == ">"
    if page.sampleformat != 1 or page.compression == WEBP or big_endian_bigtiff:
        return False
    is_gray = colors in ("MINISWHITE", "MINISBLACK")
    planes = page.planarconfig != 1
    if page.bitspersample in range(1, 9):
        is_premultiplied = page.extrasamples[:1] == (PREMULTIPLIED,)
        return colors in PIL_TIFF_COLORS and not (planes and (is_gray or is_premultiplied))
    raw_planes = planes and page.compression == 1
    if page.bitspersample != 16 or raw_planes:
        return False
    if is_gray:
        return colors == "MINISBLACK" and page.samplesperpixel == 1
    return colors in ("RGB", "SEPARATED") and max_value is None  # PIL drops the lower 8 bits


def _read_tiff_array(part, page, in_chans):
    """A page or a series of pages, by tifffile → [H, W, C] of any type.

    The shape is checked first: hundreds of pages can be packed into little.
    """
    others = [size for axis, size in zip(part.axes, part.shape) if axis not in "YX"]
    if len(others) > 1 or len(others) + 2 != len(part.axes):
        raise ValueError(f"its shape is {part.shape}, not height, width, {in_chans}")
    channels = math.prod(others)
    gray = channels == 1 or (channels == 2 and bool(page.extrasamples))
    _check_channels(channels, in_chans, converts=gray or page.photometric.name == "RGB")
    try:
        array = part.asarray(maxworkers=1)  # threads: the loader's workers are enough
    except (ValueError, NotImplementedError, ImportError) as error:
        if "imagecodecs" not in str(error) and not isinstance(error, ImportError):
            raise
        kind = f"{page.bitspersample}-bit {getattr(page.compression, 'name', '')}"
        raise ValueError(f"a TIFF of {kind} compression: pip install imagecodecs") from None
    array = np.moveaxis(array, [part.axes.index("Y"), part.axes.index("X")], [0, 1])
    return array.reshape(*array.shape[:2], channels)


def _divide_by_alpha(array, white):
    """[H, W, C], whose last channel has multiplied the others → not multiplied, float32."""
    colors, alpha = array[..., :-1].astype(np.float32), array[..., -1:].astype(np.float32)
    scale = np.divide(white, alpha, out=np.zeros_like(alpha), where=alpha > 0)
    return np.concatenate([colors * scale, alpha], axis=-1)


# Everything else


def _decode_with_pil(data, pixel_format):
    if Image.MAX_IMAGE_PIXELS and pixel_format.max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = pixel_format.max_pixels  # PIL's own limit, for all that it opens
    # From its bytes: given a path, PIL misreads uncompressed TIFFs that have to be rotated.
    with Image.open(io.BytesIO(data)) as image:
        _check_size(image.height, image.width, pixel_format)
        if pixel_format.max_value:
            _check_max_value_acts(image, data)
        _repair_palette(image)
        image.load()
        return convert_pil_image(image, pixel_format)


def convert_pil_image(image, pixel_format):
    """PIL's image → uint8 [C, H, W], upright; ValueError for what decode_image refuses."""
    orientation = _pil_orientation(image)
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip at 255
        array = np.asarray(image)
        if image.format in ("PNG", "PPM") and image.mode == "I":  # PIL makes 32 bits of 16
            array = array.astype(np.uint16)
        image = Image.fromarray(_to_uint8(array, pixel_format.max_value))
    if pixel_format.in_chans in (1, 3):
        tensor = tv.pil_to_tensor(_to_mode(image, "L" if pixel_format.in_chans == 1 else "RGB"))
    elif image.mode in ("LA", "RGBA", "L", "RGB"):
        tensor = _to_chw(np.asarray(image), pixel_format)
    else:
        raise ValueError(f"{image.mode} pixels, not --in-chans {pixel_format.in_chans}")
    return _upright(tensor, orientation)


def _pil_orientation(image):
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # broken EXIF; the pixels are whole
        warnings.warn(f"broken EXIF: {first_line(error)}", stacklevel=2)
        return 1


def _to_mode(image, mode):
    """PIL's convert, also where it takes two steps."""
    detour = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}.get(image.mode)
    if detour:
        image = image.convert(detour)
    return image if image.mode == mode else image.convert(mode)


def _repair_palette(image):
    """PIL takes the upper 8 of 16 bits of a TIFF's colours; some programs write 8 bits."""
    if image.format == "TIFF" and image.mode == "P":
        colors = image.tag_v2[320]
        if max(colors) < 256:
            image.putpalette(np.reshape(colors, (3, -1)).T.astype(np.uint8).tobytes())


def _check_max_value_acts(image, data):
    """PIL rescales some files of more than 8 bits before max_value can be applied."""
    bits, is_raw = 8, False
    if image.format == "PNG":
        bits, is_raw = data[24], image.mode.startswith("I")
    elif image.format == "PPM" and isinstance(image.tile[0].args, tuple):
        bits = image.tile[0].args[1].bit_length()  # of the header's largest value
    elif image.format == "JPEG2000":
        bits = data[data.find(b"\xff\x51") + 40] % 128 + 1
        is_raw = bits == 16 and image.mode == "I;16"
    if bits > 8 and not is_raw:
        raise ValueError(f"PIL rescales its {bits} bits: --max-value can't act")


def _explain_unidentified(data):
    """Of a file that PIL doesn't open: its format, if that is known, and why."""
    prefix = bytes(data[:16]).ljust(16, b"\0")
    for name, (open_file, accepts) in Image.OPEN.items():
        answer = accepts and accepts(prefix)
        if isinstance(answer, str):  # this PIL was built without that format
            return answer
        if answer:
            try:
                open_file(io.BytesIO(data), "")
            except Exception as error:
                return f"a damaged or unsupported {name} file: {first_line(error)}"
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("latin-1")
        return f"a file of the kind {brand} (HEIF or a video): convert it to JPEG or PNG"
    return "no image of a known format"


# Arrays


def _to_chw(array, pixel_format):
    """[H, W] or [H, W, C] of any numeric type → uint8 [in_chans, H, W]."""
    in_chans = pixel_format.in_chans
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"its shape is {array.shape}, not height, width, {in_chans}")
    _check_size(*array.shape[:2], pixel_format)
    channels = array.shape[2] if array.ndim == 3 else 1
    _check_channels(channels, in_chans, converts=channels <= 4)
    array = _to_uint8(array.reshape(*array.shape[:2], channels), pixel_format.max_value)
    if channels != in_chans:
        image = Image.fromarray(array.squeeze(2) if channels == 1 else array)
        image = image.convert("RGB" if in_chans == 3 else "L")
        array = np.asarray(image).reshape(*array.shape[:2], in_chans)
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def _check_channels(channels, in_chans, converts):
    """converts: whether the file's channels can be made gray or RGB."""
    if channels != in_chans and not (converts and in_chans in (1, 3)):
        raise ValueError(f"it has {channels} channel(s), not --in-chans {in_chans}")


def _to_uint8(array, max_value):
    """Numbers of any type → uint8; in types of more than 8 bits max_value becomes 255."""
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iuf":
        raise ValueError(f"pixels are {array.dtype}")
    if max_value is None:
        if array.dtype.kind != "u" or array.dtype.itemsize != 2:
            raise ValueError(f"pixels are {array.dtype}, whose range is unknown: --max-value V")
        max_value = 65535
    return (np.nan_to_num(array).clip(0, max_value) / (max_value / 255)).astype(np.uint8)
