"""The photometric half of both views: parameters drawn by a worker, applied on the device.

`sample_params` draws the parameters for one view of one image; `augment` applies a batch of them:
jitter, grayscale, blur, solarize, flip, normalize. Each operation is that of
torchvision.transforms.v2.functional on floats in [0, 1], with a factor for each image instead of
one for the batch. Images without three channels have no colour: saturation, hue and grayscale leave
them as they are.
"""

import functools
import itertools
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from moco.compilation import inductor_or_eager

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA_WEIGHTS = (0.2989, 0.587, 0.114)
BLUR_SIGMA = (0.1, 2.0)  # pixels
SOLARIZE_THRESHOLD = 128 / 255


@dataclass(frozen=True)
class Policy:
    """Strengths and probabilities, by default the paper's (Appendix, after BYOL).

    A factor of brightness, contrast or saturation is drawn from 1 ± its strength, a shift of the
    hue from ± hue turns. A pair is (view 1, view 2).
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_p: float = 0.8
    grayscale_p: float = 0.2
    blur_p: tuple[float, float] = (1.0, 0.1)
    solarize_p: tuple[float, float] = (0.0, 0.2)
    flip_p: float = 0.5
    vertical_flip_p: float = 0.0


PAPER = Policy()


class Param(IntEnum):
    """Columns of the parameters of a view. The four of jitter come first: ORDER permutes 0 to 3."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3
    ORDER = 4  # index into JITTER_ORDERS
    GRAYSCALE = 5
    SIGMA = 6  # of the blur, in pixels; 0: none
    SOLARIZE = 7
    FLIP = 8
    VERTICAL_FLIP = 9


NUM_PARAMS = len(Param)
IDENTITY_PARAMS = (1, 1, 1, 0, 0, 0, 0, 0, 0, 0)  # they leave an image as it is
JITTER_ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def sample_params(rng, view, policy=PAPER):
    """Parameters of one view (0 or 1) from a numpy Generator → float32 [NUM_PARAMS].

    Always draws the same 11 numbers, so that the generator's state after a view does not depend on
    their values; one more for a policy with vertical flips.
    """
    u = rng.random(11)
    u_jitter, u_brightness, u_contrast, u_saturation, u_hue, u_order = u[:6]
    u_grayscale, u_blur, u_sigma, u_solarize, u_flip = u[6:]

    params = np.array(IDENTITY_PARAMS, np.float32)
    if u_jitter < policy.jitter_p:
        params[Param.BRIGHTNESS] = 1 + policy.brightness * (2 * u_brightness - 1)
        params[Param.CONTRAST] = 1 + policy.contrast * (2 * u_contrast - 1)
        params[Param.SATURATION] = 1 + policy.saturation * (2 * u_saturation - 1)
        params[Param.HUE] = policy.hue * (2 * u_hue - 1)
        params[Param.ORDER] = int(u_order * len(JITTER_ORDERS))
    params[Param.GRAYSCALE] = u_grayscale < policy.grayscale_p
    if u_blur < policy.blur_p[view]:
        low, high = BLUR_SIGMA
        params[Param.SIGMA] = low + (high - low) * u_sigma
    params[Param.SOLARIZE] = u_solarize < policy.solarize_p[view]
    params[Param.FLIP] = u_flip < policy.flip_p
    if policy.vertical_flip_p > 0:
        params[Param.VERTICAL_FLIP] = rng.random() < policy.vertical_flip_p
    return params


@torch.no_grad()
def augment(images, params, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Applies `params` and normalizes: uint8 [B, C, H, W] on any device → float32 [B, C, H, W].

    params: float32 [B, NUM_PARAMS] in CPU memory. Which images an operation changes is decided
    there, so that nothing waits for the device and an operation costs only the images it changes.
    mean, std: one number per channel.
    """
    x = to_float(images)
    device_params = params.to(x.device, non_blocking=x.is_cuda)
    has_colour = x.shape[1] == 3

    def apply(operation, selected, column):
        apply_to(x, selected, operation, device_params[:, column])

    order = JITTER_ORDERS[params[:, Param.ORDER].long()]  # [B, 4]
    # Each image has its own order: at position p, an operation acts on the images whose p-th it is.
    for position in range(4):
        for column, operation in jitter_operations(has_colour):
            changes = params[:, column] != IDENTITY_PARAMS[column]
            apply(operation, changes & (order[:, position] == column), column)
    if has_colour:
        apply(lambda x, _: grayscale(x), params[:, Param.GRAYSCALE] > 0, Param.GRAYSCALE)
    apply(gaussian_blur, params[:, Param.SIGMA] > 0, Param.SIGMA)
    apply(lambda x, _: solarize(x), params[:, Param.SOLARIZE] > 0, Param.SOLARIZE)
    apply(lambda x, _: x.flip(-1), params[:, Param.FLIP] > 0, Param.FLIP)
    apply(lambda x, _: x.flip(-2), params[:, Param.VERTICAL_FLIP] > 0, Param.VERTICAL_FLIP)
    return normalize(x, mean, std)


@torch.no_grad()
def augment_compiled(images, params, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """As augment, for a GPU: operations act on all images, in a few kernels made by torch.compile.

    That is more arithmetic, and fewer passes over memory, which are what takes time there.
    """
    device = images.device
    device_params = params.to(device, non_blocking=images.is_cuda)
    x = _compiled(jitter_and_grayscale)(images, device_params, _jitter_orders(device))
    apply_to(x, params[:, Param.SIGMA] > 0, gaussian_blur, device_params[:, Param.SIGMA])
    mean, std = _per_channel(tuple(mean), device), _per_channel(tuple(std), device)
    return _compiled(solarize_flip_normalize)(x, device_params, mean, std)


def jitter_and_grayscale(images, params, orders):
    """uint8 → [0, 1]; params, orders (JITTER_ORDERS): on the device."""
    x = to_float(images)
    has_colour = x.shape[1] == 3
    order = orders[params[:, Param.ORDER].long()]  # [B, 4]
    for position in range(4):
        jittered = x
        for column, operation in jitter_operations(has_colour):
            selected = _per_image(order[:, position] == int(column))  # no enum for Dynamo
            jittered = torch.where(selected, operation(x, params[:, column]), jittered)
        x = jittered
    if has_colour:
        x = torch.where(_per_image(params[:, Param.GRAYSCALE] > 0), grayscale(x), x)
    return x


def solarize_flip_normalize(x, params, mean, std):
    """params: on the device; mean, std: [C, 1, 1]."""
    x = torch.where(_per_image(params[:, Param.SOLARIZE] > 0), solarize(x), x)
    x = torch.where(_per_image(params[:, Param.FLIP] > 0), x.flip(-1), x)
    x = torch.where(_per_image(params[:, Param.VERTICAL_FLIP] > 0), x.flip(-2), x)
    return (x - mean) / std


def apply_to(x, selected, operation, factor):
    """x[i] ← operation(x[i], factor[i]) where `selected` [B], in CPU memory, is true."""
    i = selected.nonzero().squeeze(1).to(x.device, non_blocking=x.is_cuda)
    if len(i) == len(x):
        x.copy_(operation(x, factor))
    elif len(i) > 0:
        x[i] = operation(x[i], factor[i])


def to_float(images):
    """uint8 → float32 in [0, 1]."""
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 255


def jitter_operations(has_colour):
    """→ (column, operation); without colour brightness and contrast alone."""
    jitter = {Param.BRIGHTNESS: adjust_brightness, Param.CONTRAST: adjust_contrast}
    if has_colour:
        jitter |= {Param.SATURATION: adjust_saturation, Param.HUE: adjust_hue}
    return jitter.items()


def _per_image(values):
    return values[:, None, None, None]


@functools.cache
def _compiled(function):
    return torch.compile(function, backend=inductor_or_eager, dynamic=False)


@functools.cache  # one copy to the device for all batches: each copy would wait for it
def _jitter_orders(device):
    return JITTER_ORDERS.to(device)


def normalize(x, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """[..., C, H, W] in [0, 1] → (x − mean) / std, per channel."""
    return (x - _per_channel(tuple(mean), x.device)) / _per_channel(tuple(std), x.device)


def denormalize(x, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    return x * _per_channel(tuple(std), x.device) + _per_channel(tuple(mean), x.device)


@functools.cache  # one copy to the device for all batches: each copy would wait for it
def _per_channel(values, device):
    return torch.tensor(values, device=device)[:, None, None]


# The operations: x [B, C, H, W] in [0, 1], factor [B] → the same shape and range.


def adjust_brightness(x, factor):
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Blends each image with its mean luma; a factor below 1 lowers the contrast."""
    return blend(x, luminance(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x, factor):
    return blend(x, luminance(x), factor)


def adjust_hue(x, shift):
    """Rotates the hue by shift · 360°, shift in [−.5, .5].

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
    n = torch.arange(5, 0, -2, dtype=x.dtype, device=x.device)[:, None, None]
    k = (n + hue[:, None]) % 6  # [B, 3, H, W]
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def grayscale(x):
    return luminance(x).expand_as(x)


def gaussian_blur(x, sigma, dtype=None):
    """Separable Gaussian, reflected at the edges, cut at 3 of the largest sigma (6 pixels).

    As one banded matrix for each image and axis, [H, H] and [W, W]: the sum over the taps becomes
    a batched matrix product, and an image smaller than the kernel reflects more than once.
    dtype: of the product, on CUDA float16 by default: fast there, and images have 8 bits.
    """
    height, width = x.shape[-2:]
    dtype = dtype or (torch.float16 if x.is_cuda else x.dtype)
    vertical = _blur_matrix(sigma, height)[:, None].to(dtype)  # [B, 1, H, H]
    horizontal = _blur_matrix(sigma, width)[:, None].to(dtype)  # [B, 1, W, W]
    return (vertical @ x.to(dtype) @ horizontal.mT).to(x.dtype)


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
    """Luma of RGB, the mean of any other channels: [..., C, H, W] → [..., 1, H, W]."""
    if x.shape[-3] != 3:
        return x.mean(-3, keepdim=True)
    r, g, b = LUMA_WEIGHTS
    return r * x[..., :1, :, :] + g * x[..., 1:2, :, :] + b * x[..., 2:, :, :]


def blend(x, other, factor):
    factor = factor[:, None, None, None]
    return (factor * x + (1 - factor) * other).clamp_(0, 1)
