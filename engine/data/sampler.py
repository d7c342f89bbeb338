"""Which images a batch has: batches of keys (epoch, index), the same for any number of ranks."""

import math

import numpy as np
from torch.utils.data import Sampler

from engine.errors import UserError
from moco.distributed import rank, world_size

ORDER_STREAM = 1  # of the generators seeded by (seed, epoch, index, stream): an epoch's order


class EpochBatchSampler(Sampler):
    """Batches of keys (epoch, index) for this rank: shuffled by (seed, epoch), no image twice.

    The global batch is cut into world_size pieces in rank order, so that all ranks' batches
    together are the same for any number of ranks. The `num_dropped` images that don't fill a batch
    are not shown in this epoch. repeats: repeated augmentation; an epoch has as many views, of
    fewer images, each shown that often. UserError for an impossible batch size.
    """

    def __init__(self, num_images, batch_size, seed, repeats=1):
        if batch_size % world_size():
            raise UserError(f"--batch-size {batch_size} is not divisible by {world_size()} ranks")
        if batch_size < 2 * world_size():
            raise UserError(f"--batch-size {batch_size}: BatchNorm needs 2 images in each process")
        if num_images < batch_size:
            raise UserError(f"lower --batch-size {batch_size}: {num_images} images don't fill one")
        self.num_images, self.batch_size = num_images, batch_size
        self.seed, self.repeats = seed, repeats
        self.epoch = self.first_batch = 0
        self.num_dropped = num_images - math.ceil(len(self) * batch_size / repeats)

    def __len__(self):
        """Steps per epoch."""
        return self.num_images // self.batch_size

    def __str__(self):
        dropped = f"{self.num_dropped} images of each epoch dropped"
        return f"{self.batch_size}; {len(self)} steps per epoch, {dropped}"

    def set_epoch(self, epoch, first_batch=0):
        """The next iteration is that of `epoch`, from its batch `first_batch` on."""
        self.epoch, self.first_batch = epoch, first_batch

    def state_dict(self):
        return {"images": self.num_images}

    def load_state_dict(self, state):
        if not isinstance(state["images"], int):
            raise TypeError("'images' is not a number")
        if state["images"] != self.num_images:
            now = f"DIR holds {self.num_images} now"
            raise UserError(f"the run has {state['images']} images, {now}")

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch, 0, ORDER_STREAM))
        order = rng.permutation(self.num_images).repeat(self.repeats)
        order = order[: len(self) * self.batch_size]
        # Each view of an image needs an epoch of its own to draw from: epoch · repeats, + 1, …
        epochs = self.epoch * self.repeats + np.arange(len(order)) % self.repeats
        keys = np.stack([epochs, order], 1)
        # [steps, world_size, batch per rank, (epoch, index)]
        keys = keys.reshape(len(self), world_size(), -1, 2)
        for batch in keys[self.first_batch :, rank()]:
            yield [tuple(key) for key in batch.tolist()]
