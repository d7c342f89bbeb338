"""LARS and the schedules against their formulas."""

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from moco.optimizer import LARS, cosine_momentum, create_optimizer, set_lr, warmup_cosine_lr


def test_lars_matches_the_formula():
    wd, eta, momentum = 1e-2, 1e-3, 0.9
    shapes = [(7, 5), (5,), (3, 2, 3, 3), (4, 4), (2, 3)]
    params = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    with torch.no_grad():
        params[3].zero_()  # a norm of 0: ratio 1
    w = [p.detach().clone() for p in params]
    mu = [torch.zeros_like(p) for p in w]
    optimizer = LARS(params, lr=0.0, weight_decay=wd, momentum=momentum, eta=eta)
    for step in range(5):
        lr = 0.1 * (step + 1)
        set_lr(optimizer, lr)
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            g = p.grad.clone()
            if g.ndim > 1:
                g = g + wd * w[i]
                norms = w[i].norm(), g.norm()
                if norms[0] > 0 and norms[1] > 0:
                    g = g * eta * norms[0] / norms[1]
            mu[i] = momentum * mu[i] + g
            w[i] = w[i] - lr * mu[i]
        optimizer.step()
        for p, expected in zip(params, w):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_lars_leaves_a_layer_without_gradient_alone():
    p = torch.ones(3, 3, requires_grad=True)
    p.grad = torch.zeros(3, 3)
    LARS([p], lr=0.1).step()
    assert (p == 1).all()


def test_lars_without_matrices_is_sgd():
    ours, theirs = (torch.ones(5, requires_grad=True) for _ in range(2))
    optimizers = LARS([ours], lr=0.1, weight_decay=1), torch.optim.SGD([theirs], 0.1, momentum=0.9)
    for _ in range(3):
        for p, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            (p**3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_adamw_decays_every_trainable_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    model[0].bias.requires_grad_(False)
    optimizer = create_optimizer("adamw", model, lr=0.1, wd=0.5)
    assert len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]["params"]) == 3
    before = model[1].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(
    "t, expected", [(0, 0), (20, 0.5), (40, 1), (170, 0.5), (300, 0), (235, (1 - 0.5**0.5) / 2)]
)
def test_lr_warms_up_then_follows_a_cosine(t, expected):
    assert warmup_cosine_lr(t, 300, 40, 1.0) == pytest.approx(expected)
    assert warmup_cosine_lr(0, 300, 0, 0.3) == 0.3  # without warm-up


@pytest.mark.parametrize("warmup_prefix", [False, True], ids=["DeiT", "MMPretrain"])
@pytest.mark.parametrize("warmup", [0, 5, 20])
def test_lr_is_that_of_timms_scheduler(warmup_prefix, warmup):
    """In DeiT the cosine begins at 0, and the warm-up replaces its first part."""
    total, peak_lr, start_lr, end_lr = 90, 1e-3, 1e-6, 1e-5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak_lr)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=total - warmup if warmup_prefix else total,
        lr_min=end_lr,
        warmup_t=warmup,
        warmup_lr_init=start_lr,
        warmup_prefix=warmup_prefix,
    )
    cosine_start = None if warmup_prefix else 0
    for t in range(total):
        scheduler.step(t)
        [expected] = [group["lr"] for group in optimizer.param_groups]
        lr = warmup_cosine_lr(t, total, warmup, peak_lr, start_lr, end_lr, cosine_start)
        assert lr == pytest.approx(expected, rel=1e-12), t


@pytest.mark.parametrize("t", [0, 1, 50, 99, 100])
def test_momentum_follows_the_formula(t):
    expected = 1 - (1 - 0.99) * (1 + math.cos(math.pi * t / 100)) / 2
    assert cosine_momentum(t, 100, 0.99) == pytest.approx(expected)
    assert cosine_momentum(0, 100, 0.99) == pytest.approx(0.99)
    assert cosine_momentum(100, 100, 0.99) == 1


def test_sgd_decays_weights_alone():
    linear = torch.nn.Linear(3, 2).double()
    optimizer = create_optimizer("sgd", linear, lr=0.1, wd=0.5)
    w, b, mu_w, mu_b = linear.weight.clone(), linear.bias.clone(), 0, 0
    for _ in range(3):
        linear.weight.grad, linear.bias.grad = torch.ones_like(w), torch.ones_like(b)
        optimizer.step()
        mu_w, mu_b = 0.9 * mu_w + 1 + 0.5 * w, 0.9 * mu_b + 1
        w, b = w - 0.1 * mu_w, b - 0.1 * mu_b
    torch.testing.assert_close(linear.weight, w, rtol=1e-12, atol=0)
    torch.testing.assert_close(linear.bias, b, rtol=1e-12, atol=0)


def test_an_unknown_optimizer_is_a_value_error():
    with pytest.raises(ValueError, match="unknown optimizer 'adam'"):
        create_optimizer("adam", torch.nn.Linear(2, 2), lr=0.1, wd=0)
