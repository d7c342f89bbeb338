"""Each benchmark runs, and what it compares agrees."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from conftest import ENV, ROOT, launch
from timm.layers import set_fused_attn
from torch.utils.data import TensorDataset

import main_moco
from engine.launch import Env
from engine.log import read_log
from moco import MoCo

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import kept_runs
import memory
import other_methods
import peers
import step
from study import find_spikes


def finished(*argv):
    done = launch(*argv)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "name",
    [
        "archives",
        "attention",
        "listing",
        "peers",
        "probe",
        pytest.param("loader", marks=pytest.mark.slow),
        pytest.param("memory", marks=pytest.mark.slow),
        pytest.param("soak", marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_runs(name):
    done = finished(1, f"benchmarks/{name}.py", "--quick")
    assert json.loads(done.stdout)["command"] == f"python benchmarks/{name}.py --quick"


def test_another_method_is_trained_in_the_loop_of_main_moco(few_digits, tmp_path, monkeypatch):
    """With our own method in place of the other library's, the run is that of main_moco.py."""
    flags = f"{few_digits} -a vit_nano --img-size 16 --patch-size 8 --moco-mlp-dim 16 -b 80 -p 1 "
    flags += "--optimizer adamw --lr 1e-3 --epochs 1 --warmup-epochs 0 --device cpu --output-dir"
    ours, other = (tmp_path / name for name in ("ours", "other"))
    main_moco.main(main_moco.parse_args([*flags.split(), str(ours)]))
    monkeypatch.setattr(other_methods, "METHODS", {"lightly": MoCo})
    monkeypatch.setattr(main_moco, "create_model", main_moco.create_model)  # is put back at the end
    other_methods.main("lightly", main_moco.parse_args([*flags.split(), str(other)]))
    for key in ("loss", "rankme"):
        values = [
            [line[key] for line in read_log(folder / "log.jsonl") if key in line]
            for folder in (ours, other)
        ]
        assert values[0] == values[1] and len(values[0]) == 2


@pytest.mark.slow
def test_the_accuracy_beside_other_libraries_is_measured(tmp_path):
    flags = "--quick --seeds 0 --methods ours --runs".split()
    done = finished(1, "benchmarks/peers_accuracy.py", *flags, tmp_path)
    [run] = json.loads(done.stdout)["results"]["ours"]["runs"]
    assert run.keys() == {"seed", "knn_before", "knn", "linear"} and run["knn"] > 50


def test_the_step_of_another_library_is_measured(tmp_path, monkeypatch):
    views = TensorDataset(*torch.randn(2, 16, 3, 32, 32))
    monkeypatch.setattr(peers.Lightly, "create_dataset", lambda *args: views)
    monkeypatch.setattr(peers.Lightly, "views", lambda self, batch: batch)
    monkeypatch.setattr(peers, "METHODS", {"lightly": MoCo})
    args = main_moco.parse_args("digits -a vit_nano --img-size 32 --moco-mlp-dim 16 -b 8".split())
    side = peers.Lightly(args, ENV, tmp_path)
    peers.warm_up(side)
    rates = peers.images_per_s(side, "step", SimpleNamespace(workers=0, steps=1, batch_size=8))
    assert rates.keys() == {"step", "step_per_cpu_s"}


@pytest.fixture
def side(monkeypatch):
    """Makes a Side in float64: in fp32 a ReLU that rounding switches moves losses by 1e-4."""
    make_views = main_moco.make_views
    monkeypatch.setattr(
        main_moco, "make_views", lambda *args: [x.double() for x in make_views(*args)]
    )

    def make(arch="vit_nano", optimizer="adamw", **levers):
        side = create_side(ENV, arch, optimizer, **levers)
        side.model.double()
        return side

    return make


def create_side(env, arch="vit_nano", optimizer="adamw", **levers):
    img_size = 16 if arch.startswith("resnet") else 32
    args = dict(arch=arch, batch_size=8, img_size=img_size, compile=False, encode_chunk=0)
    return step.Side(SimpleNamespace(**args, optimizer=optimizer, quick=True), env, **levers)


def test_the_fast_step_loses_as_the_plain_one(side):
    plain = dict.fromkeys(step.LEVERS, False)
    fast, plain = ([trained.run() for _ in range(10)] for trained in (side(), side(**plain)))
    assert fast == pytest.approx(plain, rel=1e-8) and fast[-1] < 0.6 * fast[0]


@pytest.mark.parametrize("arch, optimizer", [("vit_nano", "adamw"), ("resnet18", "lars")])
def test_each_lever_does_something_and_leaves_the_loss_as_it_is(side, arch, optimizer):
    fast = side(arch, optimizer)
    chosen, losses = fast.chosen(), [fast.run() for _ in range(2)]
    own = "channels_last"
    if arch == "vit_nano":
        own = "concat_views patch_product fused_attention"
    shared = {"foreach_momentum", "fused_optimizer", "grad_monitor", "no_wait"}
    assert chosen.keys() == {*own.split(), *shared}
    for lever, value in chosen.items():
        other = side(arch, optimizer, **{lever: not value})
        assert [other.run() for _ in range(2)] == pytest.approx(losses, rel=1e-8), lever
        assert lever in shared or other.chosen().get(lever) != value


def test_a_step_in_fp16_goes_without_the_fused_optimizer():
    """There GradScaler divides the gradients, which AdamW does by itself only if it is fused."""
    plain = dict.fromkeys(step.LEVERS, False)
    losses = [
        [trained.run() for _ in range(3)]
        for trained in (
            create_side(Env(ENV.device, torch.float16), **levers)
            for levers in ({}, {"fused_optimizer": False}, plain)
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[2], rel=1e-2)


def test_step_measures_both_sides_and_each_lever():
    flags = "--quick --plain --levers --amp off --device cpu --encode-chunk 4".split()
    done = finished(1, "benchmarks/step.py", *flags)
    report = json.loads(done.stdout)
    fast, plain = (report[side]["losses_of_10_steps"] for side in ("fast", "plain"))
    assert fast[:2] == pytest.approx(plain[:2], rel=1e-4)
    assert fast != plain  # rounded otherwise
    unused = {"concat_views", "channels_last", "compile"}
    assert report["levers"].keys() == set(step.LEVERS) - unused
    parts = "augment, encode, all_gather, heads and loss, backward, grad_monitor, optimizer, "
    parts += "momentum update"
    assert set(report["fast"]["milliseconds_of_parts"]) == set(parts.split(", "))


def memory_table(monkeypatch, capsys, out, answers, *flags):
    """memory.py whose processes answer so: an exit code and what they print → exit code, table."""
    answers = iter(answers)

    def run(command, **_):
        code, stdout, stderr = next(answers)
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["memory.py", "--out", str(out), *flags])
    try:
        memory.main()
    except SystemExit as stop:
        return stop.code, json.loads(out.read_text())["rows"]
    assert json.loads(capsys.readouterr().out)["rows"] == json.loads(out.read_text())["rows"]
    return 0, json.loads(out.read_text())["rows"]


def measured(chunk, gib, images_per_s):
    line = dict(batch_size=64, encode_chunk=chunk, peak_gib=gib, images_per_s=images_per_s)
    return 0, json.dumps(line), ""


OUT_OF_MEMORY = (1, "", "…\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate")


def test_settings_that_run_out_of_memory_are_lines_of_the_table(monkeypatch, capsys, tmp_path):
    flags = ["--device", "cpu", "--encode-chunk", "0", "32", "16"]
    answers = [OUT_OF_MEMORY, (-9, "", ""), measured(16, 2.0, 9.0)]
    code, table = memory_table(monkeypatch, capsys, tmp_path / "m.json", answers, *flags)
    assert code == 0
    assert [line.get("out_of_memory") for line in table] == [True, True, None]
    answers = [measured(0, 8.0, 10.0), OUT_OF_MEMORY, measured(16, 2.0, 9.0)]
    _, table = memory_table(monkeypatch, capsys, tmp_path / "m.json", answers, *flags)
    assert table[2]["memory of the first/this"] == 4 and table[1]["out_of_memory"]


def test_lines_before_a_failure_are_kept(monkeypatch, capsys, tmp_path):
    answers = [measured(0, 8.0, 10.0), (1, "", "a traceback")]
    code, table = memory_table(monkeypatch, capsys, tmp_path / "m.json", answers, "--device", "cpu")
    assert code == "a traceback" and [line["peak_gib"] for line in table] == [8.0]
    assert "8.0" in capsys.readouterr().err


def test_the_largest_batch_is_one_that_was_measured(monkeypatch, capsys, tmp_path):
    gpu = SimpleNamespace(total_memory=79.2 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    answers = [OUT_OF_MEMORY, measured(0, 8, 9), measured(0, 16, 9), OUT_OF_MEMORY]
    flags = "--encode-chunk 0 --gib 1 80 160".split()
    _, table = memory_table(monkeypatch, capsys, tmp_path / "m.json", answers, *flags)
    assert [line["largest_batch"] for line in table] == [None, 64, None]
    assert table[2]["this_gpu_gib"] == 79.2


ESTIMATED = {
    "vit_tiny": "-a vit_tiny --img-size 64 -b 96 --amp off",
    "vit_small": "-a vit_small -b 4 --amp bf16",  # an explicit softmax, on a CPU
    "resnet18": "-a resnet18 --img-size 64 -b 128 --amp off",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATED)
def test_the_estimated_memory_is_what_a_cpu_takes(name):
    """Tensors of 64 KiB and more are given back to the system as soon as they are freed."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    flags = [*ESTIMATED[name].split(), *"--device cpu --encode-chunk 0 --steps 1".split()]

    def memory(flag):
        command = [sys.executable, ROOT / "benchmarks/memory.py", flag, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    measured, [estimate] = memory("--one"), memory("--estimate")["rows"]
    gib = measured["peak_gib"] - measured["of_python_and_torch"]
    assert gib > 0.4
    assert estimate["estimated_gib"] == pytest.approx(gib, rel=0.1)


def estimate(chunk, batch_size, **flags):
    args = dict(
        arch="vit_nano", img_size=224, compile=False, quick=False, amp="auto", device="auto"
    )
    return memory.estimate(SimpleNamespace(**args | flags), batch_size, chunk)


def test_a_gpu_keeps_no_matrix_of_attention(monkeypatch):
    batch_size, heads, tokens, layers = 32, 4, 197, 4
    fused = estimate(0, batch_size)
    monkeypatch.setattr(memory, "set_fused_attn", lambda _: set_fused_attn(False))
    scores = layers * 2 * 2 * batch_size * heads * tokens**2 / 2**30  # bf16, both views
    assert estimate(0, batch_size) - fused > 0.9 * scores


@pytest.mark.parametrize(
    "peak", [lambda n: 2 + n / 20, lambda n: max(9, 2 + n / 20) + (n / 2e3) ** 2]
)
def test_the_largest_batch_is_the_largest_that_fits(peak):
    for limit in (1, 3.7, 9.1, 24, 100, 1000):
        fits = [n for n in range(32, memory.MAX_BATCH + 1, 32) if peak(n) <= limit]
        assert memory.largest_estimated_batch(peak, limit) == max(fits, default=0)


def test_the_largest_batch_in_chunks_may_be_smaller_than_a_chunk():
    def peak(n):
        return 2 + min(n, 256) / 20 + n / 200

    for limit in (1, 9, 16, 17, 25):
        fits = [n for n in range(32, memory.MAX_BATCH + 1, 32) if peak(n) <= limit]
        assert memory.largest_estimated_batch(peak, limit, chunk=256) == max(fits, default=0)


def test_the_last_value_of_a_sweep_is_the_best_rates():
    lines = [{"acc1/lr0.1": 90, "acc1/lr1": 91}, {"acc1/lr0.1": 80, "acc1/lr1": 70}, {"loss": 1}]
    assert kept_runs.last_value(lines, "acc1") == 80


@pytest.mark.slow
def test_one_command_measures_a_gpu_and_keeps_what_it_has():
    done = finished(1, "benchmarks/gpu.py", "--quick")
    rows = {row["row"]: row for row in json.loads(done.stdout)["rows"]}
    compiled, textbook, resnet, failed, augmentation, end_to_end, tests = rows.values()
    assert compiled["graphs"] > 0 and compiled["graphs_after_the_first_step"] == 0
    assert compiled["losses"] == pytest.approx(textbook["losses"], rel=1e-3)
    assert min(row["images_per_s"] for row in (compiled, textbook, resnet, end_to_end)) > 0
    assert "no_such_model" in failed["error"]
    assert augmentation["compiled_ms"] > 0 and "skipped" in tests["summary"][0]


def test_rows_of_the_gpu_benchmark_are_kept_with_their_revision(tmp_path):
    args = SimpleNamespace(out=str(tmp_path / "gpu.json"))
    assert gpu.kept_rows(args, ENV) == []
    rows = [dict(row="a", images_per_s=1), dict(row="b", error="TooSlow: stopped")]
    gpu.report.save(args, ENV.device, rows=rows)
    assert gpu.kept_rows(args, ENV) == rows[:1]
    gpu.report.save(args, ENV.device, rows=rows, versions=dict(git="another"))
    assert gpu.kept_rows(args, ENV) == []


def test_a_row_of_the_gpu_benchmark_that_fails_or_is_too_slow_is_reported():
    assert gpu.finish_row(lambda seconds: seconds / 0, 60)["error"].startswith("ZeroDivisionError")
    assert "no time left" in gpu.finish_row(lambda _: {}, 1)["error"]
    with pytest.raises(gpu.TooSlow), gpu.time_limit(0.05):
        while True:
            with suppress(Exception):
                time.sleep(1)


def test_a_study_measures_by_how_many_steps_the_first_layer_is_ahead():
    lines = [{"step": 0, "knn": 70}]
    for i in range(1, 301):
        first, last = (9 if i % 100 == at else 1 for at in (50, 62))
        lines.append({"step": i, "grad_linf/first_max": first, "grad_linf/last_max": last})
    lines += [{"step": 300, "knn": 80}, {"step": 310, "knn": 70}]
    expected = dict(spikes={"first": 3, "last": 3}, lags=[12, 12, 12], dips=1)
    assert find_spikes(lines) == expected


@pytest.mark.slow
def test_a_study_covers_its_grid_and_keeps_finished_runs(tmp_path):
    study = tmp_path / "my_study.txt"
    study.write_text(
        "# two blocks\n@recipes/study_digits.txt --moco-mlp-dim 16\n\n"
        "learned: --no-stop-grad-conv1\nfixed:\n\nlr 1e-3: --lr 1e-3\nlr 1e30: --lr 1e30\n"
    )
    argv = [study, "--quick", "--probe", "", "--runs", tmp_path, "--out", tmp_path / "x.json"]
    reports = []
    for _ in range(2):
        done = launch(1, "benchmarks/study.py", *argv)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / "x.json").read_text()))
    assert reports[0]["runs"] == reports[1]["runs"]
    settings = [(*run["setting"], run["diverged"]) for run in reports[0]["runs"]]
    assert settings == [
        ("learned", "lr 1e-3", False),
        ("learned", "lr 1e30", True),
        ("fixed", "lr 1e-3", False),
        ("fixed", "lr 1e30", True),
    ]
    assert (tmp_path / "x.png").exists()
    study.write_text(study.read_text().replace("16", "32"))
    done = launch(1, "benchmarks/study.py", *argv)
    assert done.returncode == 1 and "has a run of other flags" in done.stderr


@pytest.mark.slow
def test_accuracies_of_a_small_set_are_measured_beside_their_controls(tmp_path):
    argv = ["digits", "--quick", "--seeds", 0, "--runs", tmp_path, "--out", tmp_path / "x.json"]
    done = finished(1, "benchmarks/accuracy.py", *argv)
    [run] = json.loads((tmp_path / "x.json").read_text())["runs"]
    names = {"knn_before", "knn_after", "lincls", "finetune", "finetune_from_scratch"}
    assert all(0 < run[name] <= 100 for name in names)
    done = launch(1, "benchmarks/accuracy.py", *argv, "--moco-t", 0.3)
    assert done.returncode == 1 and "has a run of other flags" in done.stderr
