"""What the training asks of a dataset, whatever its format; each format answers in a module of its own.

``CorpusFactory`` opens the datasets of one format, ``Corpus`` is an open one, ``CorpusSamples`` are the samples of one
split of it. Nothing here knows a format. No torch here: --dry-run uses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import Share
from megatron_telechat.data.pieces import IndexFolder, Say

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class PairMarks:
    """The pairs of a sample, in order.

    Attributes:
        numbers: int64 [pairs], of each in its dataset.
        halves: int64 [pairs, 2, 2], first token of the chosen and of the rejected half, and the one behind its last.
        reference: float64 [pairs, 2], log-probability of the answers of each half under the reference; NaN where it is
            not known.
    """

    numbers: np.ndarray
    halves: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class Marks:
    """What a source that knows its borders says of the tokens of a sample.

    Attributes:
        learned: bool [sequence_length + 1], the tokens that are learned where they are labels.
        starts: int64, ascending, where documents (dialogs) and the padding begin.
        used: tokens before the padding.
        pairs: of a sample of pairs.
    """

    learned: np.ndarray
    starts: np.ndarray
    used: int
    pairs: PairMarks | None = None


@dataclass(frozen=True)
class PastLeg:
    """What a part of the run that read samples of another length took of a source.

    Attributes:
        sequence_length: tokens of a sample.
        samples: how many were read.
        ends: how many were to be read as it began; None: no end was planned.
    """

    sequence_length: int
    samples: int
    ends: int | None = None


@dataclass(frozen=True)
class SourceLegs:
    """The lengths that a source was read with before, and the samples after which another one is to follow; None: never
    planned."""

    past: tuple[PastLeg, ...] = ()
    ends: int | None = None


ONE_LENGTH = SourceLegs()


class SampleSource(Protocol):
    """Samples of ``sequence_length`` + 1 tokens. Which tokens make sample i depends on the data, the seed and the
    length of a sample, never on how many samples a run reads."""

    def __len__(self) -> int: ...

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [sequence_length + 1]."""
        ...

    def marks(self, sample: int) -> Marks | None:
        """None: every token is learned, and the end-of-document token tells the borders."""
        ...

    def cuts(self, sample: int) -> np.ndarray:
        """int64, ascending: tokens that do not follow from the one before, though no document ended there. What one
        length of a sample has left is laid end to end for another."""
        ...

    def pieces(self, sample: int) -> list[tuple[int, str]]:
        """First token, and name, of each document of a sample, and of its padding."""
        ...

    def origin(self, sample: int) -> str:
        """Where the tokens of a sample come from, for messages."""
        ...

    def find_token(self, sample: int, token: int) -> str:
        """Where the first occurrence of a token of a sample comes from, for messages."""
        ...


class CorpusSamples(SampleSource, Protocol):
    """The samples of one split of a dataset, epoch after epoch; ``require`` says how many before any is read."""

    def samples_in(self, epochs: float, once: bool) -> int:
        """Samples of so many epochs, counted from the first; before ``require``.

        Args:
            once: no other epoch follows the first.
        """
        ...

    def require(self, size: int | None, index: IndexFolder, name: str) -> None:
        """Make the first ``size`` samples readable.

        Args:
            size: None: the samples of one epoch.
            index: the folder of the index.
            name: of this source there.

        Raises:
            FileNotFoundError, ResourceError: see :meth:`IndexFolder.piece`.
        """
        ...

    def summary(self, split: str, drawn: int) -> str:
        """The line of the banner about a run that reads ``drawn`` samples."""
        ...


class Corpus(Protocol):
    """One dataset of a run, open."""

    def content_key(self) -> Any:
        """Stands for the content in the name of a cached index, JSON. Of encoded data (`EncodingFactory`): its
        folder in the cache."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Tells this data from other data, whatever its name, JSON."""
        ...

    def verify(self) -> None:
        """Check every entry, before an index is built.

        Raises:
            DataError: the data is damaged.
        """
        ...

    def require_vocabulary(self, vocab_size: int) -> None:
        """Look at the first and last tokens: data of another tokenizer is told before the first step.

        Raises:
            DataError: a token id outside the vocabulary.
        """
        ...

    def tokens_in(self, share: Share) -> int:
        """Tokens of a share."""
        ...

    def gives_none(self, share: Share) -> str:
        """Why an evaluation finds nothing in a share and does without it; empty: it finds something, or a share
        without anything is an error."""
        ...

    def size(self, share: Share) -> int:
        """What one copy of a share weighs in a blend whose weights count copies."""
        ...

    def samples(
        self, split: str, share: Share, once: bool, megatron_for: int | None, legs: SourceLegs
    ) -> CorpusSamples:
        """The samples of a split.

        Args:
            once: only the first epoch is read.
            megatron_for: the number of samples whose Megatron order is read first, where the format has one.
            legs: what was read in other lengths; nothing where the format cannot be cut anew.

        Raises:
            DataError: the share has nothing to give.
        """
        ...


class PairCorpus(Corpus, Protocol):
    """A dataset of pairs, whose answers a reference has given log-probabilities."""

    @property
    def pairs(self) -> int:
        """Number of pairs, those that cannot be used included."""
        ...

    @property
    def usable(self) -> int:
        """Number of pairs that can be used."""
        ...

    def origin(self, pair: int) -> str:
        """Where a pair comes from, for messages."""
        ...

    def whole(self, batch: int) -> SampleSource:
        """Every pair that can be used, once, in the order of the file; the last batch is filled up with empty rows.

        Args:
            batch: rows of one.

        Raises:
            DataError: a pair is too long, where that is refused.
        """
        ...

    def use_reference(self, log_probs: np.ndarray) -> None:
        """What samples say of the reference from now on.

        Args:
            log_probs: float64 [pairs of the dataset, 2], NaN for those that cannot be used.
        """
        ...


@dataclass(frozen=True)
class DataFile:
    """What a dataset holds, as far as can be told without opening it.

    Attributes:
        prefix: its name.
        tokens, documents: None where they are unknown before the training.
    """

    prefix: str
    tokens: int | None
    documents: int | None


class CorpusFactory(ABC):
    """Opens the datasets of one format. The module that a format names holds one as ``FACTORY``."""

    kind: str
    """What fingerprints call the format."""
    columns: tuple[str, str] = ("dataset", "documents")
    """What --dry-run calls a dataset and its documents."""

    @abstractmethod
    def describe(self, name: str) -> DataFile:
        """What the dataset holds, for --dry-run; quick, without torch.

        Raises:
            DataError: it is missing or damaged.
        """

    def notes(self, run: RunConfig) -> list[str]:
        """Lines of --dry-run below the table of datasets."""
        return []

    @abstractmethod
    def open(self, name: str, run: RunConfig, cache: Path, say: Say) -> Corpus:
        """Open a dataset; one that must be encoded is, if it is not yet.

        Raises:
            DataError: it is missing or damaged.
            ResourceError: the cache cannot be written.
        """

    def settings(self, run: RunConfig) -> dict[str, Any]:
        """Settings that decide tokens or samples, for the fingerprint of a run, JSON."""
        return {}

    def index_settings(self, run: RunConfig) -> dict[str, Any]:
        """Settings that decide the index beside the seed and the length of a sample, JSON."""
        return {}


class EncodingFactory(CorpusFactory):
    """Of a format whose files rank 0 encodes into the cache, where the other ranks open them."""

    @abstractmethod
    def open_encoded(self, name: str, run: RunConfig, folder: Path) -> Corpus:
        """Open what rank 0 encoded into a folder.

        Raises:
            OSError: it is not to be seen here.
        """

    @abstractmethod
    def open_if_encoded(self, name: str, run: RunConfig, cache: Path) -> Corpus | None:
        """Open what was encoded before, in the cache; None where it was not.

        Raises:
            DataError: the file cannot be read.
        """

    @abstractmethod
    def file_fingerprint(self, name: str) -> dict[str, Any]:
        """Tells the file from others before it is encoded, by size and digest, JSON.

        Raises:
            DataError: it cannot be read.
        """


class Sequences(Protocol):
    """Anything that counts its sequences."""

    def __len__(self) -> int: ...


def share_of(dataset: Sequences, share: Share) -> range:
    """The sequences of a split: rounded as megatron-core rounds, so that splits neither overlap nor leave gaps."""
    return range(int(round(share[0] * float(len(dataset)))), int(round(share[1] * float(len(dataset)))))
