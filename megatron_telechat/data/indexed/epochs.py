"""Samples of one indexed dataset, epoch after epoch, without an end.

Each epoch shuffles the documents, lays them end to end and shuffles the samples cut from that, with a generator of its
own. The first one is Megatron's order of a single epoch. A sample is ``sequence_length`` + 1 tokens; its last token is
the first of the next one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_telechat.backend.triton_guard import let_core_import_without_triton
from megatron_telechat.data.corpus import share_of
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.pieces import IndexFolder, Say
from megatron_telechat.errors import DataError

STRETCH_SAMPLES = 1 << 16
"""Samples that a file of several epochs of a small source holds at least."""
STRETCH_EPOCHS = 4096
"""Epochs in one file at most, unless a single sample takes more."""
_FILES = ("documents", "samples", "shuffle")
_OPEN = 2  # a step may read on both sides of a border


@dataclass(frozen=True)
class Stretch:
    """Epochs of a source that one index holds. What a stretch holds does not depend on the length of the run.

    Attributes:
        first_epoch, epochs: which ones.
        samples: how many samples they give.
        megatron_for: the number of samples whose Megatron order this is; None where each epoch is shuffled on its own.
    """

    first_epoch: int
    epochs: int
    samples: int
    megatron_for: int | None = None

    @property
    def name(self) -> str:
        """End of its folder's name in the index: ``megatron-<samples>``, or ``epochs-<first>-<last>``."""
        if self.megatron_for is not None:
            return f"megatron-{self.megatron_for}"
        return f"epochs-{self.first_epoch}-{self.first_epoch + self.epochs - 1}"


@dataclass(frozen=True)
class SourceShape:
    """What decides the stretches of a source.

    Attributes:
        tokens: tokens of an epoch, at least 1.
        sequence_length: tokens of a sample, without the extra one.
        megatron_for: samples that Megatron's order was made for at the start of the run; None: it was not.
    """

    tokens: int
    sequence_length: int
    megatron_for: int | None = None

    def samples_in(self, epochs: int) -> int:
        """Whole samples of so many epochs laid end to end."""
        return max(0, (epochs * self.tokens - 1) // self.sequence_length)

    def first(self) -> Stretch | None:
        """The stretch in Megatron's order; None where it is that of the first epoch alone, which is ours too."""
        if self.megatron_for is None:
            return None
        epochs = -(-(self.megatron_for * self.sequence_length + 1) // self.tokens)
        return Stretch(0, epochs, self.samples_in(epochs), self.megatron_for) if epochs > 1 else None

    def stretches(self) -> Iterator[Stretch]:
        """All stretches in order, without an end."""
        first = self.first()
        if first:
            yield first
        epoch = first.epochs if first else 0
        wanted = -(-STRETCH_SAMPLES * self.sequence_length // self.tokens)
        for_one_sample = -(-(self.sequence_length + 1) // self.tokens)
        epochs = max(for_one_sample, min(STRETCH_EPOCHS, wanted))
        while True:
            yield Stretch(epoch, epochs, self.samples_in(epochs))
            epoch += epochs


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
    ):
        self.dataset = dataset
        self.sequence_length = sequence_length
        self._split, self._seed = split, seed
        self._sequences = share_of(dataset, share)
        lengths = dataset.sequence_lengths[self._sequences.start : self._sequences.stop]
        self.tokens_per_epoch = int(lengths.sum(dtype=np.int64))
        needed = sequence_length + 1 if once else 1
        if self.tokens_per_epoch < needed:
            raise DataError(
                f"the {split} split of {dataset.prefix} holds {len(self._sequences)} sequences with "
                f"{self.tokens_per_epoch:,} tokens; {needed:,} are needed at least",
                dataset.prefix,
                "give it a larger share with --split, more documents, or leave the dataset out",
            )
        # One epoch in Megatron's order is our first epoch.
        self._shape = SourceShape(self.tokens_per_epoch, sequence_length, None if once else megatron_for)
        self._size = 0
        self._begins: list[int] = []
        self._folders: list[Path] = []
        self._opened: dict[int, tuple[np.ndarray, ...]] = {}

    def require(self, size: int | None, index: IndexFolder, name: str) -> None:
        """See `data.corpus.CorpusSamples`."""
        self._size = size = self._shape.samples_in(1) if size is None else size
        at = 0
        for stretch in self._shape.stretches():
            if at >= size:
                break
            self._folders.append(index.piece(f"{name}-{stretch.name}", partial(self._build, stretch, say=index.say)))
            self._begins.append(at)
            at += stretch.samples

    def _build(self, stretch: Stretch, folder: Path, say: Say) -> None:
        say(f"indexing {self.dataset.prefix} for {self._split}: {stretch.name}")
        if stretch.megatron_for is not None:
            _build_megatrons(
                self.dataset, self._sequences, self._split, self.sequence_length, self._seed, stretch, folder
            )
            return
        found = epochs_index(self.dataset.sequence_lengths, self._sequences, self._shape, self._seed, stretch)
        for file, array in zip(_FILES, found, strict=True):
            np.save(folder / f"{file}.npy", array)

    def _arrays(self, number: int) -> tuple[np.ndarray, ...]:
        """documents, samples and shuffle of a stretch, memory-mapped; few are open at a time, since each costs
        files."""
        found = self._opened.get(number)
        if found is None:
            found = tuple(np.load(self._folders[number] / f"{file}.npy", mmap_mode="r") for file in _FILES)
            # A new dictionary: other threads read the one before meanwhile.
            self._opened = {**dict(list(self._opened.items())[1 - _OPEN :]), number: found}
        return found

    def __len__(self) -> int:
        return self._size

    def _pieces(self, sample: int):
        """(sequence number, first token, tokens or None for all) of the parts that make the sample."""
        number = bisect_right(self._begins, sample) - 1
        documents, samples, shuffle = self._arrays(number)
        place = int(shuffle[sample - self._begins[number]])
        first, first_offset = (int(x) for x in samples[place])
        last, last_offset = (int(x) for x in samples[place + 1])
        for entry in range(first, last + 1):
            begin = first_offset if entry == first else 0
            # The extra token: the labels are the tokens moved by one.
            length = last_offset + 1 - begin if entry == last else None
            yield int(documents[entry]), begin, length

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
        return (
            f"{split}: {self.dataset.prefix}  {self.dataset.documents:,} documents  {self.tokens_per_epoch:,} tokens "
            f"in the split  {drawn:,} samples = {epochs:.2f} epochs"
        )


def epoch_generator(seed: int, epoch: int) -> np.random.RandomState:
    """The generator of an epoch; that of the first is Megatron's. numpy promises that its numbers never change."""
    return np.random.RandomState(seed if epoch == 0 else [seed, epoch])


def epochs_index(
    lengths: np.ndarray, sequences: range, shape: SourceShape, seed: int, stretch: Stretch
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The index of a stretch whose epochs are shuffled one by one.

    A sample belongs to the epoch that its last token lies in; the first sample of an epoch may begin in the one before.

    Args:
        lengths: int32, tokens of each sequence of the dataset.
        sequences: those of the split.

    Returns:
        documents: int32, numbers of the sequences in the order they are laid end to end.
        samples: [samples + 1, 2], where each sample begins: the place in ``documents``, and the token in there.
        shuffle: the samples in the order they are read.
    """
    let_core_import_without_triton()
    from megatron.core.datasets import helpers

    documents = np.empty((stretch.epochs, len(sequences)), np.int32)
    shuffle = np.arange(stretch.samples, dtype=np.uint32 if stretch.samples < 2**32 - 2 else np.int64)
    for number in range(stretch.epochs):
        random = epoch_generator(seed, stretch.first_epoch + number)
        documents[number] = np.arange(sequences.start, sequences.stop, dtype=np.int32)
        random.shuffle(documents[number])
        random.shuffle(shuffle[shape.samples_in(number) : shape.samples_in(number + 1)])
    documents = documents.reshape(-1)
    # A copy in memory: the lengths are read in a random order.
    samples = helpers.build_sample_idx(
        np.array(lengths, np.int32), documents, shape.sequence_length, stretch.epochs, shape.tokens, True, True
    )
    return documents, samples, shuffle


class _IndexTokenizer:
    """What megatron-core's dataset asks of a tokenizer while it builds an index: nothing of it decides the order."""

    vocab_size = None
    eod = -2  # megatron-core pads with -1 and warns where the two are equal

    @property
    def unique_identifiers(self) -> dict:
        return {}


def _build_megatrons(
    dataset: IndexedDataset,
    sequences: range,
    split: str,
    sequence_length: int,
    seed: int,
    stretch: Stretch,
    folder: Path,
) -> None:
    """megatron-core's own index, under our names."""
    let_core_import_without_triton()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([dataset.prefix], None),
        split="1",
        path_to_cache=str(folder),
        tokenizer=_IndexTokenizer(),  # pyright: ignore[reportArgumentType] what is asked of it, it has
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indices = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    theirs: Any = dataset  # it has what megatron-core asks of its own class
    built = GPTDataset(theirs, dataset.prefix, indices, stretch.megatron_for, Split[split], config)
    if built.sample_index.shape[0] - 1 != stretch.samples:
        raise AssertionError(
            f"megatron-core made {built.sample_index.shape[0] - 1} samples, {stretch.samples} were expected"
        )
    for file, name in zip(_FILES, ("document", "sample", "shuffle"), strict=True):
        (found,) = folder.glob(f"*-{name}_index.npy")
        found.rename(folder / f"{file}.npy")
