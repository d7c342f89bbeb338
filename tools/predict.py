"""The classes that a saved classifier, of the probe or of fine-tuning, gives to images.

    python tools/predict.py digits --pretrained runs/digits_finetune/best.pth --out digits.csv
    torchrun --nproc_per_node=8 tools/predict.py /my/images --top-k 1 \\
        --pretrained runs/vit_small_300_lincls/linear_lr3.pth --out mine.csv

FILE.csv has a row for each image: `path` below DIR, or its number where it is not a file;
`label` where there are labels; `class` and `score`, the most probable class and its probability
(softmax); `class_2`, `score_2` and so on. An image that can't be read has a row without class.

For labelled images it prints the accuracy that --evaluate prints, and writes FILE_classes.csv, the
accuracy of each class, and FILE_confusion.png. Images that can't be read count as wrong in all.
"""

import csv
import io
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from features import image_names, load_split
from visualize import check_writable, drawable

from engine import cli, flags, launch
from engine.data.splits import match_classes, require_labels
from engine.data.unreadable import UnreadableImages
from engine.errors import UserError, join_some, print_line
from engine.evaluation import format_accuracy, iterate_eval_batches
from engine.files import atomic_write, exists
from engine.launch import all_reduce_sum, print_rank0
from engine.plots import save_figure
from engine.weights import check_num_classes, create_classifier
from moco.distributed import is_main, world_size

MAX_DRAWN = 30  # classes of the confusion picture


def parse_args(argv=None):
    usage = "%(prog)s DIR --pretrained CKPT --out FILE.csv [FLAGS]"
    parser = cli.Parser(description=__doc__, usage=usage)
    flags.add_tool_flags(parser)
    add = parser.group("predictions")
    add("--out", "the table to write", type=Path, required=True, metavar="FILE.csv")
    add("--top-k", "classes of each image (default: 5, or all of fewer)", type=flags.positive_int)
    split = "which one, where DIR has both"
    add("--split", split, choices=("train", "val"), default="val")
    labels = "predict only: folders, or what else looks like labels, are none"
    add("--no-labels", labels, action="store_true")
    args = parser.parse_args(argv)
    if args.out.suffix != ".csv":
        parser.error(f"--out {args.out}: the name must end in .csv")
    return args


def main(args):
    classes_csv = args.out.with_name(f"{args.out.stem}_classes.csv")
    confusion_png = args.out.with_name(f"{args.out.stem}_confusion.png")
    flags.check_not_among_images("--out", args.out, args.data)
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    launch.on_rank0(lambda: check_new(args.out, classes_csv, confusion_png))
    options = flags.backbone_options(args)
    model, config, class_names = create_classifier(args.pretrained, options)
    classifier = model.get_submodule(model.classifier_name)
    num_classes = classifier.out_features
    if args.top_k and args.top_k > num_classes:
        raise UserError(f"--top-k {args.top_k}: {args.pretrained} has {num_classes} classes")
    part, labels = load_images(args, config, class_names, classifier)
    names = part.class_names if labels is not None else class_names
    names = names or [str(i) for i in range(num_classes)]
    launch.check_same_on_all_ranks(
        {"the number of images": len(part.dataset)}, "do all hosts see the same data?"
    )

    model.requires_grad_(False).eval().to(env.device)
    k = args.top_k or min(5, num_classes)
    # At least the 5 of evaluation.measure_accuracy, so that equal logits are ranked alike.
    num_kept = max(k, min(5, num_classes))
    predicted, scores = predict(model, num_kept, part.dataset, config, args.workers, env)
    if (predicted < 0).all():
        raise UserError(f"{args.data}: none of the images can be read", exit_code=1)
    paths = image_names(part.dataset, args.data)

    def write():
        label_names = None if labels is None else [names[label] for label in labels]
        rows = prediction_rows(paths, label_names, predicted[:, :k], scores[:, :k], names)
        write_csv(args.out, rows)
        num_missing = int((predicted[:, 0] < 0).sum())
        missing = f", {num_missing:,} of them without a class" if num_missing else ""
        print(f"{len(paths):,} predictions in {args.out}{missing}")
        if labels is not None:
            hits = predicted == labels[:, None]
            write_csv(classes_csv, class_rows(labels, hits[:, 0], names))
            save_figure(draw_confusion(labels, predicted[:, 0], names), confusion_png)
            print_accuracies(labels, hits, names)
            print(f"more in {classes_csv} and {confusion_png}")

    launch.on_rank0(write)


def check_new(*paths):
    for path in paths:
        if exists(path):
            raise UserError(f"{path} exists already: name another --out, or move it away")
    check_writable(paths[0])


def load_images(args, config, class_names, classifier):
    """DIR → the Part of its images; their labels, numbered as the classifier has them, or None."""
    source, part, which = load_split(args, config.pixel_format)
    found = f"{len(part.dataset):,} images{which}"
    # As match_classes has it: a single folder that is called like a class is one.
    is_class = not {*part.shared_folders}.isdisjoint(class_names or ())
    if args.no_labels or not (part.class_names or part.flaw or is_class):
        print_rank0(f"data    {args.data}: {found}, labels are not used")
        return part, None
    try:
        if class_names is None:
            part = require_labels(part, source.path)
            remark = f"{args.pretrained} states no class names: the images' are taken, in order"
            part = part._replace(remarks=(*part.remarks, remark))
        else:
            part = match_classes(part, class_names, source.path, args.pretrained)
        check_num_classes(classifier, len(part.class_names), args.pretrained)
    except UserError as error:
        raise UserError(f"{error}; --no-labels predicts without labels") from None
    remarks = "; ".join([f"{found}, labelled", *source.remarks, *part.remarks])
    print_rank0(f"data    {args.data}: {remarks}")
    return part, part.dataset.labels


@torch.no_grad()
def predict(model, k, dataset, config, workers, env):
    """→ the k best classes of each image, int64 [n, k], and their probabilities, [n, k].

    On every rank. -1 and 0 for an image that can't be read, or whose logits are not finite.
    """
    predicted = torch.zeros(len(dataset), k, dtype=torch.long, device=env.device)
    scores = torch.zeros(len(dataset), k, device=env.device)
    unreadable = UnreadableImages(max_fraction=1)
    settings = config.img_size, workers, env, unreadable, config.interpolation
    batches = iterate_eval_batches(dataset, torch.arange(len(dataset)), *settings)
    hide_bar = None if is_main() else True  # None: where stderr is not a terminal
    with tqdm(total=len(dataset), unit=" images", disable=hide_bar) as bar:
        for indices, images in batches:
            with env.autocast():
                logits = model(images)
            is_finite = logits.isfinite().all(1, keepdim=True)
            best = logits.topk(k)
            log_sum = logits.logsumexp(1, keepdim=True)
            # + 1, so that 0 is no class: each image's row is from one rank, and 0 on the others.
            predicted[indices] = torch.where(is_finite, best.indices + 1, 0)
            scores[indices] = torch.where(is_finite, (best.values - log_sum).exp(), 0.0)
            bar.update(min(world_size() * len(indices), len(dataset) - bar.n))
    return all_reduce_sum(predicted).cpu() - 1, all_reduce_sum(scores).cpu()


def prediction_rows(paths, label_names, predicted, scores, names):
    """Yields the header and a row for each image; label_names: None without labels."""
    header = ["path"] if label_names is None else ["path", "label"]
    for place in range(1, predicted.shape[1] + 1):
        suffix = "" if place == 1 else f"_{place}"
        header += [f"class{suffix}", f"score{suffix}"]
    yield header
    for i, (classes, values) in enumerate(zip(predicted.tolist(), scores.tolist())):
        row = [paths[i]] if label_names is None else [paths[i], label_names[i]]
        for number, value in zip(classes, values):
            row += ["", ""] if number < 0 else [names[number], f"{value:.6f}"]
        yield row


def class_rows(labels, is_correct, names):
    """Yields the header and a row for each class; accuracy in %, empty for a class of no image."""
    yield ["class", "images", "correct", "accuracy"]
    for name, n, correct in zip(names, *class_counts(labels, is_correct, len(names))):
        yield [name, n, correct, f"{100 * correct / n:.2f}" if n else ""]


def class_counts(labels, is_correct, num_classes):
    """→ number of images of each class, number of correct ones: two lists."""
    counts = labels.bincount(minlength=num_classes)
    return counts.tolist(), labels[is_correct].bincount(minlength=num_classes).tolist()


def write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    try:
        with atomic_write(path) as file:
            # Paths that are no UTF-8 keep their bytes.
            file.write(text.getvalue().encode(errors="surrogateescape"))
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}", exit_code=1) from None


def print_accuracies(labels, hits, names):
    """The accuracy of all images, as --evaluate prints it, and the classes of the lowest."""
    acc1, acc5 = (100 * int(hits[:, :k].sum()) / len(labels) for k in (1, 5))
    print(f"{format_accuracy(acc1, acc5, len(names))} on {len(labels):,} images")
    rows = zip(names, *class_counts(labels, hits[:, 0], len(names)))
    accuracies = sorted((100 * correct / n, name) for name, n, correct in rows if n)
    lowest = join_some((f"{name} {accuracy:.2f} %" for accuracy, name in accuracies), most=3)
    print_line(f"lowest of {len(accuracies)} classes: {lowest}")


def draw_confusion(labels, predicted, names):
    """labels, predicted: [n], the latter -1 where there is none → Figure, percent of each row.

    Of many classes it shows the MAX_DRAWN that have the most errors.
    """
    errors = labels[predicted != labels].bincount(minlength=len(names))
    shown = errors.argsort(descending=True, stable=True)[:MAX_DRAWN].sort().values
    n, columns = len(shown), [names[i] for i in shown]
    position = torch.full((len(names) + 1,), n)  # of each class among those shown; n: others
    position[shown] = torch.arange(n)
    position[-1] = n + 1  # of -1, no class
    cells = position[labels] * (n + 2) + position[predicted]
    table = cells.bincount(minlength=(n + 2) ** 2).view(n + 2, n + 2)[:n]
    kept = [*range(n), *(i for i in (n, n + 1) if table[:, i].any())]
    columns = [*columns, "other classes", "unreadable"]
    percent = 100 * table / table.sum(1, keepdim=True).clamp(min=1)

    side = max(3.6, 1.8 + 0.36 * n)  # inches
    figure = Figure(figsize=(side + 0.36 * (len(kept) - n), side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(percent[:, kept].numpy(), cmap="Blues", vmin=0, vmax=100)
    for row in range(n):
        for column, i in enumerate(kept):
            if table[row, i]:
                color = "white" if percent[row, i] > 60 else "black"
                text = f"{percent[row, i]:.0f}" if percent[row, i] >= 1 else "<1"
                axes.text(column, row, text, color=color, fontsize=8, ha="center", va="center")
    texts = [shortened(columns[i]) for i in kept]
    style = dict(fontsize=8, parse_math=False)  # names may contain $
    rotation = 90 if max(map(len, texts)) > 3 else 0
    axes.set_xticks(range(len(kept)), texts, rotation=rotation, **style)
    axes.set_yticks(range(n), texts[:n], **style)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    of_all = "" if n == len(names) else f"; the {n} of {len(names):,} classes with most errors"
    axes.set_title(f"percent of each label's images{of_all}", fontsize=9)
    return figure


def shortened(name):
    name = drawable(name)
    return name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}"


if __name__ == "__main__":
    cli.run_script(main, parse_args)
