"""Samples as the training reads them: tokens, labels, loss masks, positions and borders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_telechat.data.corpus import Marks, PairMarks, SampleSource
from megatron_telechat.errors import DataError


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
        reset_attention_mask: so does the attention, and the first token of a document or dialog is not learned from the
            end of the one before it. A batch then holds ``segment_lengths`` too, int64 [segments of all its rows]: the
            lengths of the stretches that attend to themselves only. They sum to s in each row.
        tell_padding: a batch of dialogs holds ``padding`` too, bool [len(ids), s]: the inputs that are padding.

    A batch of pairs holds of its pairs, chosen half and rejected one in turn: ``answers``, int64 [halves, longest], the
    places of the learned labels of each among the len(ids) * s of the batch; ``answer_lengths``, int64 [halves], how
    many of them are meant; ``reference``, float64 [halves], their log-probability under the reference; and
    ``pair_numbers``, int64 [pairs], of each pair in its dataset.
    """

    def __init__(
        self,
        source: SampleSource,
        size: int,
        vocab_size: int,
        eod: int | None = None,
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
        cuts = [self.source.cuts(sample) for sample in samples]
        starts = [self._starts(*row) for row in zip(text, marks, cuts, strict=True)]
        length = text.shape[1] - 1
        place = np.tile(np.arange(length), (len(samples), 1))
        if self.reset_position_ids:
            for row, begins in zip(place, starts, strict=True):
                row -= np.repeat(begins, np.diff([*begins, length]))
        batch = {
            "tokens": text[:, :-1].copy(),
            "labels": text[:, 1:].copy(),
            "loss_mask": np.stack([self._loss_mask(*row) for row in zip(text, marks, cuts, strict=True)]),
            "position_ids": place,
        }
        if self.reset_attention_mask:
            batch["segment_lengths"] = np.concatenate([np.diff([*begins, length]) for begins in starts])
        used = [mark.used for mark in marks if mark is not None]
        if self.tell_padding and used:
            batch["padding"] = np.stack([np.arange(length) >= tokens for tokens in used])
        pairs = [mark.pairs for mark in marks if mark is not None and mark.pairs is not None]
        if pairs:
            batch |= _pairs_of(pairs, batch["loss_mask"])
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _starts(self, row: np.ndarray, marks: Marks | None, cuts: np.ndarray) -> np.ndarray:
        """Where documents or dialogs begin among the inputs of a row; the first is 0. A cut is a border as theirs."""
        if marks is not None:
            return marks.starts[marks.starts < row.size - 1]
        if self.eod is None:
            return np.zeros(1, np.int64)
        begins = np.concatenate([[0], np.flatnonzero(row[:-2] == self.eod) + 1])
        return np.union1d(begins, cuts[cuts < row.size - 1]) if cuts.size else begins

    def _loss_mask(self, row: np.ndarray, marks: Marks | None, cuts: np.ndarray) -> np.ndarray:
        """float32 [s]: the mask of a position is that of its label."""
        mask = np.ones(row.size - 1, np.float32) if marks is None else marks.learned[1:].astype(np.float32)
        # Where the attention is reset, the first token of a document would be guessed from the end of another one. The
        # last position counts too: its label may begin a document of which no other token is in the row.
        if marks is None and (self.eod_mask_loss or self.reset_attention_mask):
            mask[row[:-1] == self.eod] = 0.0
            if self.reset_attention_mask:
                mask[cuts - 1] = 0.0
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


def _pairs_of(rows: Sequence[PairMarks], loss_mask: np.ndarray) -> dict[str, np.ndarray]:
    """What a batch says of its pairs.

    Args:
        rows: the pairs of each row.
        loss_mask: float32 [rows, s].
    """
    length = loss_mask.shape[1]
    places: list[np.ndarray] = []
    for number, pairs in enumerate(rows):
        for begin, end in pairs.halves.reshape(-1, 2):
            # A token is the label of the place before it, and the first of a half is no label.
            places.append(number * length + begin + np.flatnonzero(loss_mask[number, begin : end - 1]))
    lengths = np.array([found.size for found in places], np.int64)
    answers = np.zeros((lengths.size, int(lengths.max(initial=0))), np.int64)
    for row, found in zip(answers, places, strict=True):
        row[: found.size] = found
    return {
        "answers": answers,
        "answer_lengths": lengths,
        "reference": np.concatenate([pairs.reference.reshape(-1) for pairs in rows]),
        "pair_numbers": np.concatenate([pairs.numbers for pairs in rows]),
    }
