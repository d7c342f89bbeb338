"""The direction of imports: scripts → engine → moco, vits; the library needs nothing of a run."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

MOCO = sorted((ROOT / "moco").glob("*.py"))
ENGINE = sorted((ROOT / "engine").rglob("*.py"))
OURS = [*MOCO, *ENGINE, ROOT / "vits.py", *ROOT.glob("main_*.py"), *ROOT.glob("tools/*.py")]
SCRIPTS_SIDE = {"cli.py", "flags.py", "downstream.py"}  # of engine/: they know the flags
PLAIN = [path for path in ENGINE if path.name not in SCRIPTS_SIDE]
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


def modules_imported_by(path, known):
    """Our modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


def test_imports_go_one_way():
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in OURS}
    imports = {name: modules_imported_by(path, paths.keys()) for name, path in paths.items()}
    while imports:  # takes away what imports nothing that is left
        leaves = {name for name, needed in imports.items() if not needed & imports.keys()}
        assert leaves, f"a circle among {sorted(imports)}"
        imports = {name: needed for name, needed in imports.items() if name not in leaves}


@pytest.mark.parametrize("path", PLAIN, ids=name_of)
def test_library_functions_take_plain_parameters(path):
    """Not parsed arguments. run_metadata takes a plain dict of them, which it writes down."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    takers = {f.name for f in functions if "args" in [arg.arg for arg in f.args.args]}
    assert takers <= {"run_metadata"}
    # The official release pickles argparse.Namespace into its checkpoints.
    assert "argparse" not in imported(path) or path.name == "checkpoint.py"


@pytest.mark.slow
def test_the_library_can_be_copied_and_imported_alone(tmp_path):
    for path in [*MOCO, ROOT / "vits.py"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    code = "import sys, moco; assert not {'timm', 'engine'} & sys.modules.keys(); import vits"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
