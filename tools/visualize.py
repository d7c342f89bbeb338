"""Pictures: what a ViT's class token attends to, the nearest images of an image, curves of runs.

    python tools/visualize.py attention digits --pretrained runs/digits/checkpoint.pth
    python tools/visualize.py neighbours digits --pretrained runs/digits/checkpoint.pth
    python tools/visualize.py curves runs/digits runs/digits2 --out curves.png

Each writes one PNG and needs no display.
"""

import argparse
import os
from pathlib import Path

import torch
from features import embed, load_model, model_flags  # makes moco importable
from matplotlib.figure import Figure
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract

from moco import UserError, checkpoint, cli, distributed
from moco.augment import RGB, visible
from moco.builder import unit
from moco.evaluation import batches
from moco.log import draw_curves
from moco.sources import Files

RIGHT, WRONG = "#1a9850", "#d7301f"  # frames of neighbours of the same class, and of another


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__)
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")

    def picture(name, parent, words):
        sub = pictures.add_parser(name, parents=[parent], help=words, description=words)
        sub.add_argument("--out", type=Path, default=f"{name}.png", metavar="PNG")
        return sub.add_argument

    add = picture("attention", model_flags(), "attention of a ViT's class token, head by head")
    add("--images", type=cli.positive, default=6, help="rows, taken evenly from val, or from DIR")
    add = picture("neighbours", model_flags(), "images of val and their nearest ones of train")
    add("--images", type=cli.positive, default=6, help="rows, taken evenly from val, or from DIR")
    add("-k", type=cli.positive, default=8, help="nearest images of each")
    add("--knn-bank", type=cli.positive, metavar="IMAGES", help="training images that are searched "
        "(default: all)")  # fmt: skip
    add = picture("curves", argparse.ArgumentParser(add_help=False), "log.jsonl of runs, overlaid")
    add("runs", nargs="+", metavar="RUN", help="--output-dir of a run")

    args = parser.parse_args(argv)
    if args.out.suffix != ".png":
        parser.error(f"--out {args.out}: the name must end in .png")
    return args


def main(args):
    if "RANK" in os.environ:
        raise UserError("a picture is drawn by one process: python in place of torchrun")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write {args.out}: {error.strerror}") from None
    if not os.access(args.out.parent, os.W_OK):
        raise UserError(f"can't write {args.out}: {args.out.parent} is read-only")
    {"attention": attention, "neighbours": neighbours, "curves": curves}[args.picture](args)
    print(args.out)


def curves(args):
    for run in args.runs:
        if not Path(run, "log.jsonl").is_file():
            raise UserError(f"{run} is no run: it has no log.jsonl")
    draw_curves(*args.runs, out=args.out)


def attention(args):
    device, amp = distributed.set_up(args.device, args.amp)
    set_fused_attn(False)  # a fused kernel shows no weights; a model asks when it is made
    model, setting = load_model(args, device)
    dataset = cli.images(args, setting)
    source = dataset.val or dataset.train
    chosen = spread_out(source, args.images)
    if not checkpoint.num_heads(model):
        raise UserError(f"{setting['arch']} has no attention to draw: attention is for ViTs")

    images = views(source, chosen, setting["img_size"], args, device)
    with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        maps = class_attention(model, images).cpu()
    words = captions(dataset, source, chosen)
    draw_attention(images, maps, words, pixels=source.pixels).savefig(args.out, dpi=100)


def class_attention(model, images):
    """The class token's attention in the last block → [N, heads, rows, columns] of patches.

    Its sum falls short of 1 by the share of the class token itself. The model must have been made
    without fused attention.
    """
    last = f"blocks.{len(model.blocks) - 1}.attn.attn_drop"
    weights = AttentionExtract(model, [last], method="hook")(images)[last]  # [N, heads, 1+P, 1+P]
    return weights[:, :, 0, 1:].float().unflatten(-1, model.patch_embed.grid_size)


def draw_attention(images, maps, words, pixels=RGB):
    """images [n, C, H, W], maps [n, heads, rows, columns], words: n captions → Figure."""
    height, width = images.shape[-2:]
    figure, cells = grid(len(images), 1 + maps.shape[1], height / width)
    cells[0, 0].set_title("input", fontsize=10)
    for row, image, heads, caption in zip(cells, images, maps, words):
        show(row[0], image, pixels)
        row[0].set_xlabel(caption, fontsize=8, labelpad=2)
        for head, (cell, weights) in enumerate(zip(row[1:], heads), 1):
            show(cell, image.mean(0, keepdim=True).expand_as(image), pixels)
            cell.imshow(weights.numpy(), cmap="inferno", vmin=0, alpha=0.75,
                        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                        interpolation="nearest")  # fmt: skip
            cell.set_xlabel(f"max {weights.max():.2f}", fontsize=8, labelpad=2)
            if cell.get_subplotspec().is_first_row():
                cell.set_title(f"head {head}", fontsize=10)
    figure.supxlabel("bright: where the class token looks, from 0 to the cell's max", fontsize=8)
    return figure


def neighbours(args):
    device, amp = distributed.set_up(args.device, args.amp)
    model, setting = load_model(args, device)
    dataset = cli.images(args, setting)
    bank = dataset.bank or dataset.train
    source = dataset.val or bank
    chosen = spread_out(source, args.images)
    size_of_bank = min(args.knn_bank or len(bank), len(bank))
    k = min(args.k, size_of_bank - (source is bank))  # an image is no neighbour of its own
    if k == 0:
        raise UserError(f"{args.data}: a single image has no neighbours")
    searched = torch.arange(size_of_bank) * len(bank) // size_of_bank  # as for the kNN

    def embedded(images, indices):
        found = embed(model, images, indices, setting["img_size"], args, device, amp)
        return torch.cat([unit(h) for _, h in found])

    similarity = (embedded(source, chosen) @ embedded(bank, searched).T).cpu()  # [n, bank]
    if source is bank:
        similarity[chosen[:, None] == searched] = -torch.inf
    similarity, nearest = similarity.topk(k)  # [n, k]
    nearest = searched[nearest]

    size = setting["img_size"]
    same = bank.labels is not None and bank.labels[nearest] == source.labels[chosen][:, None]
    draw_neighbours(
        views(source, chosen, size, args, device),
        views(bank, nearest.flatten(), size, args, device).unflatten(0, nearest.shape),
        similarity,
        same,
        captions(dataset, source, chosen),
        captions(dataset, bank, nearest.flatten()),
        pixels=source.pixels,
    ).savefig(args.out, dpi=100)


def draw_neighbours(queries, found, similarity, same, query_words, found_words, pixels=RGB):
    """queries [n, C, H, W]; found [n, k, C, H, W], similarity and same [n, k] → Figure.

    same: whether a neighbour has the label of its query; False where there are no labels.
    words: captions, of each query and of each that was found, row by row.
    """
    height, width = queries.shape[-2:]
    figure, cells = grid(len(queries), 1 + found.shape[1], height / width, lines=2)
    cells[0, 0].set_title("query", fontsize=10)
    cells[0, 1].set_title("nearest (cosine)", fontsize=10, loc="left").set_in_layout(False)
    words = iter(found_words)
    for r, row in enumerate(cells):
        show(row[0], queries[r], pixels)
        row[0].set_xlabel(query_words[r], fontsize=8, labelpad=2)
        for c, cell in enumerate(row[1:]):
            show(cell, found[r, c], pixels)
            cell.set_xlabel(f"{next(words)}\n{similarity[r, c]:.4f}", fontsize=8, labelpad=2)
            if same is not False:
                right = bool(same[r, c])
                for spine in cell.spines.values():
                    spine.set(color=RIGHT if right else WRONG, lw=2.5, ls="-" if right else ":")
    return figure


def spread_out(source, n):
    """Indices of n images, evenly over the classes and over the set."""
    labels = torch.zeros(len(source)) if source.labels is None else source.labels
    n = min(n, len(source))
    return labels.argsort(stable=True)[(2 * torch.arange(n) + 1) * len(source) // (2 * n)]


def views(source, indices, size, args, device):
    """The images as the features see them: normalised [n, C, H, W]."""
    return torch.cat([images for _, images in batches(source, indices, size, args.workers, device)])


def captions(dataset, source, indices):
    """A short text for each image: its class where there are labels, else its name."""
    words = []
    for i in indices.tolist():
        if source.labels is not None:
            label = int(source.labels[i])
            text = dataset.names[label] if dataset.names else str(label)
        elif isinstance(source, Files):
            text = Path(os.fsdecode(source.paths[i])).stem
        else:
            text = str(i)
        words.append(text if len(text) <= 10 else f"{text[:3]}…{text[-6:]}")  # what a cell holds
    return words


def grid(rows, columns, ratio, lines=1):
    """Cells for images of height/width = ratio, lines of text below → Figure, [rows, columns]."""
    figure = Figure(figsize=(1.2 * columns, (1.15 * ratio + 0.08 + 0.15 * lines) * rows + 0.25),
                    layout="constrained")  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0, hspace=0)
    blank = dict(xticks=[], yticks=[])
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=blank)


def show(cell, image, pixels):
    """image: normalised [C, H, W]."""
    cell.imshow(visible(image.cpu(), pixels).permute(1, 2, 0).numpy(), interpolation="nearest")


if __name__ == "__main__":
    cli.run(main, parse_args)
