"""Sampler, crops and loader: what is shown depends on (seed, epoch, index) alone."""

import time
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import ENV
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import engine.data.sampler
from engine.data.crops import CenterCrops, LabelledCrops, TwoCrops, random_crop_box
from engine.data.decode import UnreadableImage
from engine.data.images import ArrayDataset, ImageFileDataset
from engine.data.loader import create_loader, unpack_batches
from engine.data.sampler import EpochBatchSampler
from engine.errors import UserError

CPU = ENV.device


def test_views_are_a_function_of_seed_epoch_and_index(image_file, tmp_path):
    for i in range(6):
        image_file(f"{i}.jpg", height=30 + i)
    dataset = ImageFileDataset(tmp_path, [f"{i}.jpg" for i in range(6)])

    def views(seed, keys, workers):
        batches = [keys[i : i + 2] for i in range(0, len(keys), 2)]
        loader = create_loader(TwoCrops(dataset, (24, 16), 0.2, seed), batches, workers, CPU)
        crops, params = zip(*((crops.clone(), params) for crops, params in unpack_batches(loader)))
        return torch.cat(crops, 1), torch.cat(params, 1)

    keys = [(epoch, i) for epoch in (0, 1) for i in range(6)]
    crops, params = views(0, keys, workers=0)
    assert crops.shape == (2, 12, 3, 24, 16) and crops.dtype == torch.uint8
    other = views(0, keys[::-1], workers=2)
    assert torch.equal(other[0].flip(1), crops) and torch.equal(other[1].flip(1), params)
    assert not torch.equal(params[:, :6], params[:, 6:])  # another epoch
    assert not torch.equal(views(1, keys, workers=0)[1], params)  # another seed
    assert not torch.equal(params[0], params[1])  # the other view


@pytest.mark.parametrize("workers", [1, 2])
def test_a_workers_batch_lasts_until_the_one_after_the_next(workers):
    images = torch.arange(120, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    dataset = ArrayDataset(images)
    batches = [[(0, 2 * i), (0, 2 * i + 1)] for i in range(60)]
    held = []
    loader = create_loader(TwoCrops(dataset, (8, 8), 0.2, 0), batches, workers, CPU)
    for n, (crops, _) in enumerate(unpack_batches(loader)):
        time.sleep(0.005)  # the workers go as far ahead as they may
        held = [*held[-1:], (n, crops)]
        for i, batch in held:
            assert torch.equal(batch[:, :, 0, 0, 0], torch.tensor([[2 * i, 2 * i + 1]] * 2))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_batches_of_one_process(world, monkeypatch):
    expected = EpochBatchSampler(100, 16, seed=3)
    expected.set_epoch(5)
    expected = list(expected)
    assert len(expected) == 6
    seen = [key for batch in expected for key in batch]
    assert len(set(seen)) == 96 and {epoch for epoch, _ in seen} == {5}

    shards = []
    monkeypatch.setattr(engine.data.sampler, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(engine.data.sampler, "rank", lambda rank=rank: rank)
        batches = EpochBatchSampler(100, 16, seed=3)
        batches.set_epoch(5)
        assert batches.num_dropped == 4
        shards.append(list(batches))
    assert [list(chain(*parts)) for parts in zip(*shards)] == expected


def test_the_rest_of_an_epoch_begins_at_any_batch():
    sampler = EpochBatchSampler(100, 16, seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, first_batch=4)
    assert list(sampler) == whole[4:]


def test_random_numbers_stay_as_they_are(monkeypatch):
    """A run that another version of the packages continues shows the same images and views."""
    dataset = ArrayDataset(np.zeros((10, 3, 8, 8), np.uint8))
    sampler = EpochBatchSampler(10, 4, seed=7)
    sampler.set_epoch(3)
    assert [[i for _, i in batch] for batch in sampler] == [[4, 7, 0, 6], [2, 3, 9, 8]]
    sampler = EpochBatchSampler(10, 4, seed=7, repeats=3)
    sampler.set_epoch(3)
    first, second = sampler
    assert first == [(9, 4), (10, 4), (11, 4), (9, 7)]
    assert second == [(10, 7), (11, 7), (9, 0), (10, 0)]

    crops = TwoCrops(dataset, (8, 8), 0.2, seed=7)
    params = crops.__getitems__([(3, 5)])[0][1]
    view_1 = [0.91563445, 1.33129382, 1.16967702, -0.07067876, 11, 1, 0.55627316, 0, 0, 0]
    view_2 = [0.80440730, 1.20024836, 1.12801075, 0.01007037, 3, 1, 0, 0, 1, 0]
    assert torch.allclose(params[:, 0], torch.tensor([view_1, view_2]), rtol=1e-6)

    indices = []

    def fail(i):
        indices.append(i)
        raise UnreadableImage("x.jpg", "broken")

    monkeypatch.setattr(dataset, "read", fail)
    with pytest.raises(UserError):
        crops.read((3, 5), {})
    assert indices[:8] == [5, 9, 3, 1, 5, 2, 0, 5] and len(indices) == 32


def test_a_run_goes_on_with_as_many_images_only():
    sampler = EpochBatchSampler(100, 10, seed=0)
    sampler.load_state_dict(EpochBatchSampler(100, 20, seed=1).state_dict())
    with pytest.raises(UserError, match="the run has 90 images, DIR holds 100 now"):
        sampler.load_state_dict({"images": 90})
    with pytest.raises(TypeError):
        sampler.load_state_dict({"images": "100"})


@pytest.mark.parametrize(
    "num_images, batch_size, words", [(7, 8, "don't fill one"), (7, 1, "BatchNorm needs 2 images")]
)
def test_batches_that_cannot_train_are_refused(num_images, batch_size, words):
    with pytest.raises(UserError, match=words):
        EpochBatchSampler(num_images, batch_size, seed=0)


def test_persistent_workers_follow_the_epoch():
    dataset = ArrayDataset(np.zeros((8, 3, 4, 4), np.uint8))
    sampler = EpochBatchSampler(8, 4, seed=0)
    loader = create_loader(TwoCrops(dataset, (4, 4), 0.2, 0), sampler, 1, CPU, persistent=True)
    params = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        params.append(torch.cat([params for _, params in unpack_batches(loader)], 1))
    assert torch.equal(params[0], params[2]) and not torch.equal(params[0], params[1])


def test_crops_have_the_recipes_area_and_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(rng, 200, 300, 0.2) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 200).all() and (left + width <= 300).all()
    area, ratio = height * width / 60_000, width / height
    assert 0.19 < area.min() < 0.21 and 0.85 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35
    assert random_crop_box(rng, 10, 1000, 1.0) == (0, 493, 10, 13)  # no box fits: the center


def test_center_crop_resizes_by_256_over_224_and_keeps_what_fits():
    images = torch.arange(3 * 16 * 16).view(1, 3, 16, 16).to(torch.uint8)
    assert torch.equal(CenterCrops(ArrayDataset(images), (16, 16)).__getitems__([0])[0][0], images)
    wide = ArrayDataset(torch.zeros(2, 3, 100, 400, dtype=torch.uint8))
    crops, positions = CenterCrops(wide, (56, 56)).__getitems__([0, 1])[0]
    assert crops.shape == (2, 3, 56, 56) and positions.tolist() == [0, 1]
    assert CenterCrops(wide, (32, 64)).__getitems__([0])[0][0].shape == (1, 3, 32, 64)


@pytest.mark.parametrize("height, width, size", [(9, 400, (32, 32)), (400, 9, (32, 16))])
def test_of_a_strip_the_middle_is_seen(height, width, size):
    picture = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    (crop,), _ = CenterCrops(ArrayDataset(picture[None]), size).__getitems__([0])[0]
    scale = max(s * 256 / 224 / side for s, side in zip(size, (height, width)))
    resized = [max(s, int(side * scale)) for s, side in zip(size, (height, width))]
    expected = tv.center_crop(tv.resize(picture, resized, antialias=True), size)
    assert (crop.float() - expected.float()).abs().mean() < 20  # noise of another place: 60
    other = expected.roll(8, 1 if height > width else 2)
    assert (crop.float() - other.float()).abs().mean() > 40


@pytest.mark.parametrize("height, width", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_points_and_strips_are_read_and_cropped(image_file, tmp_path, height, width, kind):
    path = image_file(f"a.{kind}", height, width)
    dataset = ImageFileDataset(tmp_path, [path])
    image = dataset.read(0).permute(1, 2, 0).numpy()
    assert np.abs(image - np.asarray(Image.open(path)).astype(int)).max() <= 2
    crops, _ = TwoCrops(dataset, (224, 224), 0.08, 0).__getitems__([(0, 0)])[0]
    assert crops.shape == (2, 1, 3, 224, 224)
    began = time.perf_counter()
    crops, _ = CenterCrops(dataset, (224, 224)).__getitems__([0])[0]
    assert crops.shape == (1, 3, 224, 224)
    assert time.perf_counter() - began < 1  # not by way of 256 × 768,000 pixels


# What the probe and fine-tuning train on.


def test_labelled_crops_are_random_crops_half_of_them_flipped():
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 3, 32, 32).contiguous()
    crops = LabelledCrops(ArrayDataset(ramp, torch.tensor([7])), (8, 8), 0.2, seed=0)
    images, labels = crops.__getitems__([(epoch, 0) for epoch in range(200)])[0]
    assert images.shape == (200, 3, 8, 8) and (labels == 7).all()
    rising = (images[:, 0, 0, -1] > images[:, 0, 0, 0]).float().mean()
    assert 0.4 < rising < 0.6
    again, _ = crops.__getitems__([(5, 0)])[0]
    assert torch.equal(again[0], images[5])


def test_repeated_augmentation_shows_fewer_images_with_other_numbers():
    sampler = EpochBatchSampler(100, 30, seed=0, repeats=3)
    assert sampler.num_dropped == 70
    keys = [key for batch in sampler for key in batch]
    images = {index for _, index in keys}
    assert len(keys) == 90 and len(images) == 30 and len(set(keys)) == 90
    sampler.set_epoch(1)
    assert not set(keys) & {key for batch in sampler for key in batch}
    once = EpochBatchSampler(100, 30, seed=0)
    assert all(epoch == 0 for batch in once for epoch, _ in batch)


def test_bicubic_and_bilinear_views_differ():
    image = torch.randint(0, 256, (1, 3, 50, 40), dtype=torch.uint8)
    views = [
        CenterCrops(ArrayDataset(image), (16, 16), name).__getitems__([0])[0][0]
        for name in ("bilinear", "bicubic")
    ]
    assert views[0].shape == views[1].shape and not torch.equal(*views)
