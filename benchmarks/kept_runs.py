"""Runs of the scripts that a benchmark keeps: what is finished is not repeated."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import report  # noqa: F401  first of ours: it makes the repository importable

from engine.files import exists

ROOT = Path(__file__).parents[1]
DIVERGED = "last good checkpoint"  # in the line of a run whose loss or weights are not finite


def run_script(folder, threads, name, *flags):
    """Runs a script into `folder`, or continues it → {"seconds", "diverged"}.

    Kept in folder/finished.json. seconds: of the part since the last interruption. SystemExit if
    the script fails, or if the folder has a run of other flags.
    """
    kept, flags = Path(folder, "finished.json"), [str(flag) for flag in flags]
    if exists(kept):
        result = json.loads(kept.read_text())
        if result.pop("flags") != flags:
            raise SystemExit(f"{folder} has a run of other flags: delete it, or change --runs")
        return result
    command = [sys.executable, str(ROOT / name), *flags]
    command += ["--resume", "auto", "--output-dir", str(folder)]
    env = os.environ | dict(OMP_NUM_THREADS=str(threads))
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    diverged = done.returncode == 1 and DIVERGED in done.stderr
    if done.returncode and not diverged:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")
    result = dict(seconds=round(time.perf_counter() - start, 1), diverged=diverged)
    kept.write_text(json.dumps(result | dict(flags=flags)))
    return result


def last_value(lines, key):
    """The last value in a log whose name begins with `key`; of several rates the best one's."""
    for line in reversed(lines):
        values = [value for name, value in line.items() if name.startswith(key)]
        if values:
            return max(values)
    raise KeyError(key)
