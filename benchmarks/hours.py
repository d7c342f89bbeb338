"""Hours that the recipes take on one GPU, computed from measured rates → the table of docs/time.md.

    python benchmarks/hours.py
Images of all epochs by images/s of a step, augmentation included: one NVIDIA H200, bf16, revision
64d8096, 512 images a step for ViT-S, else 256. Not in it: loading, where it is slower than the
step, kNN, checkpoints, and communication between GPUs.
"""

import json
import re
from pathlib import Path

import report  # noqa: F401  # makes the repository importable

import main_moco

ROOT = Path(__file__).parents[1]
IMAGENET_IMAGES = 1_281_167
# Recipes of 224 pixels for smaller sets, by the beginning of their names: name, training images.
SMALL_SETS = {"imagenet100_": ("ImageNet-100", 126_689), "imagenette_": ("Imagenette", 9_469)}
NAMES = {
    "resnet50": "ResNet-50",
    "vit_tiny": "ViT-Ti",
    "vit_small": "ViT-S",
    "vit_base": "ViT-B",
    "vit_large": "ViT-L",
    "vit_huge": "ViT-H",
    "vit_conv_small": "ViT-S, convolutional stem",
    "vit_conv_base": "ViT-B, convolutional stem",
}
# What the paper states, by architecture and epochs.
PAPER = {
    ("vit_base", 100): f"{128 * 24:,} GPU-hours (24 h on 128 GPUs), {256 * 2.1:.0f} TPU-hours",
    ("vit_huge", 300): f"about {625 * 24:,} TPU-hours (625 TPU-days)",
}


def main():
    print("\n".join([*table(), "", *table_of_small_sets()]))


def table():
    """Lines of Markdown, by architecture and epochs; what has no rate is "not run"."""
    eager, compiled = rates()
    lines = [
        "| Backbone | Epochs | Recipes | Hours, eager | Hours, compiled | The paper |",
        "|---|---|---|---|---|---|",
    ]
    groups = recipes()
    for arch, name in NAMES.items():
        for epochs in sorted(epochs for other, epochs in groups if other == arch):
            cells = [name, epochs, ", ".join(f"`{recipe}`" for recipe in groups[arch, epochs])]
            for rate in (eager.get(arch), compiled.get(arch)):
                cells.append(f"{hours(epochs, rate):,.0f}" if rate else "not run")
            cells.append(PAPER.get((arch, epochs), ""))
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def table_of_small_sets():
    """The same of SMALL_SETS, without the recipes whose backbone has no rate."""
    eager, compiled = rates()
    lines = ["| Data | Recipe | Hours, eager | Hours, compiled |", "|---|---|---|---|"]
    for beginning, (name, num_images) in SMALL_SETS.items():
        for path in sorted((ROOT / "recipes").glob(f"{beginning}*.txt")):
            args = main_moco.parse_args([f"@{path}", "DIR"])
            if args.arch not in eager:
                continue
            cells = [name, f"`{path.stem}`"]
            for rate in (eager[args.arch], compiled.get(args.arch)):
                cells.append(f"{hours(args.epochs, rate, num_images):.1f}" if rate else "not run")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def hours(epochs, images_per_s, num_images=IMAGENET_IMAGES):
    return epochs * num_images / images_per_s / 3600


def rates():
    """Images/s by architecture: eager, compiled."""
    steps, profile = (
        json.loads((ROOT / f"benchmarks/results/gpu_{name}_h200.json").read_text())
        for name in ("step", "profile")
    )
    eager = {
        name.removeprefix("step_"): row["fast"]["images_per_s"]
        for name, row in steps.items()
        if name.startswith("step_")
    }
    compiled = {
        name.split(",")[0]: row["images_per_s"]
        for name, row in profile.items()
        if name.endswith(",compile")
    }
    return eager, compiled


def recipes():
    """Recipes of pre-training on ImageNet, at 224 pixels: {(arch, epochs): [names]}."""
    groups = {}
    for path in sorted((ROOT / "recipes").glob("**/*.txt")):
        command = rf"main_moco\.py @\S*{path.name} DIR\n"
        if path.name.startswith(tuple(SMALL_SETS)) or not re.search(command, path.read_text()):
            continue
        args = main_moco.parse_args([f"@{path}", "DIR"])
        assert args.img_size == (224,) and args.arch in NAMES, path
        groups.setdefault((args.arch, args.epochs), []).append(path.stem)
    return groups


if __name__ == "__main__":
    main()
