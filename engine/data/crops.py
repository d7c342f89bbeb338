"""Batches of crops, made by a worker: uint8, on the CPU.

The crop and the augmentation of image i in epoch e under seed s are a pure function of (s, e, i):
the sampler hands out keys (epoch, index), so workers, ranks and restarts make no difference.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional as tv

from engine.data.decode import UnreadableImage
from engine.data.quiet import quiet_libraries
from engine.errors import UserError
from moco.augmentation import NUM_PARAMS, PAPER, sample_params

PREFETCH_FACTOR = 2  # batches that each worker prepares ahead
MAX_ATTEMPTS = 32  # to find an image that can be read, before the run gives up
MAX_ASPECT = 16  # what is more elongated is cut before it is resized

# Generators are seeded by (seed, epoch, index) for an image, and by one number more for
# the first image in place of one that can't be read, 2; the second, 3; …; sampler.py has 1.
SUBSTITUTE_STREAM = 2


class BatchDataset:
    """Makes whole batches, for DataLoader; unpack_batches unpacks them.

    A subclass defines crop_image(image, key) for a batch of crops and labels, or make_batch. A key
    is (epoch, index).
    """

    def __init__(self, dataset, seed=0):
        self.dataset, self.seed = dataset, seed

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, keys):
        """→ what make_batch returns, and path → reason of images that could not be read.

        The first may be a UserError: raised in a worker, it would be shown with a traceback.
        """
        unreadable = {}
        with quiet_libraries():
            try:
                return self.make_batch(keys, unreadable), unreadable
            except UserError as error:
                return error, unreadable

    def make_batch(self, keys, unreadable):
        """→ crops [N, C, H, W], labels [N] of the images that are shown."""
        crops, indices = [], []
        for key in keys:
            image, index = self.read(key, unreadable)
            crops.append(self.crop_image(image, key))
            indices.append(index)
        return torch.stack(crops), self.dataset.labels[indices]

    def read(self, key, unreadable):
        """Reads the image of a key, or another one if it can't be read → image, its index.

        Which other one is a pure function of the seed and the key. What can't be read goes into
        `unreadable`: path → reason. UserError after MAX_ATTEMPTS images in a row.
        """
        index, errors = key[1], []
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self.dataset.read(index), index
            except UnreadableImage as error:
                unreadable[error.path] = error.reason
                errors.append(error)
            rng = np.random.default_rng((self.seed, *key, SUBSTITUTE_STREAM + attempt))
            index = int(rng.integers(len(self.dataset)))
        first = f"{errors[0].path}: {errors[0].reason}"
        message = f"{MAX_ATTEMPTS} unreadable images in a row, the first is {first}"
        raise UserError(message, exit_code=1, rank_local=True)


class TwoCrops(BatchDataset):
    """Keys → crops uint8 [2, N, C, H, W], params float32 [2, N, NUM_PARAMS].

    size: (H, W) in pixels; crop_min: smallest fraction of the area that a crop keeps; policy: of
    the augmentation.
    Buffer reuse: a worker's crops are overwritten two steps after they were handed over; clone what
    is needed for longer.
    """

    def __init__(self, dataset, size, crop_min, seed, policy=PAPER):
        super().__init__(dataset, seed)
        self.size, self.crop_min, self.policy = size, crop_min, policy
        self._buffers = []

    def make_batch(self, keys, unreadable):
        channels = self.dataset.pixel_format.in_chans
        crops = self._next_buffer(2, len(keys), *self.size, channels).permute(0, 1, 4, 2, 3)
        params = np.empty((2, len(keys), NUM_PARAMS), np.float32)
        for n, key in enumerate(keys):
            rng = np.random.default_rng((self.seed, *key))
            image, _ = self.read(key, unreadable)
            for view in range(2):
                box = random_crop_box(rng, *image.shape[1:], self.crop_min)
                crops[view, n] = resized_crop(image, box, self.size)
                params[view, n] = sample_params(rng, view, self.policy)
        return crops, torch.from_numpy(params)

    def _next_buffer(self, *shape):
        """A uint8 tensor; in a worker in shared memory, which is reused: new pages take longer."""
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        # PREFETCH_FACTOR batches wait, one is used by the main process, one is on its way there.
        if len(self._buffers) < PREFETCH_FACTOR + 2:
            self._buffers.append(torch.empty(shape, dtype=torch.uint8).share_memory_())
        else:
            self._buffers.append(self._buffers.pop(0))
        return self._buffers[-1]


def random_crop_box(rng, height, width, crop_min):
    """RandomResizedCrop's box: area U(crop_min, 1), ratio 3/4 … 4/3 → top, left, height, width."""
    for _ in range(10):
        area = height * width * rng.uniform(crop_min, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # An image too elongated for that: the largest center box of an allowed ratio.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image, box, size):
    """uint8 [C, H, W] → [C, *size]; box: top, left, height, width."""
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    # torch's fastest kernel needs the channels of a pixel side by side, and no gap between lines.
    crop = crop.contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, size, mode="bilinear", antialias=True)[0]


class LabelledCrops(BatchDataset):
    """Keys → uint8 [N, C, H, W], labels [N]: random crop and horizontal flip.

    The training views of the linear protocol; arguments as TwoCrops has them.
    """

    def __init__(self, dataset, size, crop_min, seed):
        super().__init__(dataset, seed)
        self.size, self.crop_min = size, crop_min

    def crop_image(self, image, key):
        rng = np.random.default_rng((self.seed, *key))
        box = random_crop_box(rng, *image.shape[1:], self.crop_min)
        crop = resized_crop(image, box, self.size)
        return crop.flip(-1) if rng.random() < 0.5 else crop


class CenterCrops(BatchDataset):
    """Indices → uint8 [N, C, H, W], without augmentation; positions [N] in the list of indices.

    As in the linear protocol, resized to 256/224 of `size` and cropped; an image of `size` stays as
    it is. An unreadable image has no substitute: N is smaller.
    """

    def __init__(self, dataset, size, interpolation="bilinear"):
        super().__init__(dataset)
        self.size, self.interpolation = size, tv.InterpolationMode(interpolation)

    def make_batch(self, indices, unreadable):
        channels = self.dataset.pixel_format.in_chans
        crops = torch.empty(len(indices), channels, *self.size, dtype=torch.uint8)
        is_read = torch.ones(len(indices), dtype=torch.bool)
        for n, index in enumerate(indices):
            try:
                crops[n] = self.crop(self.dataset.read(index))
            except UnreadableImage as error:
                unreadable[error.path] = error.reason
                is_read[n] = False
        return crops[is_read], is_read.nonzero().flatten()

    def crop(self, image):
        """uint8 [C, H, W] → uint8 [C, *size]."""
        if image.shape[1:] == self.size:
            return image
        # Crop very elongated images first: resizing them whole could allocate gigabytes.
        (height, width), (h, w) = image.shape[1:], self.size
        max_height = max(1, MAX_ASPECT * width * h // w)
        max_width = max(1, MAX_ASPECT * height * w // h)
        image = tv.center_crop(image, [min(height, max_height), min(width, max_width)])
        scale = max(s * 256 / 224 / side for s, side in zip(self.size, image.shape[1:]))
        # Rounded down, as torchvision's Resize does it; 1e-6 for 255.999….
        resized = [max(s, int(side * scale + 1e-6)) for s, side in zip(self.size, image.shape[1:])]
        image = tv.resize(image, resized, self.interpolation, antialias=True)
        return tv.center_crop(image, self.size)
