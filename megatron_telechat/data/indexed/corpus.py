"""Indexed datasets as the training asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import Share
from megatron_telechat.data.corpus import Corpus, CorpusFactory, CorpusSamples, DataFile, SourceLegs, share_of
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.indexed.epochs import IndexedSamples
from megatron_telechat.data.indexed.header import read_header
from megatron_telechat.data.pieces import Say
from megatron_telechat.errors import DataError, Problem


class IndexedCorpus:
    """An open indexed dataset, for the seed and the length of a sample of a run."""

    def __init__(self, dataset: IndexedDataset, run: RunConfig):
        self.dataset = dataset
        self._seed, self._length = run.training.seed, run.training.seq_length

    def content_key(self) -> Any:
        """Sizes and digests of the ends of both files."""
        return self.dataset.fingerprint()

    def fingerprint(self) -> dict[str, Any]:
        """Sizes and digests of the ends of both files."""
        return self.dataset.fingerprint()

    def verify(self) -> None:
        """Check every entry of the index."""
        self.dataset.verify()

    def require_vocabulary(self, vocab_size: int) -> None:
        """Look at the first and last million tokens."""
        self.dataset.require_vocabulary(vocab_size)

    def tokens_in(self, share: Share) -> int:
        """Tokens of the sequences of a share."""
        sequences = share_of(self.dataset, share)
        return int(self.dataset.sequence_lengths[sequences.start : sequences.stop].sum(dtype=np.int64))

    def gives_none(self, share: Share) -> str:
        """Nothing: an empty share of text is an error."""
        return ""

    def size(self, share: Share) -> int:
        """A copy weighs its tokens."""
        return self.tokens_in(share)

    def samples(
        self, split: str, share: Share, once: bool, megatron_for: int | None, legs: SourceLegs
    ) -> CorpusSamples:
        """Documents laid end to end and cut into samples."""
        return IndexedSamples(self.dataset, share, once, split, self._length, self._seed, megatron_for, legs)


class IndexedFactory(CorpusFactory):
    """Opens ``PREFIX.bin`` and ``PREFIX.idx``."""

    kind = "indexed"

    def describe(self, name: str) -> DataFile:
        """Tokens and documents by the header of the index and the size of the tokens."""
        index, tokens = Path(f"{name}.idx"), Path(f"{name}.bin")
        for path in (index, tokens):
            if not path.is_file():
                fix = "correct the prefix (no suffix), or make it with tools/preprocess_data.py"
                gone = not (index.exists() or tokens.exists())
                raise DataError(Problem(f"{path} is missing", name, fix, missing=name if gone else ""))
        try:
            header = read_header(index)
            count, rest = divmod(tokens.stat().st_size, header.item_bytes)
        except OSError as error:
            raise DataError(
                f"cannot read {index}: {error.strerror}", str(index), "fix the permissions of the file"
            ) from error
        if rest:
            raise DataError(
                f"{tokens} does not hold whole tokens of {header.item_bytes} bytes",
                str(tokens),
                "write the dataset again with tools/preprocess_data.py",
            )
        return DataFile(name, count, header.boundaries - 1)

    def open(self, name: str, run: RunConfig, cache: Path, say: Say) -> Corpus:
        """Map both files."""
        return IndexedCorpus(IndexedDataset(name), run)


FACTORY = IndexedFactory()
