"""Model FLOPs utilization (MFU): the fraction of a GPU's peak that a model's operations reach."""

import copy
import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from moco.distributed import is_main, world_size

# TFLOP/s of dense matrix products, from NVIDIA's data sheets: bf16 and fp16, summed in fp32. By the
# name that torch.cuda.get_device_name() returns.
PEAK_TFLOPS = {
    r"NVIDIA H200": 989,
    r"NVIDIA H100 80GB HBM3": 989,  # SXM
    r"(NVIDIA )?A100(-SXM4-\d+GB|-PCIE-\d+GB| 80GB PCIe)": 312,
    r"NVIDIA L40S": 362,
    r"NVIDIA GeForce RTX 4090": 165,
    r"NVIDIA GeForce RTX 3090": 71,
    r"Tesla V100-SXM[23]-\d+GB": 125,  # in fp16; it has no bf16
}


def peak_images_per_s(backbone, config, env, passes):
    """Images/s of all processes if their devices computed at their peak; None where it isn't known.

    config: BackboneConfig. passes: forward passes of the backbone that take as long as what a step
    does with an image; a backward pass counts as two. Only rank 0, which writes the log, counts.
    """
    peak = peak_flops(env.device, env.amp_dtype)
    if peak is None or not is_main():
        return None
    flops = forward_flops(backbone, config.img_size, config.pixel_format.in_chans)
    return world_size() * peak / (passes * flops) if flops else None


def peak_flops(device, dtype):
    """FLOP/s of a device in bf16 or fp16, None where it isn't known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    if dtype == torch.bfloat16 and name.startswith("Tesla V100"):
        return None
    known = [peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)]
    return known[0] * 1e12 if known else None


def forward_flops(backbone, img_size, in_chans=3):
    """Operations of the forward pass of one image, a multiplication and an addition as two.

    Those of matrix products and convolutions, counted on tensors without data. None for a backbone
    that can't run on such tensors.
    """
    backbone = copy.deepcopy(backbone).to("meta").eval()
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):  # timm's; fused attention is not counted on all devices
            module.fused_attn = False
    x = torch.empty(1, in_chans, *img_size, device="meta")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            backbone(x)
    except Exception:  # each model has its own way to need data
        return None
    return counter.get_total_flops()
