#!/usr/bin/env python3
"""The manifest of a checkpoint of very many ranks: what each thing that is done with it takes, in seconds by the clock
and of the processor.

    python tools/bench/manifest.py [--ranks 1024 10000] [--json FILE]

The ranks are made up: TeleChat2-115B by its table of tensors, TP8, PP8 (10 from 10,000 ranks on), the rest data
parallel with the distributed optimizer; each rank has a file of 4 KiB in place of its own. Everything else is what a
run does: merging what the ranks wrote, writing and reading the manifest, handing it out, verifying every file, finding
the newest of two checkpoints, retention.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_telechat.checkpoint import commit, verify  # noqa: E402
from megatron_telechat.checkpoint.format import CheckpointReader  # noqa: E402
from megatron_telechat.checkpoint.handed import to_hand_out  # noqa: E402
from megatron_telechat.checkpoint.lineage import Branch, candidates, look_at  # noqa: E402
from megatron_telechat.checkpoint.manifest import Manifest, StoredBox, TensorEntry, usual_name  # noqa: E402
from megatron_telechat.checkpoint.names import FileEntry  # noqa: E402
from megatron_telechat.checkpoint.optimizer_state import MASTER, MOMENTS  # noqa: E402
from megatron_telechat.checkpoint.parts import Part, merge_parts  # noqa: E402
from megatron_telechat.checkpoint.retention import prune  # noqa: E402
from megatron_telechat.config import load_run_config  # noqa: E402
from megatron_telechat.tensors.boxes import Box, flat_range_boxes  # noqa: E402
from megatron_telechat.tensors.pieces import Piece, piece_at  # noqa: E402
from megatron_telechat.tensors.table import TensorSpec, layer_of, tensor_table  # noqa: E402

TP = 8
BUCKET = 40_000_000  # elements
CONTENT = bytes(4096)


@dataclass(frozen=True)
class _Place:
    tp_rank: int
    tp_size: int = TP
    cp_rank: int = 0
    dp_rank: int = 0
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    edp_rank: int = 0


def pipeline(ranks: int) -> int:
    return 10 if ranks >= 10000 else 8


def parts(ranks: int) -> Iterator[Part]:
    """What each rank has written, and lists in its part of the manifest."""
    model = load_run_config(["--preset", "telechat2-115b", "--dry-run"], {}, planning=True).run.model
    stages, table = pipeline(ranks), tensor_table(model)
    replicas = ranks // (TP * stages)
    by_stage: list[list[TensorSpec]] = [[] for _ in range(stages)]
    for spec in table.values():
        layer = layer_of(spec.key)
        stage = (
            layer * stages // model.num_layers if layer is not None else 0 if "embedding" in spec.key else stages - 1
        )
        by_stage[stage].append(spec)
    rank = 0
    for stage in by_stage:
        for tp_rank in range(TP):
            pieces = [piece_at(spec, _Place(tp_rank)) for spec in stage if spec.tensor_axis is not None or not tp_rank]
            for number in range(replicas):
                part = Part()
                file = f"rank_{rank:05d}.safetensors"
                part.files[file] = FileEntry(len(CONTENT), f"{zlib.crc32(CONTENT):08x}")
                part.rng = {"rank": rank, "file": file, "state": {"dict": {"cpu": {"tensor": "rng/cpu"}}}}
                add(part, file, ("model",), "bfloat16", pieces, number, replicas)
                kinds = tuple(f"optimizer/{name}" for name in (MASTER, *MOMENTS))
                for bucket in buckets(pieces):
                    add(part, file, kinds, "float32", bucket, number, replicas)
                yield part
                rank += 1


def buckets(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """As megatron-core cuts its buffers with overlapped communication: a rank owns a part of each."""
    bucket: list[Piece] = []
    for piece in pieces:
        bucket.append(piece)
        if sum(one.numel for one in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def add(
    part: Part, file: str, kinds: Sequence[str], dtype: str, pieces: Sequence[Piece], number: int, replicas: int
) -> None:
    """Share ``number`` of ``replicas`` of the elements in a row."""
    total = sum(piece.numel for piece in pieces)
    low, high = total * number // replicas, total * (number + 1) // replicas
    for piece in pieces:
        begin, end = max(0, min(low, piece.numel)), max(0, min(high, piece.numel))
        low, high = low - piece.numel, high - piece.numel
        boxes = [box.shifted(piece.box.offset) for _, box in flat_range_boxes(piece.box.shape, begin, end)]
        for kind in kinds if boxes else ():
            key = f"{kind}/{piece.key}"
            stored = [StoredBox(file, usual_name(key, box.offset), box) for box in boxes]
            part.tensors[key] = TensorEntry(dtype, piece.spec.shape, stored)


def wanted_by_one(reader: CheckpointReader, stages: int) -> int:
    """Unpack and search the boxes of the tensors that a rank of the first stage reads; returns how many files."""
    files: Counter[str] = Counter()
    for key, entry in reader.entries.items():
        layer = layer_of(key.rsplit("/", 1)[-1])
        if layer is not None and layer < 96 // stages:
            rows = max(1, entry.shape[0] // TP)
            files += reader.files_of(key, Box((0,) * len(entry.shape), (rows, *entry.shape[1:])))
    return len(files)


def measure(ranks: int, root: Path) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter(), time.process_time()
        found = work()
        seconds[name], cpu[name] = time.perf_counter() - begin[0], time.process_time() - begin[1]
        return found

    written = list(parts(ranks))
    merged = timed("merge what the ranks wrote", lambda: merge_parts(written))
    branch, manifest = Branch(), None
    for step in (1, 2):
        attempt = commit.begin(root, step)
        for name in merged.files:
            (attempt.temporary / name).write_bytes(CONTENT)
        manifest = Manifest(
            step=step,
            consumed_samples=step,
            config="",
            topology={"world_size": ranks},
            versions={},
            files=merged.files,
            tensors=merged.tensors,
            rng=tuple(part.rng for part in written if part.rng),
            lineage=branch.next().to_json(),
        )
        path = timed("write the manifest, commit", lambda a=attempt, m=manifest: commit.commit(a, m))
        branch.saved(look_at(path))
        verify.remember_manifest(path, merged.files)
    timed("retention, after a save", lambda: prune(root, 2))
    verify.forget()
    folder = timed("find the newest", lambda: candidates(root))[0].path
    manifest = timed("read and check the manifest", lambda: verify.read_sound_manifest(folder))
    sent = timed("pack it for the other ranks", lambda: pickle.dumps(to_hand_out(manifest)))
    reader = CheckpointReader(folder, check_sizes=False, manifest=timed("unpack it", lambda: pickle.loads(sent)))
    timed("find what one rank reads", lambda: wanted_by_one(reader, pipeline(ranks)))
    names = list(manifest.files)
    sizes = {name: manifest.files[name].size for name in names}
    timed("share the files out", lambda: verify.shares(sizes, [{}] * ranks, [()] * ranks))
    problems = timed("verify every file, one rank alone", lambda: verify.check_files(folder, manifest, names))
    assert not problems, problems[0]
    timed("retention, in a new process", lambda: prune(root, 1))
    size = (folder / "manifest.json").stat().st_size
    boxes = sum(len(entry.boxes) for entry in manifest.tensors.values())
    return {
        "ranks": ranks,
        "manifest_mb": size / 1e6,
        "sent_mb": len(sent) / 1e6,
        "boxes": boxes,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024, 10000])
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    rows = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(ranks, Path(folder)))
        row = rows[-1]
        print(
            f"{ranks} ranks: {row['boxes']:,} boxes, manifest {row['manifest_mb']:.0f} MB, "
            f"handed out {row['sent_mb']:.0f} MB"
        )
        for name, value in row["seconds"].items():
            print(f"  {name:<36}{value:8.2f} s{row['cpu_seconds'][name]:8.2f} s of the processor", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
