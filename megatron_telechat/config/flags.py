"""The command line: flags generated from the schema, and an answer for each flag of Megatron-LM that is not among them.

Flags are matched whole (no abbreviations), with hyphens or underscores, as
``--flag value`` or ``--flag=value``. The last of several equal flags counts, so that a
launch script can end in ``"$@"``; two different spellings that disagree are a problem.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_telechat.config.fields import FieldInfo, closest, fields_by_name
from megatron_telechat.config.megatron.answers import Alias, Always, Answer, Ignored, Refused, UnevenSplit
from megatron_telechat.config.megatron.flags import ANSWERS, ONE_FOR_ALL_LAYERS, REFUSED_WORDS, WORDS
from megatron_telechat.config.split import SplitFlags
from megatron_telechat.config.yaml_io import Said
from megatron_telechat.errors import Problem


@dataclass(frozen=True)
class Actions:
    """What the door is asked to do in place of, or before, a run.

    Attributes:
        print_config: ``table`` (every value with its origin) or ``yaml``; unset: neither.
        dry_run: check and describe the run, start nothing.
        execute: with dry_run, also execute one rank of every pipeline stage on tensors without numbers.
        execute_ranks: these ranks instead.
        execute_all: every rank, and compare what they exchange.
        execute_json: file for what was executed.
        steal_lock: take the run folder, also from a job that holds it.
        help, version, list_presets: print that and stop.
    """

    print_config: str | None = None
    dry_run: bool = False
    execute: bool = False
    execute_ranks: tuple[int, ...] = ()
    execute_all: bool = False
    execute_json: str | None = None
    steal_lock: bool = False
    help: bool = False
    version: bool = False
    list_presets: bool = False

    @property
    def starts_nothing(self) -> bool:
        """Whether the command only describes a run and starts no ranks."""
        return self.dry_run or self.print_config is not None

    @property
    def executes(self) -> bool:
        """Whether virtual ranks are asked for."""
        return self.execute or self.execute_all or bool(self.execute_ranks) or self.execute_json is not None


@dataclass
class CommandLine:
    """A command line, read.

    Attributes:
        said: values given to fields; the last counts.
        preset: the preset named, if any.
        configs: YAML files named, in order.
        layers_per_virtual_stage: Megatron's way to give the number of virtual stages; resolved when num_layers is
            known.
        split: Megatron's ways to say an uneven split, and split_words as they were typed.
        refused: of the problems, flags of Megatron-LM that ask for what our training does not have and a planner can
            leave out.
        unplanned: of the problems, those of fields that a planner does not read: data, checkpoints, logging.
        given: every flag without its hyphens, with hyphens inside → its values; the last of equal ones.
        unreadable: fields whose value could not be read.
        unknown: of the problems, flags of other programs, each as typed.
    """

    said: list[Said] = field(default_factory=list)
    preset: Said | None = None
    configs: list[str] = field(default_factory=list)
    layers_per_virtual_stage: int | None = None
    split: SplitFlags = SplitFlags()
    split_words: dict[str, str] = field(default_factory=dict)
    actions: Actions = field(default_factory=Actions)
    problems: list[Problem] = field(default_factory=list)
    refused: list[Problem] = field(default_factory=list)
    unplanned: list[Problem] = field(default_factory=list)
    given: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    unknown: list[tuple[Problem, str]] = field(default_factory=list)


SLIP = 0.9
"""Likeness from which on an unknown flag is a known one, mistyped."""
UNPLANNED = ("data", "checkpoint", "evaluation", "logging")
"""Sections that a planner does not read."""

ACTION_FLAGS = {
    "config": "YAML file; may be given several times, the last one wins",
    "preset": "start from the configuration of a model; --list-presets lists them",
    "print-config": "print every value with its origin (or, with =yaml, the resolved YAML) and exit",
    "dry-run": "check everything that can be checked without starting the ranks, describe the run and exit",
    "execute": "with --dry-run: also execute one rank of every pipeline stage, on tensors without numbers (no GPU is "
    "needed), and report memory, exchanges and waits of the host",
    "execute-ranks": "with --dry-run: execute these ranks, such as 0,512",
    "execute-all": "with --dry-run: execute every rank (64 at most) and check that their exchanges meet",
    "execute-json": "with --dry-run: execute, and write everything that was recorded to this file",
    "steal-lock": "take the run folder from the job that holds it, which then stops before its next write",
    "list-presets": "list the presets and exit",
    "help": "this text",
    "version": "print the version and exit",
}


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Read the arguments behind the program's name; what is wrong is collected in ``problems``."""
    line = CommandLine()
    tokens = list(argv)
    at = 0
    while at < len(tokens):
        token = tokens[at]
        at += 1
        if token == "-h":
            token = "--help"
        if not token.startswith("--") or token == "--":
            line.problems.append(_stray(token, tokens[at - 2] if at > 1 else ""))
            while token.startswith("-") and at < len(tokens) and _is_value(tokens[at]):
                at += 1
            continue
        name, equals, inline = token.partition("=")
        values = [inline] if equals else []
        if not equals:
            while at < len(tokens) and _is_value(tokens[at]):
                values.append(tokens[at])
                at += 1
        _Flag(line, name, values, bool(equals)).read()
    _check_spellings(line)
    _join_unknown(line)
    if line.actions.executes and not line.actions.dry_run:
        line.problems.append(
            Problem(
                "--execute plays ranks without a device, beside --dry-run", "flag", "add --dry-run, or leave it out"
            )
        )
    return line


def _join_unknown(line: CommandLine) -> None:
    """One problem for all flags of other programs, which says what to remove."""
    if len(line.unknown) < 2:
        return
    each = [problem for problem, _ in line.unknown]
    typed = [typed for _, typed in line.unknown]
    what = f"unknown flags: {' '.join(dict.fromkeys(typed))}"
    joined = Problem(what, "flag", "remove them from the command; --help lists all flags")
    at = line.problems.index(each[0])
    line.problems[at:] = [joined, *(problem for problem in line.problems[at:] if problem not in each)]
    line.unknown = [(joined, one) for one in typed]


def _is_value(token: str) -> bool:
    return not token.startswith("-") or re.fullmatch(r"-\.?\d.*", token) is not None


def _stray(token: str, before: str) -> Problem:
    if token.startswith("-") and len(token) > 1:
        word = token.lstrip("-").replace("-", "_")
        fix = f"write -{token}" if word in fields_by_name() else "flags start with two hyphens"
        return Problem(f"unknown flag {token}", "flag", fix)
    after = f" after {before}" if before else ""
    what = f"argument {token!r}{after} does not belong to a flag"
    return Problem(what, "flag", "flags are --name value or --name=value")


class _Flag:
    """One flag with the values that follow it."""

    def __init__(self, line: CommandLine, typed: str, values: list[str], inline: bool):
        self.line = line
        self.typed = typed
        self.name = typed[2:].replace("_", "-")
        self.values = values
        self.inline = inline

    def read(self) -> None:
        name = self.name
        self.line.given[name] = tuple(self.values)
        by_flag = {info.flag[2:]: info for info in fields_by_name().values()}
        if name in ACTION_FLAGS:
            self.action()
        elif name == "moe-layer-freq" and self.values == ["-1"]:
            self.line.notes.append(f"{self.typed} -1: taken as 1, every layer is a MoE layer")
            self.say(by_flag[name], 1, "flag")
        elif name == "moe-layer-freq" and any("[" in value for value in self.values):
            self.field(by_flag["moe-layer-pattern"], "flag --moe-layer-freq")
        elif name in by_flag:
            self.field(by_flag[name], "flag")
        elif name.startswith("no-") and _is_bool(by_flag.get(name[3:])):
            self.constant(by_flag[name[3:]], "false")
        elif name.startswith("no-") and name in {f"no-{flag}" for flag in by_flag}:
            self.unset(by_flag[name[3:]])
        elif name in ANSWERS:
            self.megatron(ANSWERS[name])
        else:
            self.unknown(by_flag)

    def problem(self, what: str, fix: str = "") -> None:
        self.line.problems.append(Problem(what, "flag", fix))

    def single(self) -> str | None:
        """The one value, or None after a complaint."""
        if len(self.values) == 1:
            return self.values[0]
        if not self.values:
            self.problem(f"{self.typed} has no value", fix=f"{self.typed} VALUE")
        else:
            given = " ".join(self.values)
            self.problem(
                f"{self.typed} takes one value, not {len(self.values)}: {given}",
                fix="quote a value that contains spaces",
            )
        return None

    def action(self) -> None:
        line, actions = self.line, self.line.actions
        attribute = self.name.replace("-", "_")
        if self.name in ("config", "preset"):
            value = self.single()
            if value is not None and self.name == "config":
                line.configs.append(value)
            elif value is not None:
                line.preset = Said("preset", value, "flag")
        elif self.name == "print-config":
            form = self.values[0] if self.values else "table"
            if form not in ("table", "yaml") or len(self.values) > 1:
                self.problem(f"{self.typed} takes nothing or yaml, not {' '.join(self.values)!r}")
            line.actions = replace(actions, print_config=form)
        elif self.name == "execute-json":
            line.actions = replace(actions, execute_json=self.single())
        elif self.name == "execute-ranks":
            line.actions = replace(actions, execute_ranks=self.ranks())
        elif self.values:
            self.problem(f"{self.typed} takes no value, not {' '.join(self.values)!r}")
        else:
            line.actions = replace(actions, **{attribute: True})

    def ranks(self) -> tuple[int, ...]:
        """Numbers with commas or spaces between them; empty after a complaint."""
        words = [word for value in self.values for word in value.split(",") if word]
        if not words or not all(word.isdigit() for word in words):
            given = " ".join(self.values)
            self.problem(f"{self.typed} is {given!r}", fix="it takes numbers of ranks, such as 0,512")
            return ()
        return tuple(dict.fromkeys(map(int, words)))

    def field(self, info: FieldInfo, origin: str) -> None:
        if info.kind is bool and not self.values:
            self.say(info, True, origin)
            return
        if info.kind is bool and not self.inline:
            self.problem(
                f"{self.typed} takes no value, not {' '.join(self.values)!r}",
                fix=f"{info.flag}, or {info.flag.replace('--', '--no-', 1)} to turn it off",
            )
            return
        refused = self.refused_values(info)
        if refused is not None:
            what = f"{self.typed} {' '.join(dict.fromkeys(self.values))} (a Megatron-LM value) is refused: "
            self.problem(what + refused.because, f"use {refused.use}")
            self.line.refused.append(self.line.problems[-1])
            return
        self.values = [self.translated(info, value) for value in self.values]
        try:
            if info.many:
                if not self.values:
                    raise ValueError(info.expects())
                self.say(info, info.convert_many(self.values), origin)
            else:
                value = self.single()
                if value is None:
                    self.line.unreadable.add(info.name)
                    if info.section in UNPLANNED:
                        self.line.unplanned.append(self.line.problems[-1])
                    return
                unset = info.optional and value.lower() in ("none", "null")
                self.say(info, None if unset else info.convert(value), origin)
        except ValueError as error:
            self.line.unreadable.add(info.name)
            given = " ".join(self.values)
            what = f"{self.typed} is {given!r}" if given else f"{self.typed} has no value"
            self.problem(what, fix=f"it takes {error}")
            if info.section in UNPLANNED:
                self.line.unplanned.append(self.line.problems[-1])

    def refused_values(self, info: FieldInfo) -> Refused | None:
        """Why Megatron-LM can have these values and we cannot; equal values for all layers become one."""
        words = REFUSED_WORDS.get(info.name, {})
        found = next((words[value] for value in self.values if value in words), None)
        if info.name in ONE_FOR_ALL_LAYERS and found is None and len(self.values) > 1:
            if len(set(self.values)) > 1:
                return ONE_FOR_ALL_LAYERS[info.name]
            self.values = self.values[:1]
        return found

    def constant(self, info: FieldInfo, text: str) -> None:
        """A flag that stands for a value by itself."""
        if self.values:
            self.problem(f"{self.typed} takes no value, not {' '.join(self.values)!r}")
        else:
            self.say(info, info.convert(text), f"flag {self.typed}")

    def translated(self, info: FieldInfo, value: str) -> str:
        """Megatron's word for a value as ours, with a note."""
        ours = WORDS.get(info.name, {}).get(value)
        if ours is None:
            return value
        self.line.notes.append(f"{self.typed} {value}: taken as {ours}")
        return ours

    def unset(self, info: FieldInfo) -> None:
        """--no-X for a value that a preset or a file gave: back to unset."""
        if info.optional or info.many:
            if self.values:
                self.problem(f"{self.typed} takes no value, not {' '.join(self.values)!r}")
            else:
                self.say(info, () if info.many else None, "flag")
        else:
            self.problem(f"unknown flag {self.typed}: {info.name} cannot be unset", fix=f"{info.flag} VALUE")

    def say(self, info: FieldInfo, value: object, origin: str) -> None:
        self.line.said.append(Said(info.name, value, origin))

    def megatron(self, answer: Answer) -> None:
        known = fields_by_name()
        given = " ".join([self.typed, *self.values])
        if isinstance(answer, Alias):
            if answer.but:
                self.line.notes.append(f"{given}: taken as {known[answer.fields[0]].flag}; {answer.but}")
                self.values = []
            elif answer.fields != ("precision",):
                ours = " ".join(known[name].flag for name in answer.fields)
                default = answer.value is not None and known[answer.fields[0]].default == answer.value
                name = "nothing to do: it is the default of" if default else "another name of"
                self.line.notes.append(f"{given}: {name} {ours}" + (f" ({answer.value})" if answer.value else ""))
            for name in answer.fields:
                if answer.value is not None:
                    self.constant(known[name], answer.value)
                else:
                    self.field(known[name], f"flag {self.typed}")
        elif isinstance(answer, Ignored):
            self.line.notes.append(f"{given}: ignored, because {answer.because}")
        elif isinstance(answer, Always):
            if not self.values or not answer.values or all(value in answer.values for value in self.values):
                self.line.notes.append(f"{given}: nothing to do: {answer.because}")
            else:
                fix = answer.fix or f"leave it out, or {self.typed} {answer.values[0]}"
                self.problem(f"{given} contradicts this framework: {answer.because}", fix)
                self.line.refused.append(self.line.problems[-1])
        elif isinstance(answer, Refused):
            use = f"use {answer.use}" if answer.use else "leave it out"
            if answer.another_model:
                use = "omit it: neither the training nor the planner supports such a model"
            what = f"{self.typed} (a Megatron-LM flag) is refused: {answer.because}"
            self.problem(what, use)
            if not answer.another_model:
                self.line.refused.append(self.line.problems[-1])
        elif isinstance(answer, UnevenSplit):
            self.uneven(answer.part)
        else:
            self.line.layers_per_virtual_stage = self.natural() or self.line.layers_per_virtual_stage

    def natural(self) -> int | None:
        """The one value, an integer of at least 1; None after a complaint."""
        value = self.single()
        if value is not None and (not value.isdigit() or int(value) < 1):
            self.problem(f"{self.typed} is {value!r}", fix="it takes an integer of at least 1")
            return None
        return None if value is None else int(value)

    def uneven(self, part: str) -> None:
        """A part of `SplitFlags`; two spellings of one that disagree are a slip."""
        line, value = self.line, None
        if part in ("embedding", "loss"):
            if self.values:
                self.problem(f"{self.typed} takes no value, not {' '.join(self.values)!r}")
                return
            value = True
        else:
            value = self.natural()
            if value is None:
                return
        before = line.split_words.get(part, "")
        if before and before.split()[0] != self.typed and getattr(line.split, part) != value:
            self.problem(f"{before} and {self.typed} {value} disagree", "keep one of the two")
        line.split = replace(line.split, **{part: value})
        line.split_words[part] = " ".join([self.typed, *self.values])

    def unknown(self, by_flag: dict[str, FieldInfo]) -> None:
        """A flag that nobody knows: of another program, unless it looks like a slip."""
        words = [*by_flag, *ACTION_FLAGS, *(f"no-{flag}" for flag, info in by_flag.items() if _is_bool(info))]
        found = closest(self.name, words) or closest(self.name, ANSWERS)
        mean = f": did you mean --{found}?" if found else ""
        self.problem(f"unknown flag {self.typed}{mean}", fix="" if found else "--help lists all flags")
        planned = [flag for flag, info in by_flag.items() if info.section not in UNPLANNED]
        if not difflib.get_close_matches(self.name, planned, n=1, cutoff=SLIP):
            self.line.unknown.append((self.line.problems[-1], self.typed))


def _is_bool(info: FieldInfo | None) -> bool:
    return info is not None and info.kind is bool


def _check_spellings(line: CommandLine) -> None:
    """Two spellings of one flag that disagree are a slip, not an override."""
    first: dict[str, Said] = {}
    for said in line.said:
        other = first.setdefault(said.name, said)
        if other.origin != said.origin and other.value != said.value:
            both = [f"{_spelling(item)} says {item.name}={_show(item.value)}" for item in (other, said)]
            line.problems.append(Problem(", ".join(both), "flag", "keep one of the two"))


def _spelling(said: Said) -> str:
    return said.origin.removeprefix("flag").strip() or fields_by_name()[said.name].flag


def _show(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
