"""Checkpoints in and out: what is converted gives the same features and comes back unchanged."""

import json
import re
import sys

import official
import pytest
import timm
import torch
import torchvision
from conftest import ROOT
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from engine import checkpoint, cli
from engine.backbones import Classifier, create_backbone
from engine.errors import UserError
from engine.weights import (
    create_classifier,
    create_pretrained_backbone,
    detach_classifier,
    num_heads,
    read_weights,
)
from moco import MoCo
from vits import ConvStem

sys.path.insert(0, str(ROOT / "tools"))

import convert

OLD_TIMM = tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 26)  # local-dir: fails
SIX_HEADS = "timm/vit_small_patch16_224"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Official checkpoints by name, each written when it is first asked for → its path."""
    folder = tmp_path_factory.mktemp("official")

    def get(arch, classes=None):
        path = folder / f"{arch}_{classes}.pth"
        if not path.exists():
            content = (
                official.linear(arch, classes) if classes else official.pretraining(arch, mlp=64)
            )
            torch.save(content, path)
        return path

    return get


def run(source, out, to, *flags):
    convert.main(convert.parse_args([str(source), str(out), "--to", to, *flags]))
    return out


def weights(path, prefix=""):
    """By name, below a prefix."""
    content = torch.load(path, weights_only=True)
    state = content.get("state_dict", content.get("model", content))
    return {key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)}


def backbone_of(path):
    """What the official layout has of base_encoder, without the projector."""
    state = weights(path, "module.base_encoder.")
    return {key: v for key, v in state.items() if not key.startswith(("head.", "fc."))}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def load_ours(path, has_classifier=False):
    """As main_lincls.py does, with --evaluate if it has a classifier."""
    parser = cli.Parser(parents=[cli.pretrained_flags()])
    args = parser.parse_args(["digits", "--pretrained", str(path)])
    model = (create_classifier if has_classifier else create_pretrained_backbone)(args)[0]
    return model.eval()


def load_timm(folder):
    if not OLD_TIMM:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = json.loads((folder / "config.json").read_text())
    source = config["pretrained_cfg"] | dict(file=str(folder / "model.safetensors"))
    return timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg=source, **config["model_args"]
    ).eval()


@torch.no_grad()
def assert_same_features(ours, theirs, size=(224, 224)):
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-5)
    if not isinstance(ours.get_submodule(ours.classifier_name), torch.nn.Identity):
        detach_classifier(ours)
    h = ours(x)
    assert h.std() > 1e-3
    found = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    torch.testing.assert_close(found, h, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arch, classes",
    [
        ("vit_small", None),
        ("resnet18", 5),
        pytest.param("vit_base", 5, marks=pytest.mark.slow),
        pytest.param("resnet50", None, marks=pytest.mark.slow),
    ],
)
def test_timm_has_our_features_and_the_way_back_is_the_identity(files, tmp_path, arch, classes):
    source, flags = files(arch, classes), ["--with-heads"] if classes else []
    folder = run(source, tmp_path / "timm", "timm", *flags)
    theirs = load_timm(folder)
    assert_same_features(load_ours(source, bool(classes)), theirs)
    assert theirs.num_classes == (classes or 0)
    assert num_heads(theirs) == (12 if arch.startswith("vit") else None)

    expected = weights(source, "module.") if classes else backbone_of(source)
    assert_same(load_file(folder / "model.safetensors"), expected)
    back = run(folder, tmp_path / "back.pth", "official", *flags)
    assert_same(weights(back, f"module.{'' if classes else 'base_encoder.'}"), expected)
    assert checkpoint.load(back)["arch"] == arch


@pytest.mark.parametrize(
    "arch, to, flags",
    [
        ("vit_small", "official", ()),
        ("vit_small", "deit", ("--num-heads", "12")),
        ("resnet18", "deit", ()),
        ("resnet18", "torchvision", ()),
        pytest.param("resnet50", "torchvision", (), marks=pytest.mark.slow),
    ],
)
def test_round_trips_are_identities(files, tmp_path, arch, to, flags):
    source = files(arch)
    there = run(source, tmp_path / "there.pth", to, *flags)
    expected = backbone_of(source)
    prefix = "module.base_encoder." if to == "official" else ""
    assert_same(weights(there, prefix), expected)
    if to == "torchvision":
        resnet = torchvision.models.get_model(arch)
        resnet.fc = torch.nn.Identity()
        resnet.load_state_dict(torch.load(there, weights_only=True))
        assert_same_as_torchvision(resnet.eval(), load_ours(source))
    back = run(there, tmp_path / "back.pth", "official")
    assert_same(weights(back, "module.base_encoder."), expected)
    content = checkpoint.load(back)
    assert content["arch"] == arch
    assert content["num_heads"] == (12 if arch.startswith("vit") else None)


def assert_same_as_torchvision(theirs, ours):
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x))


def test_the_script_converts_both_ways(files, tmp_path, script):
    source, folder, back = files("resnet18"), tmp_path / "timm", tmp_path / "back.pth"
    code, out, err = script("tools/convert.py", source, folder, "--to", "timm")
    assert (code, err) == (0, "")
    assert "(MoCo v3 pre-training: resnet18, 224×224 pixels)" in out
    assert "(timm: 120 tensors, without fc, momentum_encoder, predictor)" in out
    code, _, err = script("tools/convert.py", folder, back, "--to", "official")
    assert (code, err) == (0, "")
    assert_same(weights(back, "module.base_encoder."), backbone_of(source))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.pth", "timm"]


def test_with_heads_every_key_is_kept_and_timms_class_takes_a_convolutional_stem(files, tmp_path):
    whole = run(files("resnet18"), tmp_path / "whole.pth", "official", "--with-heads")
    assert_same(weights(whole), weights(files("resnet18")))
    probe = files("vit_conv_small", 5)
    there = run(probe, tmp_path / "there.pth", "deit", "--with-heads")
    assert_same(weights(there), weights(probe, "module."))
    shape = dict(embed_dim=384, depth=11, num_heads=12, num_classes=5)
    theirs = VisionTransformer((224, 224), (16, 16), embed_layer=ConvStem, **shape)
    theirs.load_state_dict(weights(there))
    assert_same_features(load_ours(probe, True), theirs.eval())
    back = run(there, tmp_path / "back.pth", "official", "--with-heads")
    assert_same(weights(back), weights(probe))


def test_without_them_a_probe_becomes_a_backbone(files, tmp_path):
    probe = files("vit_conv_small", 5)
    state = weights(run(probe, tmp_path / "out.pth", "official"), "module.base_encoder.")
    expected = weights(probe, "module.")
    assert expected.keys() - state.keys() == {"head.weight", "head.bias"}
    assert_same(state, {key: expected[key] for key in state})


MM = {  # ours → MMPretrain's
    r"patch_embed\.proj\.": "patch_embed.projection.",
    r"blocks\.(\d+)\.norm": r"layers.\1.ln",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"layers.\1.ffn.layers.0.0.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"layers.\1.ffn.layers.1.",
    r"blocks\.(\d+)\.attn": r"layers.\1.attn",
    r"norm\.": "ln1.",
}


@pytest.mark.parametrize("arch", ["vit_small", "resnet18"])
def test_mms_names_become_ours(files, tmp_path, arch):
    state, expected = {"head.predictor.fc0.weight": torch.ones(2, 2)}, backbone_of(files(arch))
    for key, value in expected.items():
        if arch == "vit_small":
            for ours, theirs in MM.items():
                key = re.sub(f"^{ours}", theirs, key)
        state[f"backbone.{key}"] = value
    torch.save(dict(meta=dict(epoch=300), state_dict=state), tmp_path / "mm.pth")
    flags = ["--num-heads", "12"] if arch == "vit_small" else []
    out = run(tmp_path / "mm.pth", tmp_path / "ours.pth", "official", *flags)
    assert_same(weights(out, "module.base_encoder."), expected)
    load_ours(out)


def test_a_run_of_ours_goes_to_timm_and_back(pretrained, tmp_path):
    folder = run(pretrained, tmp_path / "timm", "timm")
    assert_same_features(load_ours(pretrained), load_timm(folder), (16, 16))
    back = run(folder, tmp_path / "back.pth", "official")
    assert_same(weights(back, "module.base_encoder."), backbone_of(pretrained))
    content = checkpoint.load(back)
    for name, value in dict(arch="vit_nano", img_size=(16, 16), num_heads=4).items():
        assert content[name] == value
    load_ours(back)


def save_ours(path, arch, classes=None, size=(32, 32), **kwargs):
    """What main_moco.py leaves, or with classes main_lincls.py, from a backbone of any kind."""
    backbone = create_backbone(arch, size, **kwargs)
    with torch.no_grad():
        for value in backbone.state_dict().values():
            if value.is_floating_point():
                value += 0.01 * torch.rand_like(value)
    config = dict(arch=arch, img_size=size, patch_size=None, small_stem=False) | kwargs
    if classes:
        head = Classifier(backbone.num_features, classes)
        backbone.set_submodule(backbone.classifier_name, head)
        config["class_names"] = [f"class {i}" for i in range(classes)]
    model = backbone if classes else MoCo(backbone, dim=8, mlp_dim=16)
    state = checkpoint.published_state_dict(model)
    config |= dict(epoch=1, iteration=1, num_heads=num_heads(model))
    torch.save(config | dict(state_dict=state), path)
    return path


BACKBONES = {
    "timm/convnext_atto": {},
    "timm/mobilenetv3_small_050": {},
    "timm/vit_wee_patch16_reg1_gap_256": dict(size=(16, 32), patch_size=(8, 8)),
    "vit_nano": dict(size=(32, 64), patch_size=(16, 8)),
}


@pytest.mark.parametrize(
    "arch, classes",
    [
        ("timm/convnext_atto", None),
        ("timm/mobilenetv3_small_050", 3),
        ("vit_nano", None),
        ("vit_nano", 3),
        pytest.param("timm/convnext_atto", 3, marks=pytest.mark.slow),
        pytest.param("timm/mobilenetv3_small_050", None, marks=pytest.mark.slow),
        pytest.param("timm/vit_wee_patch16_reg1_gap_256", None, marks=pytest.mark.slow),
        pytest.param("timm/vit_wee_patch16_reg1_gap_256", 3, marks=pytest.mark.slow),
    ],
)
def test_any_backbone_goes_to_timm_and_back(tmp_path, arch, classes):
    kwargs = BACKBONES[arch]
    source = save_ours(tmp_path / "ours.pth", arch, classes, **kwargs)
    flags = ["--with-heads"] if classes else []
    folder = run(source, tmp_path / "timm", "timm", *flags)
    size = kwargs.get("size", (32, 32))
    assert_same_features(load_ours(source, bool(classes)), load_timm(folder), size)
    back = run(folder, tmp_path / "back.pth", "official", *flags)
    ours, there = load_ours(source, bool(classes)), load_ours(back, bool(classes))
    assert_same(there.state_dict(), ours.state_dict())
    content = checkpoint.load(back)
    assert content["arch"] == arch
    assert content.get("class_names") == (classes and [f"class {i}" for i in range(classes)])


def test_a_folder_of_timms_hub_is_read(tmp_path):
    """Which states neither model_args nor channels."""
    resnet = timm.create_model("resnet18", num_classes=3)
    save_file(resnet.state_dict(), tmp_path / "model.safetensors")
    images = dict(input_size=(3, 224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config = dict(architecture="resnet18", num_classes=3, pretrained_cfg=images)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(tmp_path)
    assert weights.config["mean"] == (0.5, 0.5, 0.5) and weights.config["in_chans"] == 3
    assert weights.heads.keys() == {"fc.weight", "fc.bias"}
    model = weights.create_backbone()
    assert_same(model.state_dict(), weights.backbone)


def test_other_numbers_of_channels_are_kept(tmp_path):
    folder = tmp_path / "gray"
    folder.mkdir()
    gray = create_backbone("resnet18", in_chans=1).state_dict()
    gray = {key: value.contiguous() for key, value in gray.items()}
    save_file(gray, folder / "model.safetensors")
    config = dict(
        architecture="resnet18",
        model_args=dict(in_chans=1),
        pretrained_cfg=dict(input_size=(1, 64, 64), mean=(0.3,), std=(0.2,)),
    )
    (folder / "config.json").write_text(json.dumps(config))
    ours = run(folder, tmp_path / "ours.pth", "official")
    assert checkpoint.load(ours)["mean"] == (0.3,)
    out = run(ours, tmp_path / "out", "timm")
    assert_same(load_timm(out).state_dict(), gray)
    images = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert (images["mean"], images["std"]) == ([0.3], [0.2])


def test_a_vit_small_keeps_the_heads_it_has(tmp_path):
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    with torch.no_grad():
        theirs.pos_embed.normal_()
    torch.save(dict(model=theirs.state_dict()), tmp_path / "deit.pth")
    out = run(tmp_path / "deit.pth", tmp_path / "six.pth", "official", "--num-heads", "6")
    assert checkpoint.load(out)["arch"] == SIX_HEADS
    assert_same_features(load_ours(out), theirs)
    again = run(out, tmp_path / "again.pth", "deit")
    assert_same(weights(again), theirs.state_dict())


def test_weights_without_a_known_shape_are_named_with_arch(tmp_path):
    theirs = timm.create_model("convnext_atto", num_classes=0)
    torch.save(theirs.state_dict(), tmp_path / "bare.pth")
    folder = run(tmp_path / "bare.pth", tmp_path / "out", "timm", "-a", "timm/convnext_atto")
    assert_same(load_timm(folder).state_dict(), theirs.state_dict())


def mistakes(files, pretrained, folder):
    """Command line → what is said about it."""
    small, resnet = files("vit_small", 5), files("resnet18")
    probe, out = files("resnet18", 5), folder / "out"

    def saved(name, content):
        torch.save(content, folder / name)
        return folder / name

    (folder / "text.pth").write_text("text")
    (folder / "text.safetensors").write_text("text")
    (folder / "full").mkdir()
    plain = weights(small, "module.")
    plain = {k: v for k, v in plain.items() if "attn" not in k and "mlp" not in k}
    bare = {k: v for k, v in plain.items() if not k.startswith("blocks.3.")}
    stem = save_ours(folder / "stem.pth", "resnet18", small_stem=True)
    conv = save_ours(folder / "conv.pth", "vit_conv_nano")
    broken = folder / "broken"
    broken.mkdir()
    save_file(dict(a=torch.ones(1)), broken / "model.safetensors")
    (broken / "config.json").write_text('{"architecture": "resnet18", "model_args": [1]}')
    yield (small, folder / "full", "--to", "timm"), "exists already: name another OUT"
    yield (small, folder / "no" / "out", "--to", "timm"), "in a folder that does not exist"
    yield (folder / "no.pth", out, "--to", "timm"), "no checkpoint at"
    yield (folder / "full", out, "--to", "timm"), "no checkpoint at"
    yield (folder / "text.pth", out, "--to", "timm"), "can't be read as a checkpoint"
    yield (folder / "text.safetensors", out, "--to", "timm"), "can't be read as timm's"
    yield (broken, out, "--to", "timm"), "can't be read as timm's"
    yield (saved("list.pth", [1]), out, "--to", "timm"), "holds no weights by name"
    yield (saved("empty.pth", {}), out, "--to", "timm"), "holds no weights by name"
    yield (saved("number.pth", dict(model={"a": 1})), out, "--to", "timm"), "holds no weights"
    yield (saved("keys.pth", {1: torch.ones(1)}), out, "--to", "timm"), "holds no weights"
    yield (saved("a.pth", {"a": torch.ones(1)}), out, "--to", "timm"), "neither a ViT nor a ResNet"
    yield (saved("bare.pth", bare), out, "--to", "official"), "none of the ViTs of vits.py"
    no_size = {k: v for k, v in plain.items() if "blocks" in k or k == "cls_token"}
    yield (
        (saved("no_size.pth", no_size), out, "--to", "official", "--num-heads", "12"),
        "no patches that make up a square",
    )
    table = dict(plain, pos_embed=torch.ones(1, 7, 384))
    yield (
        (saved("table.pth", table), out, "--to", "official", "--num-heads", "12"),
        "no patches that make up a square",
    )
    yield (saved("no_attn.pth", plain), out, "--to", "timm", "--num-heads", "12"), "lacks blocks."
    flat = dict(plain, pos_embed=torch.ones(7), cls_token=torch.ones(384))
    yield (saved("flat.pth", flat), out, "--to", "official", "--num-heads", "12"), "no patches"
    yield (saved("plain.pth", plain), out, "--to", "timm"), "how many attention heads"
    yield (
        (pretrained, out, "--to", "timm", "--num-heads", "6"),
        "has 4 heads, not 6: drop --num-heads",
    )
    yield (resnet, out, "--to", "timm", "--num-heads", "6"), "has no heads, not 6"
    yield (small, out, "--to", "deit"), "DeiT's ViT-S has 6 heads, this one 12"
    yield (pretrained, out, "--to", "torchvision"), "torchvision has no vit_nano"
    yield (stem, out, "--to", "torchvision"), "torchvision has no resnet18 with this stem"
    yield (stem, out, "--to", "timm"), "timm has no resnet18 with this stem"
    yield (conv, out, "--to", "timm"), "timm has no vit_conv_nano: "
    yield (resnet, out, "--to", "timm", "--with-heads"), "no heads for --to timm"
    yield (
        (saved("r.pth", backbone_of(resnet)), out, "--to", "timm", "--with-heads"),
        "no heads for --to timm",
    )
    head = dict(weights(probe, "module."), **{"fc.extra": torch.ones(1)})
    yield (saved("h.pth", head), out, "--to", "timm", "--with-heads"), "no heads for --to timm"
    unknown = dict(arch="timm/nothing", state_dict=head)
    yield (saved("arch.pth", unknown), out, "--to", "official"), "unknown arch"
    sizes = dict(arch="vit_small", img_size="wide", state_dict=plain)
    yield (saved("size.pth", sizes), out, "--to", "official"), "is damaged: 'img_size' should be"
    yield (pretrained, out, "--to", "onnx"), "invalid choice"
    yield (pretrained, out, "--to", "timm", "-a", "vit_tiny"), "holds vit_nano, not vit_tiny: drop"


def test_a_mistake_gets_one_line_and_leaves_nothing(files, pretrained, tmp_path, script):
    for args, words in mistakes(files, pretrained, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = script("tools/convert.py", *args)
        assert code == 2 and not out, err
        assert err.count("\n") == 1 and words in err, err
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("to, writer", [("timm", "save_file"), ("official", "torch.save")])
def test_out_is_never_half_written(files, tmp_path, monkeypatch, to, writer):
    out, source = tmp_path / "out", files("resnet18")

    def fail(state, file, **kwargs):
        file.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(f"convert.{writer}", fail)
    error = OSError("no space left")
    with pytest.raises(UserError, match=r"can't write .*: no space left"):
        run(source, out, to)
    assert not list(tmp_path.iterdir())
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(source, out, to)
    assert not list(tmp_path.iterdir())
