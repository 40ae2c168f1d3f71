"""Configuration files: reading with file and line of every value, writing the resolved run.

PyYAML's own guesses are not used: a value is read by the type of its field, so that
``lr: 1e-5`` is a number (YAML 1.1 says text) and ``split: 969,30,1`` is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_telechat.config.fields import (
    FieldInfo,
    closest,
    did_you_mean,
    fields_by_name,
    make_run,
    sections,
    values_of,
)
from megatron_telechat.config.layout import text_of_lists
from megatron_telechat.config.run_stages import STAGE_FIELDS, STAGES_KEY, START_KEYS, StageStart
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.errors import ConfigError, Problem

PRESET_KEY = "preset"

LISTS: dict[str, Callable[[list[Any]], str]] = {"pipeline_model_parallel_layout": text_of_lists}
"""Fields of text that may be written as lists → the text that a list means. Raises ConfigError."""


@dataclass(frozen=True)
class Said:
    """A value somebody gave to a field, and where."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class StageEntry:
    """One entry of ``stages:``: where the stage begins and what it sets, as the file says it."""

    number: int
    start: StageStart
    said: tuple[Said, ...]
    origin: str

    @property
    def title(self) -> str:
        """``stage 2 (from 8,192 tokens)``."""
        return self.start.title_of(self.number)


@dataclass(frozen=True)
class YamlFile:
    """What a file says: values, the preset it builds on, what is wrong, the fields whose value could not be read, and
    the stages of the run; None where it names none."""

    said: tuple[Said, ...]
    preset: Said | None
    problems: tuple[Problem, ...]
    unreadable: frozenset[str] = frozenset()
    stages: tuple[StageEntry, ...] | None = None


def read_yaml(text: str, file: str, label: str | None = None) -> YamlFile:
    """Read a configuration file.

    Args:
        text: its content.
        file: its name, for messages.
        label: origin of its values; unset means file:line.
    """
    return _Reader(file, label).read(text)


class _Reader:
    def __init__(self, file: str, label: str | None):
        self.file = file
        self.label = label
        self.said: list[Said] = []
        self.preset: Said | None = None
        self.problems: list[Problem] = []
        self.unreadable: set[str] = set()
        self.stages: list[StageEntry] | None = None

    def read(self, text: str) -> YamlFile:
        import yaml

        try:
            root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = self.file if mark is None else f"{self.file}:{mark.line + 1}"
            reason = getattr(error, "problem", None) or str(error)
            self.problems.append(Problem(f"cannot read the YAML: {reason}", where))
            root = None
        if root is not None and not _is_null(root):
            if isinstance(root, yaml.MappingNode):
                self.top(root)
            else:
                self.problem(root, "the file is not a mapping of sections", fix=_SECTIONS_HELP)
        stages = None if self.stages is None else tuple(self.stages)
        return YamlFile(tuple(self.said), self.preset, tuple(self.problems), frozenset(self.unreadable), stages)

    def problem(self, node: Any, what: str, fix: str = "") -> None:
        self.problems.append(Problem(what, self.at(node), fix))

    def at(self, node: Any) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def pairs(self, node: Any, prefix: str) -> list[tuple[str, Any, Any]]:
        """(key, key node, value node) of a mapping, duplicates reported and left out."""
        lines: dict[str, int] = {}
        out = []
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in lines:
                self.problem(
                    key_node, f"{prefix}{key} is given twice, first in line {lines[key]}", "keep one of the two"
                )
                continue
            lines[key] = key_node.start_mark.line + 1
            out.append((key, key_node, value_node))
        return out

    def top(self, root: Any) -> None:
        import yaml

        for key, key_node, node in self.pairs(root, ""):
            if key == PRESET_KEY:
                self.preset = Said(PRESET_KEY, str(node.value), self.at(key_node))
            elif key == STAGES_KEY:
                self.stages_of(node)
            elif key not in sections():
                self.unknown_section(key, key_node)
            elif isinstance(node, yaml.MappingNode):
                self.section(key, node)
            elif not _is_null(node):
                self.problem(
                    node,
                    f"section {key} is not a mapping",
                    fix=f"{key}: on a line of its own, its keys indented below it",
                )

    def unknown_section(self, key: str, node: Any) -> None:
        field = fields_by_name().get(key.replace("-", "_"))
        if field is not None:
            self.problem(node, f"key {key} is outside of any section", fix=f"indent it under {field.section}:")
        else:
            self.problem(node, f"unknown section {key}{did_you_mean(key, sections())}", fix=_SECTIONS_HELP)

    def section(self, section: str, mapping: Any) -> None:
        known = fields_by_name()
        own = [name for name, field in known.items() if field.section == section]
        for key, key_node, node in self.pairs(mapping, f"{section}."):
            if key in own:
                self.value(known[key], key_node, node)
                continue
            plain = key.replace("-", "_")
            if plain in known and plain not in own:
                self.problem(
                    key_node,
                    f"key {key} does not belong in section {section}",
                    fix=f"move it under {known[plain].section}:",
                )
                continue
            guess = closest(key, own)
            if guess is None:
                other = closest(key, known)
                guess = None if other is None else known[other].key
            mean = f": did you mean {guess}?" if guess else ""
            where = self.at(key_node)
            self.problems.append(Problem(f"unknown key {section}.{key} in {where}{mean}"))

    def stages_of(self, node: Any) -> None:
        """The list of stages; entries that cannot be read are left out after a complaint."""
        import yaml

        self.stages = []
        if _is_null(node):
            return
        if not isinstance(node, yaml.SequenceNode):
            self.problem(node, f"{STAGES_KEY} is not a list", fix=_STAGES_HELP)
            return
        for number, entry in enumerate(node.value, 1):
            if not isinstance(entry, yaml.MappingNode):
                self.problem(entry, f"stage {number} is not a mapping", fix=_STAGES_HELP)
                continue
            outer, self.said, before = self.said, [], len(self.problems)
            start = self.stage(entry)
            said, self.said = self.said, outer
            self.problems[before:] = [
                replace(one, what=f"stage {number}: {one.what}") for one in self.problems[before:]
            ]
            if start is not None:
                self.stages.append(StageEntry(number, start, tuple(said), self.at(entry)))

    def stage(self, entry: Any) -> StageStart | None:
        """The start of one stage; what it sets goes to ``said``."""
        known = fields_by_name()
        starts: list[StageStart | None] = []
        for key, key_node, node in self.pairs(entry, ""):
            if key in START_KEYS:
                text = str(node.value).replace("_", "")
                if text.isdigit() and len(text) <= 18:
                    starts.append(StageStart(START_KEYS[key], int(text)))
                else:
                    self.problem(key_node, f"{key} is {node.value!r}", fix="a number from 0 on")
                    starts.append(None)
            elif key in STAGE_FIELDS:
                self.value(known[key], key_node, node)
            else:
                self.problem(key_node, _not_of_a_stage(key), fix=_OF_A_STAGE)
        if len(starts) != 1:
            self.problem(entry, f"it needs one of {' and '.join(START_KEYS)}", fix=_STAGES_HELP)
            return None
        return starts[0]

    def value(self, field: FieldInfo, key_node: Any, node: Any) -> None:
        import yaml

        try:
            if _is_null(node):
                if not field.optional:
                    raise ValueError(field.expects())
                value = None
            elif field.many:
                value = self.items(field, node)
            elif isinstance(node, yaml.ScalarNode):
                value = field.convert(node.value)
            elif isinstance(node, yaml.SequenceNode) and field.name in LISTS:
                value = LISTS[field.name](_plain(node))
            else:
                raise ValueError(field.expects())
        except ValueError as error:
            shown = repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            self.problem(key_node, f"{field.key} is {shown}", fix=f"it takes {error}")
            self.unreadable.add(field.name)
            return
        except ConfigError as error:
            self.problem(key_node, error.problems[0].what, error.problems[0].fix)
            self.unreadable.add(field.name)
            return
        self.said.append(Said(field.name, value, self.label or self.at(key_node)))

    def items(self, field: FieldInfo, node: Any) -> tuple[Any, ...]:
        import yaml

        if isinstance(node, yaml.ScalarNode):
            return field.convert_many([node.value])
        if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
            return tuple(field.convert(item.value) for item in node.value)
        raise ValueError(field.expects())


def _plain(node: Any) -> Any:
    """Sequences as lists, scalars as their text."""
    return [_plain(item) for item in node.value] if isinstance(node.value, list) else node.value


def _is_null(node: Any) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _not_of_a_stage(key: str) -> str:
    """Why a stage cannot set this."""
    known = fields_by_name()
    if key in sections():
        inside = [name for name in STAGE_FIELDS if known[name].section == key]
        return f"{key} is a section; a stage names its settings directly" + (
            f": {inside[0]}: ..." if inside else ", and none of that section"
        )
    if key in known:
        return f"{key} cannot change inside a run"
    return f"unknown key {key}{did_you_mean(key, (*STAGE_FIELDS, *START_KEYS))}"


_SECTIONS_HELP = (
    "the sections are model, parallel, training, optimizer, data, checkpoint, evaluation, average, logging (and "
    "preset: NAME, stages: a list)"
)
_STAGES_HELP = "a list of entries such as {from_tokens: 0}, {from_tokens: 1000000, seq_length: 32768}"
_OF_A_STAGE = "a stage sets " + ", ".join(STAGE_FIELDS)


def dump_run_config(run: RunConfig) -> str:
    """The run as YAML with every value, which ``--config`` and :func:`run_config_from_yaml` read back to an equal
    run."""
    return _dumped(values_of(run), {})


def dump_model_config(model: ModelConfig) -> str:
    """The model section as YAML, which ``--config`` reads."""
    return _dumped(vars(model), {})


def dump_stages(values: Mapping[str, Any], stages: Sequence[StageEntry]) -> str:
    """A run in stages as YAML, which ``--config`` reads back to equal stages.

    Args:
        values: field → value, of what somebody said outside of the stages; what follows from others is left out,
            because it may follow otherwise in each stage.
    """
    keys = {unit: key for key, unit in START_KEYS.items()}
    entries = [
        {keys[one.start.unit]: one.start.count, **{said.name: _plain_value(said.value) for said in one.said}}
        for one in stages
    ]
    known = fields_by_name()
    return _dumped({name: values[name] for name in known if name in values}, {STAGES_KEY: entries})


def _dumped(values: Mapping[str, Any], more: Mapping[str, Any]) -> str:
    import yaml

    document: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for name, value in values.items():
        document[fields_by_name()[name].section][name] = _plain_value(value)
    whole = {**{section: body for section, body in document.items() if body}, **more}
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=120)


def _plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def run_config_from_yaml(text: str, file: str = "config.yaml") -> RunConfig:
    """Read a file that :func:`dump_run_config` wrote, without rules and without presets.

    Args:
        text: content of the file.
        file: its name, for messages.

    Raises:
        ConfigError: for unknown keys and values of a wrong type.
    """
    read = read_yaml(text, file)
    if read.problems:
        raise ConfigError(read.problems)
    return make_run({said.name: said.value for said in read.said})
