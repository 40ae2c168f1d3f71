"""The schema as data: sections, fields, their types, defaults and documentation.

Flags, YAML keys, ``--help`` and ``--print-config`` are all generated from here, so a
field added to the schema is at once a flag and a key.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_telechat.config import schema
from megatron_telechat.config.schema import OneOf, RunConfig


@dataclass(frozen=True)
class FieldInfo:
    """One field of the schema.

    Attributes:
        section: name of its section (``parallel``).
        name: name of the field, unique over all sections.
        kind: ``int``, ``float``, ``bool`` or ``str``; of the items where ``many``.
        many: whether the value is a tuple.
        optional: whether None (unset) is a value.
        choices: the only values allowed; empty if any.
        words: texts that are values beside those of ``kind`` (``auto``).
        default: value where nobody says another.
    """

    section: str
    name: str
    kind: type
    many: bool
    optional: bool
    choices: tuple[str, ...]
    default: Any
    words: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name in a YAML file, ``section.name``."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """The command-line flag, ``--name`` with hyphens."""
        return "--" + self.name.replace("_", "-")

    def expects(self) -> str:
        """What a value looks like, for messages and help."""
        if self.choices:
            one = ", ".join(self.choices)
            return f"any of {one}" if self.many else f"one of {one}"
        one = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[self.kind]
        if self.words:
            one += f", or {' or '.join(self.words)}"
        return f"a list of {one}" if self.many else one

    def convert(self, text: str) -> Any:
        """One value (or one item of a tuple) from its text.

        Raises:
            ValueError: if the text is no such value; the message says what is expected.
        """
        value: Any = text
        if text in self.words:
            return text
        if self.kind is int:
            if not re.fullmatch(r"[+-]?\d{1,18}|[+-]?\d{1,3}(?:_\d{3}){1,5}", text.strip()):
                raise ValueError(self.expects())
            value = int(text)
        elif self.kind is float:
            try:
                value = float(text)
            except ValueError:
                raise ValueError(self.expects()) from None
            if not math.isfinite(value):
                raise ValueError(f"{self.expects()}, and a finite one")
        elif self.kind is bool:
            if text.lower() not in _BOOLEANS:
                raise ValueError(self.expects())
            value = _BOOLEANS[text.lower()]
        if self.choices and value not in self.choices:
            raise ValueError(self.expects() + did_you_mean(text, self.choices))
        return value

    def convert_many(self, texts: Iterable[str]) -> tuple[Any, ...]:
        """A tuple from several texts; a text may hold several items, between blanks (or commas, where the items are
        words)."""
        between = r"[\s,]+" if self.choices else r"\s+"
        return tuple(self.convert(item) for text in texts for item in re.split(between, text) if item)


_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "1": True, "0": False}


@cache
def sections() -> dict[str, type]:
    """Section name → its dataclass, in schema order."""
    hints = get_type_hints(RunConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(RunConfig)}


@cache
def fields_by_name() -> dict[str, FieldInfo]:
    """Field name → field, over all sections, in schema order."""
    out: dict[str, FieldInfo] = {}
    for section, cls in sections().items():
        hints = get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            assert field.name not in out, f"two sections have a field {field.name}"
            out[field.name] = _field_info(section, field, hints[field.name])
    return out


def _field_info(section: str, field: dataclasses.Field, hint: Any) -> FieldInfo:
    optional = many = False
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    if get_origin(hint) in (Union, UnionType):
        optional = type(None) in get_args(hint)
        hint, *others = (arg for arg in get_args(hint) if arg is not type(None))
        words = tuple(word for other in others for word in get_args(other))
    if get_origin(hint) is tuple:
        many = True
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        hint = str
    if get_origin(hint) is Annotated:
        hint, names = get_args(hint)
        assert isinstance(names, OneOf), f"{field.name}: what {names!r} means is not known"
        choices = tuple(names.registry)
    return FieldInfo(section, field.name, hint, many, optional, choices, field.default, words)


@cache
def documentation() -> dict[str, str]:
    """Field name → its line of documentation; section name → the section's."""
    out: dict[str, str] = {}
    names = {cls.__name__: section for section, cls in sections().items()}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef) or node.name not in names:
            continue
        out[names[node.name]] = ast.get_docstring(node) or ""
        for field, text in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                out[field.target.id] = " ".join(str(text.value.value).split())
    return out


def closest(word: str, words: Iterable[str]) -> str | None:
    """The word most like this one, if any is like it."""
    normal = {other.replace("-", "_").lower(): other for other in words}
    found = difflib.get_close_matches(word.replace("-", "_").lower(), normal, n=1, cutoff=0.7)
    return normal[found[0]] if found else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``: did you mean X?``, or nothing."""
    found = closest(word, words)
    return f": did you mean {found}?" if found else ""


def make_run(values: dict[str, Any]) -> RunConfig:
    """A RunConfig from field name → value; fields not named keep their default."""
    known = fields_by_name()
    parts: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for name, value in values.items():
        parts[known[name].section][name] = value
    return RunConfig(**{section: cls(**parts[section]) for section, cls in sections().items()})


def values_of(run: RunConfig) -> dict[str, Any]:
    """Field name → value of every field, in schema order."""
    return {name: getattr(getattr(run, info.section), name) for name, info in fields_by_name().items()}
