"""The arrows of docs/architecture.md: who may import whom, read from the source of every file."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_telechat.device_kinds import DEVICE_KINDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_telechat"

MAY_IMPORT = {
    "errors": (),
    "lazy": (),
    "host": (),
    "files": (),
    "locations": (),
    "device_kinds": (),
    "config": ("errors", "device_kinds", "locations"),
    "tensors": ("config",),
    "costs": ("tensors",),
    "planner": ("costs", "config"),
    "backend": ("errors", "device_kinds", "host"),
    "parallel": ("backend", "config", "lazy"),
    "moe": ("parallel", "backend", "tensors"),
    "model": ("moe", "parallel", "tensors"),
    "data": ("config", "parallel", "files", "host"),
    "checkpoint": ("model", "parallel", "data", "host"),
    "huggingface": ("checkpoint",),
    "training": ("checkpoint", "data", "model", "planner"),
    "virtual": ("training",),
    "merging": ("huggingface",),
    "supervisor": ("errors", "host", "files"),
    "cli": ("training", "merging", "planner", "virtual", "supervisor"),
}
"""What a room imports; what those import in turn is allowed too."""

WITHOUT_TORCH = (
    "errors",
    "lazy",
    "host",
    "files",
    "locations",
    "device_kinds",
    "config",
    "tensors",
    "costs",
    "planner",
    "supervisor",
)
WITHOUT_TORCH_FILES = (f"{PACKAGE}.parallel.topology", f"{PACKAGE}.parallel.cluster", f"{PACKAGE}.training.lease")
WITHOUT_TORCH_IN_VIRTUAL = tuple(
    f"{PACKAGE}.virtual.{name}" for name in ("compare", "launch", "match", "records", "shim")
)
HEAVY = {"torch", "megatron", "transformer_engine", "torch_npu", "apex", "transformers", "safetensors", "matplotlib"}
OPTIONAL = {
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "wandb",
    "mlflow",
    "swanlab",
    "matplotlib",
    "torch_npu",
    "tensorboard",
    "tiktoken",
    "transformers",
    "gigatoken",
    "zstandard",
    "pyarrow",
}


EXPORTED = f"{PACKAGE}.huggingface.exported."
"""Files that are copied into exported folders."""
BELOW_THE_FORMATS = {"blend", "core", "corpus", "order", "pieces", "tokenizers"}
"""Files of data/ that its folders may import; the other files stand above the folders."""
FOLDERS_OF_DATA = {"indexed": (), "text": ("indexed",), "chat": ("indexed",)}
"""A folder of data/ and the other folders it may import."""


class Imported(NamedTuple):
    name: str
    line: int
    at_top: bool
    """Runs when the module is imported: outside functions and `if TYPE_CHECKING`."""
    for_types: bool = False
    """Stands under `if TYPE_CHECKING`."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(path: Path) -> tuple[Imported, ...]:
    """Every import of a file by full dotted name, relative ones resolved; `from a import b` gives a.b."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def walk(node: ast.AST, at_top: bool, for_types: bool) -> Iterator[Imported]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Imported(alias.name, child.lineno, at_top, for_types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                yield from (Imported(f"{module}.{one.name}", child.lineno, at_top, for_types) for one in child.names)
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, at_top and not function and not checking, for_types or checking)

    return tuple(walk(tree_of(path), True, False))


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in MAY_IMPORT else None


def allowed(room: str) -> set[str]:
    reached = {room}
    for other in MAY_IMPORT[room]:
        reached |= allowed(other)
    return reached


def at(path: Path, found: Imported) -> str:
    return f"{path.relative_to(ROOT)}:{found.line} imports {found.name}"


def test_every_file_is_in_a_room():
    known = {PACKAGE, *(f"{PACKAGE}.{room}" for room in MAY_IMPORT)}
    strays = [name for name in map(module_name, sources(PACKAGE)) if ".".join(name.split(".")[:2]) not in known]
    assert strays == []


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    wrong = [
        at(path, found)
        for path in sources(PACKAGE)
        if room_of(module_name(path)) == room
        for found in imports_of(path)
        if room_of(found.name) not in allowed(room) | {None}
    ]
    assert wrong == []


def import_graph() -> dict[str, set[str]]:
    """Each file of the package and the files it imports, in functions too; what only a type checker reads is left
    out. An import of a package counts as one of its ``__init__``."""
    files = {module_name(path): path for path in sources(PACKAGE)}

    def file_of(name: str) -> str | None:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name or None

    return {
        name: {file_of(found.name) for found in imports_of(path) if not found.for_types} - {None, name}
        for name, path in files.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of more than one file each of which reaches the others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, ahead = set(), [start]
        while ahead:
            for name in graph[ahead.pop()] - seen:
                seen.add(name)
                ahead.append(name)
        reached[start] = seen
    groups = {frozenset(other for other in seen if name in reached[other]) for name, seen in reached.items()}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_no_circle_of_files():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles(import_graph()) == []


def test_folders_of_data_do_not_know_each_other():
    """A format of training data may stand on indexed datasets; apart from that a folder of data/ knows only the files
    that know no format."""
    wrong = []
    for path in sources(f"{PACKAGE}/data"):
        own = module_name(path).split(".")[2:]
        folder = own[0] if own and own[0] in FOLDERS_OF_DATA else None
        if folder is None and own[:1] != ["__init__"] and (not own or own[0] not in BELOW_THE_FORMATS):
            continue  # above the folders
        free = {*BELOW_THE_FORMATS, *((folder, *FOLDERS_OF_DATA[folder]) if folder else ())}
        for found in imports_of(path):
            parts = found.name.split(".")
            if parts[:2] == [PACKAGE, "data"] and (len(parts) < 3 or parts[2] not in free):
                wrong.append(at(path, found))
    assert wrong == []
    folders = {path.name for path in (ROOT / PACKAGE / "data").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(FOLDERS_OF_DATA)


def test_megatron_core_is_read_by_one_file_of_data():
    """Which lets it be imported in a process without a backend."""
    readers = {
        found.name for path in sources(f"{PACKAGE}/data") for found in imports_of(path) if "megatron.core" in found.name
    }
    assert not readers


def test_only_the_format_asks_whether_the_data_is_dialogs():
    """Whoever needs to know asks the format (config/data_formats.py) for the property that matters."""
    askers = {
        str(path.relative_to(ROOT))
        for path in sources(PACKAGE, "tools", "pretrain")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr == "sft"
    }
    assert askers == {f"{PACKAGE}/config/data_formats.py"}


def test_the_header_of_an_index_is_read_in_one_file():
    """The magic bytes of an ``.idx``, or the struct of its header, anywhere else would be a second reader."""
    readers = set()
    for path in sources(PACKAGE, "tools", "pretrain"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, (bytes, str)):
                magic = isinstance(node.value, bytes) and b"MMIDIDX" in node.value
                layout = isinstance(node.value, str) and node.value.startswith("<") and node.value.endswith("QBQQ")
                if magic or layout:
                    readers.add(str(path.relative_to(ROOT)))
    assert readers == {f"{PACKAGE}/data/indexed/header.py"}


def test_doors_load_torch_in_functions_only():
    """--help, --dry-run and a mistyped flag answer before torch is loaded: neither cli/ nor what it loads names it."""
    heavy = {"torch", "megatron", "transformers", "safetensors", "matplotlib"}
    files = {module_name(path): path for path in sources(PACKAGE)}
    wrong = []
    for name in (name for name in files if room_of(name) == "cli"):
        seen, ahead = {name}, [name]
        while ahead:
            path = files[ahead.pop()]
            for found in imports_of(path):
                if not found.at_top:
                    continue
                if found.name.split(".")[0] in heavy:
                    wrong.append(f"{name}: {at(path, found)}")
                parts = found.name.split(".")
                near = {".".join(parts[:count]) for count in range(1, len(parts) + 1)} & set(files) - seen
                seen |= near
                ahead += near
    assert wrong == []


def test_rooms_without_torch_never_name_it():
    wrong = [
        at(path, found)
        for path in sources(PACKAGE)
        if room_of(module_name(path)) in WITHOUT_TORCH or module_name(path) in WITHOUT_TORCH_FILES
        for found in imports_of(path)
        if found.name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_optional_packages_are_imported_where_they_are_used():
    wrong = [
        at(path, found)
        for path in sources(PACKAGE, "tools", "pretrain")
        for found in imports_of(path)
        if found.at_top
        and (found.name.split(".")[0] in OPTIONAL or found.name.startswith("torch.utils.tensorboard"))
        # Kernels are imported on a device of their kind only (`backend.kernels.kernels`), exported files by nobody.
        and not module_name(path).startswith((f"{PACKAGE}.backend.kernels.ascend.", EXPORTED))
    ]
    assert wrong == []


def test_exported_files_stand_alone():
    """They are copied into a folder that is read without us: they know each other, torch and what transformers needs,
    and nobody of the package imports them."""
    known = {*sys.stdlib_module_names, "torch", "transformers", "sentencepiece"}
    files = {path: module_name(path) for path in sources(PACKAGE)}
    own = [path for path, name in files.items() if name.startswith(EXPORTED)]
    assert len(own) == 3
    for path in own:
        assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        wrong = [at(path, one) for one in imports_of(path) if not one.name.startswith(EXPORTED)]
        assert [text for text in wrong if text.rpartition(" imports ")[2].split(".")[0] not in known] == []
    readers = [at(path, one) for path in files if path not in own for one in imports_of(path) if EXPORTED in one.name]
    assert readers == []


def test_parallel_state_is_read_in_one_file():
    readers = set()
    for path in sources(PACKAGE, "tools", "pretrain"):
        tree = tree_of(path)
        reads = any("parallel_state" in found.name.split(".") for found in imports_of(path))
        reads |= any(isinstance(node, ast.Attribute) and node.attr == "parallel_state" for node in ast.walk(tree))
        if reads:
            readers.add(str(path.relative_to(ROOT)))
    assert readers <= {f"{PACKAGE}/parallel/state.py"}


KNOWS_DEVICES = ("backend/", "device_kinds.py")
"""Files of the package that may name a kind of device, or ask for it."""


def device_names_in(source: str) -> Iterator[tuple[int, str]]:
    """Where a source holds the name of a kind of device, alone or with a number, or compares what a device or a backend
    is called."""
    asked = {"type", "device_type", "is_cuda", "is_cpu", "is_npu"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(rf"({'|'.join(DEVICE_KINDS)})(:\d+)?", node.value):
                yield node.lineno, f"{node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_cpu", "is_npu"):
            yield node.lineno, f".{node.attr}"
        elif isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                of_backend = isinstance(side, ast.Attribute) and side.attr == "name" and "backend" in ast.unparse(side)
                if isinstance(side, ast.Attribute) and (side.attr in asked or of_backend):
                    yield node.lineno, ast.unparse(node)


def test_nobody_asks_the_name_of_a_device():
    """The device answers (`device_kinds.DeviceTraits`, `Backend`): a new one touches a row and a class."""
    files = [path for path in sources(PACKAGE) if not str(path.relative_to(ROOT / PACKAGE)).startswith(KNOWS_DEVICES)]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in files
        for line, what in device_names_in(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 150 and wrong == []


@pytest.mark.parametrize(
    "source, found",
    [
        ('name = "cuda"', 1),
        ('torch.device("cuda:0")', 1),
        ("if x.device.type == HOST: pass", 1),
        ("if HOST != x.device.type: pass", 1),
        ("if device.type in KINDS: pass", 1),
        ("if self.backend.name == other: pass", 1),
        ("if x.is_cuda: pass", 1),
        ('help = "cuda or cpu"', 0),
        ("getattr(torch, device.type)", 0),
        ("traits_of(x.device).pins_uploads", 0),
    ],
)
def test_device_names_are_found(source, found):
    assert len(list(device_names_in(source))) == found


def test_one_answer_to_sequence_parallelism():
    """`ParallelConfig.sequence_parallel` is what a person said; the library reads `sequence_parallel_size`."""
    readers = set()
    for path in sources(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "sequence_parallel":
                owner = ast.unparse(node.value).split(".")[-1]
                if owner in ("parallel", "sizes", "self"):
                    readers.add(str(path.relative_to(ROOT)))
    assert readers == {f"{PACKAGE}/config/schema.py"}


def test_doors_are_thin():
    doors = [*(ROOT / "pretrain").glob("*.py"), *(ROOT / "tools").glob("*.py")]
    assert doors
    for door in doors:
        assert len(door.read_text(encoding="utf-8").splitlines()) <= 30, door
        ours = {found.name for found in imports_of(door) if found.name.split(".")[0] == PACKAGE}
        assert all(room_of(name) in ("cli", "errors") for name in ours), (door, ours)
        others = {found.name.split(".")[0] for found in imports_of(door)} - {PACKAGE, "__future__"}
        assert others <= sys.stdlib_module_names, (door, others)


@pytest.mark.heavy
def test_light_rooms_leave_torch_alone():
    light = [
        name
        for name in map(module_name, sources(PACKAGE))
        if room_of(name) in WITHOUT_TORCH
        or name
        in (
            *WITHOUT_TORCH_FILES,
            f"{PACKAGE}.cli.dry_run",
            f"{PACKAGE}.cli.doctor",
            f"{PACKAGE}.cli.launch",
            *WITHOUT_TORCH_IN_VIRTUAL,
        )
    ]
    assert len(light) > 15
    code = "import importlib, sys\n" + "".join(f"importlib.import_module({name!r})\n" for name in light)
    code += "print(*sorted({'torch', 'megatron.core', 'matplotlib', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
