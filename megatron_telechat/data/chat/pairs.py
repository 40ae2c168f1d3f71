"""Files of pairs as preference training asks for them: the two halves of a pair side by side in one row.

A half attends to itself only. So the log-probability of its answers is that of the dialog alone, and a row may hold
several pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_telechat.config.schema import DataConfig, RunConfig
from megatron_telechat.data.blend import Share
from megatron_telechat.data.chat.corpus import ChatCorpus, ChatFactory
from megatron_telechat.data.chat.files import PairDataset
from megatron_telechat.data.chat.packing import ChatSamples, Usable, pack
from megatron_telechat.data.chat.template import ANSWER
from megatron_telechat.data.corpus import CorpusSamples, Marks, PairMarks, SampleSource, SourceLegs, share_of
from megatron_telechat.errors import DataError, Problem

_COMPLAINTS = 20
_WHOLE_FILE: Share = (0.0, 1.0)


class UsablePairs(Usable):
    """The pairs of a split that something is learned from; ``dialogs`` are their numbers, ``lengths`` the tokens of
    both halves, and ``without_answer`` counts those whose answers are the same."""

    kind: ClassVar[str] = "pair"

    @property
    def left_out(self) -> dict[str, int]:
        """How many are left out, by what becomes of them."""
        return {
            "left out as too long": self.too_long,
            "left out because both answers are the same": self.without_answer,
        }

    def nothing_in(self, sequence_length: int) -> str:
        """Why there is none, after the name of a file that holds … ."""
        reasons = [f"{count:,} {what}" for what, count in self.left_out.items() if count]
        return f"no pair that can be used with --seq-length {sequence_length}" + "".join(f", {one}" for one in reasons)


def usable_pairs(dataset: PairDataset, pairs: range, row: int, overlong: str) -> UsablePairs:
    """Pairs of a range whose halves fit into a row of so many tokens together, and differ in an answer.

    Args:
        overlong: what becomes of longer ones: drop or refuse.

    Raises:
        DataError: a pair is longer, and that is refused.
    """
    numbers = np.arange(pairs.start, pairs.stop, dtype=np.int32)
    both = slice(2 * pairs.start, 2 * pairs.stop)
    lengths = dataset.sequence_lengths[both].astype(np.int64).reshape(-1, 2).sum(axis=1)
    long = lengths > row
    if overlong == "refuse" and np.any(long):
        raise DataError(list(_too_long(dataset, numbers[long], lengths[long], row)))
    begins = np.asarray(dataset.sequence_offsets[both]) // dataset.dtype.itemsize
    answers = np.zeros((0, 2), np.int64)
    if begins.size:
        end = int(begins[-1]) + int(dataset.sequence_lengths[both.stop - 1])
        is_answer = np.asarray(dataset.roles[int(begins[0]) : end]) == ANSWER
        answers = np.add.reduceat(is_answer, begins - begins[0], dtype=np.int64).reshape(-1, 2)
    same = ~long & ~np.all(answers > 0, axis=1)
    keep = ~(long | same)
    return UsablePairs(numbers[keep], lengths[keep].astype(np.int32), 0, int(same.sum()), int(long.sum()))


def _too_long(dataset: PairDataset, numbers: np.ndarray, lengths: np.ndarray, row: int):
    shown = list(zip(numbers.tolist(), lengths.tolist(), strict=True))[:_COMPLAINTS]
    for at, (number, length) in enumerate(shown, 1):
        rest = f" ({numbers.size:,} of them)" if numbers.size > 1 else ""
        yield Problem(
            f"the two halves of a pair have {length:,} tokens together, and a row has {row:,}",
            f"{dataset.source}:{dataset.line_of(2 * number)}",
            f"raise --seq-length, shorten or remove the pairs{rest}, or --dpo-overlong drop"
            if at == len(shown)
            else "",
        )


class PairSamples(ChatSamples):
    """Packed rows of pairs, none of them cut."""

    dataset: PairDataset

    def __init__(
        self,
        dataset: PairDataset,
        share: Share,
        split: str,
        sequence_length: int,
        seed: int,
        data: DataConfig,
    ):
        super().__init__(dataset, share, split, sequence_length, seed, data)
        self.convention = "answer"

    def _find_usable(self, share: Share, data: DataConfig) -> Usable:
        return usable_pairs(self.dataset, share_of(self.dataset.lines, share), self.row, data.dpo_overlong)

    def dialogs(self, sample: int) -> list[int]:
        """Numbers of the sequences of a row: chosen, rejected, chosen, …"""
        return [half for pair in self.packed(sample) for half in (2 * pair, 2 * pair + 1)]

    def marks(self, sample: int) -> Marks:
        """Which tokens are answers, where halves and the padding begin, and the pairs."""
        marks, numbers = super().marks(sample), np.array(self.packed(sample), np.int64)
        begins = marks.starts[: 2 * numbers.size]
        halves = np.stack([begins, np.append(begins, marks.used)[1 : begins.size + 1]], axis=1).reshape(-1, 2, 2)
        known = self.dataset.reference
        reference = np.full((numbers.size, 2), np.nan) if known is None else known[numbers]
        return Marks(marks.learned, marks.starts, marks.used, PairMarks(numbers, halves, reference))


class AllPairs(PairSamples):
    """Every pair of a file that can be used, once, in the order of the file.

    Args:
        batch: the number of rows is a multiple of this; the last ones may be empty.
    """

    def __init__(self, dataset: PairDataset, sequence_length: int, data: DataConfig, batch: int):
        super().__init__(dataset, _WHOLE_FILE, "whole", sequence_length, 0, data)
        rows = pack(self.usable.lengths, self.row, iter([np.arange(self.usable.dialogs.size)]), None, packing=True)
        self._packed = [[int(self.usable.dialogs[item]) for item in row] for row in rows]
        self._size = -(-len(rows) // batch) * batch

    def packed(self, sample: int) -> list[int]:
        """Numbers of the pairs of a row, in order."""
        return self._packed[sample] if sample < len(self._packed) else []


class PairCorpus(ChatCorpus):
    """An encoded file of pairs."""

    dialogs: PairDataset

    def _opened(self, folder: Path) -> PairDataset:
        return PairDataset(folder)

    def tokens_in(self, share: Share) -> int:
        """Tokens of both halves of the pairs of a share."""
        pairs = share_of(self.dialogs.lines, share)
        return int(self.dialogs.sequence_lengths[2 * pairs.start : 2 * pairs.stop].sum(dtype=np.int64))

    def _usable(self, share: Share) -> Usable:
        pairs = share_of(self.dialogs.lines, share)
        return usable_pairs(self.dialogs, pairs, self._length + 1, self._settings.dpo_overlong)

    def samples(
        self, split: str, share: Share, once: bool, megatron_for: int | None, legs: SourceLegs
    ) -> CorpusSamples:
        """Pairs packed into rows, epoch after epoch."""
        return PairSamples(self.dialogs, share, split, self._length, self._seed, self._settings)

    @property
    def pairs(self) -> int:
        """Number of pairs, those that cannot be used included."""
        return self.dialogs.documents

    @property
    def usable(self) -> int:
        """Number of pairs that can be used."""
        return self._usable(_WHOLE_FILE).dialogs.size

    def origin(self, pair: int) -> str:
        """``file:line`` of a pair."""
        return f"{self.dialogs.source}:{self.dialogs.line_of(2 * pair)}"

    def whole(self, batch: int) -> SampleSource:
        """Every pair that can be used, once."""
        return AllPairs(self.dialogs, self._length, self._settings, batch)

    def use_reference(self, log_probs: np.ndarray) -> None:
        """Log-probabilities of the answers under the reference, float64 [pairs, 2]."""
        assert log_probs.shape == (self.dialogs.documents, 2), "one reference of each pair of the file"
        self.dialogs.reference = log_probs


class PairFactory(ChatFactory):
    """Encodes jsonl files with one pair a line, and opens what was encoded."""

    kind = "pairs"
    columns = ("file", "pairs")
    corpus = PairCorpus
    deciding = ("sft_packing", "dpo_overlong")

    def index_settings(self, run: RunConfig) -> dict[str, Any]:
        """What decides the rows."""
        return {"dpo": (run.data.sft_packing, run.data.dpo_overlong)}


FACTORY = PairFactory()
