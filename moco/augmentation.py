"""The photometric half of both views: parameters drawn by a worker, applied on the device.

`sample_params` draws the parameters for one view of one image; `augment` applies a batch of them:
jitter, grayscale, blur, solarize, flip, normalize. Each operation is that of
torchvision.transforms.v2.functional on floats in [0, 1], with a factor for each image instead of
one for the batch. Images without three channels have no colour: saturation, hue and grayscale leave
them as they are.
"""

import functools
import itertools
from enum import IntEnum

import numpy as np
import torch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA_WEIGHTS = (0.2989, 0.587, 0.114)

# Strengths and probabilities of the paper (Appendix, after BYOL); a pair is (view 1, view 2).
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
JITTER_P, GRAYSCALE_P, FLIP_P = 0.8, 0.2, 0.5
BLUR_SIGMA, BLUR_P = (0.1, 2.0), (1.0, 0.1)
SOLARIZE_THRESHOLD, SOLARIZE_P = 128 / 255, (0.0, 0.2)


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


NUM_PARAMS = len(Param)
IDENTITY_PARAMS = (1, 1, 1, 0, 0, 0, 0, 0, 0)  # they leave an image as it is
JITTER_ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def sample_params(rng, view):
    """Parameters of one view (0 or 1) from a numpy Generator → float32 [NUM_PARAMS].

    Always draws the same 11 numbers, so that the generator's state after a view does not depend on
    their values.
    """
    u = rng.random(NUM_PARAMS + 2)
    u_jitter, u_brightness, u_contrast, u_saturation, u_hue, u_order = u[:6]
    u_grayscale, u_blur, u_sigma, u_solarize, u_flip = u[6:]

    params = np.array(IDENTITY_PARAMS, np.float32)
    if u_jitter < JITTER_P:
        params[Param.BRIGHTNESS] = 1 + BRIGHTNESS * (2 * u_brightness - 1)
        params[Param.CONTRAST] = 1 + CONTRAST * (2 * u_contrast - 1)
        params[Param.SATURATION] = 1 + SATURATION * (2 * u_saturation - 1)
        params[Param.HUE] = HUE * (2 * u_hue - 1)
        params[Param.ORDER] = int(u_order * len(JITTER_ORDERS))
    params[Param.GRAYSCALE] = u_grayscale < GRAYSCALE_P
    if u_blur < BLUR_P[view]:
        low, high = BLUR_SIGMA
        params[Param.SIGMA] = low + (high - low) * u_sigma
    params[Param.SOLARIZE] = u_solarize < SOLARIZE_P[view]
    params[Param.FLIP] = u_flip < FLIP_P
    return params


@torch.no_grad()
def augment(images, params, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Applies `params` and normalizes: uint8 [B, C, H, W] on any device → float32 [B, C, H, W].

    params: float32 [B, NUM_PARAMS] in CPU memory. Which images an operation changes is decided
    there, so that nothing waits for the device and an operation costs only the images it changes.
    mean, std: one number per channel.
    """
    x = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
    device_params = params.to(x.device, non_blocking=x.is_cuda)
    has_colour = x.shape[1] == 3

    def apply(operation, selected, column):
        """x[i] ← operation(x[i], params[i, column]) where `selected` [B] is true."""
        i = selected.nonzero().squeeze(1).to(x.device, non_blocking=x.is_cuda)
        if len(i) == len(x):
            x.copy_(operation(x, device_params[:, column]))
        elif len(i) > 0:
            x[i] = operation(x[i], device_params[i, column])

    jitter = {Param.BRIGHTNESS: adjust_brightness, Param.CONTRAST: adjust_contrast}
    if has_colour:
        jitter |= {Param.SATURATION: adjust_saturation, Param.HUE: adjust_hue}
    order = JITTER_ORDERS[params[:, Param.ORDER].long()]  # [B, 4]
    # Each image has its own order: at position p, an operation acts on the images whose p-th it is.
    for position in range(4):
        for column, operation in jitter.items():
            changes = params[:, column] != IDENTITY_PARAMS[column]
            apply(operation, changes & (order[:, position] == column), column)
    if has_colour:
        apply(lambda x, _: grayscale(x), params[:, Param.GRAYSCALE] > 0, Param.GRAYSCALE)
    apply(gaussian_blur, params[:, Param.SIGMA] > 0, Param.SIGMA)
    apply(lambda x, _: solarize(x), params[:, Param.SOLARIZE] > 0, Param.SOLARIZE)
    apply(lambda x, _: x.flip(-1), params[:, Param.FLIP] > 0, Param.FLIP)
    return normalize(x, mean, std)


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
    n = _per_channel((5.0, 3.0, 1.0), x.device)
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
    vertical = _blur_matrix(sigma, height)[:, None]  # [B, 1, H, H]
    horizontal = _blur_matrix(sigma, width)[:, None]  # [B, 1, W, W]
    return vertical @ x @ horizontal.mT


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
