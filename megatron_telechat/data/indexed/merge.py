"""Several datasets as one: tokens copied, index written anew in pieces; the bytes one run over all the input would
give."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_telechat.config.data_names import same_data
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.indexed.format import (
    CHUNK_BYTES,
    ChunkSums,
    sums_path,
    write_index,
    write_sums,
)
from megatron_telechat.data.indexed.header import HEADER_BYTES
from megatron_telechat.data.indexed.verify import pieces, verify_dataset
from megatron_telechat.errors import DataError, Problem, ResourceError

_SHARD = re.compile(r"(?P<stem>.+)\.shard-(?P<index>\d+)-of-(?P<count>\d+)_(?P<key>.+)_document$")


def plan_merge(prefixes: Sequence[str], output_prefix: str) -> dict[str, list[str]]:
    """Which datasets go into which: shards by their keys and in their order, others as they are named.

    Raises:
        DataError: shards are missing or from different runs, shards and others are mixed, or a dataset is named twice.
    """
    found = [match for match in map(_SHARD.match, prefixes) if match]
    if not found:
        twice = same_data(prefixes, copies=False)
        if twice:
            raise DataError([Problem(f"one dataset under several names: "
                                     f"{', '.join(same.names)}", "--input", "name it once")
                             for same in twice])  # fmt: skip
        return {output_prefix: list(prefixes)}
    if len(found) < len(prefixes):
        other = next(prefix for prefix in prefixes if not _SHARD.match(prefix))
        raise DataError(f"{other} is no shard, the others are", "--input", "merge the shards first")
    runs = {(match["stem"], match["count"]) for match in found}
    if len(runs) > 1:
        raise DataError(
            "the shards are of different runs: " + ", ".join(f"{stem} of {count}" for stem, count in sorted(runs)),
            "--input",
            "merge one run at a time",
        )
    (stem, count), out, problems = runs.pop(), {}, []
    for key in dict.fromkeys(match["key"] for match in found):
        there = {int(match["index"]): match.group(0) for match in found if match["key"] == key}
        missing = [index for index in range(int(count)) if index not in there]
        if missing:
            named = ", ".join(map(str, missing[:8]))
            problems.append(
                Problem(
                    f"shards {named} of {count} of {key!r} are missing",
                    f"{stem}.shard-*",
                    "finish their runs, or name them too",
                )
            )
        out[f"{output_prefix}_{key}_document"] = [there[index] for index in sorted(there)]
    if problems:
        raise DataError(problems)
    return out


def merge_datasets(prefixes: Sequence[str], output_prefix: str) -> IndexedDataset:
    """Write one dataset out of several, in order. Each is verified; nothing stands under the final name before it is
    whole.

    Raises:
        DataError: an input is damaged, of another dtype, or the output itself.
        ResourceError: the output cannot be written.
    """
    out = Path(output_prefix)
    if os.path.realpath(f"{output_prefix}.bin") in {os.path.realpath(f"{prefix}.bin") for prefix in prefixes}:
        raise DataError(f"{output_prefix} is an input too", "--output-prefix", "choose another name")
    problems = [problem for prefix in prefixes for problem in verify_dataset(prefix).problems]
    if problems:
        raise DataError(problems)
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    others = [part for part in parts if part.dtype != parts[0].dtype]
    if others:
        raise DataError(
            f"{others[0].prefix} holds {others[0].dtype.name}, {parts[0].prefix} {parts[0].dtype.name}",
            "--input",
            "make all with one tokenizer",
        )
    for part in parts:
        if part.idx_path.stat().st_size != HEADER_BYTES + 12 * len(part) + 8 * (part.documents + 1):
            raise DataError(
                f"{part.idx_path} has modes of sequences (multimodal data)", "--input", "text data has none"
            )
    needed = sum(path.stat().st_size for part in parts for path in (part.bin_path, part.idx_path))
    partial = {suffix: Path(f"{out}{suffix}.partial") for suffix in (".bin", ".idx", ".sums")}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(parts, partial)
        for suffix in (".idx", ".sums"):
            Path(f"{out}{suffix}").unlink(missing_ok=True)
        for suffix in (".bin", ".sums", ".idx"):
            os.replace(partial[suffix], sums_path(str(out)) if suffix == ".sums" else f"{out}{suffix}")
    except OSError as error:
        free = shutil.disk_usage(out.parent).free if out.parent.is_dir() else 0
        raise ResourceError(
            f"cannot write {out}: {error.strerror or error}; {needed:,} bytes are needed, {free:,} are free",
            "--output-prefix",
            "free some space or choose another --output-prefix",
        ) from error
    finally:
        for path in partial.values():
            if path.parent.is_dir():
                path.unlink(missing_ok=True)
    return IndexedDataset(output_prefix)


def _write(parts: Sequence[IndexedDataset], partial: dict[str, Path]) -> None:
    sums = ChunkSums()
    with open(partial[".bin"], "wb") as target:
        for part in parts:
            with open(part.bin_path, "rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
                    sums.update(chunk)
        target.flush()
        os.fsync(target.fileno())
    sequences, documents = sum(map(len, parts)), sum(part.documents for part in parts)

    def lengths() -> Iterator[np.ndarray]:
        for part in parts:
            yield from pieces(part)[0]

    def counts() -> Iterator[np.ndarray]:
        for part in parts:
            before = 0
            for number, boundaries in enumerate(pieces(part)[2]):
                steps = np.diff(boundaries, prepend=before)
                before = int(boundaries[-1])
                yield steps[1:] if number == 0 else steps  # the first boundary is 0 and ends no document

    with open(partial[".idx"], "wb") as file:
        index_sums = write_index(file, parts[0].dtype, sequences, documents, lengths, counts)
    write_sums(partial[".sums"], sums.result(), index_sums.result())
