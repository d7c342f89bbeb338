"""The recipes have the numbers of the published tables."""

import json
import re

import pytest
from conftest import CPU, ROOT
from timm.data import ImageNetInfo

import main_finetune
import main_lincls
import main_moco
from engine import flags
from engine.backbones import choose_config, create_backbone
from engine.data.named import NAMED_SETS

COLUMNS = "arch epochs optimizer lr wd moco_m moco_t warmup_epochs crop_min stop_grad clip".split()
ROWS = {
    "resnet50_100": ("resnet50", 100, "lars", 0.6, 1e-6, 0.99, 1.0, 10, 0.2, False, None),
    "resnet50_300": ("resnet50", 300, "lars", 0.3, 1e-6, 0.99, 1.0, 10, 0.2, False, None),
    "resnet50_800": ("resnet50", 800, "lars", 0.3, 1.5e-6, 0.996, 1.0, 10, 0.2, False, None),
    "vit_small_300": ("vit_small", 300, "adamw", 1.5e-4, 0.1, 0.99, 0.2, 40, 0.08, True, None),
    "vit_base_300": ("vit_base", 300, "adamw", 1.5e-4, 0.1, 0.99, 0.2, 40, 0.08, True, None),
    "vit_large_300": ("vit_large", 300, "adamw", 1.5e-4, 0.1, 0.99, 0.2, 40, 0.08, True, 5.0),
    "vit_conv_small_300": (
        "vit_conv_small", 300, "adamw", 1.5e-4, 0.1, 0.99, 0.2, 40, 0.08, False, None,
    ),
    "vit_conv_base_300": (
        "vit_conv_base", 300, "adamw", 1.5e-4, 0.1, 0.99, 0.2, 40, 0.08, False, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_recipe_has_the_published_numbers(name):
    args = main_moco.parse_args([f"@{ROOT}/recipes/{name}.txt", "DIR"])
    values = vars(args) | {"stop_grad": args.stop_grad_conv1, "clip": args.clip_grad}
    assert tuple(values[column] for column in COLUMNS) == ROWS[name]
    assert (args.batch_size, args.moco_m_cos, args.img_size) == (4096, True, (224,))
    assert (args.moco_dim, args.moco_mlp_dim) == (256, 4096)
    assert args.data == "DIR" and args.output_dir == f"runs/{name}"
    assert args.encode_chunk == (256 if args.arch == "vit_large" else 0)  # the same gradient


# Published by others on smaller data, with what they state of their settings.
SMALL_TARGETS = {
    "cifar10_resnet18_1000": ("cifar10", "resnet18", 1000, 256, "sgd", 0.3, 1e-6, (32,), (0.0,)),
    "cifar100_resnet18_1000": ("cifar100", "resnet18", 1000, 256, "sgd", 0.3, 1e-6, (32,), (0.0,)),
    "imagenet100_resnet18_400": ("DIR", "resnet18", 400, 256, "sgd", 0.3, 1e-6, (224,), (1, 0.1)),
    "imagenet100_resnet50_400": ("DIR", "resnet50", 400, 256, "sgd", 0.3, 1e-6, (224,), (1, 0.1)),
    "imagenette_vit_small_200": (
        "imagenette", "vit_small", 200, 256, "adamw", 1.5e-4, 0.1, (224,), (1, 0.1),
    ),
    "vit_tiny_400": ("DIR", "vit_tiny", 400, 1024, "adamw", 1.5e-4, 0.1, (224,), (1, 0.1)),
    "stl10_resnet18_400": ("stl10", "resnet18", 400, 256, "sgd", 0.3, 1e-6, (96,), (1, 0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL_TARGETS)
def test_recipes_of_small_targets_have_the_published_settings(name):
    data = SMALL_TARGETS[name][0]
    args = main_moco.parse_args([f"@{ROOT}/recipes/{name}.txt", *(["DIR"] * (data == "DIR"))])
    columns = "data arch epochs batch_size optimizer lr wd img_size blur_p".split()
    assert tuple(getattr(args, column) for column in columns) == SMALL_TARGETS[name]
    assert (args.moco_t, args.moco_m, args.moco_m_cos, args.crop_min) == (0.2, 0.99, True, 0.08)
    assert (args.moco_dim, args.moco_mlp_dim, tuple(args.solarize_p)) == (256, 4096, (0.0, 0.2))
    assert args.small_stem == data.startswith("cifar") and args.output_dir == f"runs/{name}"
    assert name in (ROOT / "docs/results.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL_TARGETS, *ROWS])
def test_a_recipe_starts_at_full_architecture(succeed, image_file, tmp_path, name):
    if name == "vit_large_300":
        pytest.skip("16 GiB")
    for i in range(2):
        image_file(f"images/{i}.jpg", height=64, width=80)
    argv = [f"@{ROOT}/recipes/{name}.txt", tmp_path / "images", "-b", 2, "--epochs", 1, *CPU]
    succeed("main_moco.py", *argv, "--warmup-epochs", 0, "--output-dir", tmp_path / "run")


def test_the_classes_of_imagenet_100_are_those_of_imagenet():
    names = (ROOT / "docs/imagenet100.txt").read_text().split()
    assert len(set(names)) == len(names) == 100 and names == sorted(names)
    assert set(names) <= set(ImageNetInfo().label_names())


def test_recipes_state_the_estimated_memory():
    estimated = {}
    for name in ("memory_estimate_512", "memory_estimate_512_chunks"):
        report = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        for row in report["rows"]:
            estimated[row["arch"], row["encode_chunk"]] = row["estimated_gib"]
    for name in [*ROWS, "ablations/vit_huge_300"]:
        path = ROOT / f"recipes/{name}.txt"
        args = main_moco.parse_args([f"@{path}", "DIR"])
        [gib] = re.findall(r"an estimated (\S+) GiB on each of 8 GPUs", path.read_text())
        assert float(gib) == pytest.approx(estimated[args.arch, args.encode_chunk], abs=0.06), name


def test_the_table_states_the_estimated_batches():
    largest = {}
    for name in ("memory_estimate", "memory_estimate_chunks"):
        report = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        for row in report["rows"]:
            batches = largest.setdefault((row["arch"], row["encode_chunk"]), [])
            batches.append(row["largest_batch"])
    names = {
        "ViT-S": "vit_small",
        "ViT-B": "vit_base",
        "ViT-L": "vit_large",
        "ViT-B, convolutional stem": "vit_conv_base",
        "ResNet-50": "resnet50",
    }
    table = (ROOT / "docs/speed.md").read_text().split("| 141 GB |\n")[1].split("\n\n")[0]
    for line in table.splitlines()[1:]:
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        label, _, flag = label.partition(", `--encode-chunk ")
        kinds = [int(flag.strip("`") or 0)] if flag else [0, 128]
        for i, cell in enumerate(cells):
            shown = [cell.split(" (")[0] for cell in cell.split(" / ")]
            batches = [largest[names[label], chunk][i] for chunk in kinds[: len(shown)]]
            assert shown == [f"{n:,}" if n else "–" for n in batches], line


PROBES = {"lincls_resnet50": 0.4, "lincls_vit_small": 12, "lincls_vit_base": 12}


@pytest.mark.parametrize("name", PROBES)
def test_probe_has_the_published_numbers(name):
    args = main_lincls.parse_args([f"@{ROOT}/recipes/{name}.txt", "DIR", "--pretrained", "x"])
    [lr] = main_lincls.epoch_lrs(args, epoch=0)
    assert lr == pytest.approx(PROBES[name])
    assert (args.epochs, args.batch_size, args.crop_min, args.batchnorm) == (90, 1024, 0.08, False)


# The same in all: RandAugment 9 with std .5, increasing; crop-min .08, smoothing .1, min-lr 1e-5.
FINETUNING = (
    "epochs batch_size effective wd clip_grad warmup_epochs warmup_lr lr_per drop_path reprob "
    "mixup cutmix repeated_aug ema evaluate_ema amp"
).split()
DEIT = (0.05, None, 5, 1e-6, "epoch")
FINETUNED = {
    "vit_small_deit": (300, 1024, 1e-3, *DEIT, 0.1, 0.25, 0.8, 1, 3, 0.99996, False, "auto"),
    "vit_base_150_deit": (150, 1024, 1e-3, *DEIT, 0.1, 0.25, 0.8, 1, 3, 0.99996, False, "auto"),
    "vit_large_100_deit": (100, 1024, 1e-3, *DEIT, 0.5, 0.25, 0.8, 1, 3, 0.99996, False, "auto"),
    "vit_base_150_mm": (
        150, 512, 5e-4, 0.05, 5.0, 5, 5e-7, "iteration", 0.1, 0.25, 0.8, 1, 1, 0.99996, True, "off",
    ),
    "vit_large_100_mm": (
        100, 512, 5e-4, 0.05, 5.0, 5, 5e-7, "iteration", 0.5, 0.25, 0.8, 1, 1, 0.99996, True, "off",
    ),
    # 3e-4 · batch/512 at 8 · 128 images
    **{
        f"vit_base_{name}": (
            100, 1024, 6e-4, wd, None, 3, 1e-6, "epoch", drop, erase, mix, cut, 1, 0.99996, False,
            "auto",
        )
        for name, wd, drop, erase, mix, cut in (
            ("cifar10", 0.1, 0.1, 0, 0.8, 1),
            ("cifar100", 0.1, 0.1, 0, 0.5, 1),
            ("flowers102", 0.3, 0.1, 0.25, 0, 0),
            ("pets", 0.1, 0, 0, 0.8, 0),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FINETUNED)
def test_fine_tuning_has_the_published_numbers(name):
    named = name.split("_")[-1] in NAMED_SETS
    argv = [f"@{ROOT}/recipes/finetune_{name}.txt", *([] if named else ["DIR"])]
    args = main_finetune.parse_args([*argv, "--pretrained", "x"])
    values = vars(args) | {"effective": pytest.approx(args.lr * args.batch_size / 256)}
    assert tuple(values[key] for key in FINETUNING) == FINETUNED[name]
    assert (args.aa, args.crop_min, args.smoothing, args.min_lr, args.layer_decay) == (
        "rand-m9-mstd0.5-inc1", 0.08, 0.1, 1e-5, None,
    )  # fmt: skip
    assert args.data == (name.split("_")[-1] if named else "DIR")


# Recipes for small sets, which benchmarks/accuracy.py and benchmarks/study.py run.
SMALL = dict(
    digits=main_moco,
    study_digits=main_moco,
    lincls_digits=main_lincls,
    finetune_digits=main_finetune,
    fashion_mnist=main_moco,
    lincls_fashion_mnist=main_lincls,
    finetune_fashion_mnist=main_finetune,
    finetune_fashion_mnist_1=main_finetune,
    finetune_fashion_mnist_10=main_finetune,
)


@pytest.mark.parametrize("name", SMALL)
def test_recipes_of_small_sets_name_their_set_and_flags(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # some begin with another recipe
    args = SMALL[name].parse_args([f"@recipes/{name}.txt"])
    assert args.data in ("digits", "fashion_mnist") and args.data.split("_")[0] in name


OTHERS = {"finetune_vit_tiny_300", "finetune_few_labels"}


def test_every_recipe_is_in_a_table_and_later_flags_win():
    files = {path.stem for path in (ROOT / "recipes").glob("*.txt")}
    finetuned = {f"finetune_{name}" for name in FINETUNED}
    assert files == {*ROWS, *SMALL_TARGETS, *PROBES, *finetuned, *SMALL, *OTHERS}
    args = main_moco.parse_args([f"@{ROOT}/recipes/digits.txt", "--epochs", "9"])
    assert args.data == "digits" and args.epochs == 9
    create_backbone(choose_config(flags.backbone_options(args)), args.stop_grad_conv1)


# The paper's study (Sec. 4 and 6.2): what differs from the base of ViT-B, 300 epochs, batch 4096.
LEARNED = dict(epochs=100, stop_grad_conv1=False)
CONSTANT = dict(moco_m_cos=False)
ABLATIONS = {
    "batch_1024": dict(LEARNED, lr=1e-4, batch_size=1024),
    "batch_2048": dict(LEARNED, lr=1e-4, batch_size=2048),
    "batch_4096": dict(LEARNED, lr=1e-4),
    "batch_6144": dict(LEARNED, lr=1e-4, batch_size=6144),
    "lr_0.5e-4": dict(LEARNED, lr=0.5e-4),
    "lr_1e-4": dict(LEARNED, lr=1e-4),
    "lr_1.5e-4": dict(LEARNED),
    "patch_fixed": dict(epochs=100),
    "pos_embed_learned": dict(pos_embed="learned"),
    "pos_embed_none": dict(pos_embed="none"),
    "pool_norm_avg": dict(pool="norm_avg"),
    "pool_avg": dict(pool="avg"),
    "no_head_bn": dict(no_head_bn=True, batch_size=2048),
    "no_predictor": dict(no_predictor=True),
    "m_0": dict(CONSTANT, moco_m=0.0),
    "m_0.9": dict(CONSTANT, moco_m=0.9),
    "m_0.99": dict(CONSTANT),
    "m_0.999": dict(CONSTANT, moco_m=0.999),
    "vit_small_600": dict(arch="vit_small", epochs=600),
    "vit_base_600": dict(epochs=600),
    "vit_huge_300": dict(arch="vit_huge", encode_chunk=128),  # the same gradient
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_differs_from_the_base_in_one_thing(name):
    base = vars(main_moco.parse_args([f"@{ROOT}/recipes/vit_base_300.txt", "DIR"]))
    args = vars(main_moco.parse_args([f"@{ROOT}/recipes/ablations/{name}.txt", "DIR"]))
    assert args == base | ABLATIONS[name] | {"output_dir": f"runs/ablations/{name}"}


def test_every_ablation_is_in_the_table_of_the_study():
    names = {path.stem for path in (ROOT / "recipes" / "ablations").iterdir()}
    assert names == ABLATIONS.keys()
    page = (ROOT / "docs" / "study.md").read_text()
    for name in names:
        assert f"recipes/ablations/{name}.txt" in page, name
