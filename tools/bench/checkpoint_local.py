#!/usr/bin/env python3
"""What local checkpoints cost a training beside saves into the shared folder, and how long a restart takes from each.

    python tools/bench/checkpoint_local.py [--megabytes 250] [--rounds 5] [--folder DIR] [--json FILE] [--check]

Two ranks on this machine are two nodes that mirror each other. Within each round take turns: steps alone, a shared save
that training waits for, a shared one beside the steps, a local one beside the steps. Then the job is started again and
again: from the shared checkpoint, from the local one on each rank's own disk, and from the local one after the disk of
node 1 was lost, each after its files were dropped from the page cache. Medians are compared, those of the slower rank.

One disk stands for the disks of both nodes and for the shared file system, and the loop-back interface for the network:
the ratios say what the software adds, not what a faster disk wins. With --check the exit code is 1 where a bar is
missed. A quiet machine with at least two cores is needed: two processes train, two write.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

from turns import Check, check_lines  # noqa: E402


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The figures for a person."""
    sizes, recovery = found["bytes"], found["recovery_s"]
    yield (
        f"{sizes['shared'] / 1e6:.0f} MB a shared checkpoint; of a local one each rank writes "
        f"{sizes['written'] / 1e6:.0f} MB and sends {sizes['sent'] / 1e6:.0f} MB; medians of {found['rounds']} rounds"
    )
    yield f"  step alone {found['step_s']:.3f} s"
    for arm, name in (("sync", "shared, waited for"), ("async", "shared, beside"), ("local", "local")):
        blocked = found[f"{arm}_blocked_s"]
        text = f"  {name:<20} training waits {blocked:6.3f} s, {blocked / found['sync_blocked_s']:6.1%} of the first"
        if arm != "sync":
            text += f"; over after {found[f'{arm}_save_s']:5.2f} s, steps {found[f'{arm}_slowdown']:+.0%} meanwhile"
        if arm == "local":
            text += f"; mirrored after {found['local_mirrored_s']:.2f} s"
        yield text
    for name, seconds in recovery.items():
        yield f"  restart, {name:<11} {seconds:6.3f} s, {seconds / recovery['shared']:5.2f} of the shared one"


def checks(found: Mapping[str, Any]) -> list[Check]:
    """The bars."""
    sizes, sync = found["bytes"], found["sync_blocked_s"]
    own, mirror = (found["recovery_s"][name] / found["recovery_s"]["shared"] for name in ("own disk", "mirror"))
    mirrored = found["local_mirrored_s"] / sync
    return [
        Check("local save: training waits, share of a shared save", found["local_blocked_s"] / sync, 0.15, False),
        Check("local save: until the mirrors are whole, over a shared save", mirrored, 8, False),
        Check("local save: slow-down of the steps beside it", found["local_slowdown"], 0.5, False),
        Check("bytes sent over bytes written", sizes["sent"] / sizes["written"], 1.0, False),
        Check("restart from the own disk over one from the shared", own, 1.3, False),
        Check("restart from the mirror over one from the shared", mirror, 2.0, False),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=250, help="size of a checkpoint, about (default: 250)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to save; the disk that is measured (default: the system's)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    args = parser.parse_args()

    from tools.bench.checkpointing.local import measure

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), args.megabytes * 1e6, args.rounds)
    print("\n".join(lines(found)))
    reached = checks(found)
    print("\n".join(check_lines(reached)))
    if args.json is not None:
        body = {**found, "checks": [{**one._asdict(), "ok": bool(one.ok)} for one in reached]}
        args.json.write_text(json.dumps(body, indent=1))
    return 1 if args.check and not all(one.ok for one in reached) else 0


if __name__ == "__main__":
    sys.exit(main())
