"""The tools of the fixes: a view of a module, constants exchanged in one function, the import hooks."""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest

from megatron_telechat.backend import triton_guard
from megatron_telechat.backend.core_patch import CorePatch, ModuleView, replace_constants

ROOT_OF_CORE = str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core"))


def test_view_hands_everything_through_but_its_overrides():
    view = ModuleView(math, {"sin": lambda _: "view"})
    assert view.sin(1) == "view" and math.sin(0) == 0
    assert view.cos is math.cos and view.__name__ == "math" and "cos" in dir(view)
    with pytest.raises(AttributeError):
        _ = view.no_such_name


def test_writing_to_a_view_writes_to_the_original():
    original = types.ModuleType("original")
    original.__spec__ = None
    view = ModuleView(original, {})
    view.value = 1
    assert original.value == 1 and view.value == 1


def test_constants_are_replaced_in_place_also_in_tuples():
    def kind(name):
        if name in ["a.One", "a.Two"]:
            return "listed"
        return "single" if name == "a.One" else name

    alias = kind
    replace_constants(kind, {"a.One": "b.One", "a.Two": "b.Two"})
    assert alias("b.Two") == "listed" and alias("a.One") == "a.One"


def test_a_function_without_the_constants_is_an_error():
    with pytest.raises(LookupError, match="has none of the constants"):
        replace_constants(lambda: "x", {"y": "z"})


def test_modules_that_another_finder_brings_are_found():
    """An editable installation of megatron-core has a finder of its own."""

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, fullname, path, target=None):
            return importlib.machinery.ModuleSpec(fullname, self) if fullname == "megatron.core.elsewhere" else None

        def exec_module(self, module):
            module.value = 1

    finder, patch = Finder(), CorePatch("cpu", ())
    treated = []
    patch.after_import("megatron.core.elsewhere", treated.append)
    sys.meta_path[:0] = [patch, finder]
    try:
        spec = patch.find_spec("megatron.core.elsewhere")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.value == 1 and treated == [module]
    finally:
        sys.meta_path[:2] = []


def test_the_stand_in_for_triton_kernels_says_what_is_missing():
    spec = triton_guard._StandIn().find_spec(triton_guard.KERNELS, None)
    if triton_guard.triton_present():
        assert spec is None
        return
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(RuntimeError, match="needs triton"):
        module.paged_stash_copy_kernel[(1,)](None)
    source = Path(ROOT_OF_CORE, "transformer", "moe", "paged_stash.py")
    if source.exists():  # 0.19: what it imports from there is what there is
        imported = [
            alias.name
            for node in ast.walk(ast.parse(source.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module == triton_guard.KERNELS
            for alias in node.names
        ]
        assert imported and set(imported) <= set(module.__all__)
