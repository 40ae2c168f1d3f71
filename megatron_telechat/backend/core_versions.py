"""The releases of megatron-core that this package runs on, and of Transformer Engine that it was read against. Standard
library only: the doctor asks it too.

Upstream's newer releases want Python 3.12; 0.16.1 is the last one for older Pythons. Both are served from one tree.
What differs between them is asked of `installed_line`, here and in the named fixes, and nowhere else.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys

from megatron_telechat.errors import ConfigError

LINES: dict[str, str] = {"0.16": "==0.16.1", "0.19": ">=0.19.2,<0.20"}
"""Each release line with its version condition, as in pyproject.toml; oldest first."""

PYTHON_OF_NEWEST = (3, 12)
"""The oldest Python that pip installs the newest line on."""

TRANSFORMER_ENGINE = ">=2.4,<2.21"
"""The releases whose signatures tests/model/te_facts.py has; the condition of the extra `te` in pyproject.toml."""


def numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, without what follows a ``+``: ``2.13.0+cpu`` is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def satisfies(version: str, condition: str) -> bool:
    """Whether a version meets all parts of a condition such as ``>=0.19.2,<0.20``; the empty condition always holds."""
    have = numbers(version)
    for part in filter(None, condition.split(",")):
        operator, wanted = re.match(r"[=<>]+", part), numbers(part)
        holds = {"==": have == wanted, ">=": have >= wanted, "<": have < wanted}
        if operator is None or not holds[operator.group()]:
            return False
    return True


def condition_here(python: tuple[int, int] = sys.version_info[:2]) -> str:
    """The version condition of what pip can install on this Python."""
    return LINES["0.19" if python >= PYTHON_OF_NEWEST else "0.16"]


def line_of(version: str) -> str | None:
    """The line that a version belongs to; None for one that this package was not written for."""
    return next((line for line, condition in LINES.items() if satisfies(version, condition)), None)


def installed_line() -> str:
    """The line of the installed megatron-core.

    Raises:
        ConfigError: megatron-core is missing, or the fixes were not written for its version.
    """
    fix = f'pip install "megatron-core{condition_here()}"'
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("megatron-core is not installed", "Python environment", fix) from None
    line = line_of(found)
    if line is None:
        known = " or ".join(LINES.values())
        raise ConfigError(
            f"megatron-core {found} is installed, but this release is written for {known}", "Python environment", fix
        )
    return line
