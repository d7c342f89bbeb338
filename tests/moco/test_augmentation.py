"""Each operation, and the chain, compared with torchvision.transforms.v2.functional per image."""

import numpy as np
import pytest
import torch
from conftest import DEVICES
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from torchvision.transforms.v2 import functional as tv

from moco import augmentation as ours
from moco import compilation
from moco.augmentation import IDENTITY_PARAMS, Param

TOLERANCE = 2 / 255


def make_images(n=24, height=32, width=40):
    """Noise, smooth gradients, gray, black and white: [n, 3, height, width] in [0, 1]."""
    x = torch.rand(n, 3, height, width)
    x[1::4] = torch.linspace(0, 1, width) * torch.rand(len(x[1::4]), 3, 1, 1)
    x[2::4] = x[2::4].mean(1, keepdim=True)
    x[3], x[7] = 0, 1
    return x


def blur(x, sigma):
    return tv.gaussian_blur(x, kernel_size=2 * int(np.ceil(3 * 2.0)) + 1, sigma=sigma)


OPERATIONS = {
    "brightness": (ours.adjust_brightness, tv.adjust_brightness, (0.6, 1.4)),
    "contrast": (ours.adjust_contrast, tv.adjust_contrast, (0.6, 1.4)),
    "saturation": (ours.adjust_saturation, tv.adjust_saturation, (0.8, 1.2)),
    "hue": (ours.adjust_hue, tv.adjust_hue, (-0.5, 0.5)),
    "blur": (ours.gaussian_blur, blur, (0.1, 2.0)),
    "grayscale": (
        lambda x, _: ours.grayscale(x),
        lambda x, _: tv.rgb_to_grayscale(x, num_output_channels=3),
        (0, 1),
    ),
    "solarize": (lambda x, _: ours.solarize(x), lambda x, _: tv.solarize(x, 128 / 255), (0, 1)),
    "normalize": (
        lambda x, _: ours.normalize(x),
        lambda x, _: tv.normalize(x, list(ours.IMAGENET_MEAN), list(ours.IMAGENET_STD)),
        (0, 1),
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_agrees_with_torchvision(name, device):
    operation, reference, (low, high) = OPERATIONS[name]
    x = make_images().to(device)
    factor = torch.linspace(low, high, len(x)).to(device)
    expected = torch.stack([reference(image, f.item()) for image, f in zip(x, factor)])
    torch.testing.assert_close(operation(x, factor), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", [0, 1])
def test_chain_agrees_with_torchvision(view, device):
    rng = np.random.default_rng(0)
    params = torch.from_numpy(np.stack([ours.sample_params(rng, view) for _ in range(64)]))
    x = torch.randint(0, 256, (64, 3, 24, 20), dtype=torch.uint8)
    x[::2] = tv.resize(x[::2, :, :4, :4], [24, 20])  # smooth ones
    augmented = ours.augment(x.to(device), params).cpu()

    jitter = tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue
    for image, p, result in zip(x, params, augmented):
        expected = image.float() / 255
        for column in ours.JITTER_ORDERS[int(p[Param.ORDER])].tolist():
            if p[column] != IDENTITY_PARAMS[column]:
                expected = jitter[column](expected, p[column].item())
        if p[Param.GRAYSCALE]:
            expected = tv.rgb_to_grayscale(expected, num_output_channels=3)
        if p[Param.SIGMA]:
            expected = blur(expected, p[Param.SIGMA].item())
        # A pixel within rounding of the threshold may fall on either side of it.
        near = (expected - ours.SOLARIZE_THRESHOLD).abs() < 1e-5
        if p[Param.SOLARIZE]:
            expected = tv.solarize(expected, ours.SOLARIZE_THRESHOLD)
        if p[Param.FLIP]:
            expected, near = expected.flip(-1), near.flip(-1)
        error = (ours.denormalize(result) - expected).abs()
        assert error[~near].max() <= TOLERANCE


def test_blur_reflects_in_images_smaller_than_the_kernel():
    x = torch.rand(3, 3, 4, 1)
    blurred = ours.gaussian_blur(x, torch.tensor([0.1, 1.0, 2.0]))
    assert blurred.shape == x.shape and blurred.isfinite().all()
    white = torch.ones(1, 3, 5, 2)
    torch.testing.assert_close(ours.gaussian_blur(white, torch.tensor([2.0])), white)


@pytest.fixture(params=["traced", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    if request.param == "traced":  # the graphs alone, without Inductor, which takes long on a CPU
        monkeypatch.setattr(compilation, "lookup_backend", lambda name: lookup_backend("aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    ours._compiled.cache_clear()
    yield
    ours._compiled.cache_clear()


@pytest.mark.parametrize("channels", [3, 2])
def test_compiled_agrees_with_eager_and_compiles_once(backend, channels):
    policy = ours.Policy(vertical_flip_p=0.5, solarize_p=(0.3, 0.3))
    for seed in range(2):
        rng = np.random.default_rng(seed)
        params = [ours.sample_params(rng, view, policy) for view in (0, 1) for _ in range(24)]
        params = torch.from_numpy(np.stack(params))
        images = (make_images(48, 24, 20)[:, :channels] * 255).byte()
        mean, std = (0.4,) * channels, (0.2,) * channels
        expected, compiled = (
            f(images, params, mean, std) for f in (ours.augment, ours.augment_compiled)
        )
        torch.testing.assert_close(compiled, expected, rtol=0, atol=1 / 255 / 0.2)
        assert ((compiled - expected).abs() < 1e-4).float().mean() > 0.999
        assert counters["stats"]["unique_graphs"] == 2


def test_blur_in_half_precision_agrees():
    """As on CUDA."""
    x, sigma = torch.rand(6, 3, 224, 224), torch.linspace(0.1, 2, 6)
    expected = ours.gaussian_blur(x, sigma)
    torch.testing.assert_close(
        ours.gaussian_blur(x, sigma, torch.float16), expected, rtol=0, atol=0.5 / 255
    )


def test_a_policy_changes_what_it_names_and_keeps_the_draws():
    def draw(policy, num=2000):
        rng = np.random.default_rng(0)
        return np.stack(
            [ours.sample_params(rng, view, policy) for _ in range(num) for view in (0, 1)]
        )

    paper = draw(ours.PAPER)
    off = draw(ours.Policy(0, 0, 0, 0, grayscale_p=0, blur_p=(0, 0), solarize_p=(0, 0), flip_p=0))
    off[:, Param.ORDER] = 0
    assert (off == IDENTITY_PARAMS).all()
    strong = draw(ours.Policy(brightness=0.8, solarize_p=(1, 0.2)))
    same = [c for c in Param if c not in (Param.BRIGHTNESS, Param.SOLARIZE)]
    assert (strong[:, same] == paper[:, same]).all()
    assert strong[:, Param.BRIGHTNESS] - 1 == pytest.approx(
        2 * (paper[:, Param.BRIGHTNESS] - 1), abs=1e-6
    )
    assert strong[::2, Param.SOLARIZE].all() and not paper[::2, Param.SOLARIZE].any()
    vertical = draw(ours.Policy(vertical_flip_p=0.3))[:, Param.VERTICAL_FLIP]
    assert (
        vertical.mean() == pytest.approx(0.3, abs=0.03) and not paper[:, Param.VERTICAL_FLIP].any()
    )


def test_identity_params_leave_an_image_as_it_is():
    x = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    params = torch.tensor([IDENTITY_PARAMS] * 4, dtype=torch.float32)
    assert torch.equal(ours.augment(x, params), ours.normalize(x.float() / 255))


@pytest.mark.parametrize("view", [0, 1])
def test_params_have_the_papers_probabilities_and_ranges(view):
    rng = np.random.default_rng(1)
    params = np.stack([ours.sample_params(rng, view) for _ in range(20_000)])

    def rate(selected):
        return pytest.approx(selected.mean(), abs=0.015)

    jittered = params[:, Param.BRIGHTNESS] != 1
    assert rate(jittered) == 0.8
    for column, low, high in (
        (Param.BRIGHTNESS, 0.6, 1.4),
        (Param.CONTRAST, 0.6, 1.4),
        (Param.SATURATION, 0.8, 1.2),
        (Param.HUE, -0.1, 0.1),
    ):
        values = params[jittered, column]
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high
    assert set(params[jittered, Param.ORDER]) == set(range(24))
    assert rate(params[:, Param.GRAYSCALE]) == 0.2
    sigma = params[:, Param.SIGMA]
    assert (1.0, 0.1)[view] == rate(sigma > 0)
    assert 0.1 <= sigma[sigma > 0].min() < 0.2 and 1.95 < sigma.max() <= 2
    assert (0.0, 0.2)[view] == rate(params[:, Param.SOLARIZE])
    assert rate(params[:, Param.FLIP]) == 0.5
