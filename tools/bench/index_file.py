#!/usr/bin/env python3
"""Writing and merging .idx files of many sequences: ours beside megatron-core's builder.

    python tools/bench/index_file.py [--sequences 10000000] [--rounds 3] [--work DIR]

Every arm is a process of its own, in turn; reported are medians of its CPU seconds and of its peak memory above what it
had after its imports, and whether the index files are the same. Sequences of one token of two bytes, one a document; a
merge joins two halves.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ARMS = ("ours write", "core write", "ours merge", "core merge")


def ours_write(folder: Path, count: int) -> Callable[[], None]:
    from megatron_telechat.data.indexed.format import stored, write_index

    with open(folder / "lengths", "wb") as file:  # in pieces: what it takes is not part of the base
        for _ in range(0, count, count // 100):
            np.ones(count // 100, np.int32).tofile(file)

    def lengths():
        return stored(folder / "lengths", "<i4")

    def work() -> None:
        with open(folder / "ours-write.idx", "wb") as file:
            write_index(file, np.dtype(np.uint16), count, count, lengths, lengths)

    return work


def core_write(folder: Path, count: int) -> Callable[[], None]:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "core-write.bin"), dtype=np.uint16)

    def work() -> None:
        builder.sequence_lengths = [1] * count
        builder.document_indices = list(range(count + 1))
        builder.finalize(str(folder / "core-write.idx"))

    return work


def ours_merge(folder: Path, count: int) -> Callable[[], object]:
    from megatron_telechat.data.indexed.merge import merge_datasets

    return lambda: merge_datasets(halves(folder, count), str(folder / "ours-merge"))


def core_merge(folder: Path, count: int) -> Callable[[], None]:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefixes = halves(folder, count)

    def work() -> None:
        builder = IndexedDatasetBuilder(str(folder / "core-merge.bin"), dtype=np.uint16)
        for prefix in prefixes:
            builder.add_index(prefix)
        builder.finalize(str(folder / "core-merge.idx"))

    return work


def halves(folder: Path, count: int) -> list[str]:
    """Two datasets of half of the sequences each; made once."""
    from megatron_telechat.data.indexed.format import write_index

    size = count // 2
    for name in ("half-0", "half-1"):
        if not (folder / f"{name}.idx").exists():
            ones = np.ones(size, np.int32)
            np.zeros(size, np.uint16).tofile(folder / f"{name}.bin")
            with open(folder / f"{name}.idx", "wb") as file:
                write_index(file, np.dtype(np.uint16), size, size, lambda: [ones], lambda: [ones])
    return [str(folder / "half-0"), str(folder / "half-1")]


def run_arm(arm: str, folder: Path, count: int) -> None:
    """The process of one arm: prints what it took."""
    work = {"ours write": ours_write, "core write": core_write, "ours merge": ours_merge, "core merge": core_merge}[
        arm
    ](folder, count)
    base, start = peak_mb(), time.process_time()
    work()
    print(json.dumps({"cpu_s": time.process_time() - start, "above_mb": peak_mb() - base}))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the files [a temporary one]")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        run_arm(args.arm, args.work, args.sequences)
        return 0
    with tempfile.TemporaryDirectory(prefix="index_file_", dir=args.work) as name:
        folder = Path(name)
        halves(folder, args.sequences)
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(args.rounds):
            for arm in ARMS:
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    __file__,
                    "--arm",
                    arm,
                    "--work",
                    name,
                    "--sequences",
                    str(args.sequences),
                ]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[arm].append(json.loads(out.splitlines()[-1]))
        print(f"{args.sequences:,} sequences\n{'':12}{'CPU s':>8}{'MB above':>10}")
        for arm, rounds in found.items():
            cpu, above = (statistics.median(one[key] for one in rounds) for key in ("cpu_s", "above_mb"))
            print(f"{arm:12}{cpu:>8.2f}{above:>10.0f}")
        same = all(
            filecmp.cmp(folder / f"ours-{what}.idx", folder / f"core-{what}.idx", shallow=False)
            for what in ("write", "merge")
        )
    print("the same bytes" if same else "DIFFERENT bytes")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
