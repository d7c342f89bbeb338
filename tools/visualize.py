"""Pictures: attention and principal components of a ViT's patches, nearest images, curves of runs.

    python tools/visualize.py attention digits --pretrained runs/digits/checkpoint.pth
    python tools/visualize.py pca digits --pretrained runs/digits/checkpoint.pth
    python tools/visualize.py neighbours digits --pretrained runs/digits/checkpoint.pth
    python tools/visualize.py curves runs/digits runs/digits2 --out curves.png

Each writes one PNG and needs no display.
"""

import itertools
import math
import os
import sys
import textwrap
from pathlib import Path

import torch
from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from timm.layers import set_fused_attn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import cli, flags, launch, plots
from engine.data.decode import RGB
from engine.data.hub import HuggingFaceDataset
from engine.data.images import Part, evenly_spaced
from engine.data.splits import load_knn_splits
from engine.data.unreadable import UnreadableImages
from engine.errors import UserError, print_line, printable
from engine.evaluation import encode_dataset, iterate_eval_batches
from engine.log import read_log
from engine.plots import save_figure, to_rgb
from engine.weights import create_pretrained_backbone
from moco.builder import l2_normalize

SAME_CLASS, OTHER_CLASS = "#1a9850", "#d7301f"  # frames of neighbours
DASHES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)))  # of curves


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__)
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")

    def add_picture(name, help, usage="%(prog)s DIR --pretrained CKPT [FLAGS]"):
        picture = pictures.add_parser(name, help=help, description=help, usage=usage)
        out = dict(type=Path, default=f"{name}.png", metavar="PNG")
        picture.add_argument("--out", help="file to write (default: %(default)s)", **out)
        return picture

    images = dict(type=flags.positive_int, default=6, metavar="N")
    images["help"] = "number of images, taken evenly from val, or from DIR"
    components = "principal components of a ViT's patches as colors, over all images together"
    for name, help in (
        ("attention", "attention of a ViT's class token, head by head"),
        ("pca", components),
    ):
        picture = add_picture(name, help)
        flags.add_tool_flags(picture)
        picture.group("picture")("--images", **images)
    picture = add_picture("neighbours", "images of val and their nearest ones of train")
    flags.add_tool_flags(picture)
    add = picture.group("picture")
    add("--images", **images)
    add("-k", type=flags.positive_int, default=8, metavar="N", help="nearest images of each")
    bank = "training images that are searched (default: all)"
    add("--knn-bank", type=flags.positive_int, metavar="IMAGES", help=bank)
    picture = add_picture("curves", "log.jsonl of several runs, overlaid", usage=None)
    picture.add_argument("runs", nargs="+", metavar="RUN", help="--output-dir of a run")
    panels = "which metrics to draw (default: all)"
    picture.add_argument("--panels", nargs="+", choices=plots.PANELS, help=panels)

    args = parser.parse_args(argv)
    if args.out.suffix != ".png":
        parser.error(f"--out {args.out}: the name must end in .png")
    return args


def main(args):
    if "RANK" in os.environ:
        raise UserError("a picture is drawn by one process: python in place of torchrun")
    check_writable(args.out)
    if args.picture != "curves":
        flags.check_not_among_images("--out", args.out, args.data)
    draw = dict(attention=attention, pca=pca, neighbours=neighbours, curves=curves)[args.picture]
    with rc_context({"text.parse_math": False}):  # names may contain $, which begins a formula
        draw(args)
    print_line(args.out)


def check_writable(path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"can't write {path}: {path.parent} is read-only")


# Curves


def curves(args):
    for run in args.runs:
        if not Path(run, "log.jsonl").is_file():
            raise UserError(f"{run} is not the folder of a run: it has no log.jsonl")
    logs = [read_log(Path(run, "log.jsonl")) for run in args.runs]
    names = [drawable(name) for name in distinct_names(args.runs)]
    save_figure(draw_curves(dict(zip(names, logs)), args.panels), args.out)


def draw_curves(logs, panels=None):
    """{name of a run: lines of its log} → Figure: a color for each run, dashes for each key.

    panels: of engine.plots.PANELS, by default all for which there are values.
    """
    runs = [plots.collect_curves(lines) for lines in logs.values()]
    all_lines = [line for lines in logs.values() for line in lines]
    measured = {panel for run in runs for panel in run}
    figure, axes_of = plots.create_panels(measured & set(panels or measured))
    for panel, axes in axes_of.items():
        keys = list(dict.fromkeys(key for run in runs for key in run[panel]))
        dashes = dict(zip(keys, itertools.cycle(DASHES)))
        for i, run in enumerate(runs):
            for key, points in run[panel].items():
                style = dict(color=f"C{i}", ls=dashes[key], lw=1.2)
                axes.plot(*zip(*points), **style, marker=plots.marker(panel, points))
        if len(keys) > 1:
            names = {key: plots.curve_name(key) for key in keys}
            handles = [Line2D([], [], color="gray", ls=dashes[k], label=names[k]) for k in keys]
            plots.add_legend(axes, handles)
        plots.finish_panel(axes, panel, all_lines)
    add_run_legend(figure, list(logs))
    return figure


def add_run_legend(figure, names):
    handles = [Line2D([], [], color=f"C{run}", label=name) for run, name in enumerate(names)]
    width, height = figure.get_size_inches()
    entry_width = 0.07 * max(map(len, names)) + 0.6  # inches
    num_entries = min(len(names), max(1, int(width / entry_width)))
    figure.set_figheight(height + 0.3 + 0.2 * math.ceil(len(names) / num_entries))
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
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    glyphs = font.get_charmap()  # code point → glyph
    return "".join(c if ord(c) in glyphs else ascii(c)[1:-1] for c in printable(text))


# Attention


def attention(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    set_fused_attn(False)  # a fused kernel shows no weights; a model asks when it is created
    model, config = create_pretrained_backbone(args.pretrained, flags.backbone_options(args))
    model.requires_grad_(False).eval().to(env.device)
    check_class_token(model, config.arch)
    images, captions, pixel_format = read_some(args, config, env)
    with env.autocast():
        maps = class_attention(model, images)
    if maps is None:
        raise UserError(
            f"{config.arch} has no attention to draw: in its last block the class token does not "
            "attend to all patches by a softmax"
        )
    save_figure(draw_attention(images, maps.cpu(), captions, pixel_format), args.out)


def check_class_token(model, arch):
    """UserError for a backbone whose features are not its class token."""
    if getattr(model, "cls_token", None) is None:
        raise UserError(f"{arch} has no class token: attention is drawn for ViTs that have one")
    pooling = getattr(model, "global_pool", "token")
    if pooling != "token":
        raise UserError(
            f"the features of {arch} are its patches, pooled ({pooling}), not its class token, "
            "whose attention would be drawn"
        )


def class_attention(model, images):
    """The class token's attention in the last block → [N, heads, rows, columns] of patches.

    Its sum falls short of 1 by the attention to the class token itself and to registers. None if
    the block has no such attention. The model must have been created without fused attention.
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or not hasattr(model, "blocks"):
        return None
    num_prefix = getattr(model, "num_prefix_tokens", 1)  # the class token is the first of them
    num_tokens = num_prefix + math.prod(grid)
    inputs, weights = [], []

    def keep_input(block, args):
        inputs.append(args[0])

    def keep_weights(dropout, args, output):
        weights.append(output)

    last_block = model.blocks[-1]
    hooks = [last_block.register_forward_pre_hook(keep_input)]
    for name, module in last_block.named_modules():
        if name.split(".")[-1] == "attn_drop":  # timm's dropout of the weights
            hooks.append(module.register_forward_hook(keep_weights))
    model(images)
    for hook in hooks:
        hook.remove()

    # What windows, pooled keys, cross-covariance or several attentions leave is of another shape.
    if len(weights) != 1 or len(inputs) != 1 or inputs[0].shape[:2] != (len(images), num_tokens):
        return None
    [attention] = weights
    if attention.ndim != 4 or attention.shape[2:] != (num_tokens, num_tokens):
        return None
    attention = attention[:, :, 0].float()  # [N, heads, tokens]
    if not torch.allclose(attention.sum(-1), torch.ones(()).to(attention), atol=0.02):
        return None  # mixed after the softmax
    return attention[:, :, num_prefix:].unflatten(-1, tuple(grid))


def draw_attention(images, maps, captions, pixel_format=RGB):
    """images [n, C, H, W], maps [n, heads, rows, columns], n captions → Figure, of one scale."""
    height, width = images.shape[-2:]
    figure, axes = create_grid(len(images), 1 + maps.shape[1], height / width)
    axes[0, 0].set_title("input", fontsize=10)
    for head in range(maps.shape[1]):
        axes[0, 1 + head].set_title(f"head {head + 1}", fontsize=10)
    for row, image, image_maps, caption in zip(axes, images, maps, captions):
        show_image(row[0], image, pixel_format)
        set_caption(row[0], caption)
        gray = image.mean(0, keepdim=True).expand_as(image)
        for cell, weights in zip(row[1:], image_maps):
            show_image(cell, gray, pixel_format)
            cell.imshow(
                weights.numpy(),
                cmap="inferno",
                vmin=0,
                vmax=maps.max(),
                alpha=0.75,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="nearest",
            )
            set_caption(cell, f"max {weights.max():.2f}")
    uniform = 1 / maps[0, 0].numel()
    text = f"bright: where the class token looks, from 0 to {maps.max():.2f}; evenly: {uniform:.3f}"
    add_note(figure, text)
    return figure


# Principal components


def pca(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    model, config = create_pretrained_backbone(args.pretrained, flags.backbone_options(args))
    model.requires_grad_(False).eval().to(env.device)
    images, captions, pixel_format = read_some(args, config, env)
    with env.autocast():
        patches = patch_tokens(model, images, config.arch)
    colors, explained = component_colors(patches.cpu())
    save_figure(draw_pca(images, colors, explained, captions, pixel_format), args.out)


def patch_tokens(model, images, arch):
    """The patches after the last block and its norm → [n, rows, columns, d].

    UserError for a backbone whose tokens are no grid of patches.
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and hasattr(model, "blocks") and hasattr(model, "forward_intermediates"):
        [patches] = model.forward_intermediates(
            images, 1, norm=True, output_fmt="NLC", intermediates_only=True
        )
        if patches.shape[1] == math.prod(grid):
            return patches.unflatten(1, tuple(grid))
    raise UserError(f"{arch} has no grid of patches: pca is drawn for ViTs")


def component_colors(patches):
    """[n, rows, columns, d] → RGB in [0, 1], [n, rows, columns, 3]; explained variance, a fraction.

    The components are those of the patches of all images. Each color spans the middle 98 % of its
    component's values.
    """
    x = patches.double()
    x = x - x.mean((0, 1, 2))
    flat = x.flatten(0, 2)
    variances, directions = torch.linalg.eigh(flat.T @ flat)  # ascending
    directions = directions[:, -3:].flip(1)  # [d, 3]
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    values = x @ (directions * largest.sign())  # [n, rows, columns, 3]
    low, high = values.flatten(0, 2).quantile(torch.tensor([0.01, 0.99]).double(), dim=0)
    colors = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors, float(variances[-3:].sum() / variances.sum())


def draw_pca(images, colors, explained, captions, pixel_format=RGB):
    """images [n, C, H, W], colors [n, rows, columns, 3], n captions → Figure of pairs."""
    height, width = images.shape[-2:]
    pairs = math.ceil(math.sqrt(len(images)))  # in a row
    figure, axes = create_grid(math.ceil(len(images) / pairs), 2 * pairs, height / width)
    for cell in axes.flat[2 * len(images) :]:
        cell.set_axis_off()
    for i, (image, caption) in enumerate(zip(images, captions)):
        left, right = axes.flat[2 * i : 2 * i + 2]
        show_image(left, image, pixel_format)
        set_caption(left, caption)
        right.imshow(
            colors[i].numpy(),
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            interpolation="nearest",
        )
    text = (
        "red, green, blue: first three principal components of the patches of all images, "
        f"{100 * explained:.0f} % of their variance"
    )
    add_note(figure, text)
    return figure


# Neighbours


def neighbours(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    model, config = create_pretrained_backbone(args.pretrained, flags.backbone_options(args))
    model.requires_grad_(False).eval().to(env.device)
    source = flags.source(args, args.data, config.pixel_format)
    bank_part, query_part = choose_parts(source)
    bank, dataset = bank_part.dataset, query_part.dataset

    def encode(images, indices):
        """Those of the indices that can be read, [n], and their unit features, [n, d]."""
        unreadable = UnreadableImages(max_fraction=1)
        features, is_read = encode_dataset(
            model, images, indices, config.img_size, args.workers, env, unreadable
        )
        return indices[is_read.cpu()], l2_normalize(features[is_read])

    chosen, queries = read_images(dataset, choose_images(dataset, args.images), config, args, env)
    _, query_features = encode(dataset, chosen)
    searched, bank_features = encode(bank, evenly_spaced(len(bank), args.knn_bank or len(bank)))
    similarity = (query_features @ bank_features.T).cpu()  # [n, bank]
    k = min(args.k, len(searched))
    if dataset is bank:  # an image is not a neighbour of its own
        k = min(k, len(searched) - 1)
        similarity[chosen[:, None] == searched] = -torch.inf
    if k == 0:
        raise UserError(f"{args.data}: a single image has no neighbours")
    nearest = similarity.topk(k).indices  # [n, k]
    similarity = centered_cosine(query_features, bank_features, nearest)
    nearest = searched[nearest]

    _, found = read_images(bank, nearest.flatten(), config, args, env)
    same_class = None
    if bank.labels is not None and dataset.labels is not None:
        same_class = bank.labels[nearest] == dataset.labels[chosen][:, None]
    figure = draw_neighbours(
        queries,
        found.unflatten(0, nearest.shape),
        similarity,
        same_class,
        image_captions(query_part, chosen),
        image_captions(bank_part, nearest.flatten()),
        dataset.pixel_format,
    )
    save_figure(figure, args.out)


def centered_cosine(queries, bank, nearest):
    """Cosines [n, k] of queries [n, d] and bank[nearest], without the mean of the bank [b, d].

    The features of one data set often share a direction: with it all cosines are near 1.
    """
    mean = bank.mean(0)
    queries, bank = l2_normalize(queries - mean), l2_normalize(bank - mean)
    return torch.einsum("nd,nkd->nk", queries, bank[nearest.to(bank.device)]).cpu()


def choose_parts(source):
    """The Parts to search and to take images from, their labels numbered alike or None."""
    splits, _ = load_knn_splits(source)
    if splits is not None:
        return Part(splits.train, splits.class_names), Part(splits.val, splits.class_names)
    bank = source.train_labelled()
    query = source.val() if source.has_val() else bank
    if query is not bank:  # nothing tells that their classes are the same
        query.dataset.labels = None
    return bank, query


def draw_neighbours(
    queries, found, similarity, same_class, query_captions, found_captions, pixel_format=RGB
):
    """queries [n, C, H, W]; found [n, k, C, H, W], similarity [n, k] → Figure.

    same_class: bool [n, k], whether a neighbour has the label of its query; None without labels.
    found_captions: n · k of them.
    """
    height, width = queries.shape[-2:]
    k = found.shape[1]
    figure, axes = create_grid(len(queries), 1 + k, height / width, caption_lines=2)
    axes[0, 0].set_title("query", fontsize=10)
    axes[0, 1].set_title("nearest first", fontsize=10, loc="left").set_in_layout(False)
    text = (
        "nearest by cosine, as in kNN; the numbers are cosines without the mean feature, and need "
        "not fall in this order"
    )
    if same_class is not None:
        text += "; green: the class of the query, dashed red: another"
    add_note(figure, text)
    for i, row in enumerate(axes):
        show_image(row[0], queries[i], pixel_format)
        set_caption(row[0], query_captions[i])
        for j, cell in enumerate(row[1:]):
            show_image(cell, found[i, j], pixel_format)
            set_caption(cell, f"{found_captions[k * i + j]}\n{similarity[i, j]:.2f}")
            if same_class is not None:
                color, style = (SAME_CLASS, "-") if same_class[i, j] else (OTHER_CLASS, ":")
                for spine in cell.spines.values():
                    spine.set(color=color, linestyle=style, linewidth=2.5)
    return figure


# What they share


def read_some(args, config, env):
    """--images of val, or of DIR → images, normalized, [n, C, H, W]; n captions; PixelFormat."""
    source = flags.source(args, args.data, config.pixel_format)
    part = source.val() if source.has_val() else source.train()
    indices = choose_images(part.dataset, args.images)
    chosen, images = read_images(part.dataset, indices, config, args, env)
    return images, image_captions(part, chosen), part.dataset.pixel_format


def choose_images(dataset, num_images):
    """Indices of so many images, evenly over the classes and over the dataset."""
    labels = torch.zeros(len(dataset)) if dataset.labels is None else dataset.labels
    n = min(num_images, len(dataset))
    middles = (2 * torch.arange(n) + 1) * len(dataset) // (2 * n)  # of n equal parts
    return labels.argsort(stable=True)[middles]


def read_images(dataset, indices, config, args, env):
    """Those of the indices that can be read, [n], and the images, normalized, [n, C, H, W].

    The others are reported on stderr.
    """
    unreadable = UnreadableImages(max_fraction=1)
    batches = iterate_eval_batches(dataset, indices, config.img_size, args.workers, env, unreadable)
    positions, images = concatenate(batches)
    return indices[positions], images


def concatenate(batches):
    """Pairs of tensors → the first of them in one tensor, the second in one."""
    batches = list(batches)
    if not batches:
        raise UserError("none of the images can be read", exit_code=1)
    first, second = zip(*batches)
    return torch.cat(first), torch.cat(second)


def image_captions(part, indices):
    """A short text for each image: its class where there are labels, else its name."""
    captions, dataset = [], part.dataset
    for i in indices.tolist():
        if dataset.labels is not None:
            text = part.class_names[int(dataset.labels[i])]
        elif isinstance(dataset, HuggingFaceDataset):
            text = str(i)  # the record's
        else:
            text = Path(dataset.name(i)).stem
        text = drawable(text)
        captions.append(text if len(text) <= 10 else f"{text[:3]}…{text[-6:]}")  # a cell's width
    return captions


def create_grid(rows, columns, aspect, caption_lines=1):
    """A Figure for images of height / width = aspect, and its axes [rows, columns]."""
    row_height = 1.15 * aspect + 0.08 + 0.15 * caption_lines  # inches
    figure = Figure(figsize=(1.2 * columns, row_height * rows + 0.25), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0, hspace=0)
    no_ticks = dict(xticks=[], yticks=[])
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=no_ticks)


def add_note(figure, text):
    """What the picture shows, below it."""
    text = textwrap.fill(text, int(figure.get_figwidth() / 0.065))
    figure.set_figheight(figure.get_figheight() + 0.15 * text.count("\n"))
    figure.supxlabel(text, fontsize=8)


def show_image(cell, image, pixel_format):
    """image: normalized [C, H, W]."""
    pixels = to_rgb(image.cpu(), pixel_format).permute(1, 2, 0)
    cell.imshow(pixels.numpy(), interpolation="nearest")


def set_caption(cell, text):
    cell.set_xlabel(text, fontsize=8, labelpad=2)


if __name__ == "__main__":
    cli.run_script(main, parse_args)
