"""``tools/verify_checkpoint.py``: read every byte of checkpoints and say what is not as it was saved."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_telechat.cli.text import gib
from megatron_telechat.cli.tool import ToolParser, purpose, run_tool
from megatron_telechat.errors import EXIT_CHECKPOINT, EXIT_OK, CheckpointError, Problem
from megatron_telechat.locations import Location, location


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 all sound, 2 arguments, 4 something is damaged or not there)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    parser = ToolParser(prog="tools/verify_checkpoint.py", description=purpose(__doc__))
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=location,
        metavar="PATH",
        help="checkpoints, or folders or URLs of them: all they hold, also set aside; folders of local checkpoints, "
        "of one node or of several: what they hold together",
    )
    add("--json", action="store_true", help="print one JSON list in place of text")
    args = parser.parse_args(argv)
    verdicts = _verdicts(args.paths)
    problems = [problem for verdict in verdicts for problem in verdict["problems"]]
    if args.json:
        print(
            json.dumps(
                [{**verdict, "problems": list(map(vars, verdict["problems"]))} for verdict in verdicts], indent=1
            )
        )
    else:
        for verdict in verdicts:
            print("\n".join(_lines(verdict)))
    if problems and not args.json:
        print(CheckpointError(problems).render(), file=sys.stderr)
    return EXIT_CHECKPOINT if problems else EXIT_OK


def _verdicts(paths: Sequence[Location]) -> list[dict[str, Any]]:
    from megatron_telechat.checkpoint.local.offline import holds_parts
    from megatron_telechat.cli.local_verdicts import local_verdicts

    local = [path for path in paths if isinstance(path, Path) and holds_parts(path)]
    found = [_verdict(folder) for path in paths if path not in local for folder in _folders(path)]
    return found + (local_verdicts(local) if local else [])


def _folders(path: Location) -> list[Location]:
    from megatron_telechat.checkpoint.folders import committed_folders, folders_aside
    from megatron_telechat.checkpoint.names import MANIFEST, step_of_name
    from megatron_telechat.checkpoint.stores import store_of

    if store_of(path).is_file(path / MANIFEST) or step_of_name(path) is not None:
        return [path]
    found = [folder for _, folder in committed_folders(path)] + folders_aside(path)
    if not found:
        raise CheckpointError(
            "no checkpoint there",
            str(path),
            "give a folder iter_… or one that holds some (checkpoints/ of a run, or the folder of a node's local ones)",
        )
    return found


def _verdict(folder: Location) -> dict[str, Any]:
    """Everything that is wrong with one checkpoint, and what it holds."""
    from megatron_telechat.checkpoint.names import MANIFEST
    from megatron_telechat.checkpoint.stores import store_of
    from megatron_telechat.checkpoint.verify import check_files, read_sound_manifest

    began = time.perf_counter()
    problems: list[Problem] = []
    facts: dict[str, Any] = {"path": str(folder), "step": None, "save": None, "files": 0, "bytes": 0}
    try:
        manifest = read_sound_manifest(folder)
    except CheckpointError as error:
        problems = list(error.problems)
    else:
        problems = check_files(folder, manifest, manifest.files)
        size = sum(entry.size for entry in manifest.files.values())
        facts |= {"step": manifest.step, "save": manifest.save, "files": len(manifest.files), "bytes": size}
        known = {MANIFEST, *manifest.files}
        facts["unknown_files"] = sorted(name for name in store_of(folder).files(folder) if name not in known)
    return {**facts, "seconds": round(time.perf_counter() - began, 3), "problems": problems}


def _lines(verdict: dict[str, Any]) -> Iterable[str]:
    from megatron_telechat.cli.local_verdicts import checkpoint_lines, part_text

    if "local" in verdict:
        yield from checkpoint_lines(verdict)
        return
    if verdict["problems"]:
        yield f"{verdict['path']}: DAMAGED"
        return
    unknown = verdict["unknown_files"]
    more = f"; not of this save: {', '.join(unknown[:5])}" if unknown else ""
    save = verdict["save"][:8] if verdict["save"] else "no id (an older release)"
    part = part_text(verdict) if "part" in verdict else ""
    yield (
        f"{verdict['path']}: sound, {part}step {verdict['step']}, save {save}, {verdict['files']} files, "
        f"{gib(verdict['bytes'])} GiB in {verdict['seconds']:.1f} s{more}"
    )
