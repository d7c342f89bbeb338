"""The recipes against the published tables, row by row."""

import pytest
from conftest import ROOT

import main_moco
from vits import create_backbone

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
    found = vars(args) | {"stop_grad": args.stop_grad_conv1, "clip": args.clip_grad}
    assert tuple(found[column] for column in COLUMNS) == ROWS[name]
    assert (args.batch_size, args.moco_m_cos, args.img_size) == (4096, True, (224, 224))
    assert (args.moco_dim, args.moco_mlp_dim) == (256, 4096)
    assert args.data == "DIR" and args.output_dir == f"runs/{name}"


def test_every_recipe_is_in_the_table_and_later_flags_win():
    files = {path.stem for path in (ROOT / "recipes").glob("*.txt")}
    assert files == {*ROWS, "digits"}
    args = main_moco.parse_args([f"@{ROOT}/recipes/digits.txt", "--epochs", "9"])
    assert args.data == "digits" and args.epochs == 9
    create_backbone(args.arch, args.img_size, args.patch_size, args.stop_grad_conv1)
