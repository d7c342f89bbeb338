"""BatchNorm of the heads: statistics of one view at a time, over the batch of all ranks."""

import torch
from torch import nn

from moco.distributed import all_gather, world_size


class ViewBatchNorm(nn.BatchNorm1d):
    """BatchNorm over [V, N, C]: V views that never mix, each normalised over the N of all ranks.

    [N, C] is one view. One collective serves all views, on any backend (nn.SyncBatchNorm refuses
    the CPU). Parameters, buffers and their names are those of BatchNorm1d; statistics are computed
    in fp32. Every rank must hold the same N.
    """

    def forward(self, x):
        if x.ndim == 2:
            return self.forward(x[None])[0]
        if not self.training:
            return super().forward(x.flatten(0, 1)).view_as(x)
        if world_size() == 1:  # the same mathematics in one fused kernel per view
            return torch.stack([super(ViewBatchNorm, self).forward(view) for view in x])

        var, mean = torch.var_mean(at_least_fp32(x), dim=1, correction=0)  # [V, C]
        means, variances = all_gather(torch.stack([mean, var])).unbind(1)  # [world_size, V, C]
        mean = means.mean(0)
        var = (variances + (means - mean) ** 2).mean(0)  # law of total variance, equal N
        self._update_running_stats(mean.detach(), var.detach(), n=x.shape[1] * world_size())

        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = -mean * scale
        if self.affine:
            shift = shift + self.bias
        return (x * scale[:, None] + shift[:, None]).to(x.dtype)

    @torch.no_grad()
    def _update_running_stats(self, mean, var, n):
        for view in range(len(mean)):  # one after the other, as V calls of BatchNorm1d would
            self.running_mean.lerp_(mean[view], self.momentum)
            self.running_var.lerp_(var[view] * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1


def at_least_fp32(x):
    """bf16 and fp16 → fp32; float64 stays float64, so that formulas can be tested in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
