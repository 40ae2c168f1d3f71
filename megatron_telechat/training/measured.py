"""What a run has measured of itself, in a file of its folder.

A checkpoint keeps what its run measured (`chunks`, `context`). Between a measurement and the next checkpoint, as behind
the switch to another stage, nothing would: a run that begins again there would measure again, choose otherwise, and sum
in another order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MEASURED = "measured.json"

log = logging.getLogger(__name__)


def read_measured(run_dir: Path) -> dict[str, Any]:
    """The last measurement of each kind, as the ``extra`` of a checkpoint has them; empty where there is none, or none
    that can be read."""
    try:
        found = json.loads((run_dir / MEASURED).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def note_measured(run_dir: Path, extra: Mapping[str, Any]) -> None:
    """Put these beside the ones of other kinds. A disk that refuses costs the next start a measurement, no more."""
    path = run_dir / MEASURED
    beside = path.with_name(f".{MEASURED}.new")
    try:
        beside.write_text(json.dumps({**read_measured(run_dir), **extra}), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        log.warning("cannot write %s: %s; a restart before the next checkpoint measures again", path, error.strerror)


def holding(
    key: str,
    conditions: Mapping[str, Any],
    places: Sequence[Mapping[str, Any]],
    sound: Callable[[Mapping[str, Any]], bool],
) -> tuple[Mapping[str, Any] | None, str]:
    """The first entry of a kind that was measured under these conditions; where there is none but one of others, which
    of them differ.

    Args:
        key: of the kind.
        places: ``extra`` of a checkpoint, what `read_measured` gave.
        sound: whether an entry can be used.
    """
    different = ""
    for place in places:
        entry = place.get(key)
        if not isinstance(entry, Mapping) or not isinstance(entry.get("conditions"), Mapping) or not sound(entry):
            continue
        then = entry["conditions"]
        names = [name for name in {**then, **conditions} if then.get(name) != conditions.get(name)]
        if not names:
            return entry, ""
        different = different or ", ".join(names)
    return None, different
