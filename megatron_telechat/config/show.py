"""What ``--help``, ``--print-config`` and ``--list-presets`` print."""

from __future__ import annotations

import textwrap

from megatron_telechat.config.fields import FieldInfo, documentation, fields_by_name, sections, values_of
from megatron_telechat.config.flags import ACTION_FLAGS
from megatron_telechat.config.loader import LoadedConfig
from megatron_telechat.config.origins import DEFAULT
from megatron_telechat.config.presets import preset_names, preset_title
from megatron_telechat.config.yaml_io import dump_run_config

WIDTH = 118


def help_text() -> str:
    """All flags, by section, with their documentation."""
    out = [
        "torchrun --nproc-per-node N pretrain/pretrain_telechat2.py --preset NAME [--config FILE.yaml ...] [--flag "
        "value ...]",
        "",
        "Pretrain a TeleChat2 (or Mixtral) model. Values come from the preset, then the YAML files, then the flags; a "
        "later one wins.",
        "Flags have Megatron-LM's names, with hyphens or underscores; --x-y and --no-x-y switch, --flag none unsets.",
        "Every Megatron-LM flag that is not listed here gets an answer: alias of another flag, ignored, or refused, "
        "with the reason.",
        "",
        "actions",
    ]
    for name, text in ACTION_FLAGS.items():
        out += _entry(f"--{name}" + {"config": " FILE", "preset": " NAME"}.get(name, ""), text)
    words = documentation()
    for section in sections():
        out += ["", f"{section}: {words[section]}"]
        for field in fields_by_name().values():
            if field.section == section:
                out += _entry(_usage(field), words[field.name] + _default(field))
    out += ["", "presets", *(f"  {line}" for line in list_presets().splitlines())]
    return "\n".join(out)


def list_presets() -> str:
    """One line a preset."""
    width = max(map(len, preset_names()))
    return "\n".join(f"{name:<{width}}  {preset_title(name)}" for name in preset_names())


def _usage(field: FieldInfo) -> str:
    if field.kind is bool:
        return f"{field.flag} | {field.flag.replace('--', '--no-', 1)}"
    what = "{" + ",".join(field.choices) + "}" if field.choices else {int: "N", float: "X", str: "TEXT"}[field.kind]
    what = "|".join((what, *field.words))
    return f"{field.flag} {what}" + (" ..." if field.many else "")


def _default(field: FieldInfo) -> str:
    if field.default in (None, ()):
        return ""
    return f" [{_text(field.default)}]"


def _entry(usage: str, text: str) -> list[str]:
    return [f"  {usage}", *textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ")]


def config_table(loaded: LoadedConfig) -> str:
    """Every value of a run with its origin, and what each later stage changes; what nobody set stands as its
    default."""
    values = values_of(loaded.run)
    shown = {name: _text(value) for name, value in values.items()}
    name_width = max(map(len, shown))
    value_width = min(40, max(map(len, shown.values())))
    out: list[str] = []
    for section in sections():
        out.append(f"{section}:")
        for name, field in fields_by_name().items():
            if field.section == section:
                origin = loaded.origins.get(name, DEFAULT)
                out.append(f"  {name + ':':<{name_width + 1}} {shown[name]:<{value_width}}  # {origin}".rstrip())
    for stage in loaded.stages.stages[1:]:
        out.append(f"{stage.title}:")
        for name, (_, value) in loaded.stages.changes(stage).items():
            origin = stage.origins.get(name, DEFAULT)
            out.append(f"  {name + ':':<{name_width + 1}} {_text(value):<{value_width}}  # {origin}".rstrip())
    return "\n".join(out)


def config_yaml(loaded: LoadedConfig) -> str:
    """The resolved run as the YAML that ``--config`` reads."""
    return (loaded.stages.document or dump_run_config(loaded.run)).rstrip("\n")


def _text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value)) if value else "[]"
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)
