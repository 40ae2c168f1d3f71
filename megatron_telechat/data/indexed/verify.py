"""Is a dataset on disk what was written? Sizes, every entry of the index, checksums, token ids. Memory is constant."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_telechat.config.data_formats import dataset_prefix
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.indexed.format import CHUNK_BYTES, file_sums, stored, sums_path, write_sums
from megatron_telechat.data.indexed.header import HEADER_BYTES
from megatron_telechat.errors import DataError, Problem, ResourceError

FIX = "copy the file again from where it was made, or write the dataset again with tools/preprocess_data.py"


@dataclass
class Verdict:
    """What is known of one dataset after ``verify_dataset``."""

    prefix: str
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    checksums: bool = False
    problems: list[Problem] = field(default_factory=list)


def find_datasets(names: Sequence[str]) -> list[str]:
    """Prefixes of datasets: each name is a prefix, one of its files, a glob of them, or a folder (its files in order).

    Raises:
        DataError: a name that stands for no dataset.
    """
    out: list[str] = []
    for name in names:
        path = Path(name)
        if path.suffix == ".sums":
            continue  # a shell's glob names it beside the .bin and .idx
        if path.suffix == ".partial":
            raise DataError(
                f"{name} is left over from an unfinished run", "command line", "run its command again to resume"
            )
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in (".idx", ".bin"))
        elif re.search(r"[*?\[]", name) and not path.exists():
            found = sorted(
                p for p in Path(path.anchor or ".").glob(name.removeprefix(path.anchor)) if p.suffix in (".idx", ".bin")
            )
            found = found or sorted(Path(path.anchor or ".").glob(name.removeprefix(path.anchor) + ".idx"))
        else:
            prefix = dataset_prefix(name)
            found = [Path(f"{prefix}.idx")]
            if not found[0].exists() and not Path(f"{prefix}.bin").exists():
                raise DataError(
                    f"neither {found[0]} nor its .bin exists",
                    "command line",
                    "give the prefix of a dataset, without suffix",
                )
        if not found:
            raise DataError(
                f"no dataset in {name}", "command line", "give prefixes, or a folder with .idx and .bin files"
            )
        out.extend(str(p)[: -len(p.suffix)] for p in found)
    return list(dict.fromkeys(out))


def verify_dataset(prefix: str, vocab_size: int | None = None) -> Verdict:
    """Check one dataset; all that is found wrong is in the verdict."""
    verdict = Verdict(prefix)
    try:
        data = IndexedDataset(prefix)
        verdict.documents, verdict.sequences, verdict.tokens = data.documents, len(data), data.num_tokens
        _check_entries(data)
        if vocab_size is not None:
            verdict.problems.extend(_check_ids(data, vocab_size))
    except DataError as error:
        verdict.problems.extend(error.problems)
    except OSError as error:
        verdict.problems.append(
            Problem(f"cannot be read: {error}", str(error.filename or prefix), "fix the disk or the permissions")
        )
    verdict.problems.extend(_check_sums(verdict))
    return verdict


def pieces(data: IndexedDataset) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray], Iterator[np.ndarray]]:
    """Lengths, offsets and document boundaries of an index, read in pieces of the same number of entries."""
    sequences, boundaries = len(data), data.documents + 1
    at = HEADER_BYTES
    lengths = stored(data.idx_path, "<i4", at, sequences)
    offsets = stored(data.idx_path, "<i8", at + 4 * sequences, sequences)
    return lengths, offsets, stored(data.idx_path, "<i8", at + 12 * sequences, boundaries)


def _check_entries(data: IndexedDataset) -> None:
    """Every length, offset and boundary.

    Raises:
        DataError: the first entry that does not fit its neighbours.
    """
    path, item = str(data.idx_path), data.dtype.itemsize
    lengths, offsets, boundaries = pieces(data)
    at = number = 0
    for length, offset in zip(lengths, offsets, strict=True):
        if int(length.min()) < 0:
            raise DataError(f"sequence {number + int(length.argmin())} has a negative length", path, FIX)
        ends = np.cumsum(length, dtype=np.int64) * item + at
        wrong = np.flatnonzero(offset != np.concatenate(([at], ends[:-1])))
        if wrong.size:
            raise DataError(f"sequence {number + int(wrong[0])} does not begin where the one before it ends", path, FIX)
        at, number = int(ends[-1]), number + length.size
    before, number = 0, 0
    for boundary in boundaries:
        wrong = np.flatnonzero(np.diff(boundary, prepend=before) < 0)
        if wrong.size:
            raise DataError(f"the boundary of document {number + int(wrong[0])} runs backwards", path, FIX)
        before, number = int(boundary[-1]), number + boundary.size


def _check_ids(data: IndexedDataset, vocab_size: int) -> list[Problem]:
    begin = 0
    for tokens in stored(data.bin_path, data.dtype.str):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            at = begin + int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
            sequence = int(np.searchsorted(data.sequence_offsets, at * data.dtype.itemsize, side="right")) - 1
            what = (
                f"token id {int(tokens[at - begin])} in document {data.document_of(sequence)} is not in a "
                f"vocabulary of {vocab_size:,}"
            )
            return [Problem(what, str(data.bin_path), "name the tokenizer the data was made with, or write it again")]
        begin += tokens.size
    return []


def _check_sums(verdict: Verdict) -> list[Problem]:
    path = sums_path(verdict.prefix)
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != 1 or content["chunk_bytes"] != CHUNK_BYTES:
            raise ValueError("another format")
        wanted = {suffix: (int(content[suffix]["bytes"]), list(content[suffix]["sha256"])) for suffix in ("bin", "idx")}
    except (ValueError, KeyError, TypeError) as error:
        return [
            Problem(
                f"the checksums cannot be read ({error!r})",
                str(path),
                "copy the file again, or remove it and run --write-checksums",
            )
        ]
    verdict.checksums = True
    problems = []
    for suffix, (size, digests) in wanted.items():
        file = Path(f"{verdict.prefix}.{suffix}")
        if not file.is_file():
            continue  # named already
        if file.stat().st_size != size:
            problems.append(Problem(f"has {file.stat().st_size:,} bytes where {size:,} were written", str(file), FIX))
            continue
        problems.extend(_compare_chunks(file, digests))
    return problems


def _compare_chunks(file: Path, digests: Sequence[str]) -> list[Problem]:
    """The first part of a file whose checksum differs."""
    with open(file, "rb") as stream:
        for number, digest in enumerate(digests):
            if hashlib.sha256(stream.read(CHUNK_BYTES)).hexdigest() != digest:
                begin = number * CHUNK_BYTES
                return [
                    Problem(
                        f"the bytes from {begin:,} to {begin + CHUNK_BYTES:,} are not those that were written",
                        str(file),
                        FIX,
                    )
                ]
    return []


def add_checksums(prefix: str) -> Path:
    """Write the side file of a dataset that has none.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        write_sums(sums_path(prefix), file_sums(Path(f"{prefix}.bin")), file_sums(Path(f"{prefix}.idx")))
    except OSError as error:
        raise ResourceError(
            f"cannot write {sums_path(prefix)}: {error.strerror}", fix="fix the disk or the permissions"
        ) from error
    return sums_path(prefix)
