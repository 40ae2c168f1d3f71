"""Samples of one indexed dataset, epoch after epoch, without an end.

Each epoch shuffles the documents, lays them end to end and shuffles the samples cut from that, with a generator of its
own. The first one is Megatron's order of a single epoch. A sample is ``sequence_length`` + 1 tokens; its last token is
the first of the next one.

A run may change the length of a sample on its way. What the length before has not read of its epoch (`unread`) is laid
end to end in the order it had, the epochs to come follow, and all of that is cut anew.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_telechat.data.core import core_datasets
from megatron_telechat.data.corpus import ONE_LENGTH, SourceLegs, share_of
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.indexed.megatron_order import FILES, build_megatrons
from megatron_telechat.data.indexed.unread import pieces_of, unread_stretches
from megatron_telechat.data.pieces import IndexFolder, Say
from megatron_telechat.errors import DataError

STRETCH_SAMPLES = 1 << 16
"""Samples that a file of several epochs of a small source holds at least."""
STRETCH_EPOCHS = 4096
"""Epochs in one file at most, unless a single sample takes more."""
_PIECES = "pieces"
_NO_PIECES = np.empty((0, 3), np.int32)
_OPEN = 2  # a step may read on both sides of a border


@dataclass(frozen=True)
class Stretch:
    """Epochs of a source that one index holds. What a stretch holds does not depend on the length of the run.

    Attributes:
        first_epoch, epochs: which ones.
        samples: how many samples they give.
        megatron_for: the number of samples whose Megatron order this is; None where each epoch is shuffled on its own.
        carried: tokens before the first epoch that samples of another length have left.
    """

    first_epoch: int
    epochs: int
    samples: int
    megatron_for: int | None = None
    carried: int = 0

    @property
    def name(self) -> str:
        """End of its folder's name in the index: ``megatron-<samples>``, or ``epochs-<first>-<last>``, with ``left-``
        before it where something is carried."""
        if self.megatron_for is not None:
            return f"megatron-{self.megatron_for}"
        return f"{'left-' * bool(self.carried)}epochs-{self.first_epoch}-{self.first_epoch + self.epochs - 1}"


@dataclass(frozen=True)
class SourceShape:
    """What decides the stretches of a source.

    Attributes:
        tokens: tokens of an epoch, at least 1.
        sequence_length: tokens of a sample, without the extra one.
        megatron_for: samples that Megatron's order was made for at the start of the run; None: it was not.
        carried: tokens that samples of another length have left of the epochs before ``first_epoch``.
        first_epoch: the first one of which nothing was read.
        endless: whether epochs follow what is carried.
        ends: samples after which another length was to follow: they are shuffled apart from those behind them, so that
            they read all that lies before that place and nothing behind it; None: none was.
    """

    tokens: int
    sequence_length: int
    megatron_for: int | None = None
    carried: int = 0
    first_epoch: int = 0
    endless: bool = True
    ends: int | None = None

    def whole(self, tokens: int) -> int:
        """Whole samples of so many tokens laid end to end."""
        return max(0, (tokens - 1) // self.sequence_length)

    def samples_in(self, epochs: int) -> int:
        """Whole samples of what is carried and so many epochs."""
        return self.whole(self.carried + epochs * self.tokens)

    def first(self) -> Stretch | None:
        """The stretch in Megatron's order; None where it is that of the first epoch alone, which is ours too."""
        if self.megatron_for is None:
            return None
        epochs = -(-(self.megatron_for * self.sequence_length + 1) // self.tokens)
        return Stretch(0, epochs, self.samples_in(epochs), self.megatron_for) if epochs > 1 else None

    def stretches(self) -> Iterator[Stretch]:
        """All stretches in order, without an end where epochs follow."""
        if not self.endless:
            yield Stretch(self.first_epoch, 0, self.samples_in(0), carried=self.carried)
            return
        first = self.first()
        if first:
            yield first
        epoch, carried = first.epochs if first else self.first_epoch, self.carried
        wanted = -(-STRETCH_SAMPLES * self.sequence_length // self.tokens)
        for_one_sample = -(-(self.sequence_length + 1) // self.tokens)
        epochs = max(for_one_sample, min(STRETCH_EPOCHS, wanted))
        while True:
            yield Stretch(epoch, epochs, self.whole(carried + epochs * self.tokens), carried=carried)
            epoch, carried = epoch + epochs, 0

    def units(self, stretch: Stretch) -> list[int]:
        """Where the parts of a stretch end that are shuffled one by one, in tokens: what is carried, and each epoch; a
        stretch in Megatron's order is one."""
        if stretch.megatron_for is not None:
            return [stretch.epochs * self.tokens]
        epochs = [stretch.carried + number * self.tokens for number in range(1, stretch.epochs + 1)]
        return [stretch.carried, *epochs] if stretch.carried else epochs

    def standing(self, read: int) -> tuple[Stretch, int, int]:
        """Where a run stands after so many samples of this source, at least one: the stretch, the samples before it,
        and the number of the unit."""
        at = 0
        for stretch in self.stretches():
            if read <= at + stretch.samples:
                unit = next(n for n, end in enumerate(self.units(stretch)) if read - at <= self.whole(end))
                return stretch, at, unit
            at += stretch.samples
        raise ValueError(f"{read} samples were read of a source that has {at}")

    def left_by(self, read: int) -> tuple[int, int]:
        """Tokens that so many samples leave of the epoch they stand in, and the first epoch they have not touched."""
        if not read:
            return self.carried, self.first_epoch
        stretch, at, unit = self.standing(read)
        left = self.units(stretch)[unit] - (read - at) * self.sequence_length
        if stretch.megatron_for is not None:
            return left, stretch.epochs
        return left, stretch.first_epoch + unit + (not stretch.carried)

    def after(self, read: int, sequence_length: int, once: bool, ends: int | None) -> SourceShape:
        """The shape of what is left, for samples of another length."""
        carried, first_epoch = self.left_by(read)
        return SourceShape(self.tokens, sequence_length, None, carried, first_epoch, not once, ends)


@dataclass(frozen=True)
class _Part:
    """A part of a sample.

    Attributes:
        sequence, begin: where it comes from.
        tokens: None: to the end of the sequence.
        begins: whether it begins its document, or goes on in it from the token before.
        ends: whether the document ends where the part would end.
    """

    sequence: int
    begin: int
    tokens: int | None
    begins: bool = True
    ends: bool = True


class IndexedSamples:
    """Samples of one indexed dataset; ``require`` says how many before any is read.

    Args:
        dataset: the open dataset.
        share: (begin, end) of its sequences that belong to this split, as shares of their number.
        once: only the first epoch is read.
        split: train, valid or test.
        sequence_length: tokens of a sample, without the extra one.
        seed: of the shuffles.
        megatron_for: see :class:`SourceShape`.
        legs: what samples of other lengths have read, and where this length is to end.

    Raises:
        DataError: the share holds no token, or less than one sample with ``once``.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        share: tuple[float, float],
        once: bool,
        split: str,
        sequence_length: int,
        seed: int,
        megatron_for: int | None = None,
        legs: SourceLegs = ONE_LENGTH,
    ):
        self.dataset = dataset
        self.sequence_length = sequence_length
        self._split, self._seed = split, seed
        self._sequences = share_of(dataset, share)
        lengths = dataset.sequence_lengths[self._sequences.start : self._sequences.stop]
        self.tokens_per_epoch = int(lengths.sum(dtype=np.int64))
        needed = sequence_length + 1 if once and not legs.past else 1
        if self.tokens_per_epoch < needed:
            raise DataError(
                f"the {split} split of {dataset.prefix} holds {len(self._sequences)} sequences with "
                f"{self.tokens_per_epoch:,} tokens; {needed:,} are needed at least",
                dataset.prefix,
                "give it a larger share with --split, more documents, or leave the dataset out",
            )
        # One epoch in Megatron's order is our first epoch.
        lengths, ends = [leg.sequence_length for leg in legs.past], [leg.ends for leg in legs.past]
        lengths, ends = [*lengths, sequence_length], [*ends, legs.ends]
        shape = SourceShape(self.tokens_per_epoch, lengths[0], None if once else megatron_for, ends=ends[0])
        self._past: list[tuple[SourceShape, int]] = []
        for leg, length, end in zip(legs.past, lengths[1:], ends[1:], strict=True):
            self._past.append((shape, leg.samples))
            shape = shape.after(leg.samples, length, once, end)
        self._shape = shape
        self._size = 0
        self._begins: list[int] = []
        self._folders: list[Path] = []
        self._opened: dict[int, tuple[np.ndarray, ...]] = {}

    def samples_in(self, epochs: float, once: bool) -> int:
        """Whole samples of the tokens of so many epochs laid end to end."""
        return self._shape.whole(int(epochs * self.tokens_per_epoch))

    def require(self, size: int | None, index: IndexFolder, name: str) -> None:
        """See `data.corpus.CorpusSamples`."""
        of_one = self._shape.samples_in(1 if self._shape.endless else 0)
        self._size = size = of_one if size is None else size
        at = 0
        for stretch in self._shape.stretches():
            if at >= size:
                break
            self._folders.append(
                index.piece(f"{name}-{stretch.name}", partial(self._build, stretch, at, say=index.say))
            )
            self._begins.append(at)
            at += stretch.samples

    def _build(self, stretch: Stretch, at: int, folder: Path, say: Say) -> None:
        say(f"indexing {self.dataset.prefix} for {self._split}: {stretch.name}")
        if stretch.megatron_for is not None:
            self._build_megatrons(self._shape, stretch, folder)
            return
        pieces = self._carried(folder) if stretch.carried else _NO_PIECES
        lengths = self.dataset.sequence_lengths
        found = epochs_index(lengths, self._sequences, self._shape, self._seed, stretch, pieces, at)
        for file, array in zip(FILES, found, strict=True):
            np.save(folder / f"{file}.npy", array)
        if stretch.carried:
            np.save(folder / f"{_PIECES}.npy", pieces)

    def _build_megatrons(self, shape: SourceShape, stretch: Stretch, folder: Path) -> None:
        assert stretch.megatron_for is not None, "only this stretch is in Megatron's order"
        build_megatrons(
            self.dataset, self._sequences, self._split, shape.sequence_length, self._seed, stretch.megatron_for,
            stretch.samples, folder,
        )  # fmt: skip

    def _carried(self, folder: Path) -> np.ndarray:
        """int32 [pieces, 3], sequence, first token and tokens of what the lengths before have left, in order."""
        pieces = _NO_PIECES
        for shape, read in self._past:
            if not read:
                continue
            stretch, at, unit = shape.standing(read)
            pieces = pieces if stretch.carried else _NO_PIECES
            sizes = _sizes(self.dataset.sequence_lengths, pieces)
            if stretch.megatron_for is None:
                documents, shuffle = shuffled(
                    len(self.dataset), self._sequences, shape, self._seed, stretch, pieces, at
                )
            else:
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    self._build_megatrons(shape, stretch, Path(scratch))
                    documents, _, shuffle = (np.load(Path(scratch, f"{file}.npy")) for file in FILES)
            units = shape.units(stretch)
            places = range(shape.whole(units[unit - 1]) if unit else 0, shape.whole(units[unit]))
            begins, ends = unread_stretches(shuffle[: read - at], places, shape.sequence_length, units[unit])
            pieces = pieces_of(begins, ends, documents, sizes, pieces, len(self.dataset))
        return pieces

    def _arrays(self, number: int) -> tuple[np.ndarray, ...]:
        """documents, samples and shuffle of a stretch, and the pieces it begins with, memory-mapped; few are open at a
        time, since each costs files."""
        found = self._opened.get(number)
        if found is None:
            folder = self._folders[number]
            found = tuple(np.load(folder / f"{file}.npy", mmap_mode="r") for file in FILES)
            pieces = folder / f"{_PIECES}.npy"
            found = (*found, np.load(pieces, mmap_mode="r") if pieces.exists() else _NO_PIECES)
            # A new dictionary: other threads read the one before meanwhile.
            self._opened = {**dict(list(self._opened.items())[1 - _OPEN :]), number: found}
        return found

    def __len__(self) -> int:
        return self._size

    def _entries(self, sample: int) -> Iterator[_Part]:
        """The parts that make the sample."""
        number = bisect_right(self._begins, sample) - 1
        documents, samples, shuffle, pieces = self._arrays(number)
        place = int(shuffle[sample - self._begins[number]])
        first, first_offset = (int(x) for x in samples[place])
        last, last_offset = (int(x) for x in samples[place + 1])
        for entry in range(first, last + 1):
            begin = first_offset if entry == first else 0
            # The extra token: the labels are the tokens moved by one.
            length = last_offset + 1 - begin if entry == last else None
            sequence = int(documents[entry])
            if sequence < len(self.dataset):
                yield _Part(sequence, begin, length)
                continue
            sequence, base, tokens = (int(x) for x in pieces[sequence - len(self.dataset)])
            whole = base + tokens == self.dataset.sequence_lengths[sequence]
            length = tokens - begin if length is None else length
            yield _Part(sequence, base + begin, length, begins=base == 0 or begin > 0, ends=whole)

    def _pieces(self, sample: int) -> Iterator[tuple[int, int, int | None]]:
        """(sequence number, first token, tokens or None for all) of the parts that make the sample."""
        for part in self._entries(sample):
            yield part.sequence, part.begin, part.tokens

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [sequence_length + 1]."""
        out = np.empty(self.sequence_length + 1, np.int64)
        at = 0
        for sequence, begin, length in self._pieces(sample):
            part = self.dataset.get(sequence, begin, length)
            out[at : at + part.size] = part
            at += part.size
        assert at == out.size, f"sample {sample} of {self.dataset.prefix} has {at} tokens"
        return out

    def marks(self, sample: int) -> None:
        """Every token of a document is learned."""

    def cuts(self, sample: int) -> np.ndarray:
        """int64, where a part begins that does not follow from the token before it, and no document ended there."""
        found, at, before = [], 0, True
        if not self._past:
            return np.empty(0, np.int64)
        for part in self._entries(sample):
            if at and not (before and part.begins):
                found.append(at)
            rest = int(self.dataset.sequence_lengths[part.sequence]) - part.begin
            at += rest if part.tokens is None else part.tokens
            before = part.ends
        return np.array(found, np.int64)

    def pieces(self, sample: int) -> list[tuple[int, str]]:
        """First token, and name, of each document in a sample."""
        out, at = [], 0
        for sequence, begin, length in self._pieces(sample):
            out.append((at, f"{self.dataset.bin_path}, document {self.dataset.document_of(sequence)}"))
            at += self.dataset.get(sequence, begin, length).size
        return out

    def origin(self, sample: int) -> str:
        """Where the tokens of a sample come from, for messages."""
        documents = [self.dataset.document_of(sequence) for sequence, _, _ in self._pieces(sample)]
        return f"{self.dataset.bin_path}, documents {', '.join(str(d) for d in documents[:8])}"

    def find_token(self, sample: int, token: int) -> str:
        """The file and the document of the first occurrence of a token in a sample."""
        for sequence, begin, length in self._pieces(sample):
            if np.any(self.dataset.get(sequence, begin, length) == token):
                return f"{self.dataset.bin_path}, document {self.dataset.document_of(sequence)}"
        return self.origin(sample)

    def summary(self, split: str, drawn: int) -> str:
        """The line of the banner."""
        epochs = drawn * self.sequence_length / self.tokens_per_epoch
        left = f", first {self._shape.carried:,} tokens that another length left" * bool(self._past)
        return (
            f"{split}: {self.dataset.prefix}  {self.dataset.documents:,} documents  {self.tokens_per_epoch:,} tokens "
            f"in the split  {drawn:,} samples = {epochs:.2f} epochs{left}"
        )


def epoch_generator(seed: int, epoch: int) -> np.random.RandomState:
    """The generator of an epoch; that of the first is Megatron's. numpy promises that its numbers never change."""
    return np.random.RandomState(seed if epoch == 0 else [seed, epoch])


def _sizes(lengths: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """int32, tokens of each sequence, then of each piece; a copy in memory, because they are read in a random order."""
    return np.concatenate([np.asarray(lengths, np.int32), pieces[:, 2]])


def shuffled(
    numbers: int, sequences: range, shape: SourceShape, seed: int, stretch: Stretch, pieces: np.ndarray, at: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Documents and samples of a stretch in their order, see `epochs_index`; what is carried keeps its order.

    Args:
        numbers: how many sequences the dataset has; pieces are numbered behind them.
        at: samples of the source before the stretch.
    """
    documents = np.empty((stretch.epochs, len(sequences)), np.int32)
    shuffle = np.arange(stretch.samples, dtype=np.uint32 if stretch.samples < 2**32 - 2 else np.int64)
    begin, units = 0, shape.units(stretch)
    for unit, end in enumerate(units):
        number = unit - (len(units) - stretch.epochs)
        if number < 0:
            random = np.random.RandomState([seed, stretch.first_epoch, shape.sequence_length])
        else:
            random = epoch_generator(seed, stretch.first_epoch + number)
            documents[number] = np.arange(sequences.start, sequences.stop, dtype=np.int32)
            random.shuffle(documents[number])
        borders = [begin, shape.whole(end)]
        if shape.ends is not None and begin < shape.ends - at < borders[1]:
            borders.insert(1, shape.ends - at)
        for first, last in pairwise(borders):
            random.shuffle(shuffle[first:last])
        begin = borders[-1]
    return np.concatenate([np.arange(numbers, numbers + len(pieces), dtype=np.int32), documents.reshape(-1)]), shuffle


def epochs_index(
    lengths: np.ndarray,
    sequences: range,
    shape: SourceShape,
    seed: int,
    stretch: Stretch,
    pieces: np.ndarray,
    at: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The index of a stretch whose epochs are shuffled one by one.

    A sample belongs to the epoch that its last token lies in; the first sample of an epoch may begin in the one before.

    Args:
        lengths: int32, tokens of each sequence of the dataset.
        sequences: those of the split.
        pieces: int32 [n, 3], sequence, first token and tokens of each piece that the stretch carries.
        at: samples of the source before the stretch.

    Returns:
        documents: int32, numbers of the sequences in the order they are laid end to end; pieces are numbered behind
            all sequences.
        samples: [samples + 1, 2], where each sample begins: the place in ``documents``, and the token in there.
        shuffle: the samples in the order they are read.
    """
    documents, shuffle = shuffled(len(lengths), sequences, shape, seed, stretch, pieces, at)
    tokens = stretch.carried + stretch.epochs * shape.tokens
    build = core_datasets("helpers").build_sample_idx
    samples = build(_sizes(lengths, pieces), documents, shape.sequence_length, 1, tokens, True, True)
    return documents, samples, shuffle
