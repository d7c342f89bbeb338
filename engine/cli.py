"""Command lines: recipes as flag files, errors in one line."""

import argparse
import difflib
import os
import re
import shlex
import sys
import warnings

import torch

from engine.errors import OUT_OF_GPU_MEMORY, UserError, first_line, is_out_of_memory, print_line
from engine.launch import destroy_process_group, is_first_to_print
from engine.signals import Interrupted
from moco.distributed import world_size


class Args(argparse.Namespace):
    """The flags of a script. may_change and defaults are beside them: vars() leaves them out."""

    __slots__ = ("defaults", "may_change")


class Parser(argparse.ArgumentParser):
    """argparse with `@recipes/NAME.txt`: flags as on the command line, # comments; later wins.

    DIR, too: one on the command line replaces a recipe's. may_change: the names of arguments that
    may differ when a run is resumed; any other one changes its mathematics.
    """

    def __init__(self, **kwargs):
        super().__init__(
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        self.may_change = set()

    def group(self, title, may_change=False):
        """A group of --help → add(names, help, **kwargs), which shows defaults.

        names: for example "-a --arch". may_change: whether all its flags may.
        """
        group = self.add_argument_group(title)
        group_may_change = may_change

        def add(names, help, may_change=group_may_change, **kwargs):
            default = kwargs.get("default")
            if default is not None and default is not False and "default" not in help:
                help += " (default: %(default)s)"
            if "type" in kwargs:
                kwargs.setdefault("metavar", "N")
            action = group.add_argument(*names.split(), help=help, **kwargs)
            if may_change:
                self.may_change.add(action.dest)

        return add

    def convert_arg_line_to_args(self, line):
        if "\0" in line:  # UTF-16, perhaps
            raise ValueError("it is not a text file")
        words = shlex.split(re.sub(r"(^|\s)#.*", "", line))
        return [RecipeWord(_expand(word)) for word in words]

    def parse_args(self, argv=None, namespace=None):
        try:
            args, extra = self.parse_known_args(argv, namespace or Args())
        except ValueError as error:  # from a recipe: not a text, or a quotation without its end
            if isinstance(error, UserError):
                raise
            self.error(f"can't read the recipe: {error}")
        except RecursionError:
            self.error("can't read the recipe: it names itself")
        recipe_data = None  # that another DIR replaces
        if hasattr(args, "data") and len(extra) == 1 and not extra[0].startswith("-"):
            if isinstance(args.data, RecipeWord):
                args.data, recipe_data, extra = extra[0], args.data, []
            elif isinstance(extra[0], RecipeWord):
                recipe_data, extra = extra[0], []
        if extra and isinstance(extra[0], RecipeWord) and not extra[0].startswith("-"):
            self.error("a recipe holds words that are no flags: is it a recipe?")  # perhaps secret
        if extra:
            near = difflib.get_close_matches(extra[0], self._option_string_actions, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(extra)}{hint}")
        # Not where another recipe's DIR replaced it.
        if recipe_data and not isinstance(args.data, RecipeWord) and args.data != recipe_data:
            _warn_of_what_stays(args, recipe_data)
        for name, value in vars(args).items():
            if isinstance(value, RecipeWord):
                setattr(args, name, str(value))  # checkpoints hold plain types
            if value == "":  # an unset variable of the shell; it would pass for a missing flag
                flag = "DIR" if name == "data" else f"--{name.replace('_', '-')}"
                self.error(f"{flag} is an empty text")
        args.may_change = frozenset(self.may_change)
        args.defaults = {action.dest: action.default for action in self._actions}
        return args

    def error(self, message):
        # argparse opens no other files than recipes.
        message = re.sub(
            r"^\[Errno \d+\] (.*): (['\"].*)$", r"can't read the recipe \2: \1", message
        )
        raise UserError(f"{message} (--help lists the flags)")


class RecipeWord(str):
    """A word that stands in a recipe, not on the command line."""


def _warn_of_what_stays(args, recipe_data):
    """Where DIR is not the recipe's, its other paths may be those of another set: a line each."""
    for name in ("output_dir", "pretrained"):
        value = getattr(args, name, None)
        if isinstance(value, RecipeWord):
            flag = f"--{name.replace('_', '-')} {value}"
            text = f"warning: {flag} is still the recipe's, whose DIR was {recipe_data}"
            if is_first_to_print(text):
                print_line(text, sys.stderr)


def _expand(word):
    """~ and $VARIABLE of a recipe, as the shell has them; ValueError for one that is not set."""
    expanded = os.path.expandvars(os.path.expanduser(word))
    unset = re.search(r"\$\w+|\$\{\w+\}|^~", expanded)
    if unset:
        raise ValueError(f"{unset[0]} is not set")
    return expanded


def run_script(main, parse_args):
    """main(parse_args()); what goes wrong becomes one line on stderr and an exit code."""
    script = os.path.basename(sys.argv[0])
    prepare_streams()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    exit_code, message, rank_local, args = 0, None, True, None
    try:
        args = parse_args()
        try:
            main(args)
        except Interrupted as interrupted:
            exit_code = interrupted.exit_code
        destroy_process_group()  # all processes come here, or none
    except KeyboardInterrupt:
        exit_code = 130
        if os.environ.get("RANK", "0") == "0":
            hint = "; --resume auto continues" if script.startswith("main_") else ""
            print_line(f"{script}: interrupted{hint}", sys.stderr)
    except UserError as error:
        exit_code, message, rank_local = error.exit_code, str(error), error.rank_local
    except ValueError as error:
        if not _raised_by_library(error):
            raise
        exit_code, message, rank_local = 2, str(error), False
    except (MemoryError, OSError, RuntimeError) as error:
        exit_code, message = exit_code or 1, explain(error, args)
        if message is None:
            raise
    # Out of the handlers, which would keep the traceback, and with it DataLoader's workers, alive.
    if message and (rank_local or is_first_to_print(message)):
        print_line(f"{script}: error: {message}", sys.stderr)
    drop_unwritable_streams()
    sys.exit(exit_code)


def prepare_streams():
    """Stdout and stderr that take any name, closed or not, in a notebook or not."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: another file would get its number
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):  # a notebook's streams lack it
            getattr(sys, name).reconfigure(errors="backslashreplace")
    if "IPython" not in sys.modules:
        os.environ.pop("MPLBACKEND", None)  # a notebook's, which `!python` inherits


def drop_unwritable_streams():
    """Sends stdout and stderr nowhere if they can't be flushed.

    Python's own flush at exit would fail, and change the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, a closed pipe or terminal
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
    "Application timeout",
    "gloo",
)
PEERS_GONE = "another process has ended, or the network between them"
CONTINUE = "--resume auto continues, and torchrun's --max-restarts does so by itself"


def explain(error, args=None):
    """What a failure of the machine, not of this code, means for the user; None for any other."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(w in text for w in OUT_OF_GPU_MEMORY):
        return out_of_gpu_memory(args)
    if is_out_of_memory(error):
        return "out of memory: a smaller --batch-size, or fewer --workers"
    if "DataLoader worker" in text:
        return (
            "a worker has died, for want of memory, open files (ulimit -n) or shared memory (df "
            "/dev/shm; in Docker --shm-size=8g or --ipc=host): fewer --workers"
        )
    if "nccl" in text.lower():
        return _explain_nccl(text)
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


def _explain_nccl(text):
    """The cause stands below "Last error:". Only some errors mean that another process is gone."""
    found = re.search(r"Last error:\s*(\S.*)", text)
    cause = found[1].strip() if found else None
    if "ncclRemoteError" in text or "timeout" in text.lower():
        return f"{PEERS_GONE}: {cause or text.strip().splitlines()[0]}; {CONTINUE}"
    if cause is None:
        return None
    return f"NCCL failed: {cause}; NCCL_DEBUG=INFO prints more (docs/troubleshooting.md)"


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
