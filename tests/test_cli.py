"""Flag files, numbers, and how a script ends."""

import io
import sys

import pytest
import torch
from conftest import TINY

from engine import cli
from engine.errors import UserError
from moco import MoCo


def parser():
    return cli.Parser(parents=[cli.shared_flags()])


def test_recipes_hold_flags_comments_and_quoted_words(tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(
        "# a comment\nDIR  # another\n\n--epochs 3 -b 8\n--output-dir 'runs/my run#1'\n"
    )
    args = parser().parse_args([f"@{recipe}", "--epochs", "5"])
    assert (args.data, args.epochs, args.batch_size) == ("DIR", 5, 8)
    assert args.output_dir == "runs/my run#1"


@pytest.mark.parametrize(
    "content", [b"DIR --arch 'open", b"\xff\xfe DIR", "DIR".encode("utf-16-le")]
)
def test_recipe_that_cannot_be_read_is_refused(tmp_path, content):
    recipe = tmp_path / "recipe.txt"
    recipe.write_bytes(content)
    with pytest.raises(UserError, match="can't read the recipe"):
        parser().parse_args([f"@{recipe}"])


def test_recipe_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"can't read the recipe nope\.txt: No such file"):
        parser().parse_args(["DIR", "@nope.txt"])


@pytest.mark.parametrize("words, size", [("96", (96, 96)), ("96 160", (96, 160))])
def test_sizes_are_a_side_or_height_and_width(words, size):
    args = parser().parse_args(["DIR", "--img-size", *words.split(), "--patch-size", "8"])
    assert (args.img_size, args.patch_size) == (size, (8, 8))
    with pytest.raises(UserError, match="DIR goes before it"):
        parser().parse_args(["--img-size", *words.split(), "DIR"])


@pytest.mark.parametrize(
    "flags",
    (
        "--epochs -1, --batch-size 0, --seed 4294967296, --print-freq 0, --img-size 1 2 3, "
        "--img-size 65536, --epochs 2147483648, --workers 1025, --timeout .1, --save-minutes 1e308"
    ).split(", "),
)
def test_numbers_out_of_range_are_refused(flags):
    with pytest.raises(UserError, match=flags.split()[0]):
        parser().parse_args(["DIR", *flags.split()])


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
        print("τ \udcff", flush=True)
        raise UserError("no\nsuch \udcff\x1b[0m ü")

    with pytest.raises(SystemExit):
        cli.run_script(main, lambda: None)
    assert sys.stdout.buffer.getvalue() == b"\\u03c4 \\udcff\n"
    assert capsys.readouterr().err.endswith("error: no\\nsuch \\udcff\\x1b[0m ü\n")


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
def test_out_of_gpu_memory_is_one_line_with_what_would_fit(script, monkeypatch, tmp_path, error):
    def step(*_):
        raise error

    monkeypatch.setattr("moco.optimizer_step", step)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the rank that fails prints it
    code, _, err = script("main_moco.py", *TINY, "--knn-every", 0, "--output-dir", tmp_path)
    [line] = [line for line in err.splitlines() if "error" in line]
    assert code == 1 and "Traceback" not in err
    assert "out of GPU memory with 256 images in this process" in line
    assert "smaller --batch-size" in line and "--encode-chunk" in line
    assert "benchmarks/memory.py --estimate -a vit_nano -b 256 " in line


def test_defaults_are_beside_the_flags():
    args = parser().parse_args(["DIR", "--epochs", "5"])
    assert args.defaults["epochs"] == 100 and "defaults" not in vars(args)


def test_dir_on_the_command_line_replaces_a_recipes(tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("digits --img-size 16 16\n--seed 1")
    args = parser().parse_args([f"@{recipe}", "--seed", "2", "/my/images"])
    assert (args.data, args.seed) == ("/my/images", 2)
    for argv in (
        ["/my/images", f"@{recipe}"],
        [f"@{recipe}", "/my/images", "--output-dir", "digits"],
    ):
        assert parser().parse_args(argv).data == "/my/images"
    assert parser().parse_args(["digits", f"@{recipe}"]).data == "digits"
    later = tmp_path / "later.txt"
    later.write_text("s --data-root s")
    args = parser().parse_args([f"@{recipe}", f"@{later}"])  # the later one wins
    assert args.data == "s" and type(args.data) is type(args.data_root) is str
    assert parser().parse_args([f"@{later}", "s"]).data == "s"
    for argv in (["digits", "/my/images"], [f"@{recipe}", "a", "b"], [f"@{recipe}", "--what", "a"]):
        with pytest.raises(UserError, match="unrecognized arguments"):
            parser().parse_args(argv)


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "NCCL error in: /p/ProcessGroupNCCL.cpp:3356, unhandled cuda error, NCCL version 2.27\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 2 'out of memory'",
            ["NCCL: out of GPU memory"],
        ),
        (
            "NCCL error in: /p/NCCLUtils.cpp:94, invalid usage\nncclInvalidUsage: \nLast error:\n"
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50",
            ["Duplicate GPU detected", "--nproc_per_node"],
        ),
        (
            "NCCL error in: /p/x.cpp:1, unhandled system error\nncclSystemError: System call\n"
            "Last error:\nError while creating shared memory segment /dev/shm/nccl-x (size 9)",
            ["/dev/shm/nccl-x", "--ipc=host"],
        ),
        (
            "NCCL error in: /p/x.cpp:1, remote process exited or there was a network error\n"
            "ncclRemoteError: A call failed\nLast error:\nsocketProgress: Connection closed by "
            "remote peer host<1>",
            ["another process has ended", "Connection closed by remote peer"],
        ),
        (
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1) ran",
            ["another process has ended", "Watchdog caught"],
        ),
        (
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:144] Gloo connectFullMesh failed",
            ["GLOO_SOCKET_IFNAME"],
        ),
    ],
)
def test_errors_of_the_network_name_their_cause(text, words):
    for error in (RuntimeError(text), torch.distributed.DistBackendError(text)):
        assert all(word in cli.explain(error) for word in words)


def test_an_nccl_error_without_a_cause_keeps_its_traceback():
    assert cli.explain(RuntimeError("ncclInternalError: a check failed")) is None
