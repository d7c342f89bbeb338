"""Weights of the field through the scripts' door: features as in the project that wrote them."""

import argparse
import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import TINY
from official import mmpretrain_names, pretraining
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from engine import checkpoint, load_backbone, weights
from engine.backbones import BackboneConfig, Classifier, create_backbone
from engine.data.decode import RGB
from engine.errors import UserError
from moco import MoCo

SIX_HEADS = "timm/vit_small_patch16_224"
NANO = dict(embed_dim=128, depth=4, num_heads=4, img_size=16, patch_size=8)
NANO_FLAGS = ["-a", "vit_nano", "--img-size", 16, "--patch-size", 8]


def randomized(model):
    """In eval mode, with weights and statistics that no initialization has."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = 0.02 * torch.randn(value.shape, generator=generator)
                is_scale = value.ndim == 1 and name.endswith(("weight", "var"))
                value.copy_(noise.abs() + 1 if is_scale else noise)
    return model.eval()


def theirs(name="vit_tiny_patch16_224", **kwargs):
    return randomized(timm.create_model(name, **dict(num_classes=0) | kwargs))


@torch.no_grad()
def assert_same_features(ours, other, size=(224, 224), in_chans=3):
    x = torch.randn(2, in_chans, *size)
    expected = other(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)


def saved(folder, content, name="theirs.pth"):
    torch.save(content, folder / name)
    return folder / name


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def namespace(**args):
    return argparse.Namespace(lr=0.1, output_dir="out", **args)


# What each project writes → the model that computes its features.


def deit(folder):
    model = theirs("vit_small_patch16_224", num_classes=5)
    path = saved(folder, dict(model=model.state_dict(), epoch=3, args=namespace(model="unknown")))
    model.reset_classifier(0)
    return path, model, dict(arch=SIX_HEADS)


def deit_with_args(folder):
    """A checkpoint of a run: its Namespace names the model, and with it the number of heads."""
    model = theirs("deit_small_patch16_224")
    args = namespace(model="deit_small_patch16_224")
    return saved(folder, dict(model=model.state_dict(), args=args)), model, {}


def mae(folder):
    """The encoder with the decoder of its pre-training."""
    model = theirs()
    decoder = ("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight")
    state = model.state_dict() | {key: torch.ones(4) for key in decoder}
    args = namespace(model="mae_vit_tiny_patch16")
    return saved(folder, dict(model=state, optimizer={}, args=args)), model, dict(arch="vit_tiny")


def dino(folder):
    model = theirs("vit_small_patch8_224", img_size=64)
    head = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    teacher = prefixed(model.state_dict(), "backbone.") | head
    student = {key: torch.zeros_like(value) for key, value in prefixed(teacher, "module.").items()}
    content = dict(student=student, teacher=teacher, args=namespace(arch="vit_small", patch_size=8))
    about = dict(arch="timm/vit_small_patch8_224", img_size=64, size=(64, 64))
    return saved(folder, content), model, about


def dino_student(folder):
    model = randomized(torchvision.models.resnet18())
    model.fc = torch.nn.Identity()
    state = prefixed(model.state_dict(), "module.backbone.")
    return saved(folder, dict(student=state)), model, dict(arch="resnet18")


def torchvisions(folder):
    model = randomized(torchvision.models.resnet50(num_classes=3))
    path = saved(folder, model.state_dict())
    model.fc = torch.nn.Identity()
    return path, model, dict(arch="resnet50")


def timm_folder(folder, **model_args):
    model = theirs("vit_tiny_patch16_224", img_size=32, in_chans=1)
    save_file(model.state_dict(), folder / "model.safetensors")
    images = dict(input_size=(1, 32, 32), mean=[0.3], std=[0.2])
    args = dict(img_size=32, in_chans=1) | model_args
    config = dict(architecture="vit_tiny_patch16_224", model_args=args, pretrained_cfg=images)
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model, dict(size=(32, 32), in_chans=1)


def timm_run(folder):
    """A checkpoint of timm's train.py."""
    model = theirs("convnext_atto")
    content = dict(arch="convnext_atto", state_dict=model.state_dict(), args=namespace())
    return saved(folder, content), model, {}


def timm_weights(folder):
    """Nothing but names and tensors, of a backbone that is neither ours nor torchvision's."""
    model = theirs("convnext_atto", num_classes=3)
    path = saved(folder, model.state_dict())
    model.reset_classifier(0)
    return path, model, dict(arch="timm/convnext_atto")


def mmpretrain(folder):
    model = theirs()
    state = mmpretrain_names(model.state_dict())
    state["head.predictor.fc0.weight"] = torch.ones(2, 2)
    content = dict(meta=dict(epoch=300), state_dict=state)
    return saved(folder, content), model, dict(arch="vit_tiny")


FORMATS = [deit, deit_with_args, mae, dino, dino_student, torchvisions, timm_folder, timm_run,
           timm_weights, mmpretrain]  # fmt: skip


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_features_equal_those_of_the_project_that_wrote_the_weights(tmp_path, write):
    path, model, about = write(tmp_path)
    about = dict(arch=None, img_size=None, size=(224, 224), in_chans=3) | about
    ours, transform = load_backbone(str(path), about["arch"], about["img_size"])
    assert transform.crops.size == about["size"]
    assert_same_features(ours, model, about["size"], about["in_chans"])


def test_a_vit_is_interpolated_to_another_size(tmp_path):
    path, model, _ = mae(tmp_path)
    ours, _ = load_backbone(path, "vit_tiny", img_size=384)
    expected = resample_abs_pos_embed(model.pos_embed, (24, 24), (14, 14))
    torch.testing.assert_close(ours.pos_embed, expected, rtol=0, atol=0)


# What is refused, in one line.


def pickled_classes(folder):
    return saved(folder, dict(model={"a": torch.ones(1)}, best=Fraction(1, 2)))


def plain_vit_small(folder):
    return saved(folder, theirs("vit_small_patch16_224").state_dict())


def fine_tuned_mae(folder):
    state = theirs().state_dict()
    state = {key.replace("norm.", "fc_norm.") if key[:5] == "norm." else key: state[key]
             for key in state}  # fmt: skip
    return saved(folder, dict(model=state)), "-a", "vit_tiny"


def registers(folder):
    return timm_folder(folder, reg_tokens=4)[0]


REFUSED = {
    pickled_classes: "it holds fractions.Fraction, which could run code; if you trust it, load",
    plain_vit_small: "states no architecture: name it, for example -a resnet50 or -a timm/NAME; a "
    "ViT-S has 12 heads as -a vit_small (MoCo v3's) and 6 as -a timm/vit_small_patch16_224",
    fine_tuned_mae: 'does not fit this model: Missing key(s) in state_dict: "norm.weight"',
    registers: "has model_args that can't be built: reg_tokens",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_a_refusal_names_the_remedy_in_one_line(tmp_path, script, write):
    args = write(tmp_path)
    args = args if isinstance(args, tuple) else (args,)
    probe = ["digits", "--knn", "--epochs", 0, "--device", "cpu", "--workers", 0, "--pretrained"]
    code, out, err = script("main_lincls.py", *probe, *args)
    assert (code, err.count("\n"), out) == (2, 1, ""), err
    assert REFUSED[write] in err


# Through the scripts.


@pytest.fixture
def nano(tmp_path):
    """A vit_nano of another project's making, with learned positions, as DeiT saves it."""
    model = randomized(timm.models.VisionTransformer(num_classes=0, **NANO))
    return saved(tmp_path, dict(model=model.state_dict(), args=namespace()), "nano.pth"), model


SHORT = ["--device", "cpu", "--amp", "off", "--workers", 0]


@pytest.mark.slow
def test_every_script_takes_weights_of_other_projects(script, tmp_path, nano):
    path, _ = nano
    first = ["digits", *SHORT, "--pretrained", path, *NANO_FLAGS]
    probe = [*first, "-b", 256, "--epochs", 1]
    code, out, err = script("main_lincls.py", *probe, "--output-dir", tmp_path / "probe", "--knn")
    assert code == 0 and "vit_nano, 4 heads" in out and "kNN" in out, err
    tune = ["--output-dir", tmp_path / "tuned", "--warmup-epochs", 0, "--img-size", 24]
    code, out, err = script("main_finetune.py", *probe, *tune)
    assert code == 0, err
    code, _, err = script("tools/features.py", *first, "--out", tmp_path / "a.npz")
    assert code == 0, err

    # What they leave gives its backbone in turn.
    for left in ("probe/linear_lr0.1.pth", "tuned/best.pth"):
        again = ["digits", *SHORT, "--pretrained", tmp_path / left, "--knn", "--epochs", 0]
        code, out, err = script("main_lincls.py", *again)
        assert code == 0 and "kNN" in out, err


def test_a_classifier_of_another_project_is_measured(script, tmp_path):
    model = randomized(timm.models.VisionTransformer(num_classes=10, **NANO))
    path = saved(tmp_path, dict(model=model.state_dict()))
    measure = ["digits", *SHORT, "--pretrained", path, *NANO_FLAGS, "--evaluate"]
    code, out, err = script("main_lincls.py", *measure)
    assert code == 0 and "top-1" in out and "on 360 images" in out, err


def state_of(path):
    return checkpoint.without_module_prefix(checkpoint.load(path)["state_dict"])


SLOW_SOURCE = pytest.param("all of it", marks=pytest.mark.slow)


@pytest.mark.parametrize("source", ["other project", "other widths", SLOW_SOURCE])
def test_init_from(script, tmp_path, nano, pretrained, source):
    """The model as it is before the first step, which lr 0 and m 1 keep."""
    path = nano[0] if source == "other project" else pretrained
    dims = ["--moco-dim", 16] if source == "other widths" else []
    run = [*TINY, "--epochs", 1, "--warmup-epochs", 0, "--lr", 0, "--moco-m", 1, "--knn-every", 0]
    run += ["--output-dir", tmp_path / "run", "--init-from", path]
    code, out, err = script("main_moco.py", *run, *dims)
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("init ")]
    state, old = state_of(tmp_path / "run" / checkpoint.LAST), state_of(pretrained)
    if source == "all of it":
        weights_of = {k for k, v in old.items() if v.is_floating_point() and "running" not in k}
        assert not lines and all(torch.equal(state[k], old[k]) for k in weights_of)
        return

    stored = nano[1] if source == "other project" else load_backbone(path)[0]
    for key, value in stored.state_dict().items():
        assert torch.equal(state[f"base_encoder.{key}"], value), key
        assert torch.equal(state[f"momentum_encoder.{key}"], value), key
    assert len(lines) == 1 and "it has no heads that fit: they start at random" in lines[0]
    assert not torch.equal(state["predictor.0.weight"][:, :16], old["predictor.0.weight"][:, :16])


@pytest.mark.slow
def test_a_run_that_started_from_learned_positions_resumes_with_them(script, tmp_path, nano):
    path, model = nano
    run = [*TINY, "--init-from", path, "--output-dir", tmp_path / "run", "--knn-every", 0]
    assert script("main_moco.py", *run, "--epochs", 1)[0] == 0
    more = ["--epochs", 2, "--resume", "auto", "--allow-changed-args"]
    code, out, err = script("main_moco.py", *run, *more)
    assert code == 0 and "resumed after step 5" in out, err
    state = state_of(tmp_path / "run" / checkpoint.LAST)
    assert torch.equal(state["base_encoder.pos_embed"], model.pos_embed)
    assert torch.equal(state["momentum_encoder.pos_embed"], model.pos_embed)


def start(model, path, arch, **options):
    return weights.initialize_moco(model, path, dict(arch=arch, **options), RGB)


@pytest.mark.slow
def test_init_from_a_vit_small_needs_its_heads(tmp_path):
    path = plain_vit_small(tmp_path)
    model = MoCo(create_backbone(BackboneConfig("vit_small")), dim=8, mlp_dim=8)
    with pytest.raises(UserError, match="For --init-from, tools/convert"):
        start(model, path, "vit_small")
    six = MoCo(create_backbone(BackboneConfig(SIX_HEADS)), dim=8, mlp_dim=8)
    assert SIX_HEADS in start(six, path, SIX_HEADS)
    twelve = saved(tmp_path, pretraining("vit_small", dim=8, mlp=8), "official.pth")
    with pytest.raises(UserError, match="trained with 12 heads, this model has 6"):
        start(six, twelve, SIX_HEADS)


def test_init_from_asks_for_the_pixels_of_the_weights(tmp_path, pretrained):
    model = MoCo(create_backbone(BackboneConfig("vit_nano", 16, 8)), dim=8, mlp_dim=8)
    stated = dict(std=(0.5, 0.5, 0.5), value_range=(0.0, 4095.0))
    path = saved(tmp_path, checkpoint.load(pretrained) | stated)
    with pytest.raises(
        UserError, match=r"trained with std \(0\.5, 0\.5, 0\.5\), value_range \(0\.0, 4095"
    ):
        start(model, path, "vit_nano")
    assert start(model, path, "vit_nano", **stated)


# From Python.


def test_load_backbone_sees_images_as_the_tools_do(script, tmp_path, pretrained, image_file):
    paths = [image_file(f"data/{n}.png", height=20 + 9 * n, width=40) for n in range(3)]
    out = tmp_path / "features.npz"
    flags = ["--pretrained", pretrained, *SHORT, "--out", out]
    assert script("tools/features.py", tmp_path / "data", *flags)[0] == 0
    expected = torch.tensor(np.load(out)["features"])

    backbone, transform = load_backbone(pretrained)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    for read in (str, Image.open, lambda path: torchvision.io.read_image(str(path))):
        images = torch.stack([transform(read(path)) for path in paths])
        assert images.dtype == torch.float32 and images.shape == (3, 3, 16, 16)
        torch.testing.assert_close(backbone(images), expected, rtol=0, atol=1e-5)
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(8, 8).byte(), torch.zeros(1, 8, 8).byte(), 3):
        with pytest.raises(ValueError, match=r"a uint8 tensor \[3, H, W\]"):
            transform(wrong)
    with pytest.raises(TypeError):
        load_backbone(pretrained, size=16)


def test_the_transform_turns_gray_and_rotated_images_as_the_files_are(tmp_path, pretrained):
    _, transform = load_backbone(pretrained)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    for name, extra in (("gray.png", {}), ("rotated.png", dict(exif=exif))):
        Image.fromarray(pixels).save(tmp_path / name, **extra)
        by_path, by_image = transform(tmp_path / name), transform(Image.open(tmp_path / name))
        assert torch.equal(by_path, by_image)


def test_import_of_engine_is_cheap():
    check = "import sys, engine; assert engine.load_backbone and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    "name, argv",
    [
        ("main_lincls.py", "digits --pretrained {} --epochs 0 --knn --device cpu"),
        ("main_lincls.py", "digits --pretrained {} --evaluate --device cpu"),
        ("main_finetune.py", "digits --pretrained {} --evaluate --epochs 2 --device cpu"),
        ("tools/convert.py", "{} out.pth --to deit"),
        ("tools/features.py", "digits --pretrained {} --out f.npz --device cpu"),
    ],
)
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(bias=torch.nan), "holds weights that are not finite, in "),
        (dict(std=(0.0, 0.2, 0.2)), "can't normalize: file.pth states it"),
        (dict(class_names=["a", "a"]), "class names that are not distinct texts: a, a"),
    ],
)
def test_what_gives_wrong_numbers_is_refused(
    tmp_path, monkeypatch, refusal, name, argv, change, words
):
    monkeypatch.chdir(tmp_path)
    config = BackboneConfig("vit_nano", (16, 16), (8, 8))
    model = create_backbone(config)
    model.head = Classifier(model.num_features, 2)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state["module.norm.bias"][0] = change.get("bias", 0)
    content = config.to_dict() | dict(class_names=["a", "b"], state_dict=state) | change
    torch.save(content, "file.pth")
    assert words in refusal(name, *argv.format("file.pth").split())
