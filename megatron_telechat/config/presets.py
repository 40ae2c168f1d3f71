"""The presets: one YAML file a model, in ``presets/``."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "presets"


def preset_names() -> tuple[str, ...]:
    """Names of the presets, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def preset_text(name: str) -> str:
    """The YAML of a preset."""
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def preset_title(name: str) -> str:
    """The first sentence of the comment a preset begins with."""
    first = preset_text(name).splitlines()[0].lstrip("# ")
    return first.split(". ")[0].rstrip(":.")
