"""What a sweep of rates costs the linear probe: images/s with one rate and with ten, in one run.

    python benchmarks/probe.py --arch vit_base --batch-size 256 --out benchmarks/results/probe.json
    python benchmarks/probe.py --quick
The backbone's forward pass, the classifiers' step, augmentation included; images lie in memory.
"""

import statistics
import time
from functools import partial
from types import SimpleNamespace

import report  # first: it makes the repository importable
import torch

import main_lincls
from moco import distributed
from moco.backbones import create_backbone


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    batch, steps = (8, 3) if args.quick else (args.batch_size, args.steps)

    device, amp = distributed.set_up(args.device, args.amp)
    autocast = partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    torch.manual_seed(0)
    backbone = create_backbone(args.arch).requires_grad_(False).eval().to(device)
    crops = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    labels = torch.randint(args.classes, (batch,))

    setups = {}
    for count in (1, 10):
        rates = SimpleNamespace(lr=[0.1] * count, seed=0, batchnorm=False)
        heads = main_lincls.create_classifiers(rates, backbone.num_features, args.classes)
        optimizer = main_lincls.create_optimizer(heads.to(device))
        setups[count] = (heads, backbone, optimizer, autocast, crops, labels, device)

    seconds = {count: [] for count in setups}
    for step in range(steps + 2):  # the first two warm up; one and ten take turns
        for count, setup in setups.items():
            start = time.perf_counter()
            main_lincls.train_step(*setup).cpu()  # waits for the device
            if step >= 2:
                seconds[count].append(time.perf_counter() - start)
    one, ten = (statistics.median(seconds[count]) for count in (1, 10))
    report.finish(
        args, device, arch=args.arch, batch_size=batch,
        precision=str(amp or torch.float32).removeprefix("torch."),
        images_per_s={"1 rate": round(batch / one, 1), "10 rates": round(batch / ten, 1)},
        **{"ten/one": round(ten / one, 3)},
    )  # fmt: skip


if __name__ == "__main__":
    main()
