"""How a fix reaches megatron.core: by what its own modules see, not by changing torch for everybody.

Every module of ``megatron.core`` holds a global called ``torch``. Once such a module has been
executed, that global is replaced by a *view*: a module that hands every attribute through to
the real torch, except for the few a fix names. Code outside ``megatron.core`` keeps the real
torch. An import hook gives the view to modules that are imported later, and runs the fixes that
belong to one module right after that module is executed, so before anybody copies a function of it.
"""

from __future__ import annotations

import importlib.abc
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

CORE = "megatron.core"


class ModuleView(types.ModuleType):
    """A module that shows `original`, with the attributes in `overrides` exchanged.

    Writing an attribute writes to the original: a view has no state of its own.
    """

    def __init__(self, original: types.ModuleType, overrides: Mapping[str, Any]):
        super().__init__(original.__name__, original.__doc__)
        self.__dict__.update(overrides)
        self.__dict__.update(__spec__=original.__spec__, _viewed=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_viewed"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_viewed"], name, value)

    def __dir__(self) -> list[str]:
        return dir(self.__dict__["_viewed"])


class CorePatch(importlib.abc.MetaPathFinder):
    """What a set of fixes changes in megatron.core, and the import hook that brings it there.

    A fix fills `torch`, `cuda` (attributes the view exchanges in ``torch`` and ``torch.cuda``)
    and calls `after_import`. One instance lives in ``sys.meta_path`` once `install` was called.
    """

    def __init__(self, backend: str, fixes: tuple[str, ...]):
        self.backend = backend
        self.fixes = fixes
        self.torch: dict[str, Any] = {}
        self.cuda: dict[str, Any] = {}
        self._after_import: dict[str, list[Callable[[types.ModuleType], None]]] = {}
        self._view: ModuleView | None = None

    @staticmethod
    def installed() -> CorePatch | None:
        """The patch of this process, if one was installed."""
        return next((finder for finder in sys.meta_path if isinstance(finder, CorePatch)), None)

    def after_import(self, module: str, action: Callable[[types.ModuleType], None]) -> None:
        """Run `action` on the module of this full name as soon as it is executed (now, if it is)."""
        self._after_import.setdefault(module, []).append(action)

    def install(self) -> None:
        """Hook the imports to come, and treat the modules of megatron.core that are already there."""
        import torch

        if self.cuda:
            self.torch["cuda"] = ModuleView(torch.cuda, self.cuda)
        if self.torch:
            self._view = ModuleView(torch, self.torch)
        sys.meta_path.insert(0, self)
        for name, module in list(sys.modules.items()):
            if _is_core(name) and module is not None:
                self._treat(module)

    def find_spec(self, fullname, path=None, target=None):
        """The spec of a module of megatron.core as the other finders give it, its loader changed so that the module is
        treated as soon as it is executed; None for every other module, which is left to them."""
        if not _is_core(fullname):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_treat(module: types.ModuleType) -> None:
            execute(module)
            self._treat(module)

        # On the instance: the loader keeps its type, so sources, resources and caches work as before.
        spec.loader.exec_module = execute_and_treat
        return spec

    def _treat(self, module: types.ModuleType) -> None:
        import torch

        if self._view is not None and module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = self._view
        for action in self._after_import.get(module.__name__, ()):
            action(module)


def rebind(module: types.ModuleType, name: str, replacement: Any) -> None:
    """Exchange ``module.name``, also where other modules of megatron.core imported it by name."""
    old = getattr(module, name)
    setattr(module, name, replacement)
    for other_name, other in list(sys.modules.items()):
        if _is_core(other_name) and other is not None and other.__dict__.get(name) is old:
            setattr(other, name, replacement)


def replace_constants(function: Callable, table: Mapping[str, str]) -> None:
    """Exchange string constants in the code of one function, in place.

    In place, so that every reference to the function has the new constants.

    Raises:
        LookupError: the function has none of the constants: it is not the code this was written for.
    """
    function = getattr(function, "__func__", function)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code = function.__code__
    constants = _replaced(code.co_consts, table)
    if constants == code.co_consts:
        raise LookupError(f"{function.__qualname__} has none of the constants {sorted(table)}")
    function.__code__ = code.replace(co_consts=constants)


def _replaced(value: Any, table: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return table.get(value, value)
    if isinstance(value, tuple):
        return tuple(_replaced(item, table) for item in value)
    return value


def _is_core(name: str) -> bool:
    return name == CORE or name.startswith(CORE + ".")
