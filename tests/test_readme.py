"""Every command that README and the scripts' own headers show is one that the scripts take."""

import ast
import re
import shlex
import sys

import pytest
from conftest import ROOT

import main_finetune
import main_lincls
import main_moco

sys.path.insert(0, str(ROOT / "tools"))

import convert
import features
import visualize

SCRIPTS = {module.__name__: module for module in (main_moco, main_lincls, main_finetune)}
SCRIPTS |= {f"tools/{module.__name__}": module for module in (convert, features, visualize)}


def commands():
    """(script, its arguments) of each line that calls one."""
    text = (ROOT / "README.md").read_text()
    for name in SCRIPTS:
        text += "\n" + ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    for recipe in (ROOT / "recipes").glob("*"):
        text += "\n" + re.sub(r"^# ?", "", recipe.read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:python|torchrun|sbatch)\b.*\b(main_\w+|tools/\w+)\.py\s(.*)", line)
        if found and line.startswith(" "):
            yield found[1], found[2]


@pytest.mark.parametrize("name, words", sorted(set(commands())))
def test_the_command_is_understood(name, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    SCRIPTS[name].parse_args(shlex.split(words, comments=True))


def test_commands_are_found():
    assert len(set(commands())) > 40
