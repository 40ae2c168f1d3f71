"""Time that a training loses to a save, in between the steps and beside them.

    OMP_NUM_THREADS=1 python tools/bench/checkpoint_async.py --megabytes 500 --json async.json
    OMP_NUM_THREADS=2 python tools/bench/checkpoint_async.py --megabytes 500 --writers

On a quiet machine with at least two cores: one trains, the other one writes. With --writers the ways to write are
compared (page cache, priorities), also where the training takes all cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500, help="size of the checkpoint, about")
    parser.add_argument("--repeats", type=int, default=5, help="turns of all arms")
    parser.add_argument("--folder", type=Path, help="where to save; the disk that is measured")
    parser.add_argument("--json", type=Path, help="file for the figures; unset: they are printed")
    parser.add_argument("--writers", action="store_true", help="compare the ways to write in place of the arms")
    args = parser.parse_args()

    from tools.bench.checkpointing.asynchronous import measure
    from tools.bench.checkpointing.writers import measure_ways

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = (measure_ways if args.writers else measure)(Path(folder), args.megabytes * 1e6, args.repeats)
    text = json.dumps(found, indent=1)
    if args.json is None:
        print(text)
    else:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
