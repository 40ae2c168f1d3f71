"""README and docs against the code: flags, paths and links exist, the Chinese README says what the English one says.

Docstrings are counted here too: in every room each public class and function has one.
"""

from __future__ import annotations

import ast
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.flags import ACTION_FLAGS
from megatron_telechat.config.megatron.flags import ANSWERS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_telechat"
CHINESE = ROOT / "README.zh-CN.md"
PAGES = [ROOT / "README.md", CHINESE, *sorted((ROOT / "docs").glob("*.md"))]

COLUMNS = 120

FOREIGN_FLAGS = {
    *(
        "--nnodes",
        "--nproc-per-node",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--standalone",
        "--max-restarts",
    ),  # torchrun
    *("--nodes", "--ntasks-per-node", "--ntasks", "--gpus-per-node", "--gres", "--map-by"),  # srun, sbatch, mpirun
    *("--kill-on-bad-exit", "--signal", "--batch"),  # srun, scancel
    *("--use-gigatoken", "--padded-vocab-size"),  # Megatron-LM's tools and its tokenizer options
    *("--no-build-isolation", "--no-deps"),  # pip
}
"""Flags of other programs that the pages name."""

EXAMPLE_FLAGS = {"--flag", "--x", "--no-x", "--micro-batch"}
"""Placeholders, and the misspelt flag of the example of an error."""

ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(text: str) -> str:
    """The page without its fenced code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def code_blocks(text: str) -> list[str]:
    """Fenced and indented code blocks, dedented."""
    fenced = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:\n(?: {4}[^\n]*)(?:\n {4}[^\n]*)*)", "\n" + prose(text))
    return [textwrap.dedent(block).strip() for block in (*fenced, *indented)]


def tables(text: str) -> list[list[list[str]]]:
    """Tables as rows of cells, without the line under the head."""
    found: list[list[list[str]]] = []
    rows: list[list[str]] = []
    for line in [*prose(text).splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            if not set("".join(cells)) <= set("-: "):
                rows.append([cell.strip() for cell in cells])
        elif rows:
            found.append(rows)
            rows = []
    return found


def facts(cell: str) -> list[str]:
    """Code spans and words with a digit of a cell: what must be equal in every language."""
    spans = re.findall(r"`([^`]*)`", cell)
    plain = re.sub(r"\([^)]*\.md[^)]*\)|`[^`]*`", " ", cell)
    return sorted([*spans, *(word.strip(".,/") for word in re.findall(r"[A-Za-z-]*\d[\w.,/-]*", plain, re.ASCII))])


def facts_of(table: list[list[str]]) -> list[list[list[str]]]:
    return [[facts(cell) for cell in row] for row in table[1:]]


@functools.cache
def known_flags() -> set[str]:
    """Flags of the schema, of the command line, of Megatron-LM, of every parser in the package and the tools, and of
    tests/run.sh."""
    known = {f"--{name.replace('_', '-')}" for name in (*fields_by_name(), *ACTION_FLAGS, *ANSWERS)}
    for folder in (PACKAGE, ROOT / "tools"):
        for source in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    values = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                    known |= {value for value in values if isinstance(value, str) and value.startswith("--")}
    known |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / "tests" / "run.sh").read_text(encoding="utf-8")))
    return known | {f"--no-{flag[2:]}" for flag in known} | FOREIGN_FLAGS | EXAMPLE_FLAGS


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ +(.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def public_definitions(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Public classes, functions, and methods of public classes, with their dotted names.

    A method that overrides one of a class of the same file is left out: the class above says what it does.
    """
    methods = {
        node.name: {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }

    def inherited(node: ast.Module | ast.ClassDef) -> set[str]:
        found: set[str] = set()
        for base in node.bases if isinstance(node, ast.ClassDef) else []:
            if isinstance(base, ast.Name) and base.id in methods:
                found |= methods[base.id]
        return found

    waiting: list[tuple[ast.Module | ast.ClassDef, str]] = [(tree, "")]
    while waiting:
        node, prefix = waiting.pop()
        overridden = inherited(node)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                if child.name in overridden:
                    continue
                yield child, prefix + child.name
                if isinstance(child, ast.ClassDef):
                    waiting.append((child, f"{prefix}{child.name}."))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_lines_of_prose_fit_the_columns(page):
    lines = prose(page.read_text(encoding="utf-8")).splitlines()
    long = [line[:60] for line in lines if len(line) > COLUMNS and not line.startswith(("|", "    ", "!["))]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_relative_links_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_flags_exist(page):
    known = known_flags()
    named = set(re.findall(r"(?<![\w`-])`?(--[a-z][a-z0-9-]*[a-z0-9])(?![\w/-])", page.read_text(encoding="utf-8")))
    assert not sorted(named - known)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_files_exist(page):
    """A path in a code span or command that begins with a folder of the project or of the package, or names a .py file
    with a folder."""
    rooms = {path.name for path in (*ROOT.iterdir(), *PACKAGE.iterdir()) if path.is_dir()}
    text = page.read_text(encoding="utf-8")
    missing = []
    for path in set(re.findall(r"(?<![\w./~$-])((?:[\w-]+/)+[\w.-]*\.(?:py|sh|md|yaml|json))\b(?!\()", text)):
        parts = path.split("/")
        if parts[0] in rooms - {"data"} or (parts[0] == "data" and path.endswith(".py")):
            if not any((base / path).exists() for base in (ROOT, PACKAGE, page.parent)):
                missing.append(path)
    assert not missing


def test_the_chinese_readme_has_the_commands_of_the_english_pages():
    english = [block for page in PAGES if page != CHINESE for block in code_blocks(page.read_text(encoding="utf-8"))]
    blocks = code_blocks(CHINESE.read_text(encoding="utf-8"))
    assert len(blocks) >= 8
    assert not [block[:200] for block in blocks if block not in english]


def test_the_chinese_readme_has_the_figures_of_the_english_tables():
    english = [table for page in PAGES if page != CHINESE for table in tables(page.read_text(encoding="utf-8"))]
    chinese = tables(CHINESE.read_text(encoding="utf-8"))
    assert len(chinese) >= 5
    known = [facts_of(table) for table in english]
    assert not [table[:2] for table in chinese if facts_of(table) not in known]


@pytest.mark.parametrize("room", ROOMS)
def test_public_classes_and_functions_have_docstrings(room):
    place = PACKAGE / room
    bare = []
    for source in [place] if place.is_file() else sorted(place.rglob("*.py")):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        bare += [f"{ids(source)} {name}" for node, name in public_definitions(tree) if not ast.get_docstring(node)]
    assert not bare
