"""The Python files of a torch_npu wheel: of the one that is installed, or of the one that TORCH_NPU_WHEEL names.

Nothing of it is imported: on a machine without CANN that fails.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import zipfile
from pathlib import Path

from tests.backend.torch_npu_signatures import signature

VARIABLE = "TORCH_NPU_WHEEL"
"""Environment variable: the path of a wheel, or of a folder that one was unpacked into."""


class Wheel:
    """Reads signatures from a wheel, or from the folder that has ``torch_npu/`` in it."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def at_hand(cls) -> Wheel | None:
        """The wheel that the environment names, else the installed package; None without either."""
        named = os.environ.get(VARIABLE)
        if named:
            if not Path(named).exists():
                raise FileNotFoundError(f"{VARIABLE}={named}: no such wheel or folder")
            return cls(Path(named))
        spec = importlib.util.find_spec("torch_npu")
        places = (spec.submodule_search_locations or ()) if spec is not None else ()
        return next((cls(Path(place).parent) for place in places), None)

    def read(self, name: str) -> str:
        """The text of one file, by its path inside the wheel."""
        if self.path.is_dir():
            return (self.path / name).read_text(encoding="utf-8")
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(name).decode("utf-8")

    @property
    def version(self) -> str:
        """Version of the package."""
        found = re.search(r"__version__ = '([^']+)'", self.read("torch_npu/version.py"))
        assert found is not None
        return found[1].partition("+")[0]

    def documented(self, name: str) -> inspect.Signature:
        """Parameters in the documentation of a function: ``torch_npu.NAME(Tensor x, float y=1.) -> ...``, types with
        or without."""
        text = self.read("torch_npu/_op_plugin_docs.py")
        found = [
            match[1] for match in re.finditer(rf"^(?:torch_npu\.)?{name}\((.*)\)\s*:?\s*->", text, flags=re.MULTILINE)
        ]
        assert found, f"{name} is not documented"
        return signature(", ".join(map(_plain, _split(max(found, key=len)))))

    def registered(self, name: str) -> inspect.Signature:
        """Parameters of the function that is registered for the meta device."""
        tree = ast.parse(self.read("torch_npu/op_plugin/meta/_meta_registrations.py"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(mark, ast.Call) and ast.unparse(mark) == f"impl(m, '{name}')" for mark in node.decorator_list
            ):
                return signature(ast.unparse(node.args))
        raise AssertionError(f"{name} is not registered")


def _split(parameters: str) -> list[str]:
    """Parts between commas, those inside of brackets left alone."""
    return [part.strip() for part in re.split(r",(?![^\[(]*[\])])", parameters)]


def _plain(parameter: str) -> str:
    """``float keep_prob=1.`` → ``keep_prob=1.``; a type that may be None, and has no default, has None."""
    declared, equal, default = parameter.partition("=")
    kind, _, name = declared.strip().rpartition(" ")
    if not equal and kind.endswith("?"):
        return f"{name}=None"
    return name + equal + default
