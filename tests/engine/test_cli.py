"""Flag files, numbers, and how a script ends."""

import io
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY

from engine import cli, flags
from engine.errors import UserError, print_line
from engine.launch import print_rank0
from engine.signals import Interrupted
from moco import MoCo

sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture
def parser():
    parser = cli.Parser()
    flags.add_image_flags(parser)
    flags.add_model_flags(parser)
    flags.add_optimization_flags(parser, epochs=100, batch_size=4096)
    flags.add_run_flags(parser)
    flags.add_hardware_flags(parser)
    return parser


GROUPS = "images model optimization evaluation run hardware".split()
HELPS = {
    "main_moco": [*GROUPS[:3], "augmentation", *GROUPS[3:]],
    "main_lincls": GROUPS,
    "main_finetune": GROUPS,
    "convert": None,
    "features": ["images", "model", "hardware", "features"],
    "predict": ["images", "model", "hardware", "predictions"],
    "visualize attention": ["images", "model", "hardware", "picture"],
    "visualize pca": ["images", "model", "hardware", "picture"],
    "visualize neighbours": ["images", "model", "hardware", "picture"],
    "visualize curves": None,
}


@pytest.mark.parametrize("command", HELPS)
def test_help_tells_what_each_flag_does_group_by_group(command, capsys, monkeypatch):
    name, *words = command.split()
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        __import__(name).parse_args([*words, "--help"])
    text = re.sub(r"\n {8,}", "  ", capsys.readouterr().out)  # a line for each flag
    for line in re.findall(r"^  ((?:-|[A-Z]{2,}\b).*)$", text, re.MULTILINE):
        assert re.fullmatch(r"\S.*?  +\S.+", line), line
    groups = re.findall(r"^(\w+):$", text, re.MULTILINE)
    if HELPS[command] is not None:
        assert [group for group in groups if group != "options"] == HELPS[command]
    if "model" in groups and name != "main_moco":
        stated = re.findall(r"--(\S+) .*\(default: as --pretrained states it", text)
        options = {option.replace("_", "-") for option in flags.BACKBONE_OPTIONS}
        assert {*stated} == options - {"max-pixels", "pos-embed", "pool"}
    if name.startswith("main_"):
        given = ["DIR"] if name == "main_moco" else ["DIR", "--pretrained", "CKPT"]
        for flag, default in vars(__import__(name).parse_args(given)).items():
            if default not in (None, False, *given):
                flag = flag.replace("_", "-")
                [line] = re.findall(rf"^  (?:-\w [^,]+, )?--{flag} .*", text, re.MULTILINE)
                assert "(default: " in line


def test_recipes_hold_flags_comments_and_quoted_words(parser, tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(
        "# a comment\nDIR  # another\n\n--epochs 3 -b 8\n--output-dir 'runs/my run#1'\n"
    )
    args = parser.parse_args([f"@{recipe}", "--epochs", "5"])
    assert (args.data, args.epochs, args.batch_size) == ("DIR", 5, 8)
    assert args.output_dir == "runs/my run#1"


@pytest.mark.parametrize(
    "content", [b"DIR --arch 'open", b"\xff\xfe DIR", "DIR".encode("utf-16-le")]
)
def test_recipe_that_cannot_be_read_is_refused(parser, tmp_path, content):
    recipe = tmp_path / "recipe.txt"
    recipe.write_bytes(content)
    with pytest.raises(UserError, match="can't read the recipe"):
        parser.parse_args([f"@{recipe}"])


@pytest.mark.parametrize("name", ["nope.txt", "a word", "it's", ""])
def test_recipe_that_is_missing_is_named(parser, name):
    with pytest.raises(UserError) as error:
        parser.parse_args(["DIR", f"@{name}"])
    assert str(error.value).startswith(f"can't read the recipe {name!r}: No such file")


def test_a_recipe_whose_name_has_a_space_may_stand_in_another(parser, tmp_path):
    (tmp_path / "my file.txt").write_text("--epochs 3\n")
    (tmp_path / "outer.txt").write_text(f"DIR '@{tmp_path}/my file.txt'\n")
    assert parser.parse_args([f"@{tmp_path}/outer.txt"]).epochs == 3


@pytest.mark.parametrize("words, size", [("96", (96,)), ("96 160", (96, 160))])
def test_sizes_are_a_side_or_height_and_width(parser, words, size):
    args = parser.parse_args(["DIR", "--img-size", *words.split(), "--patch-size", "8"])
    assert (args.img_size, args.patch_size) == (size, (8,))
    assert flags.backbone_options(args)["img_size"] == (size[0], size[-1])
    with pytest.raises(UserError, match="DIR goes before it"):
        parser.parse_args(["--img-size", *words.split(), "DIR"])


@pytest.mark.parametrize(
    "words",
    (
        "--epochs -1, --batch-size 0, --seed 4294967296, --print-freq 0, --img-size 1 2 3, "
        "--img-size 65536, --epochs 2147483648, --workers 1025, --timeout .1, --save-minutes 1e308"
    ).split(", "),
)
def test_numbers_out_of_range_are_refused(parser, words):
    with pytest.raises(UserError, match=words.split()[0]):
        parser.parse_args(["DIR", *words.split()])


@pytest.mark.parametrize(
    "error, local_rank, exit_code, lines",
    [
        (UserError("wrong"), "0", 2, 1),
        (UserError("wrong"), "1", 2, 0),
        (UserError("wrong", exit_code=1, rank_local=True), "1", 1, 1),
        (KeyboardInterrupt(), "0", 130, 1),
        (None, "0", 0, 0),
    ],
)
def test_a_script_ends_with_one_line_and_its_code(
    monkeypatch, capsys, error, local_rank, exit_code, lines
):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("RANK", local_rank)

    def main(args):
        if error:
            raise error

    with pytest.raises(SystemExit) as stop:
        cli.run_script(main, lambda: None)
    assert stop.value.code == exit_code and capsys.readouterr().err.count("\n") == lines


def test_names_of_any_bytes_are_printed_and_stay_on_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))

    def main(args):
        print_line("τ \udcff")
        raise UserError("no\nsuch \udcff\x1b[0m ü")

    with pytest.raises(SystemExit):
        cli.run_script(main, lambda: None)
    assert sys.stdout.buffer.getvalue() == b"\\u03c4 \\udcff\n"
    assert capsys.readouterr().err.endswith("error: no\\nsuch \\udcff\\x1b[0m ü\n")


class Full(io.RawIOBase):
    """What a full disk is to a file, and a closed pipe to a process."""

    def writable(self):
        return True

    def write(self, data):
        raise OSError(28, "No space left on device")


def notebook_stream():
    """A stream without reconfigure or a descriptor."""
    return SimpleNamespace(write=lambda text: None, flush=lambda: None)


@pytest.mark.parametrize(
    "create", [lambda: io.TextIOWrapper(io.BufferedWriter(Full())), lambda: None, notebook_stream]
)
@pytest.mark.parametrize("names", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_output_that_goes_nowhere_ends_no_script(monkeypatch, create, names):
    for name in names:
        monkeypatch.setattr(sys, name, create())
    monkeypatch.setattr(os, "dup2", lambda *args: None)
    monkeypatch.setattr(Full, "fileno", lambda self: 1)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")

    def main(args):
        print_rank0("data")
        print_rank0("data", sys.stderr)
        assert "MPLBACKEND" not in os.environ

    with pytest.raises(SystemExit) as stop:
        cli.run_script(main, lambda: None)
    assert stop.value.code == 0


@pytest.mark.parametrize("exit_code", [0, 75])
def test_a_rank_whose_peer_dies_at_the_end_prints_one_line(monkeypatch, capsys, exit_code):
    def leave():
        raise RuntimeError("[/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:20190")

    def main(args):
        if exit_code:
            raise Interrupted(exit_code)

    monkeypatch.setattr(cli, "destroy_process_group", leave)
    with pytest.raises(SystemExit) as stop:
        cli.run_script(main, lambda: None)
    assert stop.value.code == (exit_code or 1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another process has ended" in err


def test_a_recipe_has_the_variables_of_a_shell(parser, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("~/images --output-dir ${DATA}/run --data-root '$DATA'\n")
    args = parser.parse_args([f"@{recipe}"])
    assert (args.data, args.output_dir, args.data_root) == ("/home/me/images", "/data/run", "/data")
    for word in ("$UNSET/images", "${UNSET}", "~nobody-of-this-name/images"):
        recipe.write_text(word)
        with pytest.raises(UserError, match=r"can't read the recipe: .* is not set"):
            parser.parse_args([f"@{recipe}"])


def test_a_file_that_is_no_recipe_is_not_shown(parser, tmp_path):
    (tmp_path / "shadow").write_text("root:secret:1\ndaemon:secret:2\nbin:secret:3\n")
    with pytest.raises(UserError, match="is it a recipe") as error:
        parser.parse_args([f"@{tmp_path}/shadow"])
    assert "secret" not in str(error.value)


def test_a_value_error_of_the_library_is_one_line_and_any_other_a_bug(capsys):
    def wrong_backbone(args):
        MoCo(torch.nn.Conv2d(3, 3, 1))

    with pytest.raises(SystemExit) as stop:
        cli.run_script(wrong_backbone, lambda: None)
    assert stop.value.code == 2
    assert "error: the backbone must state" in capsys.readouterr().err

    def bug(args):
        int("one")

    with pytest.raises(ValueError, match="invalid literal"):
        cli.run_script(bug, lambda: None)
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_gpu_memory_is_one_line_with_what_would_fit(refusal, monkeypatch, tmp_path, error):
    def step(*_):
        raise error

    monkeypatch.setattr("moco.optimizer_step", step)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the rank that fails prints it
    line = refusal("main_moco.py", *TINY, "--knn-every", 0, "--output-dir", tmp_path, code=1)
    assert "out of GPU memory with 256 images in this process" in line
    assert "smaller --batch-size" in line and "--encode-chunk" in line
    assert "benchmarks/memory.py --estimate -a vit_nano -b 256 " in line


def test_what_may_change_is_beside_the_flags(parser):
    args = parser.parse_args(["DIR", "--epochs", "5"])
    assert {"data", "output_dir", "workers"} <= args.may_change and "may_change" not in vars(args)
    assert not {"epochs", "batch_size", "seed", "arch", "img_size"} & args.may_change


def test_dir_on_the_command_line_replaces_a_recipes(parser, tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("digits --img-size 16 16\n--seed 1")
    args = parser.parse_args([f"@{recipe}", "--seed", "2", "/my/images"])
    assert (args.data, args.seed) == ("/my/images", 2)
    for argv in (
        ["/my/images", f"@{recipe}"],
        [f"@{recipe}", "/my/images", "--output-dir", "digits"],
    ):
        assert parser.parse_args(argv).data == "/my/images"
    assert parser.parse_args(["digits", f"@{recipe}"]).data == "digits"
    later = tmp_path / "later.txt"
    later.write_text("s --data-root s")
    args = parser.parse_args([f"@{recipe}", f"@{later}"])  # the later one wins
    assert args.data == "s" and type(args.data) is type(args.data_root) is str
    assert parser.parse_args([f"@{later}", "s"]).data == "s"
    for argv in (["digits", "/my/images"], [f"@{recipe}", "a", "b"], [f"@{recipe}", "--what", "a"]):
        with pytest.raises(UserError, match="unrecognized arguments"):
            parser.parse_args(argv)


def test_what_stays_of_a_recipe_whose_dir_is_replaced_is_told(parser, tmp_path, capsys):
    recipe = tmp_path / "recipe.txt"
    parser.add_argument("--pretrained")
    recipe.write_text("digits --output-dir runs/digits --pretrained 'runs/a b.pth'")
    for argv in ([f"@{recipe}"], [f"@{recipe}", "digits"]):
        args = parser.parse_args(argv)
        assert type(args.output_dir) is str and capsys.readouterr().err == ""
    for argv in (["/my/images", f"@{recipe}"], [f"@{recipe}", "/my/images"]):
        parser.parse_args(argv)
        assert capsys.readouterr().err == (
            "warning: --output-dir runs/digits is still the recipe's, whose DIR was digits\n"
            "warning: --pretrained runs/a b.pth is still the recipe's, whose DIR was digits\n"
        )
        parser.parse_args([*argv, "--output-dir", "runs/mine", "--pretrained", "mine.pth"])
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "NCCL error in: /p/ProcessGroupNCCL.cpp:3356, unhandled cuda error, NCCL version 2.27\n"
            "Last error:\nCuda failure 2 'out of memory'",
            "NCCL failed: Cuda failure 2 'out of memory'; NCCL_DEBUG=INFO prints more",
        ),
        (
            "NCCL error in: /p/x.cpp:1, remote process exited or there was a network error\n"
            "ncclRemoteError: A call failed\nLast error:\nsocketProgress: Connection closed",
            "another process has ended, or the network between them: socketProgress: Connection",
        ),
        (
            "[Rank 0] NCCL watchdog: collective operation timeout: WorkNCCL(SeqNum=1) ran",
            "another process has ended, or the network between them: [Rank 0] NCCL watchdog",
        ),
        (
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:144] Gloo connectFullMesh failed",
            "GLOO_SOCKET_IFNAME",
        ),
    ],
)
def test_errors_of_the_network_name_their_cause(text, words):
    for error in (RuntimeError(text), torch.distributed.DistBackendError(text)):
        assert words in cli.explain(error)


def test_an_nccl_error_without_a_cause_keeps_its_traceback():
    assert cli.explain(RuntimeError("ncclInternalError: a check failed")) is None
