"""Imports go one way: scripts → engine → moco, vits."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PAPER = [*sorted((ROOT / "moco").glob("*.py")), ROOT / "vits.py"]
ENGINE = sorted((ROOT / "engine").glob("*.py"))
SCRIPTS = {"main_moco", "main_lincls", "main_finetune", "tools", "features", "convert", "visualize"}


def imported(path):
    """Top-level packages that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.name)
def test_the_paper_imports_nothing_of_the_engine(path):
    third_party = {"timm"} if path.name == "vits.py" else {"torchvision"}
    allowed = {"torch", "numpy", "moco"} | third_party | sys.stdlib_module_names
    refused = {"argparse", "pathlib", "os", "io", "json", "shutil"}  # no flags, no files
    assert imported(path) <= allowed - refused
    words = {node.id for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.Name}
    assert not words & {"open", "UserError", "print"}


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.name)
def test_the_engine_imports_no_script(path):
    assert not imported(path) & SCRIPTS


def test_the_paper_can_be_imported_alone(tmp_path):
    for path in PAPER:
        place = tmp_path / path.relative_to(ROOT)
        place.parent.mkdir(exist_ok=True)
        place.write_text(path.read_text())
    check = "import sys, moco; assert 'timm' not in sys.modules and 'engine' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True)
