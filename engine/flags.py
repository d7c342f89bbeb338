"""The flags that scripts share, in the groups of --help, and what the library takes of them."""

import argparse
import os
from pathlib import Path

from engine.data.decode import MAX_PIXELS
from engine.data.named import NAMED_SETS
from engine.data.places import image_folders
from engine.data.splits import open_source
from engine.errors import UserError
from moco.augmentation import PAPER, Policy

BACKBONE_OPTIONS = (
    "arch img_size patch_size small_stem in_chans mean std value_range max_pixels pos_embed pool"
).split()
RUN_OPTIONS = "epochs allow_changed_args save_minutes print_freq max_bad_images tensorboard".split()
# DIR comes first: after a flag that takes several values it would be one of them.
USAGE = "%(prog)s [@RECIPE] DIR [FLAGS]"
STATED = "as --pretrained states it"


class OneOrTwo(argparse.Action):
    """One value or two, as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, "takes one value or two (DIR goes before it)")
        setattr(namespace, self.dest, tuple(values))


# Flags that scripts share, group by group


def add_image_flags(parser, in_chans=3):
    """in_chans None: the weights state it."""
    add, channels = parser.group("images"), dict(nargs="+", metavar="X")
    forms = f"folder of images, list.txt, .tar, hf:NAME, or one of: {' '.join(NAMED_SETS)}"
    add("data", forms, metavar="DIR", type=lambda word: word, may_change=True)
    add("--data-root", "where named data sets are downloaded to", default="data", may_change=True)
    stated = f"{STATED}, else " if in_chans is None else ""
    gray = f"channels of the images; 1: gray (default: {stated}3)"
    add("--in-chans", gray, type=width, default=in_chans)
    imagenet = f"(default: {stated}ImageNet's, or their average where there are not 3 channels)"
    add("--mean", f"channel means in 0…1 {imagenet}", type=fraction, **channels)
    add("--std", f"channel standard deviations {imagenet}", type=positive_float, **channels)
    ends = "pixel values that map to 0 and 1 in files of more than 8 bits"
    ends += f" (default: {stated}such files are refused)"
    add("--value-range", ends, type=finite_float, nargs=2, metavar=("LOW", "HIGH"))
    pixels = "largest height × width of an image file that is decoded"
    add("--max-pixels", pixels, type=positive_int, default=MAX_PIXELS)


def add_model_flags(parser, arch="resnet50", img_size=(224,)):
    """None: the weights state it. → add, for more flags of the group."""
    add, size = parser.group("model"), dict(type=side, nargs="+", action=OneOrTwo, metavar="PIXELS")
    names = "a ViT of vits.py, torchvision's ResNet, or timm/NAME"
    add("-a --arch", f"{names} (default: {arch or STATED})", default=arch)
    sides = "side of the images that the model sees, or height and width"
    default = "224" if img_size else f"{STATED}, else 224 or timm's"
    add("--img-size", f"{sides} (default: {default})", default=img_size, **size)
    patch = "patch of a ViT: side, or height and width"
    patch += " (default: the architecture's)" if arch else f" (default: {STATED})"
    add("--patch-size", patch, **size)
    stem = "ResNet for small images: 3×3 stem with stride 1, no max-pooling"
    stem += "" if arch else f" (default: {STATED})"
    add("--small-stem", stem, action="store_true")
    return add


def add_optimization_flags(parser, epochs, batch_size):
    """→ add, for more flags of the group."""
    add = parser.group("optimization")
    add("--epochs", "passes over the images", type=non_negative_int, default=epochs)
    batch = "images per step, of all processes together"
    add("-b --batch-size", batch, type=positive_int, default=batch_size)
    add("--seed", "random seed for weights, order and augmentation", type=seed, default=0)
    crop = "smallest random crop, as a fraction of the image's area"
    add("--crop-min", crop, type=fraction, default=0.08)
    return add


def add_augmentation_flags(parser):
    """Of the two views of pre-training; the defaults are the paper's."""
    add, probability = parser.group("augmentation"), dict(type=fraction, metavar="P")
    jitter = "strengths for brightness, contrast, saturation, hue (default: .4 .4 .2 .1)"
    strengths = (PAPER.brightness, PAPER.contrast, PAPER.saturation, PAPER.hue)
    add("--color-jitter", jitter, type=fraction, nargs=4, metavar="X", default=strengths)
    add("--jitter-p", "probability of color jitter", default=PAPER.jitter_p, **probability)
    add("--grayscale-p", "probability of grayscale", default=PAPER.grayscale_p, **probability)
    two = dict(nargs="+", action=OneOrTwo) | probability
    blur = "probability of blur in both views, or each (default: 1 .1)"
    add("--blur-p", blur, default=PAPER.blur_p, **two)
    solarize = "probability of solarization in both views, or each (default: 0 .2)"
    add("--solarize-p", solarize, default=PAPER.solarize_p, **two)
    add("--hflip-p", "probability of a horizontal flip", default=PAPER.flip_p, **probability)
    vertical = "probability of a vertical flip"
    add("--vflip-p", vertical, default=PAPER.vertical_flip_p, **probability)


def add_run_flags(parser):
    """→ add, for more flags of the group."""
    add = parser.group("run", may_change=True)
    add("--output-dir", "folder for all output (default: in runs/)")
    resume = "checkpoint to continue; auto: the newest in --output-dir, if there is one"
    add("--resume", resume, metavar="CKPT")
    allow = "resume although arguments or images differ from those of the checkpoint"
    add("--allow-changed-args", allow, action="store_true")
    minutes = "minutes between checkpoints within an epoch; 0: only at its end"
    add("--save-minutes", minutes, type=non_negative_float, default=30)
    add("-p --print-freq", "steps between lines of log.jsonl", type=positive_int, default=10)
    add("--tensorboard", "log to TensorBoard, too", action="store_true")
    unreadable = "fraction of the images of each set that may be unreadable"
    add("--max-bad-images", unreadable, type=fraction, default=0.001)
    return add


def add_hardware_flags(parser):
    """→ add, for more flags of the group."""
    add = parser.group("hardware", may_change=True)
    devices = ("auto", "cuda", "mps", "cpu")
    add("--device", "auto: a GPU if there is one", choices=devices, default="auto")
    amp = "mixed precision; auto: bf16 where the hardware computes in it"
    add("--amp", amp, choices=("auto", "bf16", "fp16", "off"), default="auto")
    workers = "processes that load images, for each training process"
    workers += " (default: as many as CPU cores, 8 at most; here %(default)s)"
    add("-j --workers", workers, type=int_up_to_1024, default=min(8, num_cores()))
    add("--timeout", "seconds that a process waits for the others", type=seconds, default=600)
    return add


def add_compile_flag(add):
    """add: of the group "hardware" of a script that trains."""
    compiled = "torch.compile the backbone (default: ViTs on CUDA)"
    add("--compile", compiled, action=argparse.BooleanOptionalAction)


def add_pretrained_flag(add, required=False):
    """add: of the group "model"."""
    kinds = "weights of ours, the official release, timm, DeiT, MAE, DINO, MMPretrain"
    add("--pretrained", kinds, metavar="CKPT", required=required)


def add_evaluation_flags(parser):
    """Of the scripts that start from pre-trained weights → add, for more flags of the group."""
    add = parser.group("evaluation", may_change=True)
    val = "labelled images to validate on, in any form of DIR, in place of DIR's own"
    add("--val", val, metavar="DIR")
    evaluate = "measure the classifier in --pretrained on DIR, train nothing"
    add("--evaluate", evaluate, action="store_true")
    return add


def add_tool_flags(parser):
    """Of a tool that shows images to a pre-trained backbone."""
    add_image_flags(parser, in_chans=None)
    add_pretrained_flag(add_model_flags(parser, arch=None, img_size=None), required=True)
    add_hardware_flags(parser)


def check_downstream(parser, args):
    """What argparse can't check about the flags of the scripts that start from weights."""
    if not args.pretrained and not (args.from_scratch and args.arch):
        parser.error("give --pretrained CKPT, or as a control --from-scratch and -a")
    if args.from_scratch and args.evaluate:
        parser.error("--from-scratch leaves nothing for --evaluate")
    if args.evaluate and args.resume:
        parser.error("--evaluate measures --pretrained, --resume continues training: give one")
    if args.evaluate and args.val:
        parser.error("--evaluate measures the images in DIR: give them there, without --val")
    if args.compile and (args.evaluate or args.epochs == 0):
        parser.error("--compile is for training, and nothing is trained: drop it")


# From flags to what the library takes


def backbone_options(args):
    """What backbones.choose_config takes: the flags about the backbone and its images."""
    options = {name: value for name, value in vars(args).items() if name in BACKBONE_OPTIONS}
    for name in ("img_size", "patch_size"):
        if options[name] is not None:  # a side, or height and width
            options[name] = (options[name][0], options[name][-1])
    return options


def augmentation_policy(args):
    """moco.Policy of the flags. UserError for a hue of more than half a turn."""
    brightness, contrast, saturation, hue = args.color_jitter
    if hue > 0.5:
        raise UserError(f"--color-jitter: a hue of {hue:g} is more than 0.5, half a turn")
    return Policy(
        brightness,
        contrast,
        saturation,
        hue,
        jitter_p=args.jitter_p,
        grayscale_p=args.grayscale_p,
        blur_p=(args.blur_p[0], args.blur_p[-1]),
        solarize_p=(args.solarize_p[0], args.solarize_p[-1]),
        flip_p=args.hflip_p,
        vertical_flip_p=args.vflip_p,
    )


def run_options(args):
    """Keyword arguments of run.Run that are flags."""
    options = {name: getattr(args, name) for name in RUN_OPTIONS}
    return options | dict(may_change=args.may_change, defaults=args.defaults)


def source(args, path, pixel_format):
    """splits.open_source for DIR, --val or --knn-data."""
    return open_source(path, pixel_format, args.data_root)


def output_folder(output_dir, default, *sources):
    """--output-dir, or runs/DEFAULT. UserError if it is among the images of one of the paths."""
    folder = Path(output_dir or f"runs/{default}")
    check_not_among_images("--output-dir", folder, *sources)
    return folder


def check_not_among_images(flag, path, *sources):
    """UserError if what a run or a tool writes would be taken for images of one of the sources."""
    for data in sources:
        if data is None or data.startswith("hf:") or data in NAMED_SETS:
            continue
        if any(path.resolve().is_relative_to(place.resolve()) for place in image_folders(data)):
            raise UserError(f"{flag} {path} is among the images of {data}: move it")


def num_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _number(kind, is_valid, expected):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


# With bounds that leave room for products: 64-bit integers, seconds as nanoseconds, fp32.
positive_int = _number(int, lambda v: 0 < v < 2**31, "a whole number above 0, below 2³¹")
non_negative_int = _number(int, lambda v: 0 <= v < 2**31, "a whole number from 0, below 2³¹")
int_up_to_1024 = _number(int, lambda v: 0 <= v <= 1024, "a whole number from 0 to 1024")
width = _number(int, lambda v: 0 < v <= 2**16, "a width, from 1 to 65536")
positive_float = _number(float, lambda v: 1e-12 <= v <= 1e38, "a number above 0 (1e-12 to 1e38)")
non_negative_float = _number(
    float, lambda v: v == 0 or 1e-12 <= v <= 1e38, "a number, 0 or more (1e-12 to 1e38)"
)
finite_float = _number(float, lambda v: abs(v) <= 1e38, "a number (-1e38 to 1e38)")
seconds = _number(float, lambda v: 1 <= v <= 1e9, "a number of seconds (1 to 1e9)")
fraction = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
fraction_below_1 = _number(float, lambda v: 0 <= v < 1, "a number from 0, below 1")
side = _number(int, lambda v: 0 < v < 2**16, "a side in pixels (DIR goes before it)")
seed = _number(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2³² − 1")
