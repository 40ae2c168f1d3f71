"""A format of training data as somebody would add it (CONTRIBUTING.md): token ids in a ``.npy`` file, cut into samples
that are shuffled anew for each epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_telechat.config.data_formats import DataFormat
from megatron_telechat.config.schema import DataConfig, RunConfig
from megatron_telechat.data.blend import Share
from megatron_telechat.data.corpus import Corpus, CorpusFactory, CorpusSamples, DataFile, SourceLegs
from megatron_telechat.data.pieces import IndexFolder, Say
from megatron_telechat.errors import DataError


class NpyFormat(DataFormat):
    """The class for ``config/data_formats.py``; the rest is the module that it names."""

    module = "npy"
    has_documents = False

    def is_chosen(self, data: DataConfig) -> bool:
        return any(name.endswith(".npy") for name in (*data.data_path, *data.train_data_path))


class NpySamples:
    """Samples [i * length, (i + 1) * length] of the tokens, shuffled for each epoch."""

    def __init__(self, name: str, tokens: np.ndarray, length: int, seed: int):
        self.name, self.data, self.length, self.seed = name, tokens, length, seed
        self.per_epoch = (tokens.size - 1) // length
        if self.per_epoch < 1:
            raise DataError(f"{name} holds less than a sample", name, "more tokens, or a smaller --seq-length")
        self.size = 0

    def samples_in(self, epochs: float, once: bool) -> int:
        return math.ceil(epochs * self.per_epoch)

    def require(self, size: int | None, index: IndexFolder, name: str) -> None:
        self.size = self.per_epoch if size is None else size

    def __len__(self) -> int:
        return self.size

    def _begin(self, sample: int) -> int:
        epoch, place = divmod(sample, self.per_epoch)
        return int(np.random.default_rng((self.seed, epoch)).permutation(self.per_epoch)[place]) * self.length

    def tokens(self, sample: int) -> np.ndarray:
        begin = self._begin(sample)
        return self.data[begin : begin + self.length + 1].astype(np.int64)

    def marks(self, sample: int) -> None:
        return None

    def cuts(self, sample: int) -> np.ndarray:
        return np.empty(0, np.int64)

    def pieces(self, sample: int) -> list[tuple[int, str]]:
        return [(0, self.origin(sample))]

    def origin(self, sample: int) -> str:
        return f"{self.name}, token {self._begin(sample)}"

    def find_token(self, sample: int, token: int) -> str:
        return self.origin(sample)

    def summary(self, split: str, drawn: int) -> str:
        return f"{split}: {self.name}  {self.data.size:,} tokens  {drawn:,} samples"


class NpyCorpus:
    def __init__(self, name: str, run: RunConfig):
        self.name, self.run = name, run
        self.data = np.load(name, mmap_mode="r")

    def content_key(self) -> Any:
        return self.fingerprint()

    def fingerprint(self) -> dict[str, Any]:
        return {"tokens": int(self.data.size), "bytes": Path(self.name).stat().st_size}

    def verify(self) -> None:
        if self.data.ndim != 1:
            raise DataError(f"{self.name} has {self.data.ndim} axes", self.name, "save one flat array of token ids")

    def require_vocabulary(self, vocab_size: int) -> None:
        if int(self.data[: 1 << 20].max()) >= vocab_size:
            raise DataError("a token outside the vocabulary", self.name, "correct --vocab-size")

    def tokens_in(self, share: Share) -> int:
        return self._part(share).size

    def gives_none(self, share: Share) -> str:
        return ""

    def size(self, share: Share) -> int:
        return self.tokens_in(share)

    def samples(
        self, split: str, share: Share, once: bool, megatron_for: int | None, legs: SourceLegs
    ) -> CorpusSamples:
        return NpySamples(self.name, self._part(share), self.run.training.seq_length, self.run.training.seed)

    def _part(self, share: Share) -> np.ndarray:
        return self.data[round(share[0] * self.data.size) : round(share[1] * self.data.size)]


class NpyFactory(CorpusFactory):
    kind = "npy"
    columns = ("file", "documents")

    def describe(self, name: str) -> DataFile:
        try:
            return DataFile(name, int(np.load(name, mmap_mode="r").size), 1)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {name}: {error}", name, "np.save one flat array of token ids") from error

    def open(self, name: str, run: RunConfig, cache: Path, say: Say) -> Corpus:
        self.describe(name)
        return NpyCorpus(name, run)


FACTORY = NpyFactory()
