"""Draws docs/architecture.png: both encoders, their heads, the loss, the momentum update.

python docs/architecture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GRAY = "#dbe9f8", "#fdebd3", "#eeeeee"
BASE, MOMENTUM = 3.05, 0.75  # heights of the two rows
HIDDEN = "Linear 4096, BN, ReLU"


def box(ax, x, y, width, height, text, color, size=10):
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=color, ec="#444444"))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(ax, start, end, text="", style="-|>", **kwargs):
    options = dict(arrowstyle=style, mutation_scale=13, color="#222222", lw=1.3) | kwargs
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **options))
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    ax.text(x, y + 0.1, text, ha="center", va="bottom", fontsize=9)


def draw(path):
    figure, ax = plt.subplots(figsize=(10, 4.5))
    ax.set(xlim=(0, 12.2), ylim=(0, 5.0))
    ax.axis("off")

    box(ax, 0.05, 1.85, 1.4, 1.5, "views\n$x_1, x_2$\n[N, 3, H, W]\neach", GRAY)
    for y, color, name in (
        (BASE, BLUE, "base encoder $f_q$"),
        (MOMENTUM, ORANGE, "momentum encoder $f_k$"),
    ):
        box(ax, 1.95, y - 0.1, 5.0, 1.85, "", "white")
        ax.text(2.1, y + 1.42, name, fontsize=11, weight="bold")
        box(ax, 2.1, y, 1.4, 1.3, "backbone\nViT or\nResNet", color)
        lines = (HIDDEN, HIDDEN, "Linear 256, BN*")
        box(ax, 4.25, y, 2.55, 1.3, "projector\n" + "\n".join(lines), color, 9)
        arrow(ax, (1.45, 2.6), (2.1, y + 0.65))
        arrow(ax, (3.5, y + 0.65), (4.25, y + 0.65), "[N, d]")
        ax.text(7.27, y + 0.75, "[N, C]", ha="center", va="bottom", fontsize=9)
    box(ax, 7.6, BASE, 2.5, 1.3, f"predictor\n{HIDDEN}\nLinear 256, BN*", BLUE, 9)
    arrow(ax, (6.8, BASE + 0.65), (7.6, BASE + 0.65))
    box(
        ax,
        7.6,
        MOMENTUM,
        2.5,
        1.3,
        "all_gather\nkeys of all processes\nwithout gradient",
        ORANGE,
        9,
    )
    arrow(ax, (6.8, MOMENTUM + 0.65), (7.6, MOMENTUM + 0.65))

    box(ax, 10.35, 1.95, 1.75, 1.3, "loss\nctr($q_1$, $k_2$)\n+ ctr($q_2$, $k_1$)", GRAY, 11)
    arrow(ax, (10.1, BASE + 0.65), (11.2, 3.25), connectionstyle="angle,angleA=0,angleB=90,rad=4")
    ax.text(10.35, BASE + 0.75, "$q_1, q_2$ [N, C]", fontsize=9, va="bottom")
    arrow(
        ax, (10.1, MOMENTUM + 0.65), (11.2, 1.95), connectionstyle="angle,angleA=0,angleB=90,rad=4"
    )
    ax.text(10.35, MOMENTUM + 0.55, "$k_1, k_2$\n[world size · N, C]", fontsize=9, va="top")

    arrow(ax, (3.9, BASE - 0.1), (3.9, MOMENTUM + 1.75), linestyle="--", color="#b35900")
    formula = "$f_k ← m·f_k + (1-m)·f_q$ after each optimizer step"
    ax.text(4.1, 2.7, formula, fontsize=10, va="center", color="#b35900")
    note = (
        "Widths of a ViT: C = 256. A ResNet has one hidden layer less in the projector, and no BN "
        "at the end of the predictor.\nBN*: without scale and shift. Every BN sees one view at a "
        "time, of all processes. Linear layers have no bias."
    )
    ax.text(0.05, 0.05, note, fontsize=9, color="#333333", va="bottom")
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    draw(Path(__file__).with_name("architecture.png"))
