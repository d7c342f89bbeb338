"""The bytes of an image file → uint8 [C, H, W].

The format is told by the content: JPEG (by JPEG_DECODER), NumPy's .npy, TIFF (by PIL for 8 bits,
by tifffile for more), and the others of PIL_FORMATS. What can't be read without a guess is refused.
"""

import importlib.util
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

JPEG_MODES = {3: "RGB", 1: "GRAY"}
try:
    from torchvision.io import ImageReadMode, decode_jpeg

    JPEG_DECODER = "torchvision"
    JPEG_MODES = {channels: ImageReadMode[mode] for channels, mode in JPEG_MODES.items()}
except ImportError:  # deprecated in 0.29
    try:
        from torchcodec.decoders import decode_jpeg  # since 0.17, as fast

        JPEG_DECODER = "torchcodec"
    except (ImportError, OSError, RuntimeError):  # for want of it, or of a library that it loads
        decode_jpeg, JPEG_DECODER = None, "PIL, which is slower than torchcodec"

# What else PIL reads is left out: the plugin of EPS runs a program, for example.
PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = tuple(e for e, name in Image.registered_extensions().items() if name in PIL_FORMATS)
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
RESCALED = ("PPM", "JPEG2000", "AVIF")  # PIL scales these by the range that the file states
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of so many channels
ORIENTATION = 0x0112  # EXIF's tag, and TIFF's
MAX_PIXELS = 2**27  # 134 million; medium-format cameras have 102 million
MAX_SCANS = 100  # of a progressive JPEG, each of which takes as long as an image; usual are 10


class PixelFormat(NamedTuple):
    """Channels of an image and how their values are normalized.

    mean, std: of each channel, in [0, 1]. value_range: the values that become 0 and 1 in files of
    more than 8 bits a channel, which are refused without it. max_pixels: the largest height × width
    that is decoded.
    """

    in_chans: int = 3
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    value_range: tuple | None = None
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
    of the file: a TIFF's gray pages or its samples, or a .npy of [H, W, C]. More than 8 bits a
    channel are scaled by pixel_format.value_range: what lies outside becomes its ends, NaN black.
    ValueError, or any exception of a decoder, for a file that is damaged, truncated, larger than
    max_pixels, of another number of channels, or of an unknown range.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _decode_jpeg(data, pixel_format)
        if data.startswith(b"\x93NUMPY"):
            return _to_chw(_load_npy(data), pixel_format)
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
    """By decode_jpeg; by PIL what it can't decode."""
    frame, app1 = _find_jpeg_frame(data)
    # Zeros at the end, as an interrupted copy leaves them, would be decoded as gray.
    if data.rfind(b"\xff\xd9") < frame:
        raise ValueError("the end of the JPEG is missing")
    if frame and _count_scans(data, frame) > MAX_SCANS:
        raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
    if frame and decode_jpeg is not None and pixel_format.in_chans in JPEG_MODES:
        _check_size(*struct.unpack_from(">HH", data, frame + 5), pixel_format)
        encoded = bytearray(data)  # of bytes frombuffer would warn
        for start, _ in app1:  # torchcodec would turn the image by the first of them: now APP15
            encoded[start - 3] = 0xEF
        view = torch.frombuffer(encoded, dtype=torch.uint8)
        with suppress(RuntimeError):  # PIL has the better error message
            image = decode_jpeg(view, mode=JPEG_MODES[pixel_format.in_chans])
            segments = [data[start:end] for start, end in app1]
            return _upright(image, _jpeg_orientation(segments)) if segments else image
    return _decode_with_pil(data, pixel_format)


def _find_jpeg_frame(data):
    """→ offset of the frame header or 0; start and end of the contents of APP1 segments before it.

    ITU T.81, B.1, B.2.2.
    """
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
            app1.append((at + 4, end))
        at = end
    return 0, app1


def _count_scans(data, frame):
    """The number of scans, from the frame header to the end of the image; 1 for most JPEGs."""
    scans, at, is_sequential = 0, frame, data[frame + 1] in (0xC0, 0xC1)
    while at + 5 <= len(data) and data[at + 1] != 0xD9:
        at_scan = data[at + 1] == 0xDA
        scans += at_scan
        if at_scan and is_sequential and data[at + 4] == data[frame + 9]:
            return 1  # of all components; others would be an error
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if at_scan:  # coded data, in which 0xFF is followed by 0 or a restart
            marker = re.compile(rb"\xff[^\0\xd0-\xd7\xff]").search(data, at)
            at = marker.start() if marker else len(data)
    return scans


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
    if orientation in (2, 3, 6, 7):
        image = image.flip(-1)
    if orientation in (3, 4, 7, 8):
        image = image.flip(-2)
    return image


# The colors that are read, and their samples without alpha.
TIFF_COLORS = dict(MINISBLACK=1, MINISWHITE=1, PALETTE=1, RGB=3, YCBCR=3, SEPARATED=4)
PREMULTIPLIED, UNASSOCIATED = 1, 2  # alpha, among the kinds of extra samples
WEBP = 50001  # a compression that PIL's libtiff lacks
# None, LZW, Deflate, PackBits, LZMA, Zstandard: imagecodecs decompresses no more than is expected.
BOUNDED_COMPRESSIONS = (1, 5, 8, 32946, 32773, 34925, 34926, 50000, WEBP)


def _decode_tiff(data, pixel_format):
    """The first page if it has colors, or for one channel; else all gray pages of its size."""
    import tifffile

    in_chans, value_range = pixel_format.in_chans, pixel_format.value_range
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        colors, bits = getattr(page.photometric, "name", "unknown"), page.bitspersample
        has_alpha = page.extrasamples == (UNASSOCIATED,)
        height, width = page.imagelength, page.imagewidth
        # A small image may have a large tile.
        _check_size(max(height, page.tilelength), max(width, page.tilewidth), pixel_format)
        if PREMULTIPLIED in page.extrasamples:
            raise ValueError("a TIFF whose colors are multiplied by alpha: convert it to RGB")
        is_colored = in_chans == 3 and page.samplesperpixel > 1
        part = page if in_chans == 1 or is_colored else file.series[0]
        # Before they are read: hundreds of pages can be packed into little.
        channels = math.prod(part.shape) // (height * width)
        is_known = page.samplesperpixel == TIFF_COLORS.get(colors, 0) + has_alpha
        is_page = math.prod(part.shape) == math.prod(page.shape)
        if colors in TIFF_COLORS:
            _check_channels(channels, in_chans, converts=is_known and is_page)
        # PIL mistakes some planes for strips, and is wrong on big-endian BigTIFF.
        is_plain = page.planarconfig == 1 and page.compression != WEBP and not file.is_bigtiff
        is_plain = is_plain and bits <= 8 and page.sampleformat == 1
        if is_page and in_chans in (1, 3) and is_plain and is_known:
            with suppress(UnidentifiedImageError):
                return _decode_with_pil(data, pixel_format)
        if colors not in ("MINISBLACK", "MINISWHITE", "RGB") or bits < 8:
            raise ValueError(f"a TIFF of {bits}-bit {colors} pixels: convert it to RGB")
        if len(page.dataoffsets) < math.prod(page.chunked):  # they would be black
            raise ValueError("it lacks a part of its pixels")
        if page.compression not in BOUNDED_COMPRESSIONS:
            raise ValueError(f"a TIFF of compression {page.compression:d}: convert it to Deflate")
        if page.compression != 1 and importlib.util.find_spec("imagecodecs") is None:
            raise ValueError("a compressed TIFF, which needs: pip install imagecodecs")
        array = part.asarray(maxworkers=1)  # threads: the loader's workers are enough

    array = np.moveaxis(array, [part.axes.index("Y"), part.axes.index("X")], [0, 1])
    if in_chans in (1, 3) and has_alpha:
        array = array[..., :-1]
    if value_range is None and page.sampleformat == 1 and 8 < bits < 16:
        value_range = 0, 2**bits - 1
    image = _to_chw(array, pixel_format._replace(value_range=value_range))
    if colors == "MINISWHITE":
        image = 255 - image
    return _upright(image, page.tags.valueof(ORIENTATION, 1))


def _load_npy(data):
    """np.load, but a header that announces more than there is allocates nothing."""
    file = io.BytesIO(data)
    major, _ = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0
    if major > 1:
        read_header = np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read_header(file)
    except MemoryError:  # of Python's parser
        raise ValueError("its header is damaged") from None
    if math.prod(shape) * dtype.itemsize > len(data) - file.tell():
        raise ValueError("it is cut short")
    return np.load(io.BytesIO(data))


def _decode_with_pil(data, pixel_format):
    Image.MAX_IMAGE_PIXELS = pixel_format.max_pixels  # PIL's own limit, for all that it opens
    with Image.open(io.BytesIO(data), formats=PIL_FORMATS) as image:
        _check_size(image.height, image.width, pixel_format)
        if image.format == "TIFF" and image.mode == "P" and max(image.tag_v2[320]) < 256:
            raise ValueError("a TIFF whose palette has 8 bits in place of 16: convert it to RGB")
        # PIL keeps 8 bits of these.
        is_deep = image.format == "PNG" and data[24] == 16 and not image.mode.startswith("I")
        if pixel_format.value_range and (is_deep or image.format in RESCALED):
            raise ValueError(f"--value-range can't act on this {image.format}: convert it to TIFF")
        return convert_pil_image(image, pixel_format)


def convert_pil_image(image, pixel_format):
    """PIL's image → uint8 [C, H, W], upright; ValueError for what decode_image refuses."""
    image.load()  # this turns TIFFs upright
    orientation = 1
    with suppress(Exception):  # broken EXIF: the pixels are whole
        orientation = image.getexif().get(ORIENTATION, 1)
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip at 255
        value_range = (0, 65535) if image.format in RESCALED else pixel_format.value_range
        image = Image.fromarray(_to_uint8(np.asarray(image), value_range))
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
    array = _to_uint8(array, pixel_format.value_range)
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


def _to_uint8(array, value_range):
    """Numbers of any type → uint8; in types of more than 8 bits value_range becomes 0 … 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iuf":
        raise ValueError(f"pixels are {array.dtype}")
    if value_range is None:
        seen = f"{np.nanmin(array):g} to {np.nanmax(array):g}" if array.size else "nothing"
        raise ValueError(
            f"pixels are {array.dtype}, {seen}, of unknown range: --value-range LOW HIGH"
        )
    low, high = map(float, value_range)
    is_float = array.dtype.kind == "f"
    array = array.astype(np.result_type(array, np.float32) if is_float else np.float64)
    # NaN marks pixels without data in remote sensing: they become 0.
    np.nan_to_num(array, copy=False, nan=low)
    np.clip(array, low, high, out=array)
    array -= low
    array /= (high - low) / 255
    return array.astype(np.uint8)
