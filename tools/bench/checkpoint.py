#!/usr/bin/env python3
"""Saving and loading beside a plain copy and a plain read of the same bytes.

    python tools/bench/checkpoint.py [--megabytes 500] [--rounds 5] [--folder DIR] [--json FILE] [--check]

One process; the arms take turns within each round, after a round to warm up, and their medians are compared:

* *copy*: every file of a checkpoint copied and synced to disk, as ``cp`` and ``sync`` do;
* *save*: `save_checkpoint` of a model with its optimizer; *save, no checksums*: the same without them;
* *read*: every file read from start to end after it was dropped from the page cache;
* *load*: `load_checkpoint` after the same, every byte verified; *read, cached* and *load, cached*: without dropping.

Then four data-parallel ranks save a small model: bytes of each rank. With --check the exit code is 1 where a floor is
missed. The folder must be on a disk: a file system in memory has nothing to drop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from turns import Check, check_lines  # noqa: E402

BYTES_A_PARAMETER = 2 + 4 + 8  # a bf16 weight, its fp32 master, two moments
READ_BYTES = 16 << 20
DATA_PARALLEL = 4


class Subject:
    """A model of about so many bytes with the state of its optimizer, as one rank of a run holds it."""

    def __init__(self, megabytes: float, world_size: int = 1):
        import torch

        from megatron_telechat import parallel
        from megatron_telechat.backend import get_backend
        from megatron_telechat.checkpoint.optimizer_state import optimizer_slices, set_adam_step
        from megatron_telechat.training.build import build_trained

        self.run = run_config(megabytes, world_size)
        backend = get_backend("cpu")
        backend.install()
        self.parallel = parallel.initialize(self.run, backend)
        built = build_trained(self.run, self.parallel, backend)
        self.shards, self.optimizer, self.backend = built.shards, built.optimizer, backend
        torch.manual_seed(0)  # replicas hold the same
        for item in optimizer_slices(self.optimizer, self.shards, create_state=True):
            for values in item.tensors.values():
                values.normal_()
        set_adam_step(self.optimizer, 1)

    def state(self, step: int) -> Any:
        from megatron_telechat.checkpoint import TrainState

        return TrainState(self.shards, self.optimizer, step, step, self.backend)

    def save(self, root: Path, step: int) -> Path:
        from megatron_telechat.checkpoint import save_checkpoint

        return save_checkpoint(root, self.state(step), self.run, self.parallel)

    def load(self, root: Path) -> None:
        from megatron_telechat.checkpoint import load_checkpoint

        load_checkpoint(root, self.state(0), self.run, self.parallel)


def run_config(megabytes: float, world_size: int) -> Any:
    """Layers are added until the checkpoint is about as large as wanted."""
    from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
    from megatron_telechat.costs import count_parameters

    hidden = 1024 if megabytes >= 2000 else 512 if megabytes >= 200 else 128

    def model(layers: int) -> ModelConfig:
        return ModelConfig(
            name="bench",
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=4 * hidden,
            num_attention_heads=8,
            vocab_size=4096,
        )

    one, two = (count_parameters(model(layers)).total for layers in (1, 2))
    layers = max(1, 1 + round((megabytes * 1e6 / BYTES_A_PARAMETER - one) / (two - one)))
    return RunConfig(
        model=model(layers),
        parallel=ParallelConfig(world_size=world_size),
        training=TrainingConfig(device="cpu", precision="bf16", seq_length=8, global_batch_size=world_size),
    )


class Bench:
    """The arms over one folder. An arm does its work and returns its seconds; what it needs besides is not timed."""

    def __init__(self, subject: Subject, folder: Path):
        self.subject, self.folder, self.step = subject, folder, 0
        self.source = subject.save(folder / "source", 1)
        self.files = sorted(path for path in self.source.rglob("*") if path.is_file())
        self.arms: Mapping[str, Callable[[], float]] = {
            "copy": self.copy,
            "save": self.save,
            "save, no checksums": self.save_without_checksums,
            "read": lambda: self.read(cold=True),
            "load": lambda: self.load(cold=True),
            "read, cached": lambda: self.read(cold=False),
            "load, cached": lambda: self.load(cold=False),
        }

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def copy(self) -> float:
        self.read(cold=False)
        target = self.fresh("copy")
        target.mkdir()

        def work() -> None:
            for path in self.files:
                copied = shutil.copyfile(path, target / path.name)
                handle = os.open(copied, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)

        return timed(work)

    def save(self) -> float:
        target = self.fresh("save")
        return timed(lambda: self.subject.save(target, 1))

    def save_without_checksums(self) -> float:
        with patch("megatron_telechat.checkpoint.files.crc32", lambda data, value=0: 0):
            return self.save()

    def read(self, cold: bool) -> float:
        if cold:
            self.drop()
        buffer = memoryview(bytearray(READ_BYTES))

        def work() -> None:
            for path in self.files:
                with open(path, "rb", buffering=0) as stream:
                    while stream.readinto(buffer):
                        pass

        return timed(work)

    def load(self, cold: bool) -> float:
        from megatron_telechat.checkpoint import verify

        verify.forget()
        if cold:
            self.drop()
        return timed(lambda: self.subject.load(self.source))

    def drop(self) -> None:
        """Take the files out of the page cache; they were synced."""
        for path in self.files:
            with open(path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def fresh(self, name: str) -> Path:
        """A folder that is not there; what an arm wrote before is removed and nothing is left to write back."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        return target

    def rounds(self, count: int) -> dict[str, list[float]]:
        """Seconds of each arm by round."""
        found: dict[str, list[float]] = {name: [] for name in self.arms}
        for number in range(count + 1):
            for name, arm in self.arms.items():
                seconds = arm()
                if number:  # the first round warms up
                    found[name].append(seconds)
        return found


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def shares_of_ranks() -> list[int]:
    """Bytes that each of four data-parallel ranks writes of one save."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={DATA_PARALLEL}"]
        command += [str(Path(__file__)), "--as-rank", folder]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(done.stderr)
        (saved,) = Path(folder).glob("iter_*")
        return [path.stat().st_size for path in sorted(saved.glob("rank_*.safetensors"))]


def checks(seconds: Mapping[str, list[float]], shares: list[int]) -> list[Check]:
    """The floors."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    checksums = statistics.median(
        (one - other) / one for one, other in zip(seconds["save"], seconds["save, no checksums"], strict=True)
    )
    return [
        Check("save: share of the rate of a plain copy and sync", middle["copy"] / middle["save"], 0.7),
        Check("checksums: share of a save", checksums, 0.15, at_least=False),
        Check("load with verification: share of the rate of a plain read", middle["read"] / middle["load"], 0.8),
        Check("bytes of a rank under DP4 over the mean", max(shares) * len(shares) / sum(shares), 1.1, at_least=False),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500.0, help="size of the checkpoint (default: 500)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--folder", help="where to write, on the disk in question; default: the system's")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a floor is missed")
    parser.add_argument("--as-rank", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        Subject(40, DATA_PARALLEL).save(Path(args.as_rank), 1)
        return 0
    shares = shares_of_ranks()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(Subject(args.megabytes), Path(folder))
        size, seconds = bench.bytes, bench.rounds(args.rounds)
    print(f"{size / 1e6:.0f} MB, median of {args.rounds} rounds")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"  {name:<20}{middle:8.3f} s {size / middle / 1e6:8.0f} MB/s   {min(values):.3f} to {max(values):.3f} s")
    print(f"  bytes of {DATA_PARALLEL} ranks: {', '.join(map(str, shares))}")
    found = checks(seconds, shares)
    print("\n".join(check_lines(found)))
    if args.json:
        body = {"bytes": size, "seconds": seconds, "shares": shares}
        body["checks"] = [{**one._asdict(), "ok": bool(one.ok)} for one in found]
        Path(args.json).write_text(json.dumps(body, indent=1))
    return 1 if args.check and not all(one.ok for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
