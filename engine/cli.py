"""Command lines: recipes as flag files, the flags that scripts share, errors in one line."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

import torch

from engine.datasets import NAMED_SETS, LabelError, load_splits, replace_val, require_labels
from engine.decode import MAX_PIXELS
from engine.errors import UserError, first_line, printable
from engine.folders import image_folders
from engine.launch import destroy_process_group
from engine.signals import Interrupted
from moco.distributed import world_size

# Flags that may differ when a run is resumed; any other one changes its mathematics.
MAY_CHANGE = set(
    "data data_root workers amp device encode_chunk compile output_dir resume init_from print_freq "
    "tensorboard save_every save_minutes timeout allow_changed_args val knn_every knn_bank knn "
    "knn_data max_bad_images".split()
)


class Args(argparse.Namespace):
    """The flags of a script; `defaults` is beside them, not one of them: vars() leaves it out."""

    __slots__ = ("defaults",)


class Parser(argparse.ArgumentParser):
    """argparse with `@recipes/NAME.txt`: flags as on the command line, # comments; later wins.

    DIR, too: one on the command line replaces a recipe's.
    """

    def __init__(self, **kwargs):
        super().__init__(
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def convert_arg_line_to_args(self, line):
        if "\0" in line:  # UTF-16, perhaps
            raise ValueError("it is not a text file")
        return [RecipeWord(word) for word in shlex.split(re.sub(r"(^|\s)#.*", "", line))]

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else argv
        args = Args() if namespace is None else namespace
        try:
            args, extra = self.parse_known_args(argv, args)
        except ValueError as error:  # from a recipe: not a text, or a quotation without its end
            if isinstance(error, UserError):
                raise
            self.error(f"can't read the recipe: {error}")
        except RecursionError:
            self.error("can't read the recipe: it names itself")
        if hasattr(args, "data") and len(extra) == 1 and not extra[0].startswith("-"):
            if isinstance(args.data, RecipeWord):
                args.data, extra = extra[0], []
            elif isinstance(extra[0], RecipeWord):
                extra = []
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        for name, value in vars(args).items():
            setattr(args, name, _plain(value))
            if value == "":  # an unset variable of the shell; it would pass for a missing flag
                flag = "DIR" if name == "data" else f"--{name.replace('_', '-')}"
                self.error(f"{flag} is an empty text")
        args.defaults = {name: self.get_default(name) for name in vars(args)}
        return args

    def error(self, message):
        # argparse opens no other files than recipes.
        message = re.sub(r"^\[Errno \d+\] (.*): '(.*)'$", r"can't read the recipe \2: \1", message)
        raise UserError(f"{message} (--help lists the flags)")


class RecipeWord(str):
    """A word that stands in a recipe, not on the command line."""


def _plain(value):
    """RecipeWords, also in lists and tuples, as str: checkpoints hold plain types."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return str(value) if isinstance(value, RecipeWord) else value


def input_flags():
    """Flags about images and the backbone that sees them, as a parent for parsers."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    names = " ".join(NAMED_SETS)
    forms = f"folder of images, list.txt, .tar, hf:NAME, or one of: {names}"
    add("data", metavar="DIR", help=forms)
    add(
        "-a", "--arch", default="resnet50", help="a ViT of vits.py, torchvision's ResNet, timm/NAME"
    )
    size = dict(type=side, nargs="+", action=Size, metavar="PIXELS")
    add("--img-size", default=(224, 224), help="side, or height and width", **size)
    add("--patch-size", help="patch of a ViT: side, or height and width", **size)
    add("--in-chans", type=width, default=3, help="channels of the images; 1: gray (default: 3)")
    channels = dict(nargs="+", metavar="X")
    add("--mean", type=fraction, help="channel means in 0…1 (default: ImageNet's)", **channels)
    add(
        "--std",
        type=positive_float,
        help="channel standard deviations (default: ImageNet's)",
        **channels,
    )
    max_value = "pixel value that maps to 1.0 in files of more than 8 bits (default: 65535)"
    add("--max-value", type=positive_float, metavar="V", help=max_value)
    pixels = f"largest height × width of an image file that is decoded (default: {MAX_PIXELS:,})"
    add("--max-pixels", type=positive_int, default=MAX_PIXELS, metavar="N", help=pixels)
    add("--small-stem", action="store_true", help="ResNet for small images: 3×3 stem, no pooling")
    workers = "data-loading processes of each training process"
    add("-j", "--workers", type=int_up_to_1024, default=min(8, num_cores()), help=workers)
    pair = dict(nargs="+", action=Pair)
    add("--hf-columns", metavar=("IMAGE", "LABEL"), help="columns of hf:NAME to read", **pair)
    add("--hf-splits", metavar=("TRAIN", "VAL"), help="splits of hf:NAME to read", **pair)
    add("--data-root", default="data", help="where named sets are downloaded to")
    amp = "mixed precision; auto: bf16 where the hardware computes in it"
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help=amp)
    add(
        "--device",
        choices=("auto", "cuda", "mps", "cpu"),
        default="auto",
        help="auto: a GPU if any",
    )
    return parser


def shared_flags():
    """Flags of all training scripts, as a parent for their parsers."""
    parser = argparse.ArgumentParser(add_help=False, parents=[input_flags()])
    add = parser.add_argument
    val = "labelled images to validate, in any form of DIR, in place of DIR's own"
    add("--val", metavar="DIR", help=val)
    max_bad = "unreadable images, as a fraction of the training images (default: 0.001)"
    add("--max-bad-images", type=fraction, default=0.001, metavar="FRACTION", help=max_bad)
    add("--epochs", type=non_negative_int, default=100, help="passes over the data")
    add("-b", "--batch-size", type=positive_int, default=4096, help="images per step, of all ranks")
    add("--seed", type=seed, default=0, help="random seed for weights, order and augmentation")
    add("--output-dir", help="folder for everything that the run writes (default: in runs/)")
    add("--resume", metavar="PATH", help="checkpoint to continue; auto: the newest in --output-dir")
    minutes = "between checkpoints, beside those at the ends of epochs; 0: only these"
    add("--save-minutes", type=non_negative_float, default=30, metavar="MINUTES", help=minutes)
    add("--allow-changed-args", action="store_true", help="resume although arguments differ")
    timeout = "how long a process waits for the others"
    add("--timeout", type=seconds, default=600, metavar="SECONDS", help=timeout)
    freq = "steps between log lines"
    add("-p", "--print-freq", type=positive_int, default=10, metavar="STEPS", help=freq)
    add("--tensorboard", action="store_true", help="log to TensorBoard, too, in --output-dir")
    return parser


def pretrained_flags():
    """Flags of a tool that shows images to a pre-trained backbone, as a parent for its parser."""
    parser = argparse.ArgumentParser(add_help=False, parents=[input_flags()])
    parser.add_argument(
        "--pretrained",
        metavar="CKPT",
        required=True,
        help="weights of ours, the official release, timm, DeiT, …; arch and sizes are taken from "
        "them",
    )
    parser.set_defaults(arch=None, img_size=None, in_chans=None, from_scratch=False)
    return parser


def downstream_flags():
    """Flags of the scripts that start from pre-trained weights."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--pretrained", metavar="CKPT", help="weights of ours, the official release, timm, DeiT, …")
    scratch = "control: random weights in the backbone of --pretrained or -a"
    add("--from-scratch", action="store_true", help=scratch)
    add("--evaluate", action="store_true", help="only measure the classifier in --pretrained")
    return parser


def check_downstream(parser, args):
    """What argparse can't check about downstream_flags."""
    if not args.pretrained and not (args.from_scratch and args.arch):
        parser.error("give --pretrained CKPT, or as a control --from-scratch and -a")
    if args.from_scratch and args.evaluate:
        parser.error("--from-scratch leaves nothing for --evaluate")
    if args.evaluate and args.resume:
        parser.error("--evaluate measures --pretrained, --resume continues training: give one")
    if args.evaluate and args.val:
        parser.error("--evaluate measures the images in DIR: give them there, without --val")
    return args


def load_splits_from_args(args, pixel_format):
    """The images that DIR, --val and the flags about them name → Splits."""
    val, trains_only = getattr(args, "val", None), getattr(args, "knn_every", None) == 0
    only_evaluates = getattr(args, "evaluate", False) and not getattr(args, "knn", False)
    if only_evaluates or getattr(args, "split", None) == "val":
        return _load(args, args.data, pixel_format, "val")
    if trains_only or getattr(args, "knn_data", None):
        return _load(args, args.data, pixel_format, "images")
    if val:
        splits = _load(args, args.data, pixel_format, "train")
        return replace_val(splits, _load(args, val, pixel_format, "val"), args.data, val)
    try:
        return _load(args, args.data, pixel_format, "both")
    except LabelError as error:
        if not hasattr(args, "knn_every"):
            raise
        raise UserError(f"{error}; --knn-every 0 pre-trains without labels") from None


def load_knn_splits_from_args(args, splits, pixel_format):
    """The images that kNN is measured on: those of --knn-data, else `splits`."""
    if not args.knn_data:
        return splits
    return require_labels(_load(args, args.knn_data, pixel_format, "both"), args.knn_data)


def _load(args, path, pixel_format, need):
    paths = [args.data, getattr(args, "val", None), getattr(args, "knn_data", None)]
    takes_hf_flags = path.startswith("hf:") or not any(p and p.startswith("hf:") for p in paths)
    hf_flags = (args.hf_columns, args.hf_splits) if takes_hf_flags else (None, None)
    return load_splits(path, args.data_root, pixel_format, *hf_flags, need)


def output_folder(args, default):
    """--output-dir, or runs/DEFAULT.

    UserError if it is among the images: the run's pictures would be taken for some.
    """
    folder = Path(args.output_dir or f"runs/{default}")
    check_not_among_images("--output-dir", folder, args)
    return folder


def check_not_among_images(flag, path, args):
    for data in (args.data, getattr(args, "val", None), getattr(args, "knn_data", None)):
        places = image_folders(data) if data else []
        if any(path.resolve().is_relative_to(place.resolve()) for place in places):
            raise UserError(f"{flag} {path} is among the images of {data}: move it")


def downstream_folder(args, arch, job):
    """--output-dir, or runs/RUN_JOB for a checkpoint in …/RUN."""
    run = Path(args.pretrained).resolve().parent.name if args.pretrained else arch
    control = "_from_scratch" if args.from_scratch else ""
    return output_folder(args, f"{run}_{job}{control}")


def weights_origin(args):
    return "from a random initialization" if args.from_scratch else f"from {args.pretrained}"


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
seconds = _number(float, lambda v: 1 <= v <= 1e9, "a number of seconds (1 to 1e9)")
fraction = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
fraction_below_1 = _number(float, lambda v: 0 <= v < 1, "a number from 0, below 1")
side = _number(int, lambda v: 0 < v < 2**16, "a side in pixels (DIR goes before it)")
seed = _number(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2³² − 1")


def run_script(main, parse_args):
    """main(parse_args()); what goes wrong becomes one line on stderr and an exit code."""
    script = os.path.basename(sys.argv[0])
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names have any encoding
    exit_code, message, rank_local, args = 0, None, True, None
    ended_together = False  # whether all processes come here
    try:
        args = parse_args()
        main(args)
        ended_together = True
    except Interrupted as interrupted:
        exit_code, ended_together = interrupted.exit_code, True
    except KeyboardInterrupt:
        exit_code = 130
        if os.environ.get("RANK", "0") == "0":
            hint = "; --resume auto continues" if script.startswith("main_") else ""
            print(f"{script}: interrupted{hint}", file=sys.stderr)
    except UserError as error:
        exit_code, message, rank_local = error.exit_code, str(error), error.rank_local
    except ValueError as error:
        if not _raised_by_library(error):
            raise
        exit_code, message, rank_local = 2, str(error), False
    except (MemoryError, OSError, RuntimeError) as error:
        exit_code, message = 1, explain(error, args)
        if message is None:
            raise
    # Out of the handlers, which would keep the traceback, and with it DataLoader's workers, alive.
    if message and (rank_local or os.environ.get("LOCAL_RANK", "0") == "0"):
        print(f"{script}: error: {printable(message)}", file=sys.stderr, flush=True)
    if ended_together:
        destroy_process_group()
    sys.exit(exit_code)


def _raised_by_library(error):
    """Whether moco/ or vits.py refused an argument: they know nothing of flags and UserError."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in ("moco", "vits")


# Words in a RuntimeError of a collective whose other end is gone; gloo's, torch 2.6 to 2.15.
LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "gloo",
)
# Words in a RuntimeError of CUDA and its libraries, which is no torch.OutOfMemoryError.
OUT_OF_GPU_MEMORY = ("CUDA error: out of memory", "ALLOC_FAILED")
PEERS_GONE = "another process has ended, or the network between them"
CONTINUE = "--resume auto continues, and torchrun's --max-restarts does so by itself"


def explain(error, args=None):
    """What a failure of the machine, not of this code, means for the user; None for any other."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(w in text for w in OUT_OF_GPU_MEMORY):
        return out_of_gpu_memory(args)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory: a smaller --batch-size, or fewer --workers"
    if "DataLoader worker" in text:
        return (
            "a worker was killed, for want of memory perhaps, or of /dev/shm: fewer --workers; "
            "--resume auto continues"
        )
    if "nccl" in text.lower():
        return _explain_nccl(text, args)
    lost = any(words in text for words in LOST_CONNECTION)
    if isinstance(error, torch.distributed.DistError) or lost:
        # Without the source file and line, which stand in brackets.
        reason = re.sub(r"^\[.*?\] ", "", first_line(error)).split(". ")[0]
        if "connectFullMesh" in text:
            return (
                f"the hosts don't reach each other through gloo: {reason}; GLOO_SOCKET_IFNAME "
                "names the network interface to use, and NCCL_SOCKET_IFNAME that of NCCL"
            )
        return f"{PEERS_GONE}: {reason}; {CONTINUE}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return None


def _explain_nccl(text, args):
    """The cause stands below "Last error:". Only some errors mean that another process is gone."""
    found = re.search(r"Last error:\s*(\S.*)", text)
    cause = found[1].strip() if found else None
    if "ncclRemoteError" in text or "timeout" in text.lower():
        return f"{PEERS_GONE}: {cause or text.strip().splitlines()[0]}; {CONTINUE}"
    if cause is None:
        return None
    if "out of memory" in cause:
        return f"NCCL: {out_of_gpu_memory(args)}"
    hint = "NCCL_DEBUG=INFO prints more"
    if "Duplicate GPU" in cause:
        hint = "start one process for each GPU, with --nproc_per_node"
    elif "shm" in cause:
        hint = "give the container more shared memory (docker run --ipc=host)"
    return f"NCCL failed: {cause}; {hint}"


def out_of_gpu_memory(args):
    """The line about it; args: the script's flags, None before they are known."""
    if getattr(args, "batch_size", None) is None:
        return "out of GPU memory"
    num_images = args.batch_size // world_size()
    line = f"out of GPU memory with {num_images} images in this process: a smaller --batch-size"
    if not hasattr(args, "encode_chunk"):
        return line
    return (
        f"{line}, or for ViTs --encode-chunk 256 or less; what fits: python benchmarks/memory.py "
        f"--estimate -a {args.arch} -b {num_images} --encode-chunk 0 256 64"
    )
