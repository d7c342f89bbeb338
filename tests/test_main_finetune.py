"""Fine-tuning as its users run it, and its parts compared with the published recipes."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, interrupted_after_saving
from PIL import Image
from timm.data import create_transform

import main_finetune
from engine import checkpoint
from engine.datasets import load_splits
from engine.loader import CenterCrops
from engine.log import read_log

TINY = (
    "digits --batch-size 256 --epochs 2 --warmup-epochs 1 --workers 0 --device cpu --amp off "
    "--ema 0.6 --lr 1e-3 --layer-decay 0.8 --clip-grad 5"
).split()


def finetune(script, folder, *args):
    code, out, err = script("main_finetune.py", *TINY, "--output-dir", folder, *args)
    assert code == 0, err
    return out


def test_it_leaves_last_and_best(script, tmp_path, pretrained):
    out = finetune(script, tmp_path, "--pretrained", pretrained)
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

    argv = ["digits", "--device", "cpu", "--amp", "off", "--evaluate", "--pretrained"]
    code, out, _ = script("main_finetune.py", *argv, tmp_path / "checkpoint.pth")
    assert code == 0 and f"top-1 {lines[-1]['acc1']:.2f} %" in out
    code, averaged, _ = script("main_finetune.py", *argv, tmp_path / "checkpoint.pth",
                               "--evaluate-ema")  # fmt: skip
    assert code == 0 and averaged != out


def test_best_is_measured_as_its_run_did(script, tmp_path, pretrained):
    finetune(script, tmp_path, "--pretrained", pretrained, "--evaluate-ema")
    best = checkpoint.load(tmp_path / "best.pth")["best_acc1"]
    argv = ["digits", "--device", "cpu", "--amp", "off", "--workers", 0, "--evaluate"]
    for name in ("main_finetune.py", "main_lincls.py"):
        code, out, err = script(name, *argv, "--pretrained", tmp_path / "best.pth")
        assert code == 0 and f"top-1 {best:.2f} %" in out, (name, out, err)
        assert "best.pth: the moving average, which its run measured" in out


def test_both_scripts_measure_a_classifier_alike(script, tmp_path, pretrained, monkeypatch):
    finetune(script, tmp_path / "tuned", "--pretrained", pretrained)
    argv = "digits -b 256 --epochs 1 --workers 0 --device cpu --amp off --output-dir".split()
    argv += [tmp_path / "probe", "--pretrained", pretrained]
    assert script("main_lincls.py", *argv)[0] == 0
    seen, crop = [], CenterCrops.__init__

    def spy(self, dataset, size, interpolation="bilinear"):
        seen.append(interpolation)
        crop(self, dataset, size, interpolation)

    monkeypatch.setattr(CenterCrops, "__init__", spy)
    for path, used in (("tuned/best.pth", "bicubic"), ("probe/linear_lr0.1.pth", "bilinear")):
        lines = []
        for name in ("main_finetune.py", "main_lincls.py"):
            argv = ["digits", "--device", "cpu", "--amp", "off", "--evaluate"]
            code, out, err = script(name, *argv, "--pretrained", tmp_path / path)
            assert code == 0, err
            lines.append(out)
        assert lines[0] == lines[1] and set(seen) == {used}, path
        seen.clear()


@pytest.mark.parametrize("lr_per", ["epoch", pytest.param("iteration", marks=pytest.mark.slow)])
def test_interrupted_and_resumed_equals_uninterrupted(script, tmp_path, pretrained, lr_per):
    argv = ["--pretrained", pretrained, "--drop-path", 0.2, "--lr-per", lr_per, "--evaluate-ema"]
    finetune(script, tmp_path / "whole", *argv, "--workers", int(lr_per == "epoch"))
    broken = tmp_path / "broken"
    with interrupted_after_saving():
        assert script("main_finetune.py", *TINY, "--output-dir", broken, *argv)[0] == 130
    torch.rand(7), np.random.rand(7), random.random()  # another process has drawn otherwise
    finetune(script, broken, *argv, "--resume", "auto", "--workers", 1)
    whole, resumed = (checkpoint.load(tmp_path / n / "checkpoint.pth") for n in ("whole", "broken"))
    for name in ("state_dict", "ema"):
        for key, value in whole[name].items():
            assert torch.equal(value, resumed[name][key]), (name, key)
    assert whole["results"] == resumed["results"]


def test_drop_path_needs_as_many_processes(script, tmp_path, pretrained):
    argv = ["--pretrained", pretrained, "--epochs", 1, "--warmup-epochs", 0, "--drop-path", 0.2]
    finetune(script, tmp_path, *argv)
    state = checkpoint.load(tmp_path / "checkpoint.pth")
    checkpoint.save(tmp_path, state | dict(world_size=2))
    argv = ["main_finetune.py", *TINY, "--output-dir", tmp_path, *argv, "--resume", "auto"]
    code, _, err = script(*argv)
    assert code == 2 and "2 → 1 processes" in err and err.count("\n") == 1
    assert script(*argv, "--allow-changed-args")[0] == 0


def test_from_scratch_is_the_same_backbone_with_random_weights(script, tmp_path, pretrained):
    out = finetune(script, tmp_path, "--pretrained", pretrained, "--from-scratch")
    assert "vit_nano, from a random initialization" in out
    assert checkpoint.load(tmp_path / "checkpoint.pth")["num_heads"] == 4


def test_resnets_are_tuned_too(script, tmp_path, two_classes):
    argv = [two_classes, "-a", "resnet18", "--from-scratch", "--img-size", 32, "-b", 8, "--lr", 0.1,
            "--device", "cpu", "--epochs", 1, "--warmup-epochs", 0,
            "--output-dir", tmp_path]  # fmt: skip
    code, _, err = script("main_finetune.py", *argv, "--drop-path", 0, "--amp", "off")
    assert code == 0, err
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
def test_bad_input_gets_one_line(script, tmp_path, pretrained, case):
    line, words = BAD[case]
    line = line.format(pre=f"--pretrained {pretrained}", folder=pretrained.parent)
    run = tmp_path / "run"
    argv = [
        "digits",
        "-b",
        64,
        "--lr",
        1e-3,
        "--output-dir",
        run,
        "--device",
        "cpu",
        "--amp",
        "off",
    ]
    code, out, err = script("main_finetune.py", *argv, *line.split())
    assert (code, err.count("\n")) == (2, 1), out + err
    assert err.startswith("main_finetune.py: error: ") and words in err
    assert not run.exists()


def parse(name, *args):
    return main_finetune.parse_args([f"@{ROOT}/recipes/{name}.txt", *args, "--pretrained", "x"])


def step_lrs(args, steps_per_epoch):
    """The lr of each step of a run."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=args.lr * args.batch_size / 256)
    schedule = main_finetune.create_schedule(args, optimizer, steps_per_epoch)
    for step in range(args.epochs * steps_per_epoch):
        if args.lr_per == "iteration":
            schedule.step_update(step)
        elif step % steps_per_epoch == 0:
            schedule.step(step // steps_per_epoch)
        yield optimizer.param_groups[0]["lr"]


def test_schedule_of_mm_is_per_iteration():
    """5 epochs linear from 1e-3·lr, then a cosine to 1e-5."""
    args, n, lr = parse("finetune_vit_base_150_mm", "DIR"), 4, 5e-4
    for step, step_lr in enumerate(step_lrs(args, n)):
        t = step / n
        cosine = 1e-5 + (lr - 1e-5) * (1 + math.cos(math.pi * (t - 5) / 145)) / 2
        expected = lr * 1e-3 + (lr - lr * 1e-3) * t / 5 if t < 5 else cosine
        assert step_lr == pytest.approx(expected, rel=1e-9), step


def test_schedule_of_deit_is_per_epoch():
    """5 epochs from 1e-6, cosine to 1e-5, counted from the first epoch."""
    args, n, lr = parse("finetune_vit_base_150_deit", "DIR"), 3, 5e-4 * 1024 / 512
    for step, step_lr in enumerate(step_lrs(args, n)):
        epoch = step // n
        cosine = 1e-5 + (lr - 1e-5) * (1 + math.cos(math.pi * epoch / 150)) / 2
        expected = 1e-6 + (lr - 1e-6) * epoch / 5 if epoch < 5 else cosine
        assert step_lr == pytest.approx(expected, rel=1e-9), step


def test_no_weight_decay_on_norms_biases_class_token_and_position_embedding(
    pretrained, monkeypatch
):
    groups = []
    create = main_finetune.create_optimizer_v2

    def spy(model, **kwargs):
        optimizer = create(model, **kwargs)
        names = {id(p): name for name, p in model.named_parameters()}
        groups.extend(
            (names[id(p)], p.ndim, group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(main_finetune, "create_optimizer_v2", spy)
    args = main_finetune.parse_args(["digits", "-b", "64", "--pretrained", str(pretrained)])
    with pytest.raises(KeyboardInterrupt):
        main_finetune.main(args)
    for name, ndim, decay in groups:
        free = ndim < 2 or name in ("cls_token", "pos_embed")
        assert decay == (0 if free else 0.05), name
    assert {name for name, *_ in groups} >= {"patch_embed.proj.weight", "pos_embed", "head.weight"}


def test_a_view_depends_on_seed_epoch_and_index_alone():
    args = main_finetune.parse_args(["digits", "--from-scratch", "-a", "vit_nano"])
    dataset = load_splits("digits").train_labelled
    transform = main_finetune.create_transform_from_args(args, (16, 16))
    views = main_finetune.AugmentedCrops(dataset, transform, seed=3)
    images, labels = views.__getitems__([(0, 5), (0, 6), (1, 5)]).data
    assert images.shape == (3, 3, 16, 16) and labels.tolist() == dataset.labels[[5, 6, 5]].tolist()
    torch.rand(3), np.random.rand(3), random.random()
    before = torch.get_rng_state()
    again, _ = views.__getitems__([(1, 5), (0, 5)]).data
    assert torch.equal(again[0], images[2]) and torch.equal(again[1], images[0])
    assert not torch.equal(images[0], images[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_strongest_level_of_a_policy_works():
    transform = create_transform((3, 16, 16), is_training=True, auto_augment="rand-m10-inc1-n16")
    image = Image.new("RGB", (16, 16), "white")
    for _ in range(20):
        assert transform(image).isfinite().all()
