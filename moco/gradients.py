"""Gradients of the first and the last layer: the instability that the paper studies (Fig. 4).

There, spikes of the gradient precede a dip in the accuracy, and appear in the first layer some tens
of iterations before they appear in the last ones.
"""

import torch
from torch import nn


class GradientMonitor:
    """ℓ2 and ℓ∞ norms of the gradients of a backbone's first layer and last block.

    The first layer is the first one with a trainable weight of more than one dimension: the patch
    projection, or what follows it if that is fixed. encoder: a backbone with the classifier's place
    in `classifier_name`, such as MoCo.base_encoder.
    """

    def __init__(self, encoder):
        children = [
            child
            for name, child in encoder.named_children()
            if name != encoder.classifier_name.split(".")[0] and has_trainable_weight(child)
        ]
        if not children:
            raise ValueError("the backbone has no trainable layers to monitor")
        first = next(m for m in children[0].modules() if has_own_trainable_weight(m))
        last = children[-1]
        while isinstance(last, nn.Sequential | nn.ModuleList):
            last = [block for block in last if has_trainable_weight(block)][-1]
        self.params = {
            "first": [p for p in first.parameters(recurse=False) if p.requires_grad],
            "last": [p for p in last.parameters() if p.requires_grad],
        }

    @torch.no_grad()
    def __call__(self):
        """→ {"grad_l2/first", "grad_linf/first", "grad_l2/last", "grad_linf/last"}.

        Scalars on the device, after the backward pass and before clipping; nothing waits for them.
        """
        grads = {place: [p.grad for p in params] for place, params in self.params.items()}
        everything = grads["first"] + grads["last"]
        l2, linf = torch._foreach_norm(everything), torch._foreach_norm(everything, torch.inf)
        split = len(grads["first"])
        metrics = {}
        for place, part in (("first", slice(0, split)), ("last", slice(split, None))):
            metrics[f"grad_l2/{place}"] = torch.stack(l2[part]).norm()
            metrics[f"grad_linf/{place}"] = torch.stack(linf[part]).amax()
        return metrics


def has_own_trainable_weight(module):
    return any(p.requires_grad and p.ndim > 1 for p in module.parameters(recurse=False))


def has_trainable_weight(module):
    return any(has_own_trainable_weight(m) for m in module.modules())
