"""The two tools of the fixes: a view of a module, and constants exchanged in one function."""

from __future__ import annotations

import math
import types

import pytest

from megatron_telechat.backend.core_patch import ModuleView, replace_constants


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
