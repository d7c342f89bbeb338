"""Checkpoints in and out: what is converted gives the same features and comes back unchanged."""

import json
import sys

import official
import pytest
import timm
import torch
import torchvision
from conftest import ROOT
from safetensors.torch import load_file, save_file
from timm.data.readers.class_map import load_class_map
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms.v2.functional import to_pil_image

from engine import checkpoint, load_backbone
from engine.backbones import BackboneConfig, Classifier, create_backbone
from engine.data.crops import CenterCrops
from engine.data.decode import PixelFormat
from engine.errors import UserError
from engine.weights import (
    create_classifier,
    create_pretrained_backbone,
    detach_classifier,
    num_heads,
)
from moco import MoCo
from moco.augmentation import normalize
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
    load = create_classifier if has_classifier else create_pretrained_backbone
    return load(path, {})[0].eval()


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
    [("vit_small", None), ("resnet18", 5), pytest.param("vit_base", 5, marks=pytest.mark.slow)],
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
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(resnet.eval()(x), load_ours(source)(x))
    named = ["-a", arch] if to == "torchvision" else []
    back = run(there, tmp_path / "back.pth", "official", *named)
    assert_same(weights(back, "module.base_encoder."), expected)
    content = checkpoint.load(back)
    assert content["arch"] == arch
    assert content["num_heads"] == (12 if arch.startswith("vit") else None)


def test_the_script_converts_both_ways(files, tmp_path, script):
    source, folder, back = files("resnet18"), tmp_path / "timm", tmp_path / "back.pth"
    code, out, err = script("tools/convert.py", source, folder, "--to", "timm")
    assert (code, err) == (0, "")
    assert "(MoCo v3 pre-training: resnet18)" in out
    assert "(timm: 120 tensors)" in out
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


def save_ours(path, arch, classes=None, size=(32, 32), **kwargs):
    """What main_moco.py leaves, or with classes main_lincls.py, from a backbone of any kind."""
    config = BackboneConfig(arch, size, **kwargs)
    backbone, stated = create_backbone(config), config.to_dict()
    with torch.no_grad():
        for value in backbone.state_dict().values():
            if value.is_floating_point():
                value += 0.01 * torch.rand_like(value)
    if classes:
        head = Classifier(backbone.num_features, classes)
        backbone.set_submodule(backbone.classifier_name, head)
        stated["class_names"] = [f"class {i}" for i in range(classes)]
    model = backbone if classes else MoCo(backbone, dim=8, mlp_dim=16)
    state = checkpoint.published_state_dict(model)
    torch.save(stated | dict(num_heads=num_heads(model), state_dict=state), path)
    return path


BACKBONES = {
    "timm/convnext_atto": {},
    "timm/mobilenetv3_small_050": {},
    "vit_nano": dict(size=(32, 64), patch_size=(16, 8)),
}


@pytest.mark.parametrize(
    "arch, classes",
    [
        ("timm/convnext_atto", None),
        ("timm/mobilenetv3_small_050", 3),
        ("vit_nano", None),
        ("vit_nano", 3),
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


def test_timm_measures_what_we_measure(tmp_path):
    """Its transform and the order of its classes, as timm reads them from the folder."""
    images = dict(size=(32, 32), pixel_format=PixelFormat(3, (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)))
    source = save_ours(
        tmp_path / "c.pth", "vit_nano", 3, patch_size=(8, 8), interpolation="bicubic", **images
    )
    model = load_timm(run(source, tmp_path / "timm", "timm", "--with-heads"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    ramp = torch.arange(96.0)[:, None] + torch.arange(64.0)
    pixels = torch.stack([ramp, 255 - ramp, ramp / 2]).round().to(torch.uint8)
    ours, config, names = create_classifier(source, {})
    found = transform(to_pil_image(pixels))
    crops = CenterCrops(None, config.img_size, config.interpolation)
    expected = normalize(crops.crop(pixels)[None].float() / 255, *config.pixel_format[1:3])
    torch.testing.assert_close(found[None], expected, rtol=0, atol=0.03)  # a level is 0.02
    assert config.interpolation == "bicubic" and "bicubic" in str(transform)
    with torch.no_grad():
        torch.testing.assert_close(model(expected), ours.eval()(expected), rtol=0, atol=1e-5)
    assert OLD_TIMM or model.pretrained_cfg["label_names"] == names == [
        "class 0",
        "class 1",
        "class 2",
    ]


def add_to(path, **stated):
    torch.save(torch.load(path, weights_only=True) | stated, path)
    return path


def test_the_model_card_tells_what_was_trained_and_how_to_load_it(tmp_path, pretrained, files):
    def card(name, source, *flags):
        return (run(source, tmp_path / name, "timm", *flags) / "README.md").read_text()

    text = card("plain", pretrained)
    for words in (
        "`vit_nano`, pre-trained without labels by MoCo v3, on `digits`, 1 of 1 epochs.",
        "--batch-size 256", "--moco-t 0.2", "--moco-m-cos", "--lr 0.001", "Precision: float32",
        'timm.create_model("local-dir:plain", pretrained=True)', "`hf upload USER/NAME plain`",
        "16×16 pixels, bilinear, crop_pct 0.875", "pipeline_tag: image-feature-extraction",
        "# license:\n", "Not stated yet",
    ):  # fmt: skip
        assert words in text, words
    assert "accuracy" not in text and "--workers" not in text

    args = dict(
        mixup=0.8, data="/home/someone/cats", pretrained="/home/someone/runs/a/b.pth", epochs=9
    )
    stated = dict(args=args, epoch=7, best_acc1=71.126, versions=dict(git="abc", torch="2"))
    source = add_to(save_ours(tmp_path / "c.pth", "vit_nano", 3, patch_size=(8, 8)), **stated)
    text = card("tuned", source, "--with-heads")
    for words in (
        "fine-tuned end to end, with a classifier, on `cats`, 7 of 9 epochs.",
        "It started from `a/b.pth`.", "Code: commit abc, torch 2.", "logits of 3 classes",
        "top-1 accuracy of 71.13 %, measured on the validation images of `cats`.",
    ):  # fmt: skip
        assert words in text, words
    assert "someone" not in text
    assert "of a moving average" in card(
        "ema", add_to(source, args=args | dict(evaluate_ema=True)), "--with-heads"
    )
    assert "top-1" not in card("backbone", source)
    assert "does not state how it was trained" in card("official", files("resnet18", 5))


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_onnx_has_our_features(tmp_path, pretrained):
    """The lines of docs/checkpoints.md, for any number of images."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    backbone, _ = load_backbone(pretrained)
    torch.onnx.export(
        backbone,
        (torch.randn(2, 3, 16, 16),),
        tmp_path / "backbone.onnx",
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
    )
    session = onnxruntime.InferenceSession(tmp_path / "backbone.onnx")
    images = torch.randn(5, 3, 16, 16)
    [features] = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.tensor(features), backbone(images), rtol=0, atol=1e-5)


def timm_folder(folder, resnet, **images):
    """A ResNet-18 as timm's hub has it, which states neither model_args nor channels."""
    folder.mkdir()
    save_file(resnet.state_dict(), folder / "model.safetensors")
    config = dict(architecture="resnet18", pretrained_cfg=images)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_of_timms_hub_is_read(tmp_path):
    resnet, half = timm.create_model("resnet18", num_classes=3), (0.5, 0.5, 0.5)
    folder = timm_folder(tmp_path / "hub", resnet, input_size=(3, 224, 224), mean=half, std=half)
    model, config, _ = create_classifier(folder, {})
    assert config.arch == "resnet18" and config.pixel_format[:2] == (3, half)
    assert_same(model.state_dict(), resnet.state_dict())


def test_other_numbers_of_channels_are_kept(tmp_path):
    gray = timm.create_model("resnet18", num_classes=0, in_chans=1)
    images = dict(input_size=(1, 64, 64), mean=(0.3,), std=(0.2,))
    folder = timm_folder(tmp_path / "gray", gray, **images)
    ours = run(folder, tmp_path / "ours.pth", "official")
    assert checkpoint.load(ours)["mean"] == (0.3,)
    out = run(ours, tmp_path / "out", "timm")
    assert_same(load_timm(out).state_dict(), gray.state_dict())
    images = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert (images["mean"], images["std"]) == ([0.3], [0.2])


def test_a_vit_small_keeps_the_heads_it_has(tmp_path):
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    with torch.no_grad():
        theirs.pos_embed.normal_()
    torch.save(dict(model=theirs.state_dict()), tmp_path / "deit.pth")
    out = run(tmp_path / "deit.pth", tmp_path / "six.pth", "official", "-a", SIX_HEADS)
    assert checkpoint.load(out)["arch"] == SIX_HEADS
    assert_same_features(load_ours(out), theirs)
    again = run(out, tmp_path / "again.pth", "deit")
    assert_same(weights(again), theirs.state_dict())


def mistakes(files, pretrained, folder):
    """Command line → what is said about it."""
    small, resnet = files("vit_small", 5), files("resnet18")
    probe, out = files("resnet18", 5), folder / "out"

    def saved(name, content):
        torch.save(content, folder / name)
        return folder / name

    (folder / "text.safetensors").write_text("text")
    (folder / "full").mkdir()
    plain = weights(small, "module.")
    plain = {k: v for k, v in plain.items() if "attn" not in k and "mlp" not in k}
    stem = save_ours(folder / "stem.pth", "resnet18", small_stem=True)
    conv = save_ours(folder / "conv.pth", "vit_conv_nano")
    to_timm, to_official = (out, "--to", "timm"), (out, "--to", "official")
    yield (small, folder / "full", "--to", "timm"), "exists already: name another OUT"
    yield (small, folder / "no" / "out", "--to", "timm"), "in a folder that does not exist"
    yield (folder / "full", *to_timm), "no checkpoint at"
    yield (folder / "text.safetensors", *to_timm), "can't be read as timm's"
    for content in ([1], {}, dict(model={"a": 1}), {1: torch.ones(1)}):
        yield (saved("no_weights.pth", content), *to_timm), "holds no weights by name"
    bare = saved("bare.pth", plain)
    yield (bare, *to_timm, "-a", "vit_small"), 'Missing key(s) in state_dict: "blocks.'
    flat = saved("flat.pth", weights(small, "module.") | dict(pos_embed=torch.ones(7)))
    yield (flat, *to_timm, "-a", "vit_small"), "size mismatch for pos_embed"
    yield (pretrained, *to_timm, "--num-heads", "6"), "has 4 heads: drop --num-heads"
    yield (small, out, "--to", "deit"), "DeiT's ViT-S has 6 heads, this one 12"
    yield (pretrained, out, "--to", "torchvision"), "torchvision has no vit_nano"
    yield (stem, out, "--to", "torchvision"), "torchvision has no resnet18 of this form"
    yield (stem, *to_timm), "timm has no resnet18 of this form"
    yield (conv, *to_timm), "timm has no vit_conv_nano of this form: "
    yield (resnet, *to_timm, "--with-heads"), "no heads for --to timm"
    head = weights(probe, "module.") | {"fc.extra": torch.ones(1)}
    extra = saved("h.pth", dict(arch="resnet18", state_dict=head))
    yield (extra, *to_timm, "--with-heads"), "no heads for --to timm"
    unknown = saved("arch.pth", dict(arch="timm/nothing", state_dict=head))
    yield (unknown, *to_official), "unknown arch"
    wide = saved("size.pth", dict(arch="vit_small", img_size="wide", state_dict=plain))
    yield (wide, *to_official), "is damaged: 'img_size' is no valid str"
    yield (pretrained, *to_timm, "-a", "vit_tiny"), "holds vit_nano, not vit_tiny: drop"


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


def test_the_export_of_a_classifier_says_what_was_measured(tmp_path, capsys):
    model = create_backbone(BackboneConfig("vit_nano", (16, 16), (8, 8)))
    model.head = Classifier(model.num_features, 3)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    stated = BackboneConfig("vit_nano", (16, 16), (8, 8)).to_dict()
    names = ["1", "10", "2"]  # timm would number them 1, 2, 10
    torch.save(stated | dict(state_dict=state, class_names=names), tmp_path / "probe.pth")
    out = run(tmp_path / "probe.pth", tmp_path / "out", "timm", "--with-heads")
    assert load_class_map(str(out / "class_map.txt")) == {"1": 0, "10": 1, "2": 2}
    assert "--crop-pct 1" in json.loads((out / "config.json").read_text())["preprocessing"]
    assert f"--class-map {out}/class_map.txt; measured here" in capsys.readouterr().out
