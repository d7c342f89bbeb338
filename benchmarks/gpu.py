"""All figures of the documentation that need a GPU, in eight minutes → one JSON, and its tables.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --only "resnet50 256 fp16" --limit 120
    python benchmarks/gpu.py --table benchmarks/results/gpu.json
The rows come one after the other, the most valuable first, tests/test_gpu.py last. The JSON is
written after each row: what was measured is kept if the run is cut off. A row that fails or takes
too long is reported, and the next one starts. The same command again measures what is missing.

A step is main_moco.py's own on random crops that lie on the device, augmentation included, and the
median of ROUNDS. Beside it stands the textbook step of step.py --plain. MFU: of the time of a large
matrix product in the same precision, measured first; the operations are those of the backbones.
"""

import gc
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import report  # first of ours: it makes the repository importable
import step
import torch
import torch._dynamo
from loader import write_photographs

import main_moco
from engine.data.decode import RGB
from engine.files import exists
from engine.launch import init_distributed
from engine.log import read_log

ROOT = Path(__file__).parents[1]
ROUNDS, ROUND_SECONDS = 5, 0.8  # a round has at least one step
ROW_SECONDS, TEST_SECONDS = 100, 150  # the most for a row; what is kept for the tests
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
END_TO_END = (
    "main_moco.py {images} -a vit_small --stop-grad-conv1 -b 512 --optimizer adamw --lr 1.5e-4 "
    "--wd 0.1 --moco-t 0.2 --moco-m-cos --epochs 1 --warmup-epochs 1 --knn-every 0 -j {cores} -p 1 "
    "--output-dir {run}"
)
END_TO_END_QUICK = (
    "main_moco.py {images} -a vit_nano --img-size 32 --patch-size 16 -b 16 --epochs 1 "
    "--warmup-epochs 0 --knn-every 0 --moco-mlp-dim 16 -p 1 --output-dir {run}"
)
TESTS = (
    "-m pytest -n 4 -p no:cacheprovider -k 'gpu or cuda' tests/moco/test_augmentation.py "
    "tests/test_gpu.py"
)
WARM_UP = 10  # steps of end to end that are left out

HOW = ("compiled", "eager", "textbook")
VIT_BASE = dict(arch="vit_base", batch_size=256, amp="bf16")
VIT_SMALL = dict(arch="vit_small", batch_size=512, amp="bf16")
RESNET = dict(arch="resnet50", batch_size=256, amp="bf16")


def step_rows():
    """Settings of steps, in the order of the table."""
    chunks = dict(batch_size=4096, encode_chunk=128)
    return [
        *(VIT_BASE | dict(how=how) for how in HOW),
        *(VIT_SMALL | dict(how=how) for how in HOW),
        *(RESNET | dict(how=how) for how in HOW),
        *(RESNET | dict(how=how, amp="fp16") for how in HOW[:2]),
        *(RESNET | dict(how=how, channels_last=False) for how in HOW[:2]),
        *(RESNET | dict(how=how, channels_last=False, amp="fp16") for how in HOW[:2]),
        *(VIT_BASE | dict(how=how) | chunks for how in HOW[:2]),
    ]


QUICK_ROWS = [
    dict(arch="vit_nano", batch_size=8, img_size=32, amp="off", how="compiled"),
    dict(arch="vit_nano", batch_size=8, img_size=32, amp="off", how="textbook"),
    dict(arch="resnet18", batch_size=8, img_size=32, amp="off", how="eager", channels_last=False),
    dict(arch="no_such_model", batch_size=8, amp="off", how="eager"),
]


def row_name(setting):
    parts = [setting["arch"], setting["batch_size"], setting["amp"], setting["how"]]
    if setting.get("encode_chunk"):
        parts.append(f"chunks of {setting['encode_chunk']}")
    if not setting.get("channels_last", True):
        parts.append("contiguous")
    return " ".join(map(str, parts))


def main():
    parser = report.parser(__doc__)
    parser.add_argument("--only", nargs="+", help="rows whose name has one of these in it")
    parser.add_argument("--limit", type=float, default=460, help="seconds in all")
    parser.add_argument("--table", metavar="JSON", help="print the tables of a report, and end")
    args = parser.parse_args()
    if args.table:
        return print("\n".join(tables(json.loads(Path(args.table).read_text()))))
    if not torch.cuda.is_available() and not args.quick:
        parser.error("there is no GPU (--quick shows on a CPU that the script runs)")
    end = time.monotonic() + args.limit
    env = init_distributed("auto")  # with the settings of the scripts, cuDNN's for example
    # A compiled row that isn't compiled fails.
    warnings.filterwarnings("error", message="torch.compile failed")

    about = dict(gpus=torch.cuda.device_count())
    rows = kept_rows(args, env)
    with tempfile.TemporaryDirectory() as temporary:
        missing = dict(jobs(args, env, Path(temporary)))
        for name in list(missing):
            is_wanted = not args.only or any(words in name for words in args.only)
            if not is_wanted or name in [row["row"] for row in rows]:
                del missing[name]
        for name, measure in missing.items():
            seconds = end - time.monotonic()
            if name != "tests" and not args.quick:
                seconds -= TEST_SECONDS if "tests" in missing else 0
                seconds = min(ROW_SECONDS, seconds)
            rows.append(dict(row=name) | finish_row(measure, seconds))
            print(json.dumps(rows[-1])[:400], file=sys.stderr, flush=True)
            report.save(args, env.device, **about, rows=rows)
    report.finish(args, env.device, **about, rows=rows)


def kept_rows(args, env):
    """Rows without an error in --out, of the same revision and machine."""
    path = Path(args.out or "-")
    if not exists(path):
        return []
    old, new = json.loads(path.read_text()), report.about(env.device)
    is_same = all(old[key] == value for key, value in new.items())
    return [row for row in old["rows"] if "error" not in row] if is_same else []


def jobs(args, env, temporary):
    """Yields names of rows, and functions that measure them in so many seconds → results."""

    def steps(settings):
        for setting in settings:
            measure = partial(measure_step, setting, env, args.quick)
            yield row_name(setting), lambda _, measure=measure: measure()

    def is_late(setting):  # compiling ResNet-50 takes long
        compiled_resnet = setting["arch"] == "resnet50" and setting["how"] == "compiled"
        return compiled_resnet or "channels_last" in setting

    settings, late = QUICK_ROWS, []
    if not args.quick:
        late = [s for s in step_rows() if is_late(s)]
        settings = [s for s in step_rows() if not is_late(s)]
    yield from steps(settings)
    for batch_size in (8,) if args.quick else (256, 512):
        name, size = f"augmentation 2·{batch_size}", 32 if args.quick else 224
        yield name, lambda _, n=batch_size, size=size: measure_augmentation(n, size, env)
    yield "end to end", lambda seconds: measure_end_to_end(args.quick, seconds, temporary)
    yield from steps(late)
    yield "tests", lambda seconds: run_tests(args.quick, seconds)


def finish_row(measure, seconds):
    """What a row measured within so many seconds, or why it did not."""
    if seconds < 5:
        return dict(error="not run: no time left")
    start = time.perf_counter()
    try:
        free_memory()
        with time_limit(seconds):
            results = measure(seconds)
    except (Exception, TooSlow) as error:  # of any kind: the next row may succeed
        traceback.print_exc()
        text = str(error).strip().split("\n")[0][:300]
        results = dict(error=f"{type(error).__name__}: {text}")
    return results | dict(seconds=round(time.perf_counter() - start, 1))


class TooSlow(BaseException):
    """No Exception, which the compiler would catch."""


@contextmanager
def time_limit(seconds):
    """TooSlow after so many seconds, where Python runs in the main thread."""

    def stop(*_):
        raise TooSlow(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free_memory():
    """The row before leaves nothing on the device, and no graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_step(setting, env, quick=False):
    """One row: warm-up, three losses, then rounds of steps."""
    how, on_gpu = setting["how"], env.device.type == "cuda"
    env = replace(env, amp_dtype=DTYPES[setting["amp"]])
    optimizer = "lars" if setting["arch"].startswith("resnet") else "adamw"
    args = dict(img_size=224, encode_chunk=0, optimizer=optimizer, quick=quick) | setting
    levers = dict.fromkeys(step.LEVERS, False) if how == "textbook" else {}
    if "channels_last" in setting:
        levers["channels_last"] = setting["channels_last"]
    side = step.Side(SimpleNamespace(**args, compile=how == "compiled"), env, **levers)

    start = time.perf_counter()
    losses = [side.run()]
    first_step = time.perf_counter() - start
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if how == "compiled" and graphs == 0:
        raise RuntimeError("nothing was compiled")
    start = time.perf_counter()
    losses += [side.run() for _ in range(2)]
    steps = max(1, round(2 * ROUND_SECONDS / (time.perf_counter() - start)))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        side.run(steps)  # waits for the device at its end
        times.append((time.perf_counter() - start) / steps)
    seconds = statistics.median(times)

    peak = matrix_product_flops(env, quick)
    flops = step.flops_per_image(side) * setting["batch_size"]
    results = dict(
        setting=setting,
        images_per_s=round(setting["batch_size"] / seconds, 1),
        milliseconds=round(1000 * seconds, 2),
        slowest_and_fastest_ms=[round(1000 * t, 2) for t in (max(times), min(times))],
        tflops=round(flops / seconds / 1e12, 2),
        mfu=round(flops / seconds / peak, 4),
        matrix_product_tflops=round(peak / 1e12, 1),
        first_step_s=round(first_step, 1),
        losses=[round(loss, 6) for loss in losses],
    )
    if how == "compiled":
        recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        results |= dict(graphs=graphs, graphs_after_the_first_step=recompiled)
    if on_gpu:
        results["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return results


@cache  # per precision
def matrix_product_flops(env, quick):
    return step.matrix_product_flops(env, quick)


def measure_augmentation(batch_size, size, env):
    """Both views of so many images, in bf16, eager and compiled."""
    crops, params = step.random_batch(batch_size, size, env.device)
    wait = step.Clock(env.device).wait

    def augment(compile):
        start = time.perf_counter()
        main_moco.make_views(crops, params, RGB, torch.bfloat16, compile=compile)
        wait()
        return 1000 * (time.perf_counter() - start)

    results = {}
    for name, compile in (("eager", False), ("compiled", True)):
        times = [augment(compile) for _ in range(13)][3:]
        results[f"{name}_ms"] = round(statistics.median(times), 2)
    return results


def measure_end_to_end(quick, seconds, temporary):
    """main_moco.py from JPEGs of 500×375, many of them links: medians after WARM_UP steps."""
    images = temporary / "images"
    images.mkdir()
    names = write_photographs(images, 32 if quick else 512)
    for copy in range(1, 1 if quick else 64):
        for name in names:
            os.link(images / name, images / f"{copy}_{name}")
    command = END_TO_END_QUICK if quick else END_TO_END
    run = temporary / "run"
    argv = shlex.split(command.format(images=images, run=run, cores=os.cpu_count()))
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-300:]}")
    lines = [line for line in read_log(run / "log.jsonl") if "loss" in line]
    warm = lines[min(WARM_UP, len(lines) - 1) :]
    return dict(
        command=f"python {command}",
        images=len(os.listdir(images)),
        images_per_s=round(statistics.median(line["images_per_s"] for line in warm), 1),
        largest_data_wait=max(line["data_wait"] for line in warm),
        **{key: warm[-1][key] for key in ("mfu", "peak_gib") if key in warm[-1]},
        first_step_images_per_s=lines[0]["images_per_s"],
    )


def run_tests(quick, seconds):
    tests = TESTS.replace("tests/test_gpu.py", "tests/test_imports.py") if quick else TESTS
    argv = [sys.executable, *shlex.split(tests)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=seconds - 2)
    summary = done.stdout.strip().splitlines()[-1:]
    if done.returncode != 0:
        return dict(error=f"exit code {done.returncode}", output=done.stdout[-4000:])
    return dict(summary=summary)


NAMES = dict(vit_small="ViT-S", vit_base="ViT-B", resnet50="ResNet-50")
TABLE_HEAD = """\
| Step | batch | precision | images/s | textbook = 1 | of a matrix product | GiB | first step, s |
|---|---|---|---|---|---|---|---|"""


def tables(results):
    """Lines of the tables of docs/speed.md; what has no result is "not run"."""
    rows = {row["row"]: row for row in results.get("rows", []) if "error" not in row}
    lines = TABLE_HEAD.split("\n")
    for setting in step_rows():
        name = NAMES[setting["arch"]] + f", {setting['how']}"
        if setting.get("encode_chunk"):
            name += f", `--encode-chunk {setting['encode_chunk']}`"
        if not setting.get("channels_last", True):
            name += ", contiguous"
        textbook = rows.get(row_name({**setting, "how": "textbook", "channels_last": True}))
        figures = figures_of(rows.get(row_name(setting)), textbook)
        lines.append(f"| {name} | {setting['batch_size']} | {setting['amp']} | {figures} |")
    lines += ["", "| | |", "|---|---|"]
    for batch_size in (256, 512):
        row = rows.get(f"augmentation 2·{batch_size}")
        text = "not run"
        if row:
            text = f"{row['eager_ms']:.1f} ms, compiled {row['compiled_ms']:.1f} ms"
        lines.append(f"| augmentation of both views of {batch_size} images | {text} |")
    row, text = rows.get("end to end"), "not run"
    if row:
        wait = 100 * row["largest_data_wait"]
        text = f"{row['images_per_s']:,.0f} images/s, at most {wait:.1f} % of the time waiting"
    lines.append(f"| ViT-S from JPEGs of 500×375, `main_moco.py` | {text} |")
    return lines


def figures_of(row, textbook):
    if row is None:
        return "not run | | | |"
    ratio = f"{row['images_per_s'] / textbook['images_per_s']:.2f}" if textbook else ""
    gib = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
    return " | ".join(
        [
            f"{row['images_per_s']:,.0f}",
            ratio,
            f"{100 * row['mfu']:.0f} %",
            gib,
            f"{row['first_step_s']:.0f}",
        ]
    )


if __name__ == "__main__":
    main()
