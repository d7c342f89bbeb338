"""What clusters do to a run: no finished step is lost, and none is computed wrong."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Child, launch, start, start_server, wait_for_all

from engine import checkpoint
from engine.cli import explain
from engine.data.loader import create_loader
from engine.errors import UserError
from engine.log import MEASURED, read_log

slow = pytest.mark.slow

LONG = (*TINY, "--batch-size", 32)  # 88 steps
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def weights(folder):
    return checkpoint.load(folder / checkpoint.LAST)["state_dict"]


def assert_same_run(folder, whole):
    """Weights to the last bit, and the same lines in log.jsonl, one for each step, but for the
    times. With fewer lines, the first after a resume would be of the steps since then."""
    expected, final = weights(whole), weights(folder)
    for key, value in expected.items():
        assert torch.equal(value, final[key]), key
    logs = [read_log(run / "log.jsonl") for run in (whole, folder)]
    for line in (*logs[0], *logs[1]):
        for key in MEASURED:
            line.pop(key, None)
    assert logs[0] == logs[1]


def last_step(folder):
    """The last step in the log."""
    lines = read_log(folder / "log.jsonl")
    return lines[-1]["step"] if lines else 0


def wait_for_step(step, folder, job):
    while last_step(folder) < step:
        assert job.wait(0.05) is None, job.said()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing happened to; its seconds of set-up and of training."""
    folder = tmp_path_factory.mktemp("whole")
    start_server()
    started = time.monotonic()
    child = Child(folder, "main_moco.py", *LONG, "--output-dir", folder / "run")
    wait_for_training(child)
    began = time.monotonic()
    assert child.wait() == 0, child.said()
    return folder / "run", began - started, time.monotonic() - began


def wait_for_training(child):
    while "before training" not in child.said() and "resumed" not in child.said():
        assert child.wait(0.02) is None, child.said()


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=slow)])
def test_killed_so_often_it_ends_in_the_same_weights(undisturbed, tmp_path, num_kills):
    whole, set_up, training = undisturbed
    rng, kills, while_saving, run = np.random.default_rng(0), 0, 0, 0
    argv = ("--save-minutes", 1e-6, "--resume", "auto")  # after every step
    while kills < num_kills:
        folder = tmp_path / str(run)
        folder.mkdir(exist_ok=True)
        child = Child(tmp_path, "main_moco.py", *LONG, *argv, "--output-dir", folder)
        ended = child.wait(rng.uniform(0, set_up + training / 5))
        while kills % 4 == 0 and ended is None and not (folder / "checkpoint.pth.tmp").exists():
            ended = child.wait(0)
        if ended is None:
            os.kill(child.pid, signal.SIGKILL)
        if child.wait() == -signal.SIGKILL:  # it may have ended just before
            kills += 1
            while_saving += (folder / "checkpoint.pth.tmp").exists()
        else:
            assert child.wait() == 0, child.said()
            assert_same_run(folder, whole)
            run += 1
    child = Child(tmp_path, "main_moco.py", *LONG, *argv, "--output-dir", tmp_path / str(run))
    assert child.wait() == 0, child.said()
    assert_same_run(tmp_path / str(run), whole)
    assert while_saving >= (3 if num_kills == 20 else 1)
    print(f"{kills} kills, {while_saving} of them while saving, {run + 1} runs")


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("signals", [SIGNALS[:2], pytest.param(SIGNALS * 2, marks=slow)], ids=len)
def test_stopped_so_often_it_computes_no_step_twice(undisturbed, tmp_path, signals):
    whole, _, _ = undisturbed
    rng, done = np.random.default_rng(1), 0
    argv = (*LONG, "--resume", "auto", "--output-dir", tmp_path)
    for number in signals:
        child = Child(tmp_path, "main_moco.py", *argv)
        wait_for_training(child)
        wait_for_step(done + 3, tmp_path, child)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child.pid, number)
        assert child.wait() == 75, child.said()
        said = child.said()
        assert done == 0 or f"resumed after step {done} of 88" in said
        done, before = int(re.search(r"stopped: saved after step (\d+)", said)[1]), done
        assert done >= before
    child = Child(tmp_path, "main_moco.py", *argv)
    assert child.wait() == 0, child.said()
    assert f"resumed after step {done} of 88" in child.said() and 0 < done < 88
    assert_same_run(tmp_path, whole)


@slow
@pytest.mark.parametrize("name", ["main_lincls.py", "main_finetune.py"])
def test_the_other_scripts_stop_and_continue_alike(pretrained, tmp_path, name):
    argv = f"digits --pretrained {pretrained} --device cpu --workers 1 --batch-size 32 --epochs 3"
    argv += " --print-freq 1"
    if name == "main_finetune.py":
        argv += " --warmup-epochs 1 --lr 1e-3"
    whole = Child(tmp_path, name, *argv.split(), "--output-dir", tmp_path / "whole")
    assert whole.wait() == 0, whole.said()
    run = tmp_path / "stopped"
    argv = (*argv.split(), "--output-dir", run, "--resume", "auto")
    for step, number, code in ((20, signal.SIGTERM, 75), (70, signal.SIGINT, 130)):
        child = Child(tmp_path, name, *argv)
        wait_for_step(step, run, child)
        os.kill(child.pid, number)
        assert child.wait() == code and "stopped: saved after step" in child.said()
    child = Child(tmp_path, name, *argv)
    assert child.wait() == 0, child.said()
    assert_same_run(run, tmp_path / "whole")


# A disk that is full or read-only.


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96M", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small disk")
    yield folder
    while os.path.ismount(folder):  # read-only, too
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(2**20)):
                pass
            while file.write(b"0"):
                pass
        except OSError:
            pass


def wait_until(said, child):
    while said not in child.said():
        assert child.wait(0.01) is None, child.said()


SHORT = (*TINY, "--batch-size", 96, "--epochs", 4, "--knn-every", 0)  # 14 steps an epoch


@slow
def test_a_full_disk_costs_one_checkpoint(disk, tmp_path):
    whole = Child(tmp_path, "main_moco.py", *SHORT, "--output-dir", tmp_path / "whole")
    assert whole.wait() == 0, whole.said()
    child = Child(tmp_path, "main_moco.py", *SHORT, "--output-dir", disk / "run")
    wait_until("epoch 1/4", child)
    fill(disk)
    wait_until("can't save", child)
    assert checkpoint.load(disk / "run" / checkpoint.LAST)["epoch"] == 1
    (disk / "filler").unlink()
    assert child.wait() == 0, child.said()
    assert child.said().count("No space left on device") == 1
    assert_same_run(disk / "run", tmp_path / "whole")


@slow
@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_disk_that_takes_nothing_stops_the_run_at_the_second_save(disk, tmp_path, what):
    argv = ("main_moco.py", *SHORT, "--output-dir", disk / "run", "--resume", "auto")
    child = Child(tmp_path, *argv)
    wait_until("epoch 1/4", child)
    if what == "full":
        fill(disk)
    else:
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    assert child.wait() == 1
    assert child.said().count("can't save to") == 2 and "Traceback" not in child.said()
    assert child.said().endswith("free some disk space, then --resume auto\n")
    assert checkpoint.load(disk / "run" / checkpoint.LAST)["epoch"] == 1
    if what == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["umount", disk], check=True)
    child = Child(tmp_path, *argv)
    assert child.wait() == 0 and "resumed after step 14 of 56" in child.said(), child.said()


# Workers


class CantBeSent:
    """As a tensor without room in shared memory, or without a free descriptor."""

    def __reduce__(self):
        raise RuntimeError("unable to allocate shared memory: No space left on device")


class Unsendable:
    def __getitems__(self, keys):
        return CantBeSent(), {}


def test_a_batch_that_a_worker_cant_hand_over_is_one_line_and_no_hang(capfd):
    loader = create_loader(Unsendable(), [[0]], 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="DataLoader worker") as error:
        next(iter(loader))
    assert "--shm-size=8g or --ipc=host): fewer --workers" in explain(error.value)
    assert capfd.readouterr().err == ""


def test_more_workers_than_open_files_are_refused(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    with pytest.raises(UserError, match="--workers 8 need 160 open files, and ulimit -n allows 64"):
        create_loader([], [], 8, torch.device("cpu"))
    create_loader([], [], 2, torch.device("cpu"))


# Several processes, several hosts.


class Torchrun:
    """`torchrun FLAGS main_moco.py ARGS…` in the background, its output in a file."""

    def __init__(self, output, flags, *args, before=(), **env):
        self.output = output
        argv = [*before, *TORCHRUN, *flags, ROOT / "main_moco.py", *args]
        with open(output, "w") as file:
            self.process = subprocess.Popen(
                list(map(str, argv)), stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                env=os.environ | dict(OMP_NUM_THREADS="1", **env),
            )  # fmt: skip

    def wait(self, timeout=150):
        """Its exit code; None if it still runs after that many seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def said(self):
        return self.output.read_text()

    def workers(self):
        """Process ids of the workers that are running."""
        ps = ["ps", "--ppid", str(self.process.pid), "-o", "pid=,stat="]
        listed = subprocess.run(ps, capture_output=True, text=True)
        lines = [line.split() for line in listed.stdout.splitlines()]
        return [int(pid) for pid, state in lines if not state.startswith("Z")]


TWO = ("--nproc_per_node=2", "--standalone")
FP32 = ("--amp", "off", "--save-minutes", 1e-6)
HALF = (*LONG, "--epochs", 1, *FP32)  # 44 steps


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """The folder of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = launch(2, "main_moco.py", *HALF, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


KILLS = ((5, 1), (15, 0), (30, 1))  # after this step, this worker


@slow
def test_torchrun_restarts_killed_workers_to_the_same_end(on_two_ranks, tmp_path):
    flags, run = (*TWO, "--max-restarts=3", "--monitor-interval=0.5"), tmp_path / "run"
    job = Torchrun(tmp_path / "output.txt", flags, *HALF, "--output-dir", run)
    for step, worker in KILLS:
        wait_for_step(step, run, job)
        os.kill(job.workers()[worker], signal.SIGKILL)
    assert job.wait() == 0, job.said()
    assert job.said().count("resumed after step") == len(KILLS)
    assert_same_run(run, on_two_ranks)


@slow
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_run_of_two_ranks_continues_on_another_number(on_two_ranks, tmp_path, num_ranks):
    argv = (*HALF, "--output-dir", tmp_path / "run", "--resume", "auto")
    children = start(2, tmp_path, "main_moco.py", *argv)
    wait_for_step(30, tmp_path / "run", children[0])
    os.kill(children[1].pid, signal.SIGTERM)  # one is enough: both stop after the same step
    assert wait_for_all(children, timeout=60) == [75, 75]
    done = launch(num_ranks, "main_moco.py", *argv)
    assert done.returncode == 0 and "resumed after step" in done.stdout, done.stderr
    losses, expected = (
        [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]
        for folder in (tmp_path / "run", on_two_ranks)
    )
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def hosts():
    """Two network namespaces, joined by a cable → functions that run in one, cut it, mend it."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 to make two hosts")
    names = [f"moco{os.getpid()}{end}" for end in "ab"]

    def ip(*args):
        subprocess.run(["ip", *args], check=True, capture_output=True)

    with ExitStack() as stack:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth",
           "peer", "name", "cable", "netns", names[1])  # fmt: skip
        for end, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{end}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names, lambda state: ip("-n", names[0], "link", "set", "cable", state)


@slow
def test_two_hosts_train_as_one_and_survive_a_cut_cable(hosts, on_two_ranks, tmp_path):
    names, cable = hosts
    run = tmp_path / "run"
    argv = (*HALF, "--output-dir", run, "--resume", "auto", "--timeout", 10)

    def start():
        return [
            Torchrun(
                tmp_path / f"{name}.txt",
                (
                    "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test",
                    "--rdzv_endpoint=10.77.0.1:29400", f"--local-addr=10.77.0.{number}",
                    f"--rdzv_conf=read_timeout=5,is_host={int(number == 1)}",
                ),
                *argv,
                before=("ip", "netns", "exec", name),
                GLOO_SOCKET_IFNAME="cable",
            )
            for number, name in enumerate(names, 1)
        ]  # fmt: skip

    jobs = start()
    wait_for_step(15, run, jobs[0])
    cable("down")
    cut = time.monotonic()
    while any(job.workers() for job in jobs):
        assert time.monotonic() - cut < 30
        time.sleep(0.1)
    for job in jobs:
        assert "another process has ended, or the network between them" in job.said()
    assert checkpoint.load(run / checkpoint.LAST)["iteration"] < 44
    cable("up")
    for job in jobs:  # torchrun itself may wait for its network until then
        assert job.wait(60) not in (None, 0)
    jobs = start()
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said()
    assert "resumed after step" in jobs[0].said() + jobs[1].said()
    assert_same_run(run, on_two_ranks)
