"""What the rules see: a run, where each value comes from, and which values are already known to be wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_telechat.config.fields import fields_by_name, values_of
from megatron_telechat.config.megatron.meaning import MEGATRON, Meaning
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import Problem

DEFAULT = "default"
DERIVED = "derived"


class SkipRule(Exception):
    """A value the rule needs is already reported as wrong; a second complaint would only confuse."""


@dataclass
class Check:
    """A configuration under examination.

    Attributes:
        run: every value, the derived ones filled in where they can be.
        origins: field name → origin.
        bad: fields already reported as wrong.
        environ: environment variables (torchrun's are read).
        dry_run: whether the run is only described, not started.
        notes: things a person should know that stop nothing.
        meaning: of a command whose model comes from flags alone, what its absent flags mean in Megatron-LM.
        described: whether the run is only told about, and need not be one of our training.
        staged: whether it is one stage of several of a run.
    """

    run: RunConfig
    origins: dict[str, str]
    bad: set[str] = field(default_factory=set)
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)
    meaning: Meaning | None = None
    described: bool = False
    staged: bool = False

    def take(self, *names: str) -> Any:
        """Values of these fields, one alone or several as a tuple; ends the rule if one of them is already reported."""
        if self.bad.intersection(names):
            raise SkipRule
        values = values_of(self.run)
        return values[names[0]] if len(names) == 1 else tuple(values[name] for name in names)

    def said(self, name: str) -> bool:
        """Whether a person or a preset gave the field a value."""
        return self.origins.get(name, DEFAULT) not in (DEFAULT, DERIVED, MEGATRON)

    def said_by_person(self, name: str) -> bool:
        """Whether the value comes from a flag or a YAML file."""
        return self.said(name) and not self.origins[name].startswith("preset ")

    def where(self, *names: str) -> str:
        """Origins of these fields."""
        return "; ".join(f"{name}: {self.origins.get(name, DEFAULT)}" for name in names)

    def problem(self, what: str, *names: str, fix: str = "") -> Problem:
        """A problem that these fields have, alone or together; one that the complaint begins with needs no second
        mention."""
        alone = len(names) == 1 and what.startswith((f"{names[0]}=", f"{names[0]} "))
        return Problem(what, self.origins.get(names[0], DEFAULT) if alone else self.where(*names), fix)

    def absent(self, what: str, path: str, name: str, fix: str = "") -> Problem:
        """A problem of one field whose file or folder is not what it should be: `missing` where nothing is there."""
        return replace(self.one(what, name, fix), missing="" if os.path.lexists(path) else name)

    def one(self, what: str, name: str, fix: str = "") -> Problem:
        """A problem of one field alone, which other rules then leave in peace."""
        self.bad.add(name)
        return self.problem(what, name, fix=fix)


Rule = Callable[[Check], Iterable[Problem]]


def apply_rules(rules: Iterable[Rule], check: Check) -> Iterator[Problem]:
    """Problems of all rules, in order; a rule that needs a wrong value is skipped."""
    for rule in rules:
        try:
            yield from list(rule(check))
        except SkipRule:
            continue


def flag(name: str, value: Any) -> str:
    """How to type a value of a field on the command line."""
    info = fields_by_name()[name]
    if info.kind is bool and not info.many:
        return info.flag if value else info.flag.replace("--", "--no-", 1)
    text = str(value)
    return f'{info.flag} "{text}"' if any(char in text for char in "|* ()") else f"{info.flag} {text}"
