"""The direction of imports: scripts → engine → moco, vits; the library needs nothing of a run."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

MOCO = sorted((ROOT / "moco").glob("*.py"))
ENGINE = sorted((ROOT / "engine").glob("*.py"))
SCRIPTS = {path.stem for path in ROOT.glob("main_*.py")}
TOOLS = {path.stem for path in (ROOT / "tools").glob("*.py")} | {"tools", "benchmarks", "tests"}
FILE_ACCESS = {"argparse", "io", "json", "os", "pathlib", "shutil", "tempfile"}


def name_of(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """Names of the top-level packages that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {path}"
            names.add(node.module.split(".")[0])
    return names


def words(path):
    """All names and attributes in a module's code."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", MOCO, ids=name_of)
def test_moco_needs_torch_torchvision_and_numpy_alone(path):
    foreign = imported(path) - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "torchvision", "numpy", "moco"}


def test_vits_needs_torch_and_timm_alone():
    foreign = imported(ROOT / "vits.py") - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "timm"}


@pytest.mark.parametrize("path", [*MOCO, ROOT / "vits.py"], ids=name_of)
def test_the_library_reads_no_files_and_no_flags(path):
    assert not imported(path) & FILE_ACCESS
    assert not words(path) & {"open", "print", "UserError", "args", "environ"}


@pytest.mark.parametrize("path", ENGINE, ids=name_of)
def test_engine_imports_neither_scripts_nor_tools(path):
    assert not imported(path) & (SCRIPTS | TOOLS)


@pytest.mark.parametrize("path", sorted(ROOT.glob("main_*.py")), ids=name_of)
def test_scripts_import_no_other_script(path):
    assert not imported(path) & (SCRIPTS | TOOLS)


@pytest.mark.slow
def test_the_library_can_be_copied_and_imported_alone(tmp_path):
    for path in [*MOCO, ROOT / "vits.py"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    code = "import sys, moco; assert not {'timm', 'engine'} & sys.modules.keys(); import vits"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
