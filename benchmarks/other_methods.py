"""main_moco.py with heads, loss and momentum update of another library's MoCo v3.

    pip install lightly stable-pretraining
    python benchmarks/other_methods.py lightly @recipes/digits.txt --output-dir runs/digits_lightly
    python benchmarks/other_methods.py stable-pretraining @recipes/digits.txt
The rest is that of main_moco.py: images, views, batches, backbone and its first weights, optimizer,
schedules, kNN. Its checkpoints are for main_lincls.py.

- lightly has no loss of MoCo v3. Its NTXentLoss without a memory bank is that of SimCLR, which
  takes the other queries as negatives, too: 2N − 2 of them instead of N − 1.
- stable-pretraining's loss lacks the factor 2τ, which AdamW does not see.
"""

import copy
import sys
from functools import partial

import report  # noqa: F401  first of ours: it makes the repository importable
import torch
from torch import nn

import main_moco
from engine import cli
from engine.backbones import create_backbone
from moco.builder import ends_in_batchnorm


class LightlyMoCo(nn.Module):
    """The heads and NTXentLoss of lightly, as its documentation combines them.

    backbone: images → features [N, backbone.num_features]. forward: x1, x2 → loss, {}.
    """

    def __init__(self, backbone, dim, mlp_dim, T):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead

        super().__init__()
        layers = num_layers(backbone)
        d = backbone.num_features
        self.base_encoder = backbone
        self.projector = MoCoProjectionHead(d, mlp_dim, dim, num_layers=layers, batch_norm=True)
        self.predictor = MoCoProjectionHead(dim, mlp_dim, dim, num_layers=2, batch_norm=True)
        momentum_encoder = nn.Sequential(backbone, self.projector)
        self.momentum_encoder = copy.deepcopy(momentum_encoder).requires_grad_(False)
        self.criterion = NTXentLoss(temperature=T, memory_bank_size=0)

    def forward(self, x1, x2):
        q1, q2 = (self.predictor(self.projector(self.base_encoder(x))) for x in (x1, x2))
        with torch.no_grad():
            k1, k2 = (self.momentum_encoder(x) for x in (x1, x2))
        return self.criterion(q1, k2) + self.criterion(q2, k1), {}

    def update_momentum_encoder(self, m):
        from lightly.models.utils import update_momentum

        update_momentum(self.base_encoder, self.momentum_encoder[0], m)
        update_momentum(self.projector, self.momentum_encoder[1], m)


class StablePretrainingMoCo(nn.Module):
    """MoCov3 of stable-pretraining, and the update of its teachers that its callback would call.

    backbone: images → features [N, backbone.num_features]. forward: x1, x2 → loss, {}.
    """

    def __init__(self, backbone, dim, mlp_dim, T):
        from stable_pretraining.methods import MoCov3

        super().__init__()
        projector = [mlp_dim] * (num_layers(backbone) - 1) + [dim]
        self.method = MoCov3(
            AnswersProbe(backbone),
            projector_dims=projector,
            predictor_hidden_dim=mlp_dim,
            temperature=T,
        )
        self.base_encoder = self.method.backbone.student.backbone

    def forward(self, x1, x2):
        return self.method(x1, x2).loss, {}

    def update_momentum_encoder(self, m):
        for part in (self.method.backbone, self.method.projector):
            part.ema_coefficient.fill_(m)
            part.update_teacher()


class AnswersProbe(nn.Module):
    """A backbone of any size and number of channels.

    MoCov3 asks for the width of the features by one RGB image of 224 pixels, in eval mode.
    """

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.is_created = backbone, False

    def forward(self, x):
        if not self.is_created:
            self.is_created = True
            return x.new_zeros(len(x), self.backbone.num_features)
        return self.backbone(x)


def num_layers(backbone):
    """Of the projector."""
    return 2 if ends_in_batchnorm(backbone) else 3


METHODS = {"lightly": LightlyMoCo, "stable-pretraining": StablePretrainingMoCo}


def main(method, args):
    """main_moco.main with `method` in place of MoCo."""

    def create_model(args, config, env):
        torch.manual_seed(args.seed)  # the same initial backbone as ours
        backbone = create_backbone(config, stop_grad_conv1=args.stop_grad_conv1)
        model = METHODS[method](backbone, args.moco_dim, args.moco_mlp_dim, args.moco_t)
        return model.to(env.device)

    main_moco.create_model = create_model
    main_moco.main(args)


if __name__ == "__main__":
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in METHODS:
        raise SystemExit(f"usage: other_methods.py {{{','.join(METHODS)}}} [flags of main_moco.py]")
    cli.run_script(partial(main, name), main_moco.parse_args)
