"""Command lines: recipes as flag files, the flags that the scripts share, errors in one line."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from moco import UserError
from moco.data import NAMES
from moco.distributed import leave, rank


class Parser(argparse.ArgumentParser):
    """argparse with `@recipes/NAME.txt`: flags as on the command line, # comments; later wins."""

    def __init__(self, **kwargs):
        super().__init__(
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def convert_arg_line_to_args(self, line):
        return shlex.split(re.sub(r"(^|\s)#.*", "", line))

    def parse_args(self, *args):
        try:
            return super().parse_args(*args)
        except ValueError as error:  # from a recipe: no text, or a quotation without its end
            self.error(f"can't read the recipe: {error}")

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def shared_flags():
    """Flags of all scripts, as a parent for their parsers."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("data", metavar="DIR", help=f"folder of images, or one of: {' '.join(NAMES)}")
    add("-a", "--arch", default="resnet50", help="a ViT of vits.py, a ResNet of torchvision, or "
        "timm/NAME")  # fmt: skip
    add("--img-size", type=side, nargs="+", default=(224, 224), action=Size, metavar="PIXELS",
        help="side, or height and width")  # fmt: skip
    add("--patch-size", type=side, nargs="+", action=Size, metavar="PIXELS", help="of a ViT, side "
        "or height and width (default: its own)")  # fmt: skip
    add("--small-stem", action="store_true", help="of a ResNet, for small images: 3×3 convolution "
        "with stride 1, no max-pooling")  # fmt: skip
    add("-j", "--workers", type=count, default=min(8, cores()), help="data-loading processes for "
        "each training process")  # fmt: skip
    add("--epochs", type=count, default=100, help="passes over the data")
    add("-b", "--batch-size", type=positive, default=4096, help="of all processes together")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 where "
        "the hardware computes in it")  # fmt: skip
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--seed", type=seed, default=0, help="of weights, order and augmentation")
    add("--data-root", default="data", help="where named sets are downloaded to")
    add("--output-dir", help="of all that the run writes (default: in runs/)")
    add("--resume", metavar="PATH", help="checkpoint to continue, or auto: the one in "
        "--output-dir, if there is one")  # fmt: skip
    add("-p", "--print-freq", type=positive, default=10, metavar="STEPS", help="steps between log "
        "lines")  # fmt: skip
    add("--tensorboard", action="store_true", help="log to TensorBoard too, in --output-dir")
    return parser


def downstream_flags():
    """Flags of the scripts that begin with pre-trained weights."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--pretrained", metavar="CKPT", help="checkpoint of main_moco.py or of the official "
        "release; arch and sizes are taken from it")  # fmt: skip
    add("--from-scratch", action="store_true", help="as a control: random weights, in the backbone "
        "of --pretrained or -a")  # fmt: skip
    add("--evaluate", action="store_true", help="only measure the classifier in --pretrained")
    return parser


def check_downstream(parser, args):
    """What argparse can't say about downstream_flags."""
    if not args.pretrained and not (args.from_scratch and args.arch):
        parser.error("give --pretrained CKPT, or as a control --from-scratch and -a")
    if args.from_scratch and args.evaluate:
        parser.error("--from-scratch leaves nothing for --evaluate")
    if args.evaluate and args.resume:
        parser.error("--evaluate measures --pretrained, --resume continues training: give one")
    return args


def output_folder(args, arch, job):
    """--output-dir, or runs/RUN_JOB for a checkpoint in …/RUN."""
    run = Path(args.pretrained).resolve().parent.name if args.pretrained else arch
    control = "_from_scratch" if args.from_scratch else ""
    return Path(args.output_dir or f"runs/{run}_{job}{control}")


def origin(args):
    return "from a random initialisation" if args.from_scratch else f"from {args.pretrained}"


def say(text):
    """Rank 0 prints it."""
    if rank() == 0:
        print(text, flush=True)


class Size(argparse.Action):
    """One side or two → (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, "takes one side, or height and width")
        setattr(namespace, self.dest, (values[0], values[-1]))


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _number(kind, good, what):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


positive = _number(int, lambda v: v > 0, "a whole number above 0")
count = _number(int, lambda v: v >= 0, "a whole number, 0 or more")
nonnegative = _number(float, lambda v: 0 <= v < float("inf"), "a number, 0 or more")
positive_float = _number(float, lambda v: 0 < v < float("inf"), "a number above 0")
share = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
side = _number(int, lambda v: v > 0, "a side in pixels (DIR goes before it)")
seed = _number(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2³² − 1")


def run(main, parse_args):
    """The script: parses, calls main(args), turns a UserError into one line and its exit code."""
    script = os.path.basename(sys.argv[0])
    try:
        main(parse_args())
        code = 0
    except UserError as error:
        if error.everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        code = error.code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"{script}: interrupted; --resume auto continues", file=sys.stderr)
        code = 130
    if not code:
        leave()
    sys.exit(code)
