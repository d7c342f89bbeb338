"""Features on disk: what the file holds, the same bits after a break and on two processes."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import FP32, ROOT, launch
from safetensors.numpy import load_file

from engine import checkpoint, evaluation, load_backbone
from engine.backbones import BackboneConfig, create_backbone
from engine.data.images import ArrayDataset
from engine.data.splits import load_splits, open_source
from engine.errors import UserError
from engine.weights import create_pretrained_backbone
from moco.augmentation import normalize

sys.path.insert(0, str(ROOT / "tools"))

import features as tool


def run(pretrained, out, *flags, data="digits"):
    args = [data, "--pretrained", pretrained, "--out", out, *FP32, *flags]
    tool.main(tool.parse_args([str(arg) for arg in args]))
    if out.suffix == ".safetensors":
        return load_file(out)
    return dict(np.load(out)) if out.suffix == ".npz" else np.load(out, mmap_mode="r")


@pytest.fixture
def folders(image_file):
    """Two classes and two splits, and images of two sizes."""
    for split, n in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(n):
                path = image_file(f"set/{split}/{name}/deep/{i}.png", height=20 + 4 * i)
    return path.parents[3]


@pytest.fixture
def batches_of_two(monkeypatch):
    monkeypatch.setattr(tool, "EVAL_BATCH_SIZE", 2)
    monkeypatch.setattr(evaluation, "EVAL_BATCH_SIZE", 2)


def test_the_file_holds_the_backbones_output(pretrained, tmp_path):
    found = run(pretrained, tmp_path / "f.npz")
    model, _ = create_pretrained_backbone(pretrained, {})
    digits = load_splits(open_source("digits")).train
    with torch.no_grad():
        h = model.eval()(normalize(digits.images.float() / 255))
    assert found["features"].dtype == np.float32
    torch.testing.assert_close(torch.tensor(found["features"]), h)
    assert (found["labels"] == digits.labels.numpy()).all()
    assert found["paths"].tolist() == [str(i) for i in range(len(digits))]
    assert found["classes"].tolist() == [str(digit) for digit in range(10)]
    assert set(found) == {"features", "paths", "labels", "classes", "about"}


def test_paths_lie_below_the_folder_and_classes_have_names(pretrained, folders, tmp_path):
    train = run(pretrained, tmp_path / "train.npz", data=folders)
    val = run(pretrained, tmp_path / "val.npz", "--split", "val", data=folders)
    assert len(train["features"]) == 6 and len(val["features"]) == 4
    for found in (train, val):
        assert found["classes"].tolist() == ["cat", "dog"]
        for path, label in zip(found["paths"], found["labels"]):
            assert (folders / path).is_file() and f"/{found['classes'][label]}/" in path

    plain = run(pretrained, tmp_path / "plain.npz", data=folders / "train" / "dog")
    assert set(plain) == {"features", "paths", "about"}
    assert plain["paths"].tolist() == ["deep/0.png", "deep/1.png", "deep/2.png"]
    np.testing.assert_allclose(plain["features"], train["features"][3:], atol=1e-5)


@pytest.mark.usefixtures("batches_of_two")
def test_the_split_that_is_taken_and_the_other_are_named(pretrained, folders, tmp_path, capsys):
    for split, line in (
        ("train", "6 images of train, not val"),
        ("val", "4 images of val, not tr"),
    ):
        run(pretrained, tmp_path / f"{split}.npz", "--split", split, data=folders)
        assert f"data    {folders}: {line}" in capsys.readouterr().out
    run(pretrained, tmp_path / "all.npz", data=folders / "val")
    assert f"data    {folders}/val: 4 images\n" in capsys.readouterr().out


def test_what_cant_be_read_is_nan_and_named(pretrained, folders, tmp_path, capsys):
    for broken in ("train/cat/deep/0.png", "train/cat/deep/1.png", "train/dog/deep/1.png"):
        (folders / broken).write_bytes(b"text")  # a whole batch, and one of another
    found = run(pretrained, tmp_path / "f.npz", data=folders)
    assert np.isnan(found["features"]).all(1).tolist() == [True, True, False, False, True, False]
    assert np.isfinite(found["features"][[2, 3, 5]]).all()
    out, err = capsys.readouterr()
    assert err.count("unreadable image") == 3 and out.endswith("f.npz, 3 of them NaN\n")


@pytest.mark.usefixtures("batches_of_two")
def test_npy_is_the_same_to_be_mapped(pretrained, folders, tmp_path):
    npz, npy = (run(pretrained, tmp_path / f"f.{kind}", data=folders) for kind in ("npz", "npy"))
    assert isinstance(npy, np.memmap) and (npy == npz.pop("features")).all()
    beside = np.load(tmp_path / "f.index.npz")
    assert set(beside) == set(npz) and all((beside[key] == npz[key]).all() for key in npz)


def test_safetensors_holds_features_and_labels(pretrained, folders, tmp_path):
    expected = run(pretrained, tmp_path / "f.npz", data=folders)
    found = run(pretrained, tmp_path / "f.safetensors", data=folders)
    assert found.keys() == {"features", "labels"}
    assert all((found[key] == expected[key]).all() for key in found)
    assert (np.load(tmp_path / "f.index.npz")["paths"] == expected["paths"]).all()


def tokens_by_hand(model, x, layer):
    """All tokens after the blocks up to `layer`, normalized: [N, 1 + patches, d]."""
    x = model._pos_embed(model.patch_embed(x))
    for block in model.blocks[: layer + 1]:
        x = block(x)
    return model.norm(x)


@pytest.mark.parametrize(
    "flags, layer, select",
    [
        (["--layer", "-1"], 3, lambda x: x[:, 0]),
        (["--tokens", "class"], 3, lambda x: x[:, 0]),
        (["--tokens", "avg", "--layer", "0"], 0, lambda x: x[:, 1:].mean(1)),
        (["--tokens", "patch", "--layer", "-2"], 2, lambda x: x[:, 1:]),
    ],
)
@torch.no_grad()
def test_tokens_of_a_layer_are_those_of_its_block(pretrained, tmp_path, flags, layer, select):
    found = run(pretrained, tmp_path / "f.npz", *flags)["features"]
    model, _ = load_backbone(pretrained)
    x = normalize(load_splits(open_source("digits")).train.images[:20].float() / 255)
    expected = select(tokens_by_hand(model, x, layer))
    assert found.shape == (1437, *expected.shape[1:])
    torch.testing.assert_close(torch.tensor(found[:20]), expected, rtol=0, atol=1e-5)
    if "avg" not in flags and layer == 3:
        torch.testing.assert_close(expected, model(x), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("batches_of_two")
def test_patches_of_what_cant_be_read_are_nan(pretrained, folders, tmp_path):
    for broken in ("train/cat/deep/0.png", "train/cat/deep/1.png"):  # a whole batch
        (folders / broken).write_bytes(b"text")
    found = run(pretrained, tmp_path / "f.npy", "--tokens", "patch", data=folders)
    assert found.shape == (6, 4, 128)
    assert np.isnan(found).all((1, 2)).tolist() == [True, True, False, False, False, False]
    with pytest.raises(UserError, match=r"something else .*tokens patch → avg"):
        run(pretrained, tmp_path / "f.npy", "--tokens", "avg", data=folders)


@pytest.mark.parametrize(
    "arch, tokens, words",
    [
        ("resnet18", "avg", "--tokens and --layer are for ViTs, not resnet18: drop them"),
        ("timm/convnext_atto", "patch", "are for ViTs, not timm/convnext_atto"),
        ("timm/vit_wee_patch16_reg1_gap_256", "class", "has no class token: --tokens avg or patch"),
        ("timm/vit_wee_patch16_reg1_gap_256", "avg", None),
    ],
)
def test_backbones_without_such_tokens_are_refused(arch, tokens, words):
    config = BackboneConfig(arch, img_size=(32, 32))
    model = create_backbone(config).requires_grad_(False).eval()
    if words is None:
        assert tool.select_tokens(model, config, tokens, -1)[1] == (model.num_features,)
        return
    with pytest.raises(UserError, match=words):
        tool.select_tokens(model, config, tokens, None)


def interrupt_after(num_parts, monkeypatch):
    """Ctrl-C after so many parts; returns the numbers of images of the parts that are computed."""
    embed, seen = tool.embed, []

    def embed_some(*args):
        for positions, h in embed(*args):
            if len(seen) == num_parts:
                raise KeyboardInterrupt
            seen.append(len(positions))
            yield positions, h

    monkeypatch.setattr(tool, "embed", embed_some)
    return seen


@pytest.mark.usefixtures("batches_of_two")
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_an_interrupted_run_continues_to_the_same_bits(
    pretrained, folders, tmp_path, kind, monkeypatch, capsys
):
    whole, out = tmp_path / f"whole.{kind}", tmp_path / f"parts.{kind}"
    run(pretrained, whole, data=folders)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="continues") as stop:
        interrupt_after(1, patch)
        run(pretrained, out, data=folders)
    assert stop.value.exit_code == 130 and not out.exists()
    (tmp_path / f"parts.{kind}.parts" / "0000002.npy.tmp").write_text("half a part")

    seen = interrupt_after(99, monkeypatch)
    run(pretrained, out, data=folders)
    assert seen == [2, 2] and "continuing: 1 of 3 parts are done" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / f"parts.{kind}.parts").exists()


def test_what_is_complete_is_not_computed_again(pretrained, folders, tmp_path, monkeypatch, capsys):
    run(pretrained, tmp_path / "f.npz", data=folders)
    seen = interrupt_after(99, monkeypatch)
    run(pretrained, tmp_path / "f.npz", data=folders)
    assert not seen and "nothing left to do" in capsys.readouterr().out


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("change", ["weights", "names", "pixels", "img_size", "split"])
def test_parts_of_something_else_are_refused(
    pretrained, folders, tmp_path, change, complete, monkeypatch
):
    out, flags = tmp_path / "f.npz", []
    with monkeypatch.context() as patch:
        if complete:
            run(pretrained, out, data=folders)
        else:
            interrupt_after(0, patch)
            with pytest.raises(UserError, match="continues"):
                run(pretrained, out, data=folders)
    if change == "weights":
        state = checkpoint.load(pretrained)
        state["state_dict"]["module.base_encoder.norm.bias"] += 0.1
        pretrained = tmp_path / "other.pth"
        torch.save(state, pretrained)
    elif change == "names":
        (folders / "train/cat/deep/1.png").rename(folders / "train/cat/deep/7.png")
    elif change == "pixels":
        shutil.copy(folders / "train/cat/deep/1.png", folders / "train/cat/deep/0.png")
    else:
        flags = ["--img-size", "32"] if change == "img_size" else ["--split", "val"]
    name = "data_digest" if change in ("names", "pixels") else change
    with pytest.raises(UserError, match=f"something else .*{name}"):
        run(pretrained, out, *flags, data=folders)


def test_two_processes_write_the_same_file(pretrained, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun has it
    run(pretrained, tmp_path / "one.npz")
    torch.set_num_threads(threads)
    argv = ("digits", *FP32, "--pretrained", pretrained, "--out", tmp_path / "two.npz")
    done = launch(2, "tools/features.py", *argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1,437 × 128 features") == 1
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert json.loads(np.load(tmp_path / "two.npz")["about"].item())["images"] == 1437


@pytest.mark.parametrize(
    "out, flags, line",
    [
        ("f.csv", [], "must end in .npz, .npy or .safetensors"),
        ("f.npz", ["--img-size", "18"], "is not a multiple of patch_size"),
        ("f.npz", ["--pretrained", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        ("taken.npz", [], "was not written by this tool"),
        ("taken.npz/f.npz", [], "can't write"),
        ("f.npz", ["--layer", "4"], "--layer 4: vit_nano has layers 0 to 3"),
        ("f.npz", ["--layer", "-5"], "--layer -5: vit_nano has layers 0 to 3"),
    ],
)
def test_an_error_is_one_line(pretrained, tmp_path, refusal, out, flags, line):
    (tmp_path / "taken.npz").write_text("mine")
    argv = ("digits", *FP32, "--pretrained", pretrained, "--out", tmp_path / out, *flags)
    assert line in refusal("tools/features.py", *argv)
    assert (tmp_path / "taken.npz").read_text() == "mine"


def test_a_split_that_is_missing_is_refused(pretrained, folders, tmp_path):
    shutil.rmtree(folders / "val")
    with pytest.raises(UserError, match="has no val, only train"):
        run(pretrained, tmp_path / "f.npz", "--split", "val", data=folders)


@pytest.mark.usefixtures("batches_of_two")
@pytest.mark.parametrize("kind", ["npz", "npy", "safetensors"])
def test_a_part_that_this_host_does_not_see_is_not_left_out(
    pretrained, folders, tmp_path, monkeypatch, kind
):
    out, merge = tmp_path / f"f.{kind}", tool.merge_parts

    def merge_without_one(folder, *args):
        (folder / "0000001.npy").unlink()
        merge(folder, *args)

    monkeypatch.setattr(tool, "WAIT_SECONDS", 0.2)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="1 of 3 parts") as stop:
        patch.setattr(tool, "merge_parts", merge_without_one)
        run(pretrained, out, data=folders)
    assert stop.value.exit_code == 1 and not out.exists()
    assert len(list((tmp_path / f"f.{kind}.parts").glob("*.npy"))) == 2
    run(pretrained, out, data=folders)
    assert np.load(tmp_path / "f.index.npz" if kind != "npz" else out)["paths"].shape == (6,)


@pytest.mark.parametrize("place", ["save", "savez"])
def test_a_full_disk_is_one_line_and_the_parts_stay(
    pretrained, folders, tmp_path, monkeypatch, refusal, place
):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    argv = (folders, *FP32, "--pretrained", pretrained, "--out", tmp_path / "f.npz")
    with monkeypatch.context() as patch:
        patch.setattr(np, place, fail)
        line = refusal("tools/features.py", *argv, code=1)
    assert "No space left on device; the same line again continues" in line
    assert len(list((tmp_path / "f.npz.parts").glob("*.npy"))) == (place == "savez")


def test_classes_that_are_numbers_are_in_their_order():
    labels = torch.tensor([0, 1, 2])  # of the sorted names
    dataset = ArrayDataset(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), labels)
    index = tool.create_index(dataset, ["1", "10", "2"], "DIR", {})
    assert index["classes"].tolist() == ["1", "2", "10"] and index["labels"].tolist() == [0, 2, 1]


def test_features_are_those_of_load_backbone_where_the_precision_is(pretrained, folders, tmp_path):
    found = run(pretrained, tmp_path / "f.npz", data=folders)
    backbone, transform = load_backbone(pretrained)
    images = torch.stack([transform(folders / path) for path in found["paths"]])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found["features"]), backbone(images))
