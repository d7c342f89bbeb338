"""MoCo v3: two encoders, the heads, the contrastive loss, the momentum update (Algorithm 1)."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # of every kind
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from moco import UserError
from moco.distributed import ViewBatchNorm, at_least_fp32, gather, rank


class MoCo(nn.Module):
    """base_encoder = backbone + projector, momentum_encoder = its moving average, predictor.

    `backbone` as moco.backbones creates it; the projector takes the classifier's place (`fc` in a
    ResNet, `head` in a ViT), so that the keys of the state_dict are the published ones.
    `encode_chunk` > 0: so many views go through a backbone at a time, and what its backward pass
    needs is computed again there; heads and loss see the whole batch, the gradient is the same.
    """

    def __init__(self, backbone, dim=256, mlp_dim=4096, T=1.0, encode_chunk=0, compile=False):
        super().__init__()
        self.T, self.encode_chunk = T, encode_chunk
        self.features = torch.compile(features) if compile else features
        # BatchNorm must see one view at a time; without it both go through in one batch.
        self.one_pass = not any(isinstance(m, BatchNorm) for m in backbone.modules())
        if encode_chunk and not self.one_pass:
            raise UserError(
                "--encode-chunk is for backbones without BatchNorm, which would see the chunk "
                "instead of the batch: drop it, or lower --batch-size"
            )

        resnet_form = ends_in_batchnorm(backbone)  # two layers, and no BN after the predictor
        widths = [backbone.num_features, *[mlp_dim] * (1 if resnet_form else 2), dim]
        backbone.set_submodule(backbone.classifier_name, mlp(widths))
        self.predictor = mlp([dim, mlp_dim, dim], last_bn=not resnet_form)
        self.base_encoder = backbone
        self.momentum_encoder = copy.deepcopy(backbone).requires_grad_(False)  # f_k = f_q at first

    def forward(self, x1, x2):
        """x1, x2: [N, in_chans, H, W] → loss, {"top1", "spread"}; scalars on the device.

        Algorithm 1 up to the loss, the two terms as one batch of views; changes no weight. The loss
        is this rank's mean over its 2N queries, against the keys of all ranks. With encode_chunk,
        x1 and x2 may be anything whose slices are such tensors, as moco.augment.Views.
        """
        h = self.encode(self.base_encoder, x1, x2)  # [2, N, d]
        q1, q2 = self.predictor(projector(self.base_encoder)(h))  # [N, C] each
        with torch.no_grad():
            k = projector(self.momentum_encoder)(self.encode(self.momentum_encoder, x1, x2))
            k1, k2 = gather(unit(k)).transpose(0, 1).flatten(1, 2)  # [world·N, C] each

        loss1, top1 = contrastive_loss(q1, k2, self.T)
        loss2, top2 = contrastive_loss(q2, k1, self.T)
        return loss1 + loss2, {"top1": (top1 + top2) / 2, "spread": spread(h.detach())}

    def encode(self, encoder, x1, x2):
        """Backbone features of both views: [N, in_chans, H, W] twice → [2, N, d]."""
        if self.encode_chunk:
            return torch.stack([self.encode_in_chunks(encoder, x) for x in (x1, x2)])
        # On a CPU a large batch pays for its buffers more than it gains.
        if self.one_pass and not (x1.is_cpu and x1.numel() > 2**20):
            return self.features(encoder, torch.cat([x1, x2])).view(2, len(x1), -1)
        return torch.stack([self.features(encoder, x) for x in (x1, x2)])

    def encode_in_chunks(self, encoder, x):
        """The same for one view → [N, d], keeping no activation: Chen et al., arXiv 1604.06174."""

        def encode(start):
            return self.features(encoder, x[start : start + self.encode_chunk])

        starts = range(0, len(x), self.encode_chunk)
        # Nothing in a backbone is random here, so the generators' states need no saving.
        options = dict(use_reentrant=False, preserve_rng_state=False)
        return torch.cat([activation_checkpoint(encode, start, **options) for start in starts])

    @torch.no_grad()
    def update_momentum_encoder(self, m):
        """f_k ← m·f_k + (1−m)·f_q, after the optimizer's step; in place, one fused call."""
        torch._foreach_lerp_(
            list(self.momentum_encoder.parameters()), list(self.base_encoder.parameters()), 1 - m
        )


def contrastive_loss(q, k, T):
    """InfoNCE: q [N, C], all ranks' normalised k [world·N, C] → 2T·loss, top-1; Sec. 3, Eq. (1).

    Row i of q belongs to row rank·N + i of k. Logits and loss are in fp32 whatever autocast says.
    """
    with torch.autocast(q.device.type, enabled=False):
        logits = unit(q) @ k.T / T  # [N, world·N]
        labels = torch.arange(len(q), device=q.device) + rank() * len(q)
        top1 = (logits.detach().argmax(1) == labels).float().mean()
        return 2 * T * F.cross_entropy(logits, labels), top1


def mlp(dims, last_bn=True):
    """Linear layers without bias: BN, ReLU between them, BN without affine at the end; Sec. 4.4."""
    layers = []
    for i, (before, after) in enumerate(zip(dims, dims[1:])):
        layers.append(nn.Linear(before, after, bias=False))
        if i < len(dims) - 2:
            layers += [ViewBatchNorm(after), nn.ReLU(inplace=True)]
        elif last_bn:
            layers.append(ViewBatchNorm(after, affine=False))
    return nn.Sequential(*layers)


def ends_in_batchnorm(backbone):
    """Whether the last norm is a BatchNorm, as in ResNet, RegNet, MobileNet: heads as for a ResNet.

    Else as for a ViT: with or without a convolutional stem it ends in a LayerNorm, as does Swin.
    """
    norms = (BatchNorm, nn.LayerNorm, nn.GroupNorm)
    last = [m for m in backbone.modules() if isinstance(m, norms)][-1:]
    return any(isinstance(m, BatchNorm) for m in last)


def projector(encoder):
    """What stands where the classifier stood."""
    return encoder.get_submodule(encoder.classifier_name)


def features(encoder, x):
    """The backbone's output before the projector, which is what to use downstream: [N, d].

    A ViT's class token after the last LayerNorm, a ResNet's pooled last stage.
    """
    if hasattr(encoder, "forward_features"):  # timm
        return encoder.forward_head(encoder.forward_features(x), pre_logits=True)
    for name, layer in encoder.named_children():  # torchvision's ResNet, in the order of its layers
        if name != encoder.classifier_name:
            x = layer(x)
    return x.flatten(1)


def unit(x):
    """Rows of length 1, in fp32 at least."""
    return F.normalize(at_least_fp32(x), dim=-1)


def spread(h):
    """Mean standard deviation of normalised features, times √d: near 0 when they collapse.

    h: [2, N, d] → scalar; 1 if features fill the sphere evenly. (SimSiam, Sec. 4.1)
    """
    return unit(h).std(dim=1).mean() * h.shape[-1] ** 0.5
