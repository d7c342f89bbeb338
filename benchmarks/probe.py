"""What a sweep of rates costs the linear probe: images/s with one rate and with ten, in one run.

    python benchmarks/probe.py --arch vit_base --batch-size 256 --out benchmarks/results/probe.json
    python benchmarks/probe.py --quick
It drives main_lincls.py's own train_one_epoch on images that lie in memory: the backbone's forward
pass and the classifiers' step.
"""

import statistics
import time
from types import SimpleNamespace

import report  # first: it makes the repository importable
import torch
from step import RepeatedBatch, RunInMemory

import main_lincls
from engine.backbones import BackboneConfig, create_backbone
from engine.launch import init_distributed


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    batch_size, steps = (8, 3) if args.quick else (args.batch_size, args.steps)
    if args.quick:
        args.arch = "vit_tiny"

    env = init_distributed(args.device, args.amp)
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(args.arch)).to(env.device)
    backbone.requires_grad_(False).eval()
    crops = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8)
    loader = RepeatedBatch((crops, torch.randint(args.classes, (batch_size,))), 1)

    setups = {}
    for count in (1, 10):
        rates = SimpleNamespace(
            lr=[0.1] * count, seed=0, batchnorm=False, batch_size=batch_size, epochs=1000
        )
        classifiers = main_lincls.create_classifiers(rates, backbone.num_features, args.classes)
        optimizer = main_lincls.create_sgd(classifiers.to(env.device))
        setups[count] = rates, RunInMemory(env), classifiers, backbone, loader, optimizer

    seconds = {count: [] for count in setups}
    for step in range(steps + 2):  # the first two warm up; one and ten take turns
        for count, setup in setups.items():
            start = time.perf_counter()
            main_lincls.train_one_epoch(*setup)
            setup[1].loss.cpu()  # waits for the device
            if step >= 2:
                seconds[count].append(time.perf_counter() - start)
    one, ten = (statistics.median(seconds[count]) for count in (1, 10))
    report.finish(
        args,
        env.device,
        arch=args.arch,
        batch_size=batch_size,
        precision=str(env.amp_dtype or torch.float32).removeprefix("torch."),
        images_per_s={"1 rate": round(batch_size / one, 1), "10 rates": round(batch_size / ten, 1)},
        **{"ten/one": round(ten / one, 3)},
    )


if __name__ == "__main__":
    main()
