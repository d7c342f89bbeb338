"""What the scripts that start from pre-trained weights share: the probe and fine-tuning."""

from pathlib import Path

from engine import evaluation, flags, launch
from engine.data.splits import load_splits, load_val
from engine.data.unreadable import UnreadableImages
from engine.weights import check_num_classes
from moco.compilation import is_compiled


def add_flags(add):
    """--pretrained and --from-scratch; add: of the group "model"."""
    flags.add_pretrained_flag(add)
    scratch = "control: random weights in the backbone of --pretrained or -a"
    add("--from-scratch", scratch, action="store_true")


def output_folder(args, job):
    """--output-dir, or runs/RUN_JOB for a checkpoint in …/RUN."""
    run = Path(args.pretrained).resolve().parent.name if args.pretrained else args.arch
    control = "_from_scratch" if args.from_scratch else ""
    return flags.output_folder(args.output_dir, f"{run}_{job}{control}", args.data, args.val)


def load_training_splits(args, pixel_format):
    """The labelled images of DIR, validated on --val's if it is given → Splits."""
    val_source = flags.source(args, args.val, pixel_format) if args.val else None
    source, hint = flags.source(args, args.data, pixel_format), ", or give --val DIR"
    train, test = Path(args.data, "train"), Path(args.data, "test")
    if train.is_dir() and test.is_dir():  # else test may be a class
        hint = f"; test/ is not read: --val {test}"
    return load_splits(source, val_source, val_hint=hint)


def load_test_splits(args, config, class_names, classifier):
    """The images of DIR to measure a classifier on, labelled by its class_names → Splits.

    UserError unless it has as many outputs as they have classes.
    """
    splits = load_val(
        flags.source(args, args.data, config.pixel_format), class_names, args.pretrained
    )
    check_num_classes(classifier, splits.num_classes, args.pretrained)
    launch.print_rank0(f"data    {args.data}: {splits}")
    return splits


def print_accuracy(args, classify, splits, config, env):
    """The accuracy of a single classifier on splits.val, in a line."""
    unreadable = UnreadableImages(args.max_bad_images)
    settings = config.img_size, args.workers, env, unreadable, config.interpolation
    [(acc1, acc5)] = evaluation.measure_accuracy(classify, 1, splits.val, *settings)
    text = evaluation.format_accuracy(acc1, acc5, splits.num_classes)
    remark = unreadable.remark(splits.val)
    launch.print_rank0(f"{text} on {len(splits.val):,} images{remark}")


def config_lines(args, model, backbone, splits):
    """Where the numbers come from, by the names of the lines; model: in words."""
    model += ", compiled" if is_compiled(backbone) else ""
    weights = "a random initialization" if args.from_scratch else args.pretrained
    return dict(model=f"{model}, from {weights}", data=f"{args.data}: {splits}")


def print_config(args, run, model, backbone, splits, lr):
    """Prints what this run is; model, lr: the texts of these two lines."""
    lines = config_lines(args, model, backbone, splits)
    run.print_config(**lines, batch=run.loader.batch_sampler, lr=lr)
