"""LARS, AdamW, one optimizer step, and the schedules of learning rate and momentum (Sec. 5)."""

import math

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum and a learning rate for each layer (You et al. 2017, arXiv 1708.03888).

    Tensors of more than one dimension: g ← g + wd·w, then g ← g · η‖w‖/‖g‖, the ratio 1 where a
    norm is 0; norms and biases take neither. Then μ ← momentum·μ + g, w ← w − lr·μ.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            layers = [i for i, p in enumerate(params) if p.ndim > 1]
            if layers:
                scaled = self._scale([params[i] for i in layers], [grads[i] for i in layers], group)
                for i, g in zip(layers, scaled):
                    grads[i] = g

            for p in params:
                if not self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            mu = [self.state[p]["mu"] for p in params]
            torch._foreach_mul_(mu, group["momentum"])
            torch._foreach_add_(mu, grads)
            torch._foreach_add_(params, mu, alpha=-group["lr"])
        return loss

    @staticmethod
    def _scale(params, grads, group):
        grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        w_norm = torch.stack(torch._foreach_norm(params))
        g_norm = torch.stack(torch._foreach_norm(grads))
        ratio = group["eta"] * w_norm / g_norm
        ratio = torch.where((w_norm > 0) & (g_norm > 0), ratio, 1.0)
        torch._foreach_mul_(grads, list(ratio.unbind()))
        return grads


def create_optimizer(name, model, lr, wd):
    """LARS, AdamW or SGD ("sgd") over all trainable parameters; ValueError for another name.

    AdamW decays norms and biases, too; LARS and SGD don't.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "lars":
        return LARS(params, lr, weight_decay=wd)
    if name == "sgd":
        weights = [p for p in params if p.ndim > 1]
        others = [p for p in params if p.ndim <= 1]
        groups = [dict(params=weights, weight_decay=wd), dict(params=others)]
        return torch.optim.SGD(groups, lr, momentum=0.9)
    if name != "adamw":
        raise ValueError(f"unknown optimizer {name!r}: 'lars', 'adamw' or 'sgd'")
    fused = params[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(params, lr, betas=(0.9, 0.999), weight_decay=wd, fused=fused)


def optimizer_step(loss, optimizer, scaler=None, clip_grad=None, grad_monitor=None):
    """Backward pass and one step → what grad_monitor returned, {} without it.

    scaler: torch.amp.GradScaler for fp16. clip_grad: largest ℓ2 norm of the gradient of all
    parameters together. grad_monitor: called with gradients that are unscaled and not clipped.
    """
    if scaler is None:
        scaler = torch.amp.GradScaler(enabled=False)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_metrics = {} if grad_monitor is None else grad_monitor()
    if clip_grad:
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_grad)
    scaler.step(optimizer)
    scaler.update()
    return grad_metrics


def set_lr(optimizer, lr):
    """lr of each parameter group, times its `lr_scale` where it has one (layer-wise decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)


def scaled_lr(base_lr, batch_size):
    """Linear scaling rule: base_lr · batch_size / 256, the batch over all ranks (Goyal et al. 2017,
    arXiv 1706.02677)."""
    return base_lr * batch_size / 256


def warmup_cosine_lr(t, total, warmup, peak_lr, start_lr=0.0, end_lr=0.0, cosine_start=None):
    """Linear warm-up from start_lr to peak_lr over `warmup`, then half a cosine to end_lr at
    `total`; Sec. 5.

    t, total, warmup: in one unit, for example epochs with fractions. cosine_start: where the cosine
    begins, by default at the end of the warm-up; 0 in DeiT, whose warm-up replaces its first part.
    """
    if t < warmup:
        return start_lr + t * (peak_lr - start_lr) / warmup
    if warmup == total:
        return peak_lr
    start = warmup if cosine_start is None else cosine_start
    cosine = math.cos(math.pi * (t - start) / (total - start))
    return end_lr + (peak_lr - end_lr) * (1 + cosine) / 2


def cosine_momentum(t, total, m0):
    """m from m0 to 1 by half a cosine: 1 − (1−m0)·(1 + cos(πt/total))/2; Sec. 5."""
    return 1 - (1 - m0) * (1 + math.cos(math.pi * t / total)) / 2
