"""What was found, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelerator.section import SECTIONS


def page(report: Mapping[str, Any]) -> str:
    """One page of all sections that the report holds."""
    lines = [f"# On one accelerator: {report['device']}", "", f"`{report['command']}`", ""]
    for section in SECTIONS:
        entry = report["sections"].get(section.name)
        if entry is None:
            continue
        lines += [f"## {section.title}", "", f"`{section.name}`: {entry['status']} in {entry['seconds']:.0f} s", ""]
        lines += [f"* {line}" for name, value in entry["results"].items() for line in _lines(name, value)]
        if entry.get("error"):
            lines += ["", "```", entry["error"].strip(), "```"]
        lines.append("")
    return "\n".join(lines)


def _lines(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and "ok" in value:
        rest = {key: item for key, item in value.items() if key != "ok"}
        yield f"{'ok' if value['ok'] else '**NOT OK**'}: {name}: {_text(rest)}"
        return
    yield f"{name}: {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    return str(value).replace("\n", " ")


def failed_checks(entry: Mapping[str, Any]) -> list[str]:
    """Names of the results of one section that say they are not ok."""
    return [name for name, value in entry["results"].items() if isinstance(value, dict) and value.get("ok") is False]
