"""What ``tools/verify_checkpoint.py`` says of local checkpoints: of each part, and of what the parts make together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_telechat.checkpoint.local.offline import Gathered, HeldPart, checked, gathered, held_in
from megatron_telechat.cli.text import gib

_SHOWN = 8


def local_verdicts(places: Sequence[Path]) -> list[dict[str, Any]]:
    """One verdict for each part in the folders, then one for each local checkpoint that they are of, the one saved last
    first. Raises CheckpointError where a folder holds none."""
    held = [checked(one) for one in held_in(places)]
    return [*map(_of_part, held), *(_of_checkpoint(one, places) for one in gathered(held))]


def _of_part(one: HeldPart) -> dict[str, Any]:
    manifest = one.manifest if one.is_sound else None
    said = one.part
    return {
        "path": str(one.folder),
        "step": said.step if said is not None else None,
        "save": said.save if said is not None else None,
        "files": len(manifest.files) if manifest is not None else 0,
        "bytes": sum(entry.size for entry in manifest.files.values()) if manifest is not None else 0,
        "unknown_files": one.unknown_files if manifest is not None else [],
        "part": {"run": one.run, "rank": said.rank, "ranks": said.ranks} if said is not None else None,
        "seconds": round(one.seconds, 3),
        "problems": list(one.problems),
    }


def _of_checkpoint(one: Gathered, places: Sequence[Path]) -> dict[str, Any]:
    sound = one.sound
    manifests = [copy.manifest for copy in sound.values() if copy.manifest is not None]
    numbers = range(len(places))
    held = {number: [rank for rank, copies in one.copies.items() if any(_is_at(copy, number) for copy in copies)]
            for number in numbers}  # fmt: skip
    return {
        "path": one.name,
        "step": one.one.step,
        "save": one.one.save,
        "files": sum(len(manifest.files) for manifest in manifests),
        "bytes": sum(entry.size for manifest in manifests for entry in manifest.files.values()),
        "unknown_files": [],
        "local": {
            "run": one.run,
            "ranks": one.one.ranks,
            "number": one.one.number,
            "continues": list(one.one.continues),
            "whole": one.is_whole,
            "missing": one.missing,
            "damaged": one.damaged,
            "held": {str(places[number]): sorted(ranks) for number, ranks in held.items()},
            "lost_with": {str(places[number]): one.lost_with(number) for number in numbers},
        },
        "seconds": 0.0,
        "problems": one.problems(),
    }


def _is_at(copy: HeldPart, place: int) -> bool:
    return copy.is_sound and copy.place == place


def part_text(verdict: Mapping[str, Any]) -> str:
    """Whose part a verdict is of, for a line of text."""
    part = verdict["part"]
    return f"part of rank {part['rank']} of {part['ranks']}, "


def checkpoint_lines(verdict: Mapping[str, Any]) -> Iterable[str]:
    """What the folders hold of a local checkpoint, for a person."""
    local = verdict["local"]
    yield f"local checkpoint of step {verdict['step']}, save {verdict['save'][:8]}, run {local['run'][:8]}: " + (
        f"whole in what was given, the parts of {local['ranks']} ranks, {gib(verdict['bytes'])} GiB"
        if local["whole"]
        else f"not whole in what was given, {local['ranks'] - len(local['missing']) - len(local['damaged'])} of "
        f"{local['ranks']} parts"
    )
    if local["missing"]:
        yield f"  in none of the folders: {ranks_text(local['missing'])}"
    if local["damaged"]:
        yield f"  damaged in every copy: {ranks_text(local['damaged'])}"
    for place, ranks in local["held"].items():
        alone = local["lost_with"][place]
        lost = "nothing is lost with it" if not alone else f"no other has {ranks_text(alone)}"
        yield f"  {place}: {ranks_text(ranks)}; {lost}" if ranks else f"  {place}: nothing sound of it"


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 0-7, 16``; the first few of many."""
    spans: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1] = spans[-1][0], rank
        else:
            spans.append((rank, rank))
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:_SHOWN]]
    return f"rank {', '.join(shown)}{' and others' if len(spans) > _SHOWN else ''}"
