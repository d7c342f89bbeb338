"""Pictures of a run: curves.png of its metrics, views.png of what the model sees."""

import itertools
import math
from collections import defaultdict
from pathlib import Path

from engine.checkpoint import atomic_write
from engine.decode import RGB
from engine.errors import printable
from engine.log import RENAMED_METRICS, read_log
from moco.augmentation import denormalize, luminance

PANELS = {
    "loss": "loss",
    "knn": "kNN accuracy on held-out images, %",
    "rankme": "RankMe, effective rank of the features",
    "acc1": "top-1 accuracy on held-out images, %",
    "top1": "contrastive top-1, fraction of queries",
    "feature_std": "feature std (0: collapsed)",
    "grad_linf": "largest gradient (ℓ∞)",
    "grad_l2": "gradient norm (ℓ2)",
    "lr": "learning rate",
    "m": "momentum coefficient m",
}


def plot_curves(*folders, out=None):
    """log.jsonl of one run or several, overlaid → `out`, or curves.png in the first folder.

    A panel for each metric; of several runs, a colour for each.
    """
    from matplotlib.figure import Figure

    runs = [read_log(Path(folder, "log.jsonl")) for folder in folders]
    curves = collect_curves(runs)
    panels = [panel for panel in PANELS if panel in curves]
    num_columns = max(1, min(3, len(panels)))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    figure = Figure(figsize=(3.7 * num_columns, 3 * num_rows), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        _plot_panel(axes, panel, curves[panel], several=len(runs) > 1)
        if panel == "loss":
            _plot_chance(axes, runs)
    if len(runs) > 1:
        names = [drawable(name) for name in distinct_names(folders)]
        _add_run_legend(figure, names, num_columns, num_rows)
    _save(figure, out or Path(folders[0], "curves.png"))


def collect_curves(runs):
    """Lines of the logs → {panel: {(key, run): [(epoch, value)]}}.

    A key such as "acc1/lr0.1" ("acc1 lr 0.1" in older runs) is a curve in the panel acc1.
    """
    curves = defaultdict(lambda: defaultdict(list))
    for run, lines in enumerate(runs):
        for line in lines:
            for key, value in line.items():
                key = RENAMED_METRICS.get(key, key)
                panel = key.replace("/", " ").split()[0]
                is_mean = panel.startswith("grad_") and not key.endswith("_max")
                if panel in PANELS and not is_mean:
                    curves[panel][key, run].append((line["epoch"], value))
    return curves


def _plot_panel(axes, panel, curves, several):
    """curves: {(key, run): [(epoch, value)]}. Of several runs, the dashes tell the keys apart."""
    from matplotlib.lines import Line2D

    keys = list(dict.fromkeys(key for key, _ in curves))
    dashes = dict(zip(keys, itertools.cycle(("-", "--", ":", "-."))))
    marker = "." if panel in ("knn", "rankme", "acc1") else None
    for (key, run), points in curves.items():
        if several:
            style = dict(color=f"C{run}", ls=dashes[key], lw=1.2)
        else:
            style = dict(label=key)
        axes.plot(*zip(*points), marker=marker, **style)
    if len(keys) > 1:
        handles = [Line2D([], [], color="gray", ls=dashes[key], label=key) for key in keys]
        axes.legend(fontsize=8, handles=handles if several else None)
    if panel.startswith("grad_"):
        axes.set_yscale("log")
        # Plain text: the usual labels, 10 to a power, are markup, which may be switched off.
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    axes.set_title(PANELS[panel], fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.grid(alpha=0.3)


def _plot_chance(axes, runs):
    chances = {line["chance"] for lines in runs for line in lines if "chance" in line}
    for chance in chances:
        axes.axhline(chance, ls="--", color="gray")
    if chances:
        axes.set_title("loss, and its chance level (dashed)", fontsize=10)


def _add_run_legend(figure, names, num_columns, num_rows):
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=f"C{run}", label=name) for run, name in enumerate(names)]
    entry_width = 0.07 * max(map(len, names)) + 0.6  # inches
    num_entries = min(len(names), max(1, int(3.7 * num_columns / entry_width)))
    legend_height = 0.3 + 0.2 * math.ceil(len(names) / num_entries)
    figure.set_figheight(3 * num_rows + legend_height)
    figure.legend(handles=handles, loc="outside upper center", ncols=num_entries, fontsize=9)


def distinct_names(folders):
    """The last parts of the paths, as few as tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def drawable(text):
    """The text with escapes for characters that the font lacks, and for unprintable ones."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    glyphs = font.get_charmap()  # code point → glyph
    return "".join(c if ord(c) in glyphs else ascii(c)[1:-1] for c in printable(text))


def plot_views(folder, x1, x2, pixel_format=RGB, max_images=10):
    """Pairs of normalized views [N, C, H, W], as the model sees them → folder/views.png."""
    from matplotlib.figure import Figure

    n = min(max_images, len(x1))
    height, width = x1.shape[-2:]
    figure = Figure(figsize=(1.3 * n + 0.3, 2.6 * height / width + 0.3), layout="constrained")
    for row, (views, name) in enumerate(((x1, "view 1"), (x2, "view 2"))):
        for column in range(n):
            axes = figure.add_subplot(2, n, row * n + column + 1, xticks=[], yticks=[])
            image = to_rgb(views[column].float().cpu(), pixel_format)
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            if column == 0:
                axes.set_ylabel(name)
    _save(figure, Path(folder, "views.png"))


def to_rgb(x, pixel_format=RGB):
    """Normalized [..., C, H, W] → RGB in [0, 1]; unless C is 3, the mean of the channels, gray."""
    x = denormalize(x, pixel_format.mean, pixel_format.std).clamp(0, 1)
    return x if pixel_format.in_chans == 3 else luminance(x).expand(*x.shape[:-3], 3, -1, -1)


def _save(figure, path):
    with atomic_write(path) as file:
        figure.savefig(file, dpi=100, format="png")
