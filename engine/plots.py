"""Pictures of a run: curves.png of its metrics, views.png of what the model sees."""

import math
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from engine.data.decode import RGB
from engine.files import atomic_write
from engine.log import is_sweep, read_log
from moco.augmentation import denormalize

PANELS = {
    "loss": "loss",
    "knn": "kNN accuracy on held-out images, %",
    "rankme": "RankMe, effective rank of the features",
    "acc1": "top-1 accuracy on held-out images, %",
    "top1": "contrastive top-1, fraction of queries",
    "feature_std": "feature std (0: collapsed)",
    "grad_linf": "largest gradient (ℓ∞) of a layer",
    "grad_l2": "gradient norm (ℓ2) of a layer",
    "lr": "learning rate",
    "m": "momentum coefficient m",
}

DPI = 100


def plot_curves(folder):
    """log.jsonl of a run → curves.png beside it, a panel for each metric."""
    lines = read_log(Path(folder, "log.jsonl"))
    curves = collect_curves(lines)
    figure, panels = create_panels(curves)
    for panel, axes in panels.items():
        for key, points in curves[panel].items():
            axes.plot(*zip(*points), marker=marker(panel, points), label=curve_name(key))
        if len(curves[panel]) > 1:
            add_legend(axes, axes.lines)
        finish_panel(axes, panel, lines)
    save_figure(figure, Path(folder, "curves.png"))


def collect_curves(lines):
    """Lines of a log → {panel: {key: [(epoch, value)]}}.

    A key such as "acc1/lr0.1" is a curve in the panel acc1. Of gradients the maxima are drawn.
    """
    curves = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for key, value in line.items():
            panel = key.split("/")[0]
            is_mean = panel.startswith("grad_") and not key.endswith("_max")
            if panel in PANELS and not is_mean:
                curves[panel][key].append((line["epoch"], value))
    return curves


def create_panels(names):
    """A figure with axes for those of PANELS that are among the names → Figure, {name: axes}."""
    from matplotlib.figure import Figure  # takes a second, which one process alone spends

    names = [name for name in PANELS if name in names]
    columns = max(1, min(3, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    figure = Figure(figsize=(3.7 * columns, 3 * rows), layout="constrained")
    return figure, {n: figure.add_subplot(rows, columns, i) for i, n in enumerate(names, 1)}


def curve_name(key):
    """A key in the legend of its panel: "acc1/lr0.1" → "lr0.1", "grad_l2/first_max" → "first"."""
    return key.partition("/")[2].removesuffix("_max") or key


def add_legend(axes, handles):
    """Beside the axes where curves are many: among them it would hide some."""
    beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(handles) > 2 else {}
    axes.legend(fontsize=8, handles=handles, **beside)


def marker(panel, points):
    """Dots for what is measured once in some epochs, and for a single point, which has no line."""
    return "." if panel in ("knn", "rankme", "acc1") or len(points) == 1 else None


def finish_panel(axes, panel, lines):
    """Titles, scales and the chance level of the loss; lines: of the logs that are drawn."""
    from matplotlib.ticker import LogLocator

    axes.set_title(PANELS[panel], fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.grid(alpha=0.3)
    if panel.startswith("grad_") or (panel == "lr" and len(axes.lines) > 1):
        axes.set_yscale("log")
        # Plain text: the usual labels, 10 to a power, are markup, which may be switched off.
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10) if high < 3 * low else (2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}" if high < 30 * low else "")
    if panel in ("rankme", "feature_std"):  # low values tell a collapse, lower ones do not
        axes.set_ylim(bottom=0)
    if panel == "loss" and any(map(is_sweep, lines)):
        axes.set_title("loss, the lowest of all learning rates", fontsize=10)
    if panel == "loss":
        for chance in {line["chance"] for line in lines if "chance" in line}:
            axes.set_title("loss, and its chance level (dashed)", fontsize=10)
            axes.axhline(chance, ls="--", color="gray")


def plot_views(folder, x1, x2, pixel_format=RGB, max_images=10):
    """Normalized views [N, C, H, W], as the model sees them → folder/views.png, x1 above x2."""
    from matplotlib.figure import Figure

    views = torch.cat([x1[:max_images], x2[:max_images]]).float().cpu()
    # Small images are enlarged, to 128 pixels or more.
    pixels = F.interpolate(
        to_rgb(views, pixel_format), scale_factor=math.ceil(128 / min(views.shape[-2:]))
    )
    grid = make_grid(pixels, nrow=len(views) // 2, pad_value=1).permute(1, 2, 0)
    height, width, _ = grid.shape
    margin = max(24, width // 50)  # for the text: as large beside large images
    size = (width + margin) / DPI, (height + margin) / DPI  # inches
    figure, font = Figure(size, dpi=DPI), dict(fontsize=0.45 * margin, va="center")
    figure.figimage(grid.numpy(), xo=margin)  # pixel by pixel
    x, y = margin / (width + margin), height / (height + margin)
    figure.text(x, (1 + y) / 2, "two views of each image, as the model sees them", **font)
    for name, row in (("view 1", 0.75), ("view 2", 0.25)):
        figure.text(x / 2, row * y, name, rotation="vertical", ha="center", **font)
    save_figure(figure, Path(folder, "views.png"))


def to_rgb(x, pixel_format=RGB):
    """Normalized [..., C, H, W] → RGB in [0, 1].

    One channel is gray; two are red and green; of more than three, the first ones are shown.
    """
    x = denormalize(x, pixel_format.mean, pixel_format.std).clamp(0, 1)[..., :3, :, :]
    if x.shape[-3] == 1:
        return x.expand(*x.shape[:-3], 3, -1, -1)
    if x.shape[-3] == 2:
        return torch.cat([x, torch.zeros_like(x[..., :1, :, :])], dim=-3)
    return x


def save_figure(figure, path):
    with atomic_write(path) as file:
        figure.savefig(file, dpi=DPI, format="png")
