"""Fine-tuning as its users run it, and its parts compared with the published recipes."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENV, FP32, PROBE, ROOT, TUNE, interrupted_after_saving

import main_finetune
from engine import checkpoint
from engine.backbones import BackboneConfig, create_backbone
from engine.data.crops import CenterCrops
from engine.data.decode import RGB
from engine.data.splits import load_splits, open_source
from engine.data.timm_crops import TransformedCrops, create_training_transform
from engine.log import read_log

EVALUATE = ("digits", *FP32, "--evaluate", "--pretrained")


@pytest.fixture
def finetune(succeed, pretrained):
    def run(folder, *args):
        start = ("--pretrained", pretrained, "--output-dir", folder)
        return succeed("main_finetune.py", *TUNE, *start, *args)

    return run


def test_it_leaves_last_and_best(finetune, succeed, tmp_path, pretrained):
    out = finetune(tmp_path)
    assert "tuned   top-1" in out and "after 2 epochs; best" in out
    files = {path.name for path in tmp_path.iterdir()}
    assert {"args.json", "log.jsonl", "curves.png", "checkpoint.pth", "best.pth"} <= files
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "acc1" in line]
    assert [line["step"] for line in lines] == [5, 10]

    last, before = checkpoint.load(tmp_path / "checkpoint.pth"), checkpoint.load(pretrained)
    for name in ("patch_embed.proj.weight", "pos_embed", "cls_token", "norm.weight"):
        started = before["state_dict"][f"module.base_encoder.{name}"]
        assert not torch.equal(last["state_dict"][f"module.{name}"], started), f"{name} is fixed"
    assert last["results"]["best"][0][0] == last["best_acc1"]
    assert last["best_acc1"] == pytest.approx(max(line["acc1"] for line in lines), abs=1e-3)

    saved = (*EVALUATE, tmp_path / "checkpoint.pth")
    out = succeed("main_finetune.py", *saved)
    assert f"top-1 {lines[-1]['acc1']:.2f} %" in out
    assert succeed("main_finetune.py", *saved, "--evaluate-ema") != out


def test_best_is_measured_as_its_run_did(finetune, succeed, tmp_path):
    finetune(tmp_path, "--evaluate-ema")
    best = checkpoint.load(tmp_path / "best.pth")["best_acc1"]
    for name in ("main_finetune.py", "main_lincls.py"):
        out = succeed(name, *EVALUATE, tmp_path / "best.pth")
        assert f"top-1 {best:.2f} %" in out
        assert "best.pth: the moving average, which its run measured" in out


def test_both_scripts_measure_a_classifier_alike(
    finetune, succeed, tmp_path, pretrained, monkeypatch
):
    finetune(tmp_path / "tuned")
    probe = ("--epochs", 1, "--output-dir", tmp_path / "probe", "--pretrained", pretrained)
    succeed("main_lincls.py", *PROBE, *probe)
    seen, crop = [], CenterCrops.__init__

    def spy(self, dataset, size, interpolation="bilinear"):
        seen.append(interpolation)
        crop(self, dataset, size, interpolation)

    monkeypatch.setattr(CenterCrops, "__init__", spy)
    for path, used in (("tuned/best.pth", "bicubic"), ("probe/linear_lr0.1.pth", "bilinear")):
        lines = {
            succeed(name, *EVALUATE, tmp_path / path)
            for name in ("main_finetune.py", "main_lincls.py")
        }
        assert len(lines) == 1 and set(seen) == {used}, path
        seen.clear()


@pytest.mark.parametrize("lr_per", ["epoch", pytest.param("iteration", marks=pytest.mark.slow)])
def test_interrupted_and_resumed_equals_uninterrupted(
    script, finetune, tmp_path, pretrained, lr_per
):
    argv = ("--drop-path", 0.2, "--lr-per", lr_per, "--evaluate-ema")
    finetune(tmp_path / "whole", *argv, "--workers", int(lr_per == "epoch"))
    broken = tmp_path / "broken"
    with interrupted_after_saving():
        start = ("--pretrained", pretrained, "--output-dir", broken)
        assert script("main_finetune.py", *TUNE, *start, *argv)[0] == 130
    torch.rand(7), np.random.rand(7), random.random()  # another process has drawn otherwise
    finetune(broken, *argv, "--resume", "auto", "--workers", 1)
    whole, resumed = (checkpoint.load(tmp_path / n / "checkpoint.pth") for n in ("whole", "broken"))
    for name in ("state_dict", "ema"):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), (name, key)
    assert whole["results"] == resumed["results"]


def test_drop_path_needs_as_many_processes(finetune, refusal, tmp_path, pretrained):
    argv = ("--epochs", 1, "--warmup-epochs", 0, "--drop-path", 0.2)
    finetune(tmp_path, *argv)
    state = checkpoint.load(tmp_path / "checkpoint.pth")
    checkpoint.save(tmp_path, state | dict(world_size=2))
    argv += ("--output-dir", tmp_path, "--pretrained", pretrained, "--resume", "auto")
    assert "2 → 1 processes" in refusal("main_finetune.py", *TUNE, *argv)
    finetune(tmp_path, *argv, "--allow-changed-args")


def test_from_scratch_is_the_same_backbone_with_random_weights(finetune, tmp_path):
    assert "vit_nano, from a random initialization" in finetune(tmp_path, "--from-scratch")
    assert checkpoint.load(tmp_path / "checkpoint.pth")["num_heads"] == 4


def test_resnets_are_tuned_too(succeed, tmp_path, two_classes):
    argv = "-a resnet18 --from-scratch --img-size 32 -b 8 --lr 0.1 --drop-path 0".split()
    argv += ["--epochs", 1, "--warmup-epochs", 0, "--output-dir", tmp_path]
    succeed("main_finetune.py", two_classes, *argv, *FP32)
    assert "module.fc.weight" in checkpoint.load(tmp_path / "best.pth")["state_dict"]


BAD = {
    "drop path of a ResNet": ("-a resnet18 --from-scratch", "--drop-path is for ViTs"),
    "layer decay of a ResNet": (
        "-a resnet18 --from-scratch --drop-path 0 --layer-decay 0.7", "--layer-decay is for ViTs",
    ),
    "odd batch": ("{pre} -b 63", "need an even number of images"),
    "unknown policy": ("{pre} --aa best", "timm knows no augmentation policy"),
    "part of a policy": ("{pre} --aa rand-mx-mstd0.5", "'mx' is not a letter and a number"),
    "folder of a run": ("--pretrained {folder}", "is the folder of a run: name"),
    "average without memory": ("{pre} --ema 0", "would average nothing"),
    "nothing to do": ("{pre} --epochs 0 --warmup-epochs 0", "leaves nothing to do"),
    "average of nothing": ("{pre} --evaluate-ema", "needs --ema DECAY"),
    "long warm-up": ("{pre} --epochs 3", "--warmup-epochs 5 is more than --epochs 3"),
    "lr that rises": ("{pre} --lr 1e-5", "--min-lr 1e-05 is above the peak lr"),
    "warm-up that falls": ("{pre} --warmup-lr 1", "--warmup-lr 1 is above the peak lr"),
    "warm-up without end": (
        "{pre} --epochs 5", "--warmup-epochs 5 leaves no epoch at the full --lr",
    ),
    "average of the start": (
        "{pre} --epochs 6 --ema 0.99996",
        "--ema 0.99996 after 132 steps would still be 99 % initial weights",
    ),
    "no average saved": ("{pre} --evaluate --evaluate-ema", "no 'ema'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(refusal, tmp_path, pretrained, case):
    line, words = BAD[case]
    line = line.format(pre=f"--pretrained {pretrained}", folder=pretrained.parent)
    argv = ("digits", *FP32, "-b", 64, "--lr", 1e-3, "--output-dir", tmp_path / "run")
    assert words in refusal("main_finetune.py", *argv, *line.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, peak, start, cosine_start", [("mm", 5e-4, 5e-7, 5), ("deit", 1e-3, 1e-6, 0)]
)
def test_the_schedules_are_those_of_the_recipes(name, peak, start, cosine_start):
    """5 epochs linear, then a cosine to 1e-5. MMPretrain: per iteration, after the warm-up.

    DeiT: per epoch, counted from the first one.
    """
    recipe = f"@{ROOT}/recipes/finetune_vit_base_150_{name}.txt"
    args = main_finetune.parse_args([recipe, "DIR", "--pretrained", "x"])
    for step in range(3 * 150):
        t = step / 3 if name == "mm" else step // 3
        progress = (t - cosine_start) / (150 - cosine_start)
        cosine = 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * progress)) / 2
        expected = start + (peak - start) * t / 5 if t < 5 else cosine
        run = SimpleNamespace(step=step, epoch=step // 3)
        lr = main_finetune.current_lr(args, run, steps_per_epoch=3)
        assert lr == pytest.approx(expected, rel=1e-12), step


def test_no_weight_decay_on_norms_biases_class_token_and_position_embedding():
    args = main_finetune.parse_args("digits --from-scratch -a vit_nano".split())
    config = BackboneConfig("vit_nano", 16)
    model = main_finetune.add_classifier(create_backbone(config), 10, config, ENV)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in main_finetune.create_adamw(args, model, "vit_nano").param_groups
        for p in group["params"]
    }
    assert decays.keys() == set(names.values())
    for name, p in model.named_parameters():
        free = p.ndim < 2 or name in ("cls_token", "pos_embed")
        assert decays[name] == (0 if free else 0.05), name


def test_a_view_depends_on_seed_epoch_and_index_alone():
    dataset = load_splits(open_source("digits")).train
    policy = ("rand-m9-mstd0.5-inc1", 0.25, "bicubic")
    transform = create_training_transform((16, 16), RGB, 0.08, *policy)
    views = TransformedCrops(dataset, transform, seed=3)
    images, labels = views.__getitems__([(0, 5), (0, 6), (1, 5)])[0]
    assert images.shape == (3, 3, 16, 16) and labels.tolist() == dataset.labels[[5, 6, 5]].tolist()
    torch.rand(3), np.random.rand(3), random.random()
    again, _ = views.__getitems__([(1, 5), (0, 5)])[0]
    assert torch.equal(again[0], images[2]) and torch.equal(again[1], images[0])
    assert not torch.equal(images[0], images[2])


def test_the_strongest_level_of_a_policy_works():
    policy = ("rand-m10-inc1-n16", 0, "bicubic")
    transform = create_training_transform((16, 16), RGB, 0.08, *policy)
    white = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    for _ in range(20):
        assert transform(white).isfinite().all()
