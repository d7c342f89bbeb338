"""MoCo v3 (Chen, Xie, He, 2021, arXiv 2104.02057), as a library; docs/library.md shows its use."""

from moco.augmentation import PAPER, Policy, augment, augment_compiled, sample_params
from moco.builder import MoCo, contrastive_loss
from moco.optimizer import (
    LARS,
    cosine_momentum,
    create_optimizer,
    optimizer_step,
    scaled_lr,
    set_lr,
    warmup_cosine_lr,
)

__all__ = [
    "LARS",
    "PAPER",
    "MoCo",
    "Policy",
    "augment",
    "augment_compiled",
    "contrastive_loss",
    "cosine_momentum",
    "create_optimizer",
    "optimizer_step",
    "sample_params",
    "scaled_lr",
    "set_lr",
    "warmup_cosine_lr",
]
