"""Cropping, sampling, loading: nothing but (s, e, i) matters."""

import time
from itertools import chain

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from moco import UserError, distributed
from moco.data import (
    CentreCrop,
    EpochBatches,
    LabelledCrop,
    TwoCrops,
    create_loader,
    crop_box,
)
from moco.sources import Arrays, load_data

CPU = torch.device("cpu")


def test_views_are_a_function_of_seed_epoch_and_index(image_file, tmp_path):
    for i in range(6):
        image_file(f"images/{i}.jpg", height=30 + i)
    source = load_data(str(tmp_path / "images")).train

    def views(seed, keys, workers):
        batches = [keys[i : i + 2] for i in range(0, len(keys), 2)]
        loader = create_loader(TwoCrops(source, (24, 16), 0.2, seed), batches, workers, CPU)
        crops, rows = zip(*((crops.clone(), rows) for crops, rows in loader))
        return torch.cat(crops, 1), torch.cat(rows, 1)

    keys = [(epoch, i) for epoch in (0, 1) for i in range(6)]
    crops, rows = views(0, keys, workers=0)
    assert crops.shape == (2, 12, 3, 24, 16) and crops.dtype == torch.uint8
    other = views(0, keys[::-1], workers=2)
    assert torch.equal(other[0].flip(1), crops) and torch.equal(other[1].flip(1), rows)
    assert not torch.equal(rows[:, :6], rows[:, 6:])  # another epoch
    assert not torch.equal(views(1, keys, workers=0)[1], rows)  # another seed
    assert not torch.equal(rows[0], rows[1])  # the other view


@pytest.mark.parametrize("workers", [1, 2])
def test_a_workers_batch_lasts_until_the_one_after_the_next(workers):
    source = Arrays(torch.arange(120, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8))
    batches = [[(0, 2 * i), (0, 2 * i + 1)] for i in range(60)]
    held = []
    loader = create_loader(TwoCrops(source, (8, 8), 0.2, 0), batches, workers, CPU)
    for n, (crops, _) in enumerate(loader):
        time.sleep(0.005)  # the workers go as far ahead as they may
        held = [*held[-1:], (n, crops)]
        for i, batch in held:
            assert torch.equal(batch[:, :, 0, 0, 0], torch.tensor([[2 * i, 2 * i + 1]] * 2))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_batches_of_one_process(world, monkeypatch):
    expected = EpochBatches(100, 16, seed=3)
    expected.epoch = 5
    expected = list(expected)
    assert len(expected) == 6
    seen = [key for batch in expected for key in batch]
    assert len(set(seen)) == 96 and {epoch for epoch, _ in seen} == {5}

    shards = []
    monkeypatch.setattr(distributed, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = EpochBatches(100, 16, seed=3)
        batches.epoch = 5
        assert batches.left_out == 4
        shards.append(list(batches))
    assert [list(chain(*parts)) for parts in zip(*shards)] == expected


@pytest.mark.parametrize(
    "images, batch, words", [(7, 8, "don't fill one"), (7, 1, "BatchNorm needs 2 images")]
)
def test_batches_that_cannot_train_are_refused(images, batch, words):
    with pytest.raises(UserError, match=words):
        EpochBatches(images, batch, seed=0)


def test_batches_change_with_epoch_and_seed():
    first = EpochBatches(100, 10, seed=0)
    order = list(first)
    first.epoch = 1
    assert [i for b in order for _, i in b] != [i for b in first for _, i in b]
    assert order != list(EpochBatches(100, 10, seed=1))


def test_persistent_workers_follow_the_epoch():
    source = Arrays(np.zeros((8, 3, 4, 4), np.uint8))
    batches = EpochBatches(8, 4, seed=0)
    loader = create_loader(TwoCrops(source, (4, 4), 0.2, 0), batches, 1, CPU, persistent=True)
    rows = []
    for batches.epoch in (0, 1, 0):
        rows.append(torch.cat([r for _, r in loader], 1))
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_crops_have_the_recipes_area_and_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(rng, 200, 300, 0.2) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 200).all() and (left + width <= 300).all()
    area, ratio = height * width / 60_000, width / height
    assert 0.19 < area.min() < 0.21 and 0.85 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35
    assert crop_box(rng, 10, 1000, 1.0) == (0, 493, 10, 13)  # no box fits: the centre


def test_centre_crop_resizes_by_256_over_224_and_keeps_what_fits():
    images = torch.arange(3 * 16 * 16).view(1, 3, 16, 16).to(torch.uint8)
    assert torch.equal(CentreCrop(Arrays(images), (16, 16)).__getitems__([0])[0], images)
    wide = Arrays(torch.zeros(2, 3, 100, 400, dtype=torch.uint8))
    crops, shown = CentreCrop(wide, (56, 56)).__getitems__([0, 1])
    assert crops.shape == (2, 3, 56, 56) and shown.tolist() == [0, 1]
    assert CentreCrop(wide, (32, 64)).__getitems__([0])[0].shape == (1, 3, 32, 64)


@pytest.mark.parametrize("height, width, size", [(9, 400, (32, 32)), (400, 9, (32, 16))])
def test_of_a_strip_the_middle_is_seen(height, width, size):
    picture = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    (found,), _ = CentreCrop(Arrays(picture[None]), size).__getitems__([0])
    scale = max(s * 256 / 224 / side for s, side in zip(size, (height, width)))
    resized = [max(s, int(side * scale)) for s, side in zip(size, (height, width))]
    expected = tv.center_crop(tv.resize(picture, resized, antialias=True), size)
    assert (found.float() - expected.float()).abs().mean() < 20  # noise of another place: 60
    other = expected.roll(8, 1 if height > width else 2)
    assert (found.float() - other.float()).abs().mean() > 40


# What the probe and fine-tuning train on.


def test_labelled_crops_are_random_crops_half_of_them_flipped():
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 3, 32, 32).contiguous()
    crops = LabelledCrop(Arrays(ramp, torch.tensor([7])), (8, 8), 0.2, seed=0)
    images, labels = crops.__getitems__([(epoch, 0) for epoch in range(200)])
    assert images.shape == (200, 3, 8, 8) and (labels == 7).all()
    rising = (images[:, 0, 0, -1] > images[:, 0, 0, 0]).float().mean()
    assert 0.4 < rising < 0.6
    again, _ = crops.__getitems__([(5, 0)])
    assert torch.equal(again[0], images[5])


def test_repeated_augmentation_shows_fewer_images_with_other_numbers():
    batches = EpochBatches(100, 30, seed=0, repeats=3)
    assert batches.left_out == 70
    keys = [key for batch in batches for key in batch]
    images = {index for _, index in keys}
    assert len(keys) == 90 and len(images) == 30 and len(set(keys)) == 90
    batches.epoch = 1
    assert not set(keys) & {key for batch in batches for key in batch}
    once = EpochBatches(100, 30, seed=0)
    assert all(epoch == 0 for batch in once for epoch, _ in batch)


def test_bicubic_and_bilinear_views_differ():
    image = torch.randint(0, 256, (1, 3, 50, 40), dtype=torch.uint8)
    views = [
        CentreCrop(Arrays(image), (16, 16), name).__getitems__([0])[0]
        for name in ("bilinear", "bicubic")
    ]
    assert views[0].shape == views[1].shape and not torch.equal(*views)
