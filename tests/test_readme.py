"""README, CONTRIBUTING and docs/: each command is accepted, each link and file name is right."""

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
import predict
import visualize

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SCRIPTS = {module.__name__: module for module in (main_moco, main_lincls, main_finetune)}
TOOLS = convert, features, predict, visualize
SCRIPTS |= {f"tools/{module.__name__}": module for module in TOOLS}

# Flags of other programs, of benchmarks/, and of the official release (docs/official.md).
OTHER_FLAGS = {
    *("--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max-restarts"),
    *("--shutdown-timeout", "--kill-on-bad-exit", "--shm-size", "--check"),
    *("--multiprocessing-distributed", "--world-size", "--rank", "--dist-url", "--dist-backend"),
    *("--gpu", "--start-epoch"),
    *("--estimate", "--gib", "--pretrain-only", "--threads", "--runs", "--class-map", "--crop-pct"),
}


def read(path):
    return path.read_text(encoding="utf-8")


def docstrings():
    """Those of the scripts and tools."""
    return [ast.get_docstring(ast.parse(read(ROOT / f"{name}.py"))) for name in SCRIPTS]


def shell_lines(text):
    """Its indented lines, as one where a line continues, and its commands within the text.

    Fenced code is Python; FLAGS stands for any.
    """
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^ {4,}(\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    inline = re.findall(r"`((?:python |torchrun |(?=benchmarks/\w+\.py))[^`\n]+\.py[^`\n]*)`", text)
    return [*lines, *(command for command in inline if "FLAGS" not in command)]


def commands():
    """(script, its arguments) of each indented line that calls one."""
    texts = [*map(read, DOCUMENTS), *docstrings()]
    for recipe in (ROOT / "recipes").glob("**/*.*"):
        texts.append(re.sub(r"^# ?", "", read(recipe), flags=re.MULTILINE))
    for line in (line for text in texts for line in shell_lines(text)):
        match = re.search(r"(?:python|torchrun|sbatch)\b.*\b(main_\w+|tools/\w+)\.py\s(.*)", line)
        if match:
            yield match[1], match[2]


@pytest.mark.parametrize("name, words", sorted(set(commands())))
def test_the_command_is_understood(name, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    SCRIPTS[name].parse_args(shlex.split(words, comments=True))


def test_commands_are_found():
    assert len(set(commands())) > 50


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= 180


def anchors(path):
    """Those of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", read(document))
    links = [markdown or html for markdown, html in links]
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_every_page_is_linked_from_the_readme():
    for document in DOCUMENTS[1:]:
        assert f"({document.relative_to(ROOT)})" in read(ROOT / "README.md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document):
    folders = "engine|moco|tests|docs|tools|recipes|benchmarks"
    names = re.findall(rf"(?<![\w/])(?:(?:{folders})/[\w/.-]*\w|main_\w+\.py)", read(document))
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_file_tree_is_complete():
    [tree] = re.findall(r"^```\n(main_moco\.py.*?)^```$", read(ROOT / "README.md"), re.M | re.S)
    names, folders = set(), ["", ""]
    for line in tree.splitlines():
        indent, first = re.match(r"( *)(\S+)", line).groups()
        level = {0: 0, 5: 1}.get(len(indent))  # else it continues the line above
        if level is not None:
            folders[level:] = [first if first.endswith("/") else "", *[""] * (1 - level)]
            names.add("".join(folders[:level]) + first)
        names |= {"".join(folders) + name for name in re.findall(r"\w+\.py", line)}
    for name in names:
        assert (ROOT / name).exists(), name
    sources = [*ROOT.glob("*.py"), *ROOT.glob("moco/[!_]*.py"), *ROOT.glob("engine/[!_]*.py")]
    assert {str(path.relative_to(ROOT)) for path in sources} <= names


def known_flags(capsys):
    """Flags that the scripts' --help lists."""
    for name, module in SCRIPTS.items():
        pictures = ("attention", "pca", "neighbours", "curves")
        for picture in pictures if "visualize" in name else (None,):
            with pytest.raises(SystemExit):
                module.parse_args([picture, "--help"] if picture else ["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))


def test_flags_in_the_text_exist(capsys):
    known = known_flags(capsys) | OTHER_FLAGS
    for document in DOCUMENTS:
        # Those of benchmarks/ are checked below.
        text = read(document).replace("OMP_NUM_THREADS=1 ", "")
        text = re.sub(r"(`|    )(?:python )?(benchmarks|tests)/[^`\n]*", "", text)
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known
        assert not unknown, f"{document.name}: {unknown}"


def test_the_lines_of_the_algorithm_are_in_the_code():
    page = read(ROOT / "docs/algorithm.md")
    rows = re.findall(r"^\|.*\| `(.+?)` \| (\S+\.py) \|$", page, re.M)
    assert len(rows) == 18
    for line, file in rows:
        assert line in read(ROOT / file), (line, file)
