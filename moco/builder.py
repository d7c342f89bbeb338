"""MoCo v3: two encoders, the heads, the contrastive loss, the momentum update (Algorithm 1)."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm  # of 1 to 3 dimensions, synced
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from moco.batchnorm import ViewBatchNorm, at_least_fp32
from moco.compilation import compile_backbone
from moco.distributed import all_gather, rank

CPU_CONCAT_LIMIT = 2**20  # elements of a view; benchmarks/step.py --levers concat_views


class MoCo(nn.Module):
    """base_encoder = backbone + projector, momentum_encoder = its moving average, predictor.

    backbone: any nn.Module such that backbone(x) returns features [N, d].
        d is `backbone.num_features`, or the input width of its classifier.
        The projector takes the place of the classifier: `fc`, `head`, `heads` or `classifier`, or
        the name in `backbone.classifier_name`. A backbone without one gets it as `head`.
    dim: width of q and k. mlp_dim: hidden width of the heads. T: temperature τ.
    encode_chunk: if > 0, the backbone sees so many images of a view at a time and its backward pass
        recomputes their activations; heads and loss see the whole batch, so the gradient is the
        same with less memory. Needs a backbone without BatchNorm.
    compile: torch.compile the encoders, a ViT's block by block.
    head_bn, use_predictor: False for the study of what they are worth (Sec. 6.2).

    `base_encoder(x)` remains [N, d], the features for downstream use: the projector passes its
    input through when the backbone calls it. ValueError for a backbone that breaks the contract.
    """

    def __init__(
        self,
        backbone,
        dim=256,
        mlp_dim=4096,
        T=1.0,
        encode_chunk=0,
        compile=False,
        head_bn=True,
        use_predictor=True,
    ):
        super().__init__()
        self.T, self.encode_chunk = T, encode_chunk
        has_batchnorm = any(isinstance(m, AnyBatchNorm) for m in backbone.modules())
        if encode_chunk and has_batchnorm:
            raise ValueError(
                "encode_chunk needs a backbone without BatchNorm, which would see the chunk "
                "instead of the batch: set it to 0 and lower the batch size"
            )
        # BatchNorm must see one view at a time; a backbone without it takes both in one batch.
        self.concat_views = not has_batchnorm

        name, d = find_classifier(backbone)
        resnet_form = ends_in_batchnorm(backbone)  # 2-layer projector, no BN after the predictor
        hidden = [mlp_dim] if resnet_form else [mlp_dim, mlp_dim]
        backbone.set_submodule(name, Projector(*build_mlp([d, *hidden, dim], bn=head_bn)))
        backbone.classifier_name, backbone.num_features = name, d
        layers = build_mlp([dim, mlp_dim, dim], bn=head_bn, last_bn=head_bn and not resnet_form)
        self.predictor = nn.Sequential(*layers if use_predictor else [])
        self.base_encoder = backbone
        self.momentum_encoder = copy.deepcopy(backbone).requires_grad_(False)  # f_k = f_q at first
        if compile:
            compile_backbone(self.base_encoder)
            compile_backbone(self.momentum_encoder)

    def forward(self, x1, x2):
        """x1, x2: [N, in_chans, H, W] → loss, {"top1", "feature_std"}; scalars on the device.

        Algorithm 1 up to the loss; changes no weight. The loss is the sum over both views of the
        mean over this rank's N queries, against the keys of all ranks. Each BatchNorm sees one
        view at a time.
        """
        h = self.encode(self.base_encoder, x1, x2)  # [2, N, d]
        q1, q2 = self.predictor(projector(self.base_encoder).project(h))  # [N, C] each
        with torch.no_grad():
            h_k = self.encode(self.momentum_encoder, x1, x2)  # [2, N, d]
            # q is normalized in the loss, k before it is gathered: once instead of on every rank.
            k = l2_normalize(projector(self.momentum_encoder).project(h_k))  # [2, N, C]
            k1, k2 = all_gather(k).transpose(0, 1).flatten(1, 2)  # [world_size·N, C] each

        loss1, top1 = contrastive_loss(q1, k2, self.T)
        loss2, top2 = contrastive_loss(q2, k1, self.T)
        metrics = {"top1": (top1 + top2) / 2, "feature_std": feature_std(h.detach())}
        return loss1 + loss2, metrics

    def encode(self, encoder, x1, x2):
        """Features of both views: [N, in_chans, H, W] twice → [2, N, d]."""
        if self.encode_chunk:
            h = torch.stack([self.encode_in_chunks(encoder, x) for x in (x1, x2)])
        # On a CPU a large batch is faster one view after the other.
        elif self.concat_views and not (x1.is_cpu and x1.numel() > CPU_CONCAT_LIMIT):
            h = encoder(torch.cat([x1, x2])).unflatten(0, (2, len(x1)))
        else:
            h = torch.stack([encoder(x) for x in (x1, x2)])
        if h.shape[1:] != (len(x1), encoder.num_features):
            raise ValueError(
                f"the backbone returned {list(h.shape[1:])} for a view, not the features "
                f"[N, d] = [{len(x1)}, {encoder.num_features}]"
            )
        return h

    def encode_in_chunks(self, encoder, x):
        """One view → [N, d], keeping no activations (Chen et al. 2016, arXiv 1604.06174)."""

        def encode(start):
            return encoder(x[start : start + self.encode_chunk])

        starts = range(0, len(x), self.encode_chunk)
        chunks = [activation_checkpoint(encode, start, use_reentrant=False) for start in starts]
        return torch.cat(chunks)

    @torch.no_grad()
    def update_momentum_encoder(self, m):
        """f_k ← m·f_k + (1−m)·f_q, after the optimizer's step; in place, one fused call.

        Of the parameters: BatchNorm's statistics in f_k are those of its own inputs.
        """
        torch._foreach_lerp_(
            list(self.momentum_encoder.parameters()), list(self.base_encoder.parameters()), 1 - m
        )


def contrastive_loss(q, k, T):
    """InfoNCE: q [N, C], all ranks' normalised k [world_size·N, C] → 2T·loss, top-1; Sec. 3, Eq. 1.

    Row i of q belongs to row rank·N + i of k. Logits and loss are in fp32 whatever autocast says.
    top-1: fraction of the queries whose own key is the most similar one.
    """
    with torch.autocast(q.device.type, enabled=False):
        logits = l2_normalize(q) @ k.T / T  # [N, world_size·N]
        labels = torch.arange(len(q), device=q.device) + rank() * len(q)
        top1 = (logits.detach().argmax(1) == labels).float().mean()
        return 2 * T * F.cross_entropy(logits, labels), top1


class Projector(nn.Sequential):
    """The projection head. It stands where the classifier stood, as in published checkpoints.

    Called by the backbone it returns its input, so that backbone(x) is the features; `project`
    applies the layers, to both views at once: [2, N, d] → [2, N, dim].
    """

    def forward(self, h):
        return h

    def project(self, h):
        return super().forward(h)


def build_mlp(dims, bn=True, last_bn=None):
    """Layers of a head: Linear without bias, BN and ReLU between, BN without affine last; Sec. 5.

    dims: the input width, the hidden ones, the output width. last_bn None: as bn.
    """
    last_bn = bn if last_bn is None else last_bn
    layers = []
    for i, (d_in, d_out) in enumerate(zip(dims[:-1], dims[1:])):
        layers.append(nn.Linear(d_in, d_out, bias=False))
        is_last = i == len(dims) - 2
        if not is_last:
            layers += [ViewBatchNorm(d_out)] if bn else []
            layers.append(nn.ReLU(inplace=True))
        elif last_bn:
            layers.append(ViewBatchNorm(d_out, affine=False))
    return layers


def projector(encoder):
    return encoder.get_submodule(encoder.classifier_name)


def find_classifier(backbone):
    """Name of the submodule that the projector replaces, and the width d of the features.

    ValueError where either can't be told; the docstring of MoCo states the rule.
    """
    name = classifier_name(backbone)
    layer = backbone.get_submodule(name) if name else None
    if layer is not None and not isinstance(layer, nn.Linear | nn.Identity):
        raise ValueError(
            f"the backbone's {name!r} is a {type(layer).__name__}, not a classifier (nn.Linear or "
            "nn.Identity): set backbone.classifier_name"
        )
    d = layer.in_features if isinstance(layer, nn.Linear) else None
    # head_hidden_size: timm's models whose head has a hidden layer before the classifier.
    d = d or getattr(backbone, "head_hidden_size", None) or getattr(backbone, "num_features", None)
    if not isinstance(d, int):
        raise ValueError("the backbone must state the width of its features: num_features = d")
    if name is None:
        backbone.head = nn.Identity()
    return name or "head", d


def classifier_name(backbone):
    """Stated by the backbone or by timm, else that of torchvision's models; None without one."""
    stated = getattr(backbone, "classifier_name", None)
    stated = stated or (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(stated, tuple | list):  # timm's distilled models
        raise ValueError(f"the projector replaces one classifier, the backbone has {len(stated)}")
    if stated:
        return stated
    for name in ("fc", "head", "heads", "classifier"):
        layer = getattr(backbone, name, None)
        if isinstance(layer, nn.Sequential) and len(layer) > 0:  # dropout or the like comes first
            return f"{name}.{list(layer._modules)[-1]}"
        if isinstance(layer, nn.Module):
            return name
    return None


def ends_in_batchnorm(backbone):
    """Whether the last norm is a BatchNorm, as in ResNet or RegNet: the heads have a ResNet's form.

    Other backbones get a ViT's: with or without a convolutional stem it ends in a LayerNorm.
    """
    kinds = (AnyBatchNorm, nn.LayerNorm, nn.GroupNorm)
    norms = [m for m in backbone.modules() if isinstance(m, kinds)]
    return bool(norms) and isinstance(norms[-1], AnyBatchNorm)


def l2_normalize(x):
    """Rows of length 1, in fp32 at least."""
    return F.normalize(at_least_fp32(x), dim=-1)


def feature_std(h):
    """Mean standard deviation of l2-normalised features, times √d: near 0 when they collapse.

    h: [2, N, d] → scalar; 1 if features fill the sphere evenly. (SimSiam, Sec. 4.1)
    """
    return l2_normalize(h).std(dim=1).mean() * h.shape[-1] ** 0.5
