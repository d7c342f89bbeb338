"""Training crops of fine-tuning: timm's augmentation, seeded by the sample like all others."""

import random
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from engine.data.crops import BatchDataset
from engine.errors import UserError


class TransformedCrops(BatchDataset):
    """Keys (epoch, index) → float32 [N, C, H, W], labels [N].

    transform: of an image; it draws from the global generators, which each key seeds.
    """

    def __init__(self, dataset, transform, seed):
        super().__init__(dataset, seed)
        self.transform = transform

    def crop_image(self, image, key):
        seed_generators(self.seed, *key, include_gpu=False)
        return self.transform(image)


def seed_generators(*key, include_gpu=True):
    """Seeds every global generator by `key`; a GPU's, too, for drop path draws there."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    if include_gpu:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def create_training_transform(size, pixel_format, crop_min, policy, erasing, interpolation):
    """timm's training transform: uint8 [C, H, W] → float32 [C, *size], normalized.

    policy: timm's name of an augmentation policy, or "none". erasing: probability of it.
    UserError for a policy that timm does not know or that needs RGB or gray.
    """
    if pixel_format.in_chans not in (1, 3):
        return _create_without_policy(size, pixel_format, crop_min, policy, erasing, interpolation)
    # Its strongest level keeps no bits, which Pillow 13 refuses.
    NAME_TO_OP["PosterizeIncreasing"] = NAME_TO_OP["Posterize"] = _posterize
    # timm's transforms are for RGB: gray is expanded to three equal channels and reduced again.
    repeats = 3 // pixel_format.in_chans
    try:
        transform = create_transform(
            (3, *size),
            is_training=True,
            scale=(crop_min, 1.0),
            color_jitter=0.0,
            auto_augment=None if policy == "none" else policy,
            interpolation=interpolation,
            mean=pixel_format.mean * repeats,
            std=pixel_format.std * repeats,
            re_prob=erasing,
            re_mode="pixel",
        )
        seed_generators(0, include_gpu=False)
        transform(Image.new("RGB", (8, 8)))  # some policies fail only when they see an image
    except (AssertionError, KeyError, ValueError):
        raise UserError(f"timm knows no augmentation policy --aa {policy}; none: off") from None
    return partial(_apply_to_tensor, transform)


def _posterize(image, bits, **_):
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _apply_to_tensor(transform, image):
    """image: uint8 [C, H, W] with C 1 or 3 → float32 [C, H, W]."""
    num_channels = len(image)
    return transform(tv.to_pil_image(image.expand(3, -1, -1)))[:num_channels]


def _create_without_policy(size, pixel_format, crop_min, policy, erasing, interpolation):
    """The same for numbers of channels that PIL can't hold."""
    if policy != "none":
        channels = f"{pixel_format.in_chans} channels"
        raise UserError(f"--aa {policy} is for RGB and gray, not {channels}: --aa none")
    interpolation = v2.InterpolationMode(interpolation)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (crop_min, 1.0), interpolation=interpolation),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(pixel_format.mean, pixel_format.std),
            RandomErasing(erasing, mode="pixel", device="cpu"),
        ]
    )
