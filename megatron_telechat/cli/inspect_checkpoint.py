"""``tools/inspect_checkpoint.py``: what is in a checkpoint, and how two of them differ, whatever layouts saved them."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_telechat.cli.text import count_text, gib, table
from megatron_telechat.cli.tool import ToolParser, natural, purpose, run_tool
from megatron_telechat.errors import EXIT_CHECKPOINT, EXIT_OK, ConfigError
from megatron_telechat.locations import location


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done and nothing differs, 2 arguments, 4 damaged, or the two differ)."""
    return run_tool(_run, argv)


def _parser() -> ToolParser:
    parser = ToolParser(prog="tools/inspect_checkpoint.py", description=purpose(__doc__))
    add = parser.add_argument
    add("checkpoint", type=location, help="a checkpoint, or a folder or URL of them: the newest sound one")
    add("--step", type=natural, help="the checkpoint of this step")
    add("--tensors", action="store_true", help="list the global tensors with dtype and shape")
    add("--norms", action="store_true", help="and their norm, largest absolute value and count of NaN and infinity")
    add("--digests", action="store_true", help="and a digest of each, the same whatever layout saved it")
    add("--only", default="*", metavar="PATTERN", help="tensors whose names match, such as 'model/*.layers.3.*'")
    add(
        "--compare",
        type=location,
        metavar="OTHER",
        help="a second one: list the tensors that differ; exit code 4 if any does",
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
    from megatron_telechat.checkpoint.opening import open_verified

    reader, notes = open_verified(args.checkpoint, args.step)
    found: dict[str, Any] = {**contents.overview(reader), "notes": list(notes)}
    keys = fnmatch.filter(sorted(reader.entries), args.only)
    if args.compare is not None:
        other, more = open_verified(args.compare, args.compare_step)
        found["notes"] += more
        both = fnmatch.filter(sorted({*reader.entries, *other.entries}), args.only)
        different = list(contents.differences(reader, other, both))
        found |= {
            "compared_with": contents.overview(other),
            "compared": len(both),
            "differences": list(map(vars, different)),
        }
    if args.tensors or args.norms or args.digests:
        found["listed"] = [_row(reader, key, args.norms, args.digests) for key in keys]
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(_text(found, args.norms, args.digests)))
    return EXIT_CHECKPOINT if found.get("differences") else EXIT_OK


def _row(reader: Any, key: str, norms: bool, digests: bool) -> dict[str, Any]:
    from megatron_telechat.checkpoint import contents

    entry = reader.entries[key]
    row: dict[str, Any] = {"key": key, "dtype": entry.dtype, "shape": list(entry.shape), "boxes": len(entry.boxes)}
    if norms or digests:
        facts = vars(contents.facts(reader, key))
        kept = (*(("norm", "largest", "not_finite") if norms else ()), *(("digest",) if digests else ()))
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
        rows = [
            [
                row["key"],
                row["dtype"],
                "x".join(map(str, row["shape"])),
                str(row["boxes"]),
                *([f"{row['norm']:.6g}", f"{row['largest']:.6g}", str(row["not_finite"])] if norms else []),
                *([row["digest"]] if digests else []),
            ]
            for row in found["listed"]
        ]
        yield ""
        yield from table([head, *rows])
    if "differences" in found:
        yield ""
        yield from _differences(found)


def _overview(found: dict[str, Any]) -> Iterable[str]:
    lineage = found["lineage"]
    parent = lineage["parent"] if lineage else None
    yield f"{found['path']}: step {found['step']}, {found['consumed_samples']:,} samples; every byte is as it was saved"
    yield f"  save      {found['save'] or 'no id (an older release)'}"
    if lineage:
        after = f"after step {parent['step']}" if parent else "the first of its run"
        yield f"  lineage   save {lineage['number']} of its folder, {after}"
        yield from (f"            began at step {one['step']} of {one['folder']}" for one in lineage["began"])
    yield f"  layout    {_pairs(found['topology'])}"
    yield f"  versions  {_pairs(found['versions'])}"
    parameters = count_text(found["parameters"])
    yield f"  holds     {found['tensors']} tensors in {found['files']} files; {parameters} parameters"
    for kind, entry in found["averages"].items():
        yield f"  average   {kind}: {_pairs(entry)}"
    yield f"  GiB       {', '.join(f'{kind} {gib(size)}' for kind, size in found['bytes'].items())}"


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
