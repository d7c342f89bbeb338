"""Command lines: recipes as flag files, the flags that the scripts share, errors in one line."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

import torch

from moco import UserError, one_line, reason
from moco.augment import Pixels
from moco.distributed import leave
from moco.keeper import Stop
from moco.sources import NAMES, load_data


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
        if "\0" in line:  # UTF-16, perhaps
            raise ValueError("it is no text")
        return shlex.split(re.sub(r"(^|\s)#.*", "", line))

    def parse_args(self, *args):
        try:
            args = super().parse_args(*args)
        except ValueError as error:  # from a recipe: no text, or a quotation without its end
            self.error(f"can't read the recipe: {error}")
        except RecursionError:
            self.error("can't read the recipe: it names itself")
        for name, value in vars(args).items():
            if value == "":  # of a shell's variable that is not set; it would pass for no flag
                flag = "DIR" if name == "data" else f"--{name.replace('_', '-')}"
                self.error(f"{flag} is an empty text")
        return args

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def input_flags():
    """Flags about images and the backbone that is shown them, as a parent for parsers."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("data", metavar="DIR", help="folder of images, list of them in a .txt, hf:NAME or "
        f"hf:DIR of Hugging Face, or one of: {' '.join(NAMES)}")  # fmt: skip
    add("-a", "--arch", default="resnet50", help="a ViT of vits.py, a ResNet of torchvision, or "
        "timm/NAME")  # fmt: skip
    add("--img-size", type=side, nargs="+", default=(224, 224), action=Size, metavar="PIXELS",
        help="side, or height and width")  # fmt: skip
    add("--in-chans", type=positive, default=3, metavar="N", help="channels of the images, 1 for "
        "gray (default: 3)")  # fmt: skip
    add("--mean", type=share, nargs="+", metavar="M", help="of each channel, from 0 to 1, to "
        "normalise by (default: ImageNet's; 0.449 where there are not three)")  # fmt: skip
    add("--std", type=positive_float, nargs="+", metavar="S", help="the same (default: ImageNet's; "
        "0.226 where there are not three)")  # fmt: skip
    add("--max-value", type=positive_float, metavar="V", help="what is white in files of more than "
        "8 bits a channel (default: 65535; floats need it)")  # fmt: skip
    add("--patch-size", type=side, nargs="+", action=Size, metavar="PIXELS", help="of a ViT, side "
        "or height and width (default: its own)")  # fmt: skip
    add("--small-stem", action="store_true", help="of a ResNet, for small images: 3×3 convolution "
        "with stride 1, no max-pooling")  # fmt: skip
    add("-j", "--workers", type=few, default=min(8, cores()), help="data-loading processes for "
        "each training process")  # fmt: skip
    add("--hf-columns", nargs="+", action=Pair, metavar=("IMAGE", "LABEL"), help="of hf:NAME "
        "(default: the only ones of their type)")  # fmt: skip
    add("--hf-splits", nargs="+", action=Pair, metavar=("TRAIN", "VAL"), help="of hf:NAME "
        "(default: train, and validation, val or test)")  # fmt: skip
    add("--data-root", default="data", help="where named sets are downloaded to")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 where "
        "the hardware computes in it")  # fmt: skip
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    return parser


def shared_flags():
    """Flags of all scripts, as a parent for their parsers."""
    parser = argparse.ArgumentParser(add_help=False, parents=[input_flags()])
    add = parser.add_argument
    add("--max-bad-images", type=share, default=0.001, metavar="SHARE", help="of the training "
        "images, that may be unreadable (default: 0.001)")  # fmt: skip
    add("--epochs", type=count, default=100, help="passes over the data")
    add("-b", "--batch-size", type=positive, default=4096, help="of all processes together")
    add("--seed", type=seed, default=0, help="of weights, order and augmentation")
    add("--output-dir", help="of all that the run writes (default: in runs/)")
    add("--resume", metavar="PATH", help="checkpoint to continue, or auto: the one in "
        "--output-dir, if there is one")  # fmt: skip
    add("--save-minutes", type=nonnegative, default=30, metavar="MINUTES", help="between "
        "checkpoints, beside those at the ends of epochs; 0: only these")  # fmt: skip
    add("--allow-changed-args", action="store_true", help="resume though arguments differ")
    add("--timeout", type=seconds, default=600, metavar="SECONDS", help="that a process "
        "waits for the others")  # fmt: skip
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


def images(args, setting):
    """What DIR and the flags about it name → Data; setting: as create_downstream finds it."""
    pixels = Pixels.of(setting)
    return load_data(args.data, args.data_root, pixels, args.hf_columns, args.hf_splits)


def output_folder(args, arch, job):
    """--output-dir, or runs/RUN_JOB for a checkpoint in …/RUN."""
    run = Path(args.pretrained).resolve().parent.name if args.pretrained else arch
    control = "_from_scratch" if args.from_scratch else ""
    folder = Path(args.output_dir or f"runs/{run}_{job}{control}")
    check_apart(folder, args.data)
    return folder


def check_apart(folder, data):
    """UserError if a run's folder lies among the images: its pictures would be taken for some."""
    root = Path(data).resolve()
    images = [root / "train", root / "val"] if (root / "train").is_dir() else [root]
    if data not in NAMES and any(folder.resolve().is_relative_to(path) for path in images):
        raise UserError(f"--output-dir {folder} lies among the images of {data}: put it elsewhere")


def origin(args):
    return "from a random initialisation" if args.from_scratch else f"from {args.pretrained}"


class Size(argparse.Action):
    """One side or two → (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, "takes one side, or height and width")
        setattr(namespace, self.dest, (values[0], values[-1]))


class Pair(argparse.Action):
    """One word or two."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, "takes one word or two (DIR goes before it)")
        setattr(namespace, self.dest, values)


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


# With bounds that leave room for products: 64-bit integers, seconds as nanoseconds, fp32.
positive = _number(int, lambda v: 0 < v < 2**31, "a whole number above 0, below 2³¹")
count = _number(int, lambda v: 0 <= v < 2**31, "a whole number from 0, below 2³¹")
few = _number(int, lambda v: 0 <= v <= 1024, "a whole number from 0 to 1024")
width = _number(int, lambda v: 0 < v <= 2**16, "a width, from 1 to 65536")
positive_float = _number(float, lambda v: 1e-12 <= v <= 1e38, "a number above 0 (1e-12 to 1e38)")
nonnegative = _number(
    float, lambda v: v == 0 or 1e-12 <= v <= 1e38, "a number, 0 or more (1e-12 to 1e38)"
)
seconds = _number(float, lambda v: 1 <= v <= 1e9, "a number of seconds (1 to 1e9)")
share = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
below_1 = _number(float, lambda v: 0 <= v < 1, "a number from 0, below 1")
side = _number(int, lambda v: 0 < v < 2**16, "a side in pixels (DIR goes before it)")
seed = _number(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2³² − 1")


def run(main, parse_args):
    """The script: parses, calls main(args); what goes wrong becomes one line and an exit code."""
    script = os.path.basename(sys.argv[0])
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names may be of no encoding
    code, error, everywhere = 0, None, True  # error: a text, for an exception holds the workers
    try:
        main(parse_args())
    except UserError as wrong:
        code, error, everywhere = wrong.code, str(wrong), wrong.everywhere
    except Stop as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 130
        if os.environ.get("RANK", "0") == "0":
            hint = "; --resume auto continues" if script.startswith("main_") else ""
            print(f"{script}: interrupted{hint}", file=sys.stderr)
    except (MemoryError, OSError, RuntimeError) as unforeseen:
        code, error = 1, explain(unforeseen)
        if not error:
            raise
    if error and (everywhere or os.environ.get("LOCAL_RANK", "0") == "0"):
        print(f"{script}: error: {one_line(error)}", file=sys.stderr, flush=True)
    if not code:
        leave()
    sys.exit(code)


def explain(error):
    """What a failure of the machine, not of ours, means for the user; None for any other."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory: a smaller --batch-size, or for ViTs --encode-chunk"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in said:
        return "out of memory: a smaller --batch-size, or fewer --workers"
    if "DataLoader worker" in said:
        return (
            "a worker was killed, for want of memory perhaps, or of /dev/shm: fewer --workers; "
            "--resume auto continues"
        )
    lost = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo",
            "NCCL")  # fmt: skip
    if isinstance(error, torch.distributed.DistError) or any(word in said for word in lost):
        what = re.sub(r"^\[.*?\] ", "", reason(error)).split(". ")[0]  # after file and line
        return (
            f"another process has ended, or the network between them: {what}; --resume auto "
            "continues, and torchrun's --max-restarts does so by itself"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return None
