"""Megatron's indexed datasets (``.bin`` and ``.idx``), read and written with numpy.

The layout of ``.idx`` stands in ``header.py``; ``.bin`` is the tokens and nothing else. The files are byte-identical
with those of ``megatron.core.datasets.indexed_dataset``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_telechat.config.data_formats import dataset_prefix
from megatron_telechat.data.indexed.format import write_index
from megatron_telechat.data.indexed.header import HEADER_BYTES, damaged, read_header
from megatron_telechat.errors import DataError, ResourceError

MAX_SEQUENCE_TOKENS = 2**31 - 1
_SAMPLED_TOKENS = 1 << 20
# Bytes hashed at each end of a file for its fingerprint: enough to notice another file, cheap on any size.
_DIGEST_BYTES = 1 << 16


def token_dtype(vocab_size: int) -> type:
    """The dtype Megatron stores tokens of this vocabulary in: uint16 below 65,500, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def _refuse_full_disk(error: OSError, path: Path, needed_bytes: int) -> None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return
    free = shutil.disk_usage(path.parent).free
    raise ResourceError(
        f"no space left while writing {path}: {needed_bytes:,} bytes and more are needed, {free:,} are free",
        str(path.parent),
        "free some space or choose another --output-prefix; nothing was written under the final name",
    ) from error


class IndexedWriter:
    """Writes one dataset; nothing stands under its final name before ``finish``.

    Use it as a context manager: leaving by an exception removes what was written.

    Args:
        prefix: final path without suffix.
        dtype: numpy type of the stored tokens (``token_dtype``).
    """

    def __init__(self, prefix: str, dtype: type):
        self.prefix = prefix
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._bin = Path(f"{prefix}.bin")
        self._idx = Path(f"{prefix}.idx")
        self._bin_partial = Path(f"{prefix}.bin.partial-{os.getpid()}")
        self._idx_partial = Path(f"{prefix}.idx.partial-{os.getpid()}")
        self._lengths: list[np.ndarray] = []
        self._sequences_per_document: list[np.ndarray] = []
        self.documents = 0
        self.tokens = 0
        try:
            self._bin.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._bin_partial, "wb")
        except OSError as error:
            raise ResourceError(
                f"cannot write {self._bin_partial}: {error.strerror}", fix="choose an --output-prefix you may write to"
            ) from error

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: its token ids, flat.
            lengths: lengths of its sequences; unset means one sequence, or none if there are no tokens.

        Raises:
            DataError: a token does not fit the dtype, or a sequence is too long for the format.
        """
        array = np.asarray(tokens, dtype=np.int64)
        if lengths is None:
            lengths = [array.size] if array.size else []
        self.add_documents(array, np.asarray(lengths, dtype=np.int64), np.asarray([len(lengths)], dtype=np.int64))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray, sequences_per_document: np.ndarray) -> None:
        """Append many documents: flat int64 tokens, int64 sequence lengths, int64 sequences of each document."""
        assert int(lengths.sum()) == tokens.size and int(sequences_per_document.sum()) == lengths.size
        if lengths.size and int(lengths.max()) > MAX_SEQUENCE_TOKENS:
            raise DataError(
                f"a document of {int(lengths.max()):,} tokens does not fit the format (at most "
                f"{MAX_SEQUENCE_TOKENS:,})",
                self.prefix,
                "split the document",
            )
        self._check_range(tokens)
        try:
            tokens.astype(self.dtype).tofile(self._file)
        except OSError as error:
            _refuse_full_disk(error, self._bin_partial, (self.tokens + tokens.size) * self.dtype.itemsize)
            raise ResourceError(f"cannot write {self._bin_partial}: {error}") from error
        self._lengths.append(lengths.astype(np.int32))
        self._sequences_per_document.append(sequences_per_document.astype(np.int32))
        self.documents += sequences_per_document.size
        self.tokens += tokens.size

    def _check_range(self, tokens: np.ndarray) -> None:
        if not tokens.size or self.dtype.kind not in "iu":
            return
        limits = np.iinfo(self.dtype)
        low, high = int(tokens.min()), int(tokens.max())
        if low < limits.min or high > limits.max:
            raise DataError(
                f"token id {low if low < limits.min else high} does not fit {self.dtype.name}",
                self.prefix,
                "the tokenizer gives ids beyond its own vocabulary size",
            )

    def finish(self) -> None:
        """Write the index and move both files to their final names, the index last.

        Raises:
            ResourceError: the disk is full; the partial files are removed.
        """
        sequences = sum(array.size for array in self._lengths)
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            with open(self._idx_partial, "wb") as file:
                write_index(
                    file,
                    self.dtype,
                    sequences,
                    self.documents,
                    lambda: self._lengths,
                    lambda: self._sequences_per_document,
                )
            # An old index beside a new .bin would be a readable lie: take it away first, put the new one last.
            self._idx.unlink(missing_ok=True)
            os.replace(self._bin_partial, self._bin)
            os.replace(self._idx_partial, self._idx)
        except OSError as error:
            self.abort()
            _refuse_full_disk(error, self._bin, self.tokens * self.dtype.itemsize + sequences * 12 + self.documents * 8)
            raise ResourceError(f"cannot write {self.prefix}.bin/.idx: {error}") from error

    def abort(self) -> None:
        """Remove the partial files."""
        try:
            self._file.close()
        except OSError:
            pass  # a full disk refuses the last flush; the file goes away in the next line
        for path in (self._bin_partial, self._idx_partial):
            path.unlink(missing_ok=True)


class IndexedDataset:
    """A dataset on disk, memory-mapped. Headers and sizes are checked when it is opened.

    Attributes:
        sequence_lengths: int32 [sequences], tokens.
        sequence_offsets: int64 [sequences], bytes in ``.bin``.
        document_indices: int64 [documents + 1], first sequence of each document.
        tokens: memory map of ``.bin``, one entry a token.

    Raises:
        DataError: a file is missing, cut, or not what its header says.
    """

    def __init__(self, prefix: str):
        self.prefix = dataset_prefix(prefix)
        self.bin_path = Path(f"{self.prefix}.bin")
        self.idx_path = Path(f"{self.prefix}.idx")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(
                    f"{path} does not exist", fix="make it with tools/preprocess_data.py, or correct the path"
                )
        header = read_header(self.idx_path)
        self.dtype = np.dtype(header.dtype).newbyteorder("<")
        index = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        at = HEADER_BYTES
        self.sequence_lengths = np.frombuffer(index, np.dtype("<i4"), header.sequences, at)
        at += self.sequence_lengths.nbytes
        self.sequence_offsets = np.frombuffer(index, np.dtype("<i8"), header.sequences, at)
        at += self.sequence_offsets.nbytes
        self.document_indices = np.frombuffer(index, np.dtype("<i8"), header.boundaries, at)
        self._check_ends()
        bin_bytes = self.bin_path.stat().st_size
        self.tokens = np.memmap(self.bin_path, mode="r", dtype=self.dtype) if bin_bytes else np.empty(0, self.dtype)

    def _check_ends(self) -> None:
        sequences = self.sequence_lengths.size
        if int(self.document_indices[0]) != 0 or int(self.document_indices[-1]) != sequences:
            raise damaged(
                f"document boundaries run from {int(self.document_indices[0])} to {int(self.document_indices[-1])} "
                f"where 0 to {sequences} is expected",
                self.idx_path,
            )
        expected = 0
        if sequences:
            if int(self.sequence_offsets[0]) != 0:
                raise damaged("the first sequence does not begin at byte 0", self.idx_path)
            expected = int(self.sequence_offsets[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        actual = self.bin_path.stat().st_size
        if actual != expected:
            how = "is cut short" if actual < expected else "is longer than its index says"
            raise damaged(f"the file {how}: {actual:,} bytes, the index describes {expected:,}", self.bin_path)

    def verify(self) -> None:
        """Check every length, offset and boundary: O(sequences).

        Raises:
            DataError: an entry does not fit its neighbours.
        """
        lengths = self.sequence_lengths.astype(np.int64)
        if lengths.size and int(lengths.min()) < 0:
            raise damaged(f"sequence {int(lengths.argmin())} has a negative length", self.idx_path)
        ends = np.cumsum(lengths) * self.dtype.itemsize
        wrong = np.flatnonzero(self.sequence_offsets[1:] != ends[:-1])
        if wrong.size:
            raise damaged(
                f"sequence {int(wrong[0]) + 1} does not begin where sequence {int(wrong[0])} ends", self.idx_path
            )
        steps = np.diff(self.document_indices)
        if steps.size and int(steps.min()) < 0:
            raise damaged(f"the boundary of document {int(steps.argmin())} runs backwards", self.idx_path)

    def require_vocabulary(self, vocab_size: int) -> None:
        """Look at the first and last million tokens.

        Raises:
            DataError: a token id outside the vocabulary, with its document.
        """
        for begin in (0, max(0, self.num_tokens - _SAMPLED_TOKENS)):
            part = self.tokens[begin : begin + _SAMPLED_TOKENS]
            if not part.size or (int(part.max()) < vocab_size and int(part.min()) >= 0):
                continue
            place = begin + int(np.flatnonzero((part >= vocab_size) | (part < 0))[0])
            sequence = int(np.searchsorted(self.sequence_offsets, place * self.dtype.itemsize, side="right")) - 1
            raise DataError(
                f"token id {int(self.tokens[place])} is outside the model's vocabulary of {vocab_size:,}",
                f"{self.bin_path}, document {self.document_of(sequence)}",
                "preprocess the text with the model's own tokenizer, or correct --vocab-size",
            )

    def __len__(self) -> int:
        return self.sequence_lengths.size

    @property
    def documents(self) -> int:
        """Number of documents, those without a sequence included."""
        return self.document_indices.size - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, end-of-document tokens included."""
        return self.tokens.size

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens of one sequence, or ``length`` of them from token ``offset``: a view into the map."""
        start = int(self.sequence_offsets[sequence]) // self.dtype.itemsize + offset
        count = int(self.sequence_lengths[sequence]) - offset if length is None else length
        return self.tokens[start : start + count]

    def __getitem__(self, sequence: int) -> np.ndarray:
        return self.get(sequence)

    def document_of(self, sequence: int) -> int:
        """Number of the document that holds a sequence."""
        return int(np.searchsorted(self.document_indices, sequence, side="right")) - 1

    def fingerprint(self) -> dict[str, int | str]:
        """Sizes and a digest of both files' first and last 64 KiB; the path is not part of it."""
        digest = hashlib.sha256()
        for path in (self.idx_path, self.bin_path):
            with open(path, "rb") as file:
                digest.update(file.read(_DIGEST_BYTES))
                file.seek(max(0, path.stat().st_size - _DIGEST_BYTES))
                digest.update(file.read(_DIGEST_BYTES))
        return {
            "documents": self.documents,
            "tokens": self.num_tokens,
            "idx_bytes": self.idx_path.stat().st_size,
            "bin_bytes": self.bin_path.stat().st_size,
            "sha256_ends": digest.hexdigest(),
        }
