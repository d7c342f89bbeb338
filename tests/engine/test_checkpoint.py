"""Files on disk: layout, atomicity, errors for what does not fit."""

import copy
import errno
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from timm.layers import resample_abs_pos_embed

import main_moco
from engine import checkpoint, files, flags, weights
from engine.backbones import BackboneConfig, choose_config, create_backbone
from engine.data.sampler import EpochBatchSampler
from engine.data.splits import load_splits, open_source
from engine.errors import UserError
from engine.launch import Env
from engine.log import read_log
from engine.run import Run, find_checkpoints, run_metadata
from moco import MoCo, create_optimizer


def nano(size=16):
    return MoCo(create_backbone(BackboneConfig("vit_nano", size, 4)), dim=32, mlp_dim=64)


def create_run(folder, model, *argv, **stateful):
    """A run on the digits that has this model, as main_moco.py has it before the first step."""
    args = main_moco.parse_args([*TINY, "--output-dir", str(folder), *argv])
    splits = load_splits(open_source("digits"))
    loader = SimpleNamespace(
        batch_sampler=EpochBatchSampler(len(splits.train), args.batch_size, args.seed),
        dataset=splits.train,
        _iterator=None,
    )
    config, env = choose_config(flags.backbone_options(args)), Env(torch.device("cpu"))
    metadata = run_metadata(config, vars(args), env, splits.train, splits.class_names)
    found = find_checkpoints(folder, args.resume)
    options = flags.run_options(args)
    run = Run(
        folder, env, loader, metadata, dict(model=model, **stateful), resume_from=found, **options
    )
    run.resume()
    return run


def state_of(model):
    state = checkpoint.published_state_dict(model)
    return dict(arch="vit_nano", img_size=(16, 16), patch_size=(4, 4), args={}, state_dict=state)


def saved(folder, model, **extra):
    checkpoint.save(folder, state_of(model) | extra)
    return folder / checkpoint.LAST


@pytest.mark.parametrize("saved_as", [torch.channels_last, torch.contiguous_format])
def test_a_resnet_continues_exactly_from_either_memory_format(tmp_path, saved_as):
    def create():
        model = MoCo(create_backbone(BackboneConfig("resnet18")), dim=32, mlp_dim=64)
        return model, create_optimizer("adamw", model, 0.1, 0.1)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()

    model, optimizer = create()
    steps(model, optimizer, [1, 2])
    run = create_run(tmp_path, model, optimizer=optimizer)
    state = copy.deepcopy(run._state())
    moments = state["optimizer"]["state"].values()
    for values in (state["state_dict"], *moments):
        assert all(value.is_contiguous() for value in values.values())  # as published
    for values in (state["state_dict"], *moments):
        for name, value in values.items():
            if value.ndim == 4:
                values[name] = value.contiguous(memory_format=saved_as)
    checkpoint.save(tmp_path, state)
    steps(model, optimizer, [3])

    resumed, other = create()
    create_run(tmp_path, resumed, "--resume", "auto", optimizer=other)
    steps(resumed, other, [3])
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_position_embedding_of_another_grid_is_interpolated(tmp_path):
    wide, other = nano((16, 64)), nano(32)
    path = saved(tmp_path, wide, img_size=(16, 64))
    square, _ = weights.create_pretrained_backbone(path, dict(img_size=32))
    embedding = wide.base_encoder.pos_embed
    assert square.pos_embed.shape == embedding.shape  # 4×16 cells and 8×8
    expected = resample_abs_pos_embed(embedding, (8, 8), (4, 16))
    torch.testing.assert_close(square.pos_embed, expected, rtol=0, atol=0)

    own = other.base_encoder.pos_embed.clone()
    weights.load_model(other, checkpoint.load(path), path)
    assert torch.equal(other.base_encoder.pos_embed, own)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    model = nano()
    path = saved(tmp_path, model, epoch=1)

    def crash(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, model, epoch=2)
    assert checkpoint.load(path)["epoch"] == 1


def test_a_kept_checkpoint_outlives_the_last_one(tmp_path):
    checkpoint.save(tmp_path, {"state_dict": {}, "epoch": 1}, keep_as="checkpoint_0001.pth")
    checkpoint.save(tmp_path, {"state_dict": {}, "epoch": 2}, keep_previous=True)
    assert checkpoint.load(tmp_path / "checkpoint_0001.pth")["epoch"] == 1
    assert checkpoint.load(tmp_path / checkpoint.LAST)["epoch"] == 2
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["epoch"] == 1
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "out of memory"),
    ],
)
@pytest.mark.parametrize(
    "place", ["engine.files.WatchedFile", "torch.load", "zipfile.ZipFile.testzip"]
)
def test_a_failure_of_the_machine_is_no_damage(tmp_path, monkeypatch, error, words, place):
    path = saved(tmp_path, nano())

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(place, fail)
        checkpoint.load(path)
    assert str(caught.value) == f"can't read {path}: {words}" and caught.value.exit_code == 1
    assert not isinstance(caught.value, checkpoint.DamagedCheckpoint)


def test_an_error_of_the_disk_at_any_read_is_no_damage(tmp_path, monkeypatch):
    path, num_reads, failing = saved(tmp_path, nano()), 0, 0

    class Disk(files.WatchedFile):
        def readinto(self, buffer):
            nonlocal num_reads
            num_reads += 1
            if num_reads == failing:  # once: the next try would succeed
                self.failure = OSError(errno.EIO, "Input/output error")
                raise self.failure
            return super().readinto(buffer)

    monkeypatch.setattr(files, "WatchedFile", Disk)
    checkpoint.load(path)
    for failing in (1, 2, 3, 4, num_reads // 2, num_reads):  # noqa: B007
        num_reads = 0
        with pytest.raises(UserError, match=r"can't read .*: Input/output error"):
            checkpoint.load(path)


def test_a_file_that_is_there_is_not_said_to_be_missing(tmp_path, monkeypatch):
    """A file server may answer nothing for a while; Path.exists() of Python 3.14 would say no."""
    assert files.exists(tmp_path) and not files.exists(tmp_path / "a" / "b")
    saved(tmp_path, nano())

    def stat(path, *args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(os, "stat", stat)
    for resume in (None, "auto"):
        with pytest.raises(OSError, match="Stale"):
            find_checkpoints(tmp_path, resume)
    with pytest.raises(OSError, match="Stale"):
        read_log(tmp_path / "log.jsonl")


@pytest.mark.parametrize("write", [files.atomic_write, checkpoint._link])
def test_no_link_that_somebody_planted_is_followed(tmp_path, write, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "new").write_text("new")
    monkeypatch.setattr(os, "link", lambda *args: os.open("/missing", os.O_RDONLY))
    monkeypatch.setattr("pathlib.Path.unlink", lambda path, **kwargs: None)  # planted just then
    for name in ("file.tmp", "file.tmp2"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        if write is checkpoint._link:
            write(tmp_path / "new", tmp_path / "file")
        else:
            with write(tmp_path / "file") as file:
                file.write(b"overwritten")
    assert (tmp_path / "mine").read_text() == "mine"


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_another_file_is_refused_without_running_it(tmp_path, capsys):
    path = tmp_path / "file.pth"
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(path)
    for content in (b"", b"<html>\n404", pickle.dumps(Code()), b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"as a checkpoint: torch\.save did not write it"):
            checkpoint.load(path)
    torch.save({"state_dict": Code()}, path)
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="no 'state_dict'"):
        checkpoint.load(path)
    assert "this ran" not in capsys.readouterr().out


def test_every_mismatch_is_named(tmp_path):
    model = nano()
    state = state_of(model)["state_dict"]
    lacking = {k: v for k, v in state.items() if "predictor.0" not in k}
    foreign = state | {"module.surprise": torch.zeros(1)}
    reshaped = state | {"module.predictor.0.weight": torch.zeros(1)}
    probe = {k: v for k, v in state.items() if "momentum" not in k}
    for content, words in (
        (dict(state_dict=lacking), 'Missing key.* "predictor.0.weight"'),
        (dict(state_dict=foreign), 'Unexpected key.* "surprise"'),
        (dict(state_dict=reshaped), "size mismatch for predictor.0.weight"),
        (dict(state_dict=probe), 'Missing key.* "momentum_encoder.'),
        (dict(state_dict=state, num_heads=6), "trained with 6 heads, this model has 4"),
    ):
        with pytest.raises(UserError, match=words):
            weights.load_model(model, content, "x.pth")
