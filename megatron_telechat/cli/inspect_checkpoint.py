"""``tools/inspect_checkpoint.py``: what is in a checkpoint, and how two of them differ, whatever layouts saved them."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_telechat.cli.text import count_text, gib, table
from megatron_telechat.cli.tool import ToolParser, natural, purpose, run_tool
from megatron_telechat.errors import EXIT_CHECKPOINT, EXIT_OK, CheckpointError, ConfigError
from megatron_telechat.locations import Location, location

if TYPE_CHECKING:
    from megatron_telechat.checkpoint.format import CheckpointReader
    from megatron_telechat.checkpoint.manifest import TensorEntry


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done and nothing differs, 2 arguments, 4 damaged, not
    all of it here, or the two differ)."""
    return run_tool(_run, argv)


def _parser() -> ToolParser:
    parser = ToolParser(prog="tools/inspect_checkpoint.py", description=purpose(__doc__))
    add = parser.add_argument
    add(
        "checkpoint",
        type=location,
        nargs="+",
        help="a checkpoint, or a folder or URL of them: the newest sound one; or folders of local checkpoints, of one "
        "node or of several: the newest that they hold whole, else what they hold of it",
    )
    add("--step", type=natural, help="the checkpoint of this step")
    add("--tensors", action="store_true", help="list the global tensors with dtype and shape")
    add("--norms", action="store_true", help="and their norm, largest absolute value and count of NaN and infinity")
    add("--digests", action="store_true", help="and a digest of each, the same whatever layout saved it")
    add("--only", default="*", metavar="PATTERN", help="tensors whose names match, such as 'model/*.layers.3.*'")
    add(
        "--compare",
        type=location,
        metavar="OTHER",
        action="append",
        help="a second one, once for each of its folders: list the tensors that differ; exit code 4 if any does",
    )
    add("--compare-step", type=natural, help="its step")
    add("--json", action="store_true", help="print JSON in place of text")
    return parser


def _run(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.compare_step is not None and args.compare is None:
        raise ConfigError(
            "--compare-step names the step of a second checkpoint", "--compare-step", "give --compare too"
        )
    from megatron_telechat.checkpoint import contents

    one = _opened(args.checkpoint, args.step)
    found: dict[str, Any] = {**one.overview(), "notes": list(one.notes)}
    not_whole: set[str] = set()
    if args.compare is not None:
        other = _opened(args.compare, args.compare_step)
        found["notes"] += other.notes
        both = fnmatch.filter(sorted({*one.keys, *other.keys}), args.only)
        not_whole |= {key for key in both if not (one.tells_of(key) and other.tells_of(key))}
        compared = [key for key in both if key not in not_whole]
        different = list(contents.differences(one.reader, other.reader, compared))
        found |= {
            "compared_with": other.overview(),
            "compared": len(compared),
            "differences": list(map(vars, different)),
        }
    if args.tensors or args.norms or args.digests:
        keys = fnmatch.filter(sorted(one.keys), args.only)
        found["listed"] = [_row(one, key, args.norms, args.digests) for key in keys]
        not_whole |= {key for key in keys if key in one.pieces} if args.norms or args.digests else set()
    if one.local is not None or not_whole:
        found["not_whole"] = sorted(not_whole)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(_text(found, args.norms, args.digests)))
    if not_whole:
        raise CheckpointError(
            f"{len(not_whole)} tensors are not whole in the folders that were given: {', '.join(sorted(not_whole)[:3])}"
            f"{' ...' if len(not_whole) > 3 else ''}",
            ", ".join(map(str, [*args.checkpoint, *(args.compare or [])])),
            "give the folders of all nodes of the job, or --only for the tensors that are here",
        )
    return EXIT_CHECKPOINT if found.get("differences") else EXIT_OK


@dataclass(frozen=True)
class _Opened:
    """A checkpoint, with every byte read that is looked at.

    Attributes:
        pieces: tensors that are not in the reader, because not all of them is in the folders that were given.
        local: what is said of a local checkpoint beside its overview; None for others.
    """

    reader: CheckpointReader
    notes: tuple[str, ...]
    pieces: Mapping[str, TensorEntry] = field(default_factory=dict)
    local: Mapping[str, Any] | None = None

    @property
    def keys(self) -> set[str]:
        return {*self.reader.entries, *self.pieces}

    def tells_of(self, key: str) -> bool:
        """Whether the values of a tensor, or that there is none, can be read; not where they may lie elsewhere."""
        is_whole = self.local is None or not (self.local["missing"] or self.local["damaged"])
        return key in self.reader.entries or is_whole

    def overview(self) -> dict[str, Any]:
        from megatron_telechat.checkpoint.contents import overview

        return {**overview(self.reader, self.pieces), **({"local": self.local} if self.local is not None else {})}


def _opened(places: Sequence[Location], step: int | None) -> _Opened:
    from megatron_telechat.checkpoint.local.offline import holds_parts, open_offline
    from megatron_telechat.checkpoint.opening import open_verified

    local = [path for path in places if isinstance(path, Path) and holds_parts(path)]
    if not local and len(places) == 1:
        return _Opened(*open_verified(places[0], step))
    if len(local) < len(places):
        strangers = [str(path) for path in places if path not in local]
        raise ConfigError(
            "only a local checkpoint lies in several folders, and these hold no part of one: " + ", ".join(strangers),
            "command line",
            "give one checkpoint (a second one with --compare), or folders of local checkpoints of several nodes",
        )
    found = open_offline(local, step)
    one, sound = found.checkpoint, found.checkpoint.sound
    about = {
        "run": one.run,
        "ranks": one.one.ranks,
        "missing": one.missing,
        "damaged": one.damaged,
        "from": {str(rank): str(copy.folder) for rank, copy in sound.items()},
    }
    return _Opened(found.reader, found.notes, found.pieces, about)


def _row(one: _Opened, key: str, norms: bool, digests: bool) -> dict[str, Any]:
    from megatron_telechat.checkpoint import contents

    entry = one.pieces[key] if key in one.pieces else one.reader.entries[key]
    row: dict[str, Any] = {"key": key, "dtype": entry.dtype, "shape": list(entry.shape), "boxes": len(entry.boxes)}
    kept = (*(("norm", "largest", "not_finite") if norms else ()), *(("digest",) if digests else ()))
    if key in one.pieces:
        return {**row, **dict.fromkeys(kept), "elements_here": contents.elements_there(entry)}
    if kept:
        facts = vars(contents.facts(one.reader, key))
        row |= {name: facts[name] for name in kept}
    return row


def _text(found: dict[str, Any], norms: bool, digests: bool) -> Iterable[str]:
    yield from (f"note: {note}" for note in found["notes"])
    yield from _overview(found)
    if "compared_with" in found:
        yield ""
        yield from _overview(found["compared_with"])
    if "listed" in found:
        head = ["tensor", "dtype", "shape", "boxes", *["norm", "largest", "not finite"] * norms, *["digest"] * digests]
        rows = [_cells(row, norms, digests) for row in found["listed"]]
        yield ""
        yield from table([head, *rows])
    if "differences" in found:
        yield ""
        yield from _differences(found)


def _cells(row: dict[str, Any], norms: bool, digests: bool) -> list[str]:
    """Of a row of the list; of a tensor that is not whole, how much of it is here in place of its values."""
    cells = [row["key"], row["dtype"], "x".join(map(str, row["shape"])), str(row["boxes"])]
    if "elements_here" in row:
        here = f"{row['elements_here'] / max(1, math.prod(row['shape'])):.0%} here"
        return [*cells[:3], f"{cells[3]}, {here}", *["-"] * (3 * norms + digests)]
    if norms:
        cells += [f"{row['norm']:.6g}", f"{row['largest']:.6g}", str(row["not_finite"])]
    return [*cells, *([row["digest"]] if digests else [])]


def _overview(found: dict[str, Any]) -> Iterable[str]:
    lineage = found["lineage"]
    parent = lineage["parent"] if lineage else None
    yield f"{found['path']}: step {found['step']}, {found['consumed_samples']:,} samples; every byte is as it was saved"
    yield f"  save      {found['save'] or 'no id (an older release)'}"
    if "local" in found:
        yield from _parts(found["local"])
    if lineage:
        after = f"after step {parent['step']}" if parent else "the first of its run"
        yield f"  lineage   save {lineage['number']} of its folder, {after}"
        yield from (f"            began at step {one['step']} of {one['folder']}" for one in lineage["began"])
    yield f"  layout    {_pairs(found['topology'])}"
    if found["versions"]:
        yield f"  versions  {_pairs(found['versions'])}"
    parameters = count_text(found["parameters"])
    yield f"  holds     {found['tensors']} tensors in {found['files']} files; {parameters} parameters"
    for kind, entry in found["averages"].items():
        yield f"  average   {kind}: {_pairs(entry)}"
    yield f"  GiB       {', '.join(f'{kind} {gib(size)}' for kind, size in found['bytes'].items())}"


def _parts(local: dict[str, Any]) -> Iterable[str]:
    """Which parts of a local checkpoint are here."""
    from megatron_telechat.cli.local_verdicts import ranks_text

    here = sorted(map(int, local["from"]))
    yield f"  parts     of {ranks_text(here)}, of {local['ranks']} ranks; run {local['run']}"
    if local["missing"]:
        yield f"            in none of the folders: {ranks_text(local['missing'])}"
    if local["damaged"]:
        yield f"            damaged in every copy: {ranks_text(local['damaged'])}"
    if 0 not in here:
        yield "            configuration, lineage and versions are in the part of rank 0"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _differences(found: dict[str, Any]) -> Iterable[str]:
    different = found["differences"]
    if not different:
        yield f"{found['compared']} tensors are equal, bit for bit"
        return
    yield f"{len(different)} of {found['compared']} tensors differ"
    rows = [
        [
            one["key"],
            one["what"],
            f"{one['elements']:,}" if one["elements"] else "-",
            f"{one['largest']:.6g}" if one["elements"] else "-",
            ",".join(map(str, one["at"])) or "-",
        ]
        for one in different
    ]
    yield from table([["tensor", "why", "elements", "largest", "at"], *rows], left=(0, 1))
