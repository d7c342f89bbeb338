"""Losses and gradients of a few steps in float64: this project's, or those of the official code.

    python tests/moco/measure_official.py                       # ours, beside official.json
    python tests/moco/measure_official.py --official CLONE      # the official code in CLONE

Weights and inputs are functions of names and numbers, so that any implementation can repeat this.
Nothing of the official code is contained here: CLONE is imported from where it is.
"""

import argparse
import json
import sys
import zlib
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision

ROOT = Path(__file__).resolve().parents[2]
LARS = dict(lr=0.3, weight_decay=1e-4, momentum=0.9)
ADAMW = dict(lr=1e-3, weight_decay=0.1)
HEADS = dict(dim=64, mlp_dim=128, T=0.2)


def create_ours(arch):
    """Our model in float64, with the weights and the position table of official.json."""
    import vits
    from moco import MoCo

    if arch == "resnet50":
        backbone = torchvision.models.resnet50(zero_init_residual=True)
    else:
        backbone = getattr(vits, arch)(stop_grad_conv1=True)
    model = MoCo(backbone, **HEADS).double()
    fill(model)
    return model


def create_official(arch, clone):
    """The official release's model in float64, from a clone of its code."""
    sys.path.insert(0, str(clone))
    import moco.builder as official
    import vits

    torch.set_default_dtype(torch.float64)
    sizes = (HEADS["dim"], HEADS["mlp_dim"], HEADS["T"])
    if arch == "resnet50":
        backbone = partial(torchvision.models.resnet50, zero_init_residual=True)
        model = official.MoCo_ResNet(backbone, *sizes)
    else:
        model = official.MoCo_ViT(partial(getattr(vits, arch), stop_grad_conv1=True), *sizes)
    model = model.double()
    fill(model)
    return model


@torch.no_grad()
def fill(model):
    for name, p in model.named_parameters():
        if name.startswith("momentum_encoder"):
            continue
        if name.endswith("pos_embed"):
            p.copy_(official_pos_embed(p.shape[-1]))
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.05)
        is_norm = "norm" in name or "bn" in name
        if p.ndim == 1 and is_norm and name.endswith("weight"):
            p.add_(1)
    for q, k in zip(model.base_encoder.parameters(), model.momentum_encoder.parameters()):
        k.copy_(q)


def official_pos_embed(dim):
    """Its position table of 14×14 patches, which it computes in float32."""
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    angles = torch.arange(14, dtype=torch.float32)[:, None] * omega  # [14, dim/4]
    r, c = angles[:, None].expand(-1, 14, -1), angles[None].expand(14, -1, -1)
    cells = torch.cat([r.sin(), r.cos(), c.sin(), c.cos()], 2).flatten(0, 1)
    return torch.cat([torch.zeros(1, dim), cells])[None].double()


def create_optimizer(name, model):
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(params, **ADAMW)
    from moco import LARS as OurLARS

    return OurLARS(params, **LARS)


def train(model, figures, num_steps, official=False):
    """→ losses of the steps, gradient norm of each parameter of base_encoder in the first one."""
    model.train()
    if official:
        optimizer = official_optimizer(figures["optimizer"], model)
    else:
        optimizer = create_optimizer(figures["optimizer"], model)
    losses, grad_norms = [], {}
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(100 + step)
        shape = (figures["batch"], 3, 224, 224)
        x1 = torch.randn(shape, generator=generator, dtype=torch.float64)
        x2 = torch.randn(shape, generator=generator, dtype=torch.float64)
        loss = model(x1, x2, figures["m"]) if official else model(x1, x2)[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step == 0:
            for name, p in model.named_parameters():
                grad_norms[name] = None if p.grad is None else p.grad.norm().item()
        optimizer.step()
        if not official:  # it updates before the next forward pass, which is the same with equal m
            model.update_momentum_encoder(figures["m"])
        losses.append(loss.item())
    return losses, grad_norms


def official_optimizer(name, model):
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(params, **ADAMW)
    import moco.optimizer as official

    return official.LARS(params, **LARS)


def main(args):
    figures = json.loads((Path(__file__).parent / "official.json").read_text())
    if args.official:
        # Its code needs a process group.
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        torch.Tensor.cuda = lambda self, *_, **__: self  # it moves labels to a GPU
    else:
        sys.path.insert(0, str(ROOT))
    for expected in figures["models"]:
        arch, num_steps = expected["arch"], len(expected["losses"])
        model = create_official(arch, args.official) if args.official else create_ours(arch)
        losses, grad_norms = train(model, expected, num_steps, official=bool(args.official))
        differences = [abs(a - b) for a, b in zip(losses, expected["losses"])]
        print(f"{arch}: losses {losses}")
        print(f"  differ from official.json by {', '.join(f'{d:.1e}' for d in differences)}")
        worst = max(
            abs(grad_norms[name] - norm) / max(norm, 1)
            for name, norm in expected["grad_norms_step0"].items()
            if norm is not None
        )
        print(f"  gradient norms of the first step differ by {worst:.1e} at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", metavar="CLONE", help="folder of the official code")
    main(parser.parse_args())
