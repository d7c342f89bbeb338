"""Damaged checkpoints: no code is run, no damage is taken for a run, each gets one line."""

import io
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import TINY

from engine import checkpoint


class Bomb:
    """Pickled code: unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mknod, (self.path,)


@pytest.fixture
def good(pretrained):
    return torch.load(pretrained, weights_only=True)


def content(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def truncated(good, rng, path):
    whole = content(good)
    return whole[: rng.choice([0, 1, 100, len(whole) - 1, rng.randrange(len(whole))])]


def flipped(good, rng, path):
    damaged = bytearray(content(good))
    for _ in range(rng.choice([1, 1, 1, 10])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def places(value, path=()):
    """The paths to all entries of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list | tuple) and inner:
            yield from places(inner, (*path, key))


def put(value, path, new):
    """A copy of nested dicts and lists with another value at one path."""
    if not path:
        return new(value) if callable(new) else new
    changed = list(value) if isinstance(value, list | tuple) else dict(value)
    changed[path[0]] = put(value[path[0]], path[1:], new)
    return changed


def of_another_type(good, rng, path):
    where = rng.choice(["state_dict", "optimizer", "sampler", "epoch", "iteration"])
    where = rng.choice([p for p in places(good) if p[0] == where and "param_groups" not in p])

    def other(value):
        kinds = [None, "text", -1.5, [[]], {"a": {}}, b"bytes", {1, 2}, torch.zeros(3, 1, 4, 1, 5)]
        return rng.choice([kind for kind in kinds if type(kind) is not type(value)])

    return content(put(good, where, other))


def of_another_shape(good, rng, path):
    tensors = [p for p in places(good) if p[0] in ("state_dict", "optimizer")]
    tensors = [p for p in tensors if torch.is_tensor(at(good, p)) and at(good, p).ndim]
    reshape = rng.choice([lambda v: v[None], lambda v: v[:-1], lambda v: v.new_zeros(()),
                          lambda v: torch.cat([v, v])])  # fmt: skip
    return content(put(good, rng.choice(tensors), reshape))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def with_code(good, rng, path):
    bomb = Bomb(path.with_suffix(".ran"))
    state = put(good, rng.choice([p for p in places(good)]), bomb) if rng.random() < 0.5 else bomb
    kind = rng.choice(["torch", "old torch", "pickle", "smuggled"])
    if kind == "pickle":
        return pickle.dumps(state)
    if kind == "smuggled":  # in place of the list of contents of a real file
        buffer = io.BytesIO(content(good))
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(new := io.BytesIO(), "w") as file:
            for name in old.namelist():
                data = pickle.dumps(bomb) if name.endswith("data.pkl") else old.read(name)
                file.writestr(name, data)
        return new.getvalue()
    torch.save(state, buffer := io.BytesIO(), _use_new_zipfile_serialization=kind == "torch")
    return buffer.getvalue()


def same(a, b):
    """Whether two nested structures of plain types and tensors are equal."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def backbone(state):
    return {k: v for k, v in state["state_dict"].items() if "base_encoder" in k and "head" not in k}


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "damaged", [truncated, flipped, of_another_type, of_another_shape, with_code]
)
def test_damage_is_refused_in_one_line(good, tmp_path, script, damaged, count):
    rng, refused = random.Random(damaged.__name__), {"main_moco.py": 0, "main_lincls.py": 0}
    for n in range(count):
        path = tmp_path / str(n) / checkpoint.LAST
        path.parent.mkdir()
        path.write_bytes(damaged(good, rng, path))
        downstream = f"digits --device cpu --workers 0 --epochs 0 --knn --pretrained {path}"
        resumed = (*TINY, "--epochs", 1, "--output-dir", path.parent, "--resume", "auto")
        for name, argv in (("main_moco.py", resumed), ("main_lincls.py", downstream.split())):
            code, _, err = script(name, *argv)
            if code:
                lines = err.splitlines()
                assert len(lines) == 1 and lines[0].startswith(f"{name}: error: "), err
                assert str(path) in err and "Traceback" not in err
                refused[name] += 1
            else:  # bits that carry nothing, or nothing that this script reads
                loaded = torch.load(path, weights_only=True)
                assert same(backbone(loaded), backbone(good))
                assert name == "main_lincls.py" or same(loaded, good)
        assert not path.with_suffix(".ran").exists()
    print(damaged.__name__, refused)
    assert refused["main_moco.py"] >= (0.7 * count if damaged is flipped else count)


@pytest.mark.slow
def test_the_checkpoint_before_takes_over(tmp_path, script):
    argv = (*TINY, "--output-dir", tmp_path, "--resume", "auto")
    script("main_moco.py", *argv)
    last = tmp_path / checkpoint.LAST
    whole = torch.load(last, weights_only=True)
    last.write_bytes(last.read_bytes()[:-1000])
    code, out, err = script("main_moco.py", *argv)
    assert code == 0 and "resumed after step 5 of 10" in out
    assert err.count("\n") == 1 and f"going back to {tmp_path / checkpoint.PREVIOUS}" in err
    assert same(torch.load(last, weights_only=True)["state_dict"], whole["state_dict"])
