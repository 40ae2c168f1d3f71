"""Samples of seq_length + 1 tokens: out of one indexed dataset, a blend of them, or a mock stream.

The order of the samples is Megatron's: megatron-core builds the document, sample and shuffle index and the
order of a blend; reading the tokens is ours. A source says ``len`` and ``tokens(i) -> int64 [seq_length + 1]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol, Sequence

import numpy as np
import torch

from megatron_telechat.data.indexed import IndexedDataset
from megatron_telechat.errors import DataError


@dataclass(frozen=True)
class Marks:
    """What a source of dialogs knows of the tokens of a sample.

    Attributes:
        learned: bool [sequence_length + 1], the tokens that are learned where they are labels.
        starts: int64, ascending, where dialogs and the padding begin.
        used: tokens before the padding.
    """

    learned: np.ndarray
    starts: np.ndarray
    used: int


class SampleSource(Protocol):
    def __len__(self) -> int: ...

    def tokens(self, sample: int) -> np.ndarray: ...

    def marks(self, sample: int) -> Optional[Marks]: ...

    def pieces(self, sample: int) -> list[tuple[int, str]]: ...

    def origin(self, sample: int) -> str: ...


class _IndexTokenizer:
    """What megatron-core's dataset asks of a tokenizer while it builds an index: nothing of it decides the order."""

    vocab_size = None
    eod = -2  # megatron-core pads with -1 and warns where the two are equal

    @property
    def unique_identifiers(self) -> dict:
        return {}


class IndexedSamples:
    """Samples of one indexed dataset in the order of megatron-core's ``GPTDataset``.

    Args:
        dataset: the open dataset.
        share: (begin, end) of its sequences that belong to this split, as shares of their number.
        num_samples: samples that are needed, reading the documents again as often as it takes; None: one epoch.
        split: train, valid or test.
        sequence_length: tokens of a sample, without the extra one.
        seed: of the shuffles.
        cache: folder that megatron-core keeps the index in.

    Raises:
        DataError: the share holds no token, or less than one sample with ``num_samples`` None.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        share: tuple[float, float],
        num_samples: Optional[int],
        split: str,
        sequence_length: int,
        seed: int,
        cache: Path,
    ):
        self.dataset = dataset
        self.sequence_length = sequence_length
        sequences = share_of(dataset, share)
        self.tokens_per_epoch = int(dataset.sequence_lengths[sequences.start : sequences.stop].sum(dtype=np.int64))
        needed = sequence_length + 1 if num_samples is None else 1
        if self.tokens_per_epoch < needed:
            # With no token at all megatron-core counts epochs for ever.
            raise DataError(
                f"the {split} split of {dataset.prefix} holds {len(sequences)} sequences with {self.tokens_per_epoch:,} "
                f"tokens; {needed:,} are needed at least",
                dataset.prefix,
                "give it a larger share with --split, more documents, or leave the dataset out",
            )
        index = _megatron_index(dataset, sequences, num_samples, split, sequence_length, seed, cache)
        self._document_index, self._sample_index, self._shuffle_index = index

    def __len__(self) -> int:
        return self._sample_index.shape[0] - 1

    def _pieces(self, sample: int):
        """(sequence number, first token, tokens or None for all) of the parts that make the sample."""
        place = int(self._shuffle_index[sample])
        first, first_offset = (int(x) for x in self._sample_index[place])
        last, last_offset = (int(x) for x in self._sample_index[place + 1])
        for entry in range(first, last + 1):
            begin = first_offset if entry == first else 0
            # The extra token: the labels are the tokens moved by one.
            length = last_offset + 1 - begin if entry == last else None
            yield int(self._document_index[entry]), begin, length

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


def share_of(dataset: IndexedDataset, share: tuple[float, float]) -> range:
    """The sequences of a split: rounded as megatron-core rounds, so that splits neither overlap nor leave gaps."""
    return range(int(round(share[0] * float(len(dataset)))), int(round(share[1] * float(len(dataset)))))


def _megatron_index(
    dataset: IndexedDataset,
    sequences: range,
    num_samples: Optional[int],
    split: str,
    sequence_length: int,
    seed: int,
    cache: Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([dataset.prefix], None),
        split="1",
        path_to_cache=str(cache),
        tokenizer=_IndexTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indices = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    built = GPTDataset(dataset, dataset.prefix, indices, num_samples, Split[split], config)
    return built.document_index, built.sample_index, built.shuffle_index


class BlendedSamples:
    """Samples drawn from several sources in the order of megatron-core's blending.

    Args:
        sources: the sources, each long enough for its part (``samples_of_each``).
        weights: positive, any scale.
        size: samples of the blend.
        cache: folder of the two index files; they are built if they are not there.
    """

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float], size: int, cache: Path, name: str):
        self.sources = tuple(sources)
        paths = (cache / f"blend-{name}-source.npy", cache / f"blend-{name}-sample.npy")
        if not all(path.exists() for path in paths):
            source, sample = _blend_order(weights, size)
            np.save(paths[0], source)
            np.save(paths[1], sample)
        self._source, self._sample = (np.load(path, mmap_mode="r") for path in paths)

    def __len__(self) -> int:
        return self._source.shape[0]

    def place(self, sample: int) -> tuple[int, int]:
        """(number of the source, its sample) of a sample of the blend."""
        return int(self._source[sample]), int(self._sample[sample])

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [sequence_length + 1]."""
        source, inner = self.place(sample)
        return self.sources[source].tokens(inner)

    def marks(self, sample: int) -> Optional[Marks]:
        source, inner = self.place(sample)
        return self.sources[source].marks(inner)

    def pieces(self, sample: int) -> list[tuple[int, str]]:
        source, inner = self.place(sample)
        return self.sources[source].pieces(inner)

    def origin(self, sample: int) -> str:
        source, inner = self.place(sample)
        return self.sources[source].origin(inner)

    def find_token(self, sample: int, token: int) -> str:
        source, inner = self.place(sample)
        return self.sources[source].find_token(inner, token)

    def drawn(self) -> list[int]:
        """Samples of each source in the whole blend."""
        return np.bincount(self._source, minlength=len(self.sources)).tolist()


def _blend_order(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    from megatron.core.datasets import helpers

    source = np.zeros(size, np.int16)
    sample = np.zeros(size, np.int64)
    total = sum(weights)
    shares = np.array([weight / total for weight in weights], dtype=np.float64)
    helpers.build_blending_indices(source, sample, shares.tolist(), len(weights), size, False)
    return source, sample


def samples_of_each(weights: Sequence[float], size: int) -> list[int]:
    """Samples to build of each source of a weighted blend of ``size``: megatron-core's own number.

    Its 0.5 % surplus decides how many epochs are shuffled together, so with another one the order would not be
    Megatron's. It is always enough: rounded up it adds at least one, and the greedy order of a blend takes a source
    at most weight x size + 1 times.
    """
    total = sum(weights)
    return [math.ceil(math.ceil(size * (weight / total)) * 1.005) for weight in weights]


class MockSamples:
    """A stream that costs nothing, is the same everywhere, and can be learned.

    Tokens are Zipf-distributed (p(id) ~ 1/id) starts of short runs in which each token is the one before
    plus 17: the loss falls first to the entropy of the ids, then further as successors are learned.
    """

    STEP = 17
    CONTINUE = 0.75

    def __init__(self, size: int, sequence_length: int, vocab_size: int, seed: int, split: int):
        self.size = size
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self._key = (seed, split)

    def __len__(self) -> int:
        return self.size

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [sequence_length + 1]."""
        if not 0 <= sample < self.size:
            raise IndexError(sample)
        rng = np.random.default_rng((*self._key, sample))
        count = self.sequence_length + 1
        starts = np.minimum(np.exp(rng.random(count) * math.log(self.vocab_size)).astype(np.int64), self.vocab_size) - 1
        place = np.arange(count)
        begins = rng.random(count) >= self.CONTINUE
        begins[0] = True
        run = np.maximum.accumulate(np.where(begins, place, 0))
        return (starts[run] + (place - run) * self.STEP) % self.vocab_size

    def marks(self, sample: int) -> None:
        """Every token is learned."""

    def pieces(self, sample: int) -> list[tuple[int, str]]:
        return [(0, self.origin(sample))]

    def origin(self, sample: int) -> str:
        return f"mock sample {sample}"

    def find_token(self, sample: int, token: int) -> str:
        return self.origin(sample)


class TokenDataset(torch.utils.data.Dataset):
    """Samples as the training reads them.

    ``dataset[i]`` gives tokens, labels, position_ids (int64) and loss_mask (float32), each [s];
    ``dataset.batch(ids)`` the same, each [len(ids), s].

    Args:
        source: where the tokens come from.
        size: samples of it to offer, from the first on.
        vocab_size: rows of the embedding; a token outside is an error.
        eod: end-of-document id: documents begin behind it. A source of dialogs knows their borders itself.
        eod_mask_loss: no loss at positions whose input is ``eod``.
        reset_position_ids: positions begin anew with a document or dialog.
        reset_attention_mask: so does the attention, and the first token of a document or dialog is not learned from the end
            of the one before it. A batch then holds ``segment_lengths`` too, int64 [segments of all its rows]: the lengths
            of the stretches that attend to themselves only. They sum to s in each row.
        tell_padding: a batch of dialogs holds ``padding`` too, bool [len(ids), s]: the inputs that are padding.
    """

    def __init__(
        self,
        source: SampleSource,
        size: int,
        vocab_size: int,
        eod: Optional[int] = None,
        eod_mask_loss: bool = False,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        tell_padding: bool = False,
    ):
        assert size <= len(source)
        self.source = source
        self.size = size
        self.vocab_size = vocab_size
        self.eod = eod
        self.eod_mask_loss = eod_mask_loss
        self.reset_position_ids = reset_position_ids
        self.reset_attention_mask = reset_attention_mask
        self.tell_padding = tell_padding

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        if not 0 <= sample < self.size:
            raise IndexError(sample)
        batch = self.batch([sample])
        return {name: value if name == "segment_lengths" else value[0] for name, value in batch.items()}

    def batch(self, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """The samples as one batch.

        Raises:
            DataError: a token id outside the vocabulary, naming its file and document.
        """
        text = np.stack([self.source.tokens(sample) for sample in samples])
        self._check_vocabulary(text, samples)
        marks = [self.source.marks(sample) for sample in samples]
        starts = [self._starts(row, mark) for row, mark in zip(text, marks)]
        length = text.shape[1] - 1
        place = np.tile(np.arange(length), (len(samples), 1))
        if self.reset_position_ids:
            for row, begins in zip(place, starts):
                row -= np.repeat(begins, np.diff([*begins, length]))
        batch = {
            "tokens": text[:, :-1].copy(),
            "labels": text[:, 1:].copy(),
            "loss_mask": np.stack([self._loss_mask(*row) for row in zip(text, marks)]),
            "position_ids": place,
        }
        if self.reset_attention_mask:
            batch["segment_lengths"] = np.concatenate([np.diff([*begins, length]) for begins in starts])
        if self.tell_padding and marks[0] is not None:
            batch["padding"] = np.stack([np.arange(length) >= mark.used for mark in marks])
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _starts(self, row: np.ndarray, marks: Optional[Marks]) -> np.ndarray:
        """Where documents or dialogs begin among the inputs of a row; the first is 0."""
        if marks is not None:
            return marks.starts[marks.starts < row.size - 1]
        if self.eod is None:
            return np.zeros(1, np.int64)
        return np.concatenate([[0], np.flatnonzero(row[:-2] == self.eod) + 1])

    def _loss_mask(self, row: np.ndarray, marks: Optional[Marks]) -> np.ndarray:
        """float32 [s]: the mask of a position is that of its label."""
        mask = np.ones(row.size - 1, np.float32) if marks is None else marks.learned[1:].astype(np.float32)
        # Where the attention is reset, the first token of a document would be guessed from the end of another one. The
        # last position counts too: its label may begin a document of which no other token is in the row.
        if marks is None and (self.eod_mask_loss or self.reset_attention_mask):
            mask[row[:-1] == self.eod] = 0.0
        elif marks is not None and self.reset_attention_mask:
            mask[marks.starts[1:] - 1] = 0.0
        return mask

    def _check_vocabulary(self, text: np.ndarray, samples: Sequence[int]) -> None:
        if int(text.min()) >= 0 and int(text.max()) < self.vocab_size:
            return
        row, column = (int(x) for x in np.argwhere((text < 0) | (text >= self.vocab_size))[0])
        token = int(text[row, column])
        raise DataError(
            f"token id {token} is outside the model's vocabulary of {self.vocab_size:,}",
            self.source.find_token(samples[row], token),
            "preprocess the text with the model's own tokenizer, or correct --vocab-size",
        )
