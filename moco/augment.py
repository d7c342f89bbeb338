"""The photometric half of both views: parameters drawn by the worker, applied on the device.

`draw` makes one row of numbers for one view of one image; `augment` applies a batch of rows. Each
operation is that of torchvision.transforms.v2.functional on floats in [0, 1], with a factor for
each image instead of one for the batch: jitter, grayscale, blur, solarize, flip, normalise. Images
of other than three channels have no colour: saturation, hue and grayscale leave them as they are.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch

from moco import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's; their averages:
MEAN_OF_ANY, STD_OF_ANY = 0.449, 0.226
GRAY = (0.2989, 0.587, 0.114)

# Strengths and probabilities of the paper (Appendix, after BYOL); a pair is (view 1, view 2).
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
JITTER_P, GRAYSCALE_P, FLIP_P = 0.8, 0.2, 0.5
BLUR_SIGMA, BLUR_P = (0.1, 2.0), (1.0, 0.1)
SOLARIZE_THRESHOLD, SOLARIZE_P = 128 / 255, (0.0, 0.2)

# The columns of a row. Jitter's four come first, so that `order` can name them by number.
BRIGHT, CONTR, SATUR, HUE_SHIFT, ORDER, GRAYSCALE, SIGMA, SOLARIZE, FLIP = range(9)
COLUMNS = 9
NOTHING = (1, 1, 1, 0, 0, 0, 0, 0, 0)  # the row that leaves an image as it is
ORDERS = tuple(itertools.permutations(range(4)))
ORDERS_TENSOR = torch.tensor(ORDERS)


class Pixels(NamedTuple):
    """What the numbers in an image mean.

    mean, std: of each channel, in [0, 1], to normalise by. max_value: what becomes 1 in files of
    more than 8 bits a channel; None: 65535, and floats are refused.
    """

    in_chans: int = 3
    mean: tuple = MEAN
    std: tuple = STD
    max_value: float | None = None

    @classmethod
    def chosen(cls, args, known=None):
        """By the flags, else as in `known`, a checkpoint; else ImageNet's mean and deviation, their
        averages where there are not three channels."""
        known = known or {}
        n = args.in_chans or known.get("in_chans") or 3
        mean, std = (MEAN, STD) if n == 3 else ((MEAN_OF_ANY,) * n, (STD_OF_ANY,) * n)
        mean = args.mean or known.get("mean") or mean
        std = args.std or known.get("std") or std
        for flag, values in (("--mean", mean), ("--std", std)):
            if len(values) != n:
                raise UserError(
                    f"{flag} takes a number for each of {n} channels, not {len(values)}"
                )
        return cls(n, tuple(mean), tuple(std), args.max_value or known.get("max_value"))

    @classmethod
    def of(cls, setting):
        return cls(*(setting[name] for name in cls._fields))


RGB = Pixels()


def draw(rng, view):
    """Parameters of one view (0 or 1) from a numpy Generator → float32 [COLUMNS].

    Every number is drawn whether used or not: what follows never depends on what was chosen.
    """
    u = rng.random(COLUMNS + 2)
    row = np.array(NOTHING, np.float32)
    if u[0] < JITTER_P:
        for column, strength in enumerate((BRIGHTNESS, CONTRAST, SATURATION)):
            row[column] = 1 + strength * (2 * u[1 + column] - 1)
        row[HUE_SHIFT] = HUE * (2 * u[4] - 1)
        row[ORDER] = int(u[5] * len(ORDERS))
    row[GRAYSCALE] = u[6] < GRAYSCALE_P
    if u[7] < BLUR_P[view]:
        low, high = BLUR_SIGMA
        row[SIGMA] = low + (high - low) * u[8]
    row[SOLARIZE] = u[9] < SOLARIZE_P[view]
    row[FLIP] = u[10] < FLIP_P
    return row


@torch.no_grad()
def augment(images, rows, pixels=RGB):
    """images: uint8 [B, C, H, W] on any device; rows: float32 [B, COLUMNS] → float32, normalised.

    rows stay in CPU memory: which images an operation touches is decided there, so that nothing
    waits for the device and each operation costs only the images it changes.
    """
    x = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
    device_rows = rows.to(x.device, non_blocking=x.is_cuda)

    def apply(operation, chosen, column):
        i = chosen.nonzero().squeeze(1).to(x.device, non_blocking=x.is_cuda)
        if len(i) == len(x):
            x.copy_(operation(x, device_rows[:, column]))
        elif len(i):
            x[i] = operation(x[i], device_rows[i, column])

    order = ORDERS_TENSOR[rows[:, ORDER].long()]  # [B, 4]
    jitter = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    if pixels.in_chans != 3:
        jitter = jitter[:2]
    for position in range(4):
        for column, operation in enumerate(jitter):
            changed = rows[:, column] != NOTHING[column]
            apply(operation, changed & (order[:, position] == column), column)
    if pixels.in_chans == 3:
        apply(lambda x, _: grayscale(x), rows[:, GRAYSCALE] > 0, GRAYSCALE)
    apply(gaussian_blur, rows[:, SIGMA] > 0, SIGMA)
    apply(lambda x, _: solarize(x), rows[:, SOLARIZE] > 0, SOLARIZE)
    apply(lambda x, _: x.flip(-1), rows[:, FLIP] > 0, FLIP)
    return normalize(x, pixels)


class Views:
    """Views that are augmented when taken: `views[a:b]` → float32 [b − a, C, H, W].

    images: uint8 [N, C, H, W], rows: [N, COLUMNS], as for `augment`.
    """

    def __init__(self, images, rows, pixels=RGB):
        self.images, self.rows, self.pixels = images, rows, pixels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, part):
        with torch.autocast(self.images.device.type, enabled=False):  # taken inside the model
            return augment(self.images[part], self.rows[part], self.pixels)


def normalize(x, pixels=RGB):
    """[..., C, H, W] in [0, 1] → mean 0 and deviation 1 in ImageNet, or in the user's images."""
    return (x - _channels(pixels.mean, x.device)) / _channels(pixels.std, x.device)


def denormalize(x, pixels=RGB):
    return x * _channels(pixels.std, x.device) + _channels(pixels.mean, x.device)


def visible(x, pixels=RGB):
    """Normalised [..., C, H, W] → RGB in [0, 1]; of other than three channels their mean, gray."""
    x = denormalize(x, pixels).clamp(0, 1)
    return x if pixels.in_chans == 3 else luminance(x).expand(*x.shape[:-3], 3, -1, -1)


@functools.cache  # a copy to the device, once: each would wait for it
def _channels(values, device):
    return torch.tensor(values, device=device)[:, None, None]


# Below: x [B, C, H, W] in [0, 1], factor [B] → the same shape and range.


def adjust_brightness(x, factor):
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Towards (below 1) or away from the mean gray of each image."""
    return blend(x, luminance(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x, factor):
    return blend(x, luminance(x), factor)


def adjust_hue(x, shift):
    """Turns the hue by shift · 360°, shift in [−.5, .5].

    In HSV with value v and chroma c, channel n ∈ (5, 3, 1) of hue h ∈ [0, 6) is
    v − c·clamp(min(k, 4 − k), 0, 1), k = (n + h) mod 6; only h changes.
    """
    r, g, b = x.unbind(1)
    value, brightest = x.max(1)
    chroma = value - x.amin(1)
    c = torch.where(chroma == 0, 1.0, chroma)  # gray has no hue, and chroma 0 keeps it gray
    from_green_or_blue = torch.where(brightest == 1, (b - r) / c + 2, (r - g) / c + 4)
    hue = torch.where(brightest == 0, (g - b) / c, from_green_or_blue)
    hue = hue + 6 * shift[:, None, None]
    n = _channels((5.0, 3.0, 1.0), x.device)
    k = (n + hue[:, None]) % 6  # [B, 3, H, W]
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def grayscale(x):
    return luminance(x).expand_as(x)


def gaussian_blur(x, sigma):
    """Separable Gaussian, reflected at the edges, cut at 3 of the largest sigma (6 pixels).

    As one banded matrix for each image and axis, [H, H] and [W, W]: the sum over the taps becomes
    a batched matrix product, and an image smaller than the kernel reflects more than once.
    """
    height, width = x.shape[-2:]
    rows = _blur_matrix(sigma, height)[:, None]  # [B, 1, H, H]
    columns = _blur_matrix(sigma, width)[:, None]
    return rows @ x @ columns.mT


def _blur_matrix(sigma, size):
    """Row i: the Gaussian around i, its taps outside folded back in: [B] → [B, size, size]."""
    radius = int(np.ceil(3 * BLUR_SIGMA[1]))
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)  # [B, taps]
    period = max(2 * (size - 1), 1)  # reflection without repeating the edge: … 2 1 0 1 2 …
    source = (torch.arange(size, device=sigma.device)[:, None] + tap) % period
    source = torch.minimum(source, (period - source) % period if size > 1 else source)
    matrix = sigma.new_zeros(len(sigma), size, size)
    return matrix.scatter_add_(
        2, source.expand(len(sigma), -1, -1), weight[:, None].expand(-1, size, -1)
    )


def solarize(x):
    return torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x)


def luminance(x):
    """The brightness of colours, the mean of other channels: [..., C, H, W] → [..., 1, H, W]."""
    if x.shape[-3] != 3:
        return x.mean(-3, keepdim=True)
    r, g, b = GRAY
    return r * x[..., :1, :, :] + g * x[..., 1:2, :, :] + b * x[..., 2:, :, :]


def blend(x, other, factor):
    factor = factor[:, None, None, None]
    return (factor * x + (1 - factor) * other).clamp_(0, 1)
