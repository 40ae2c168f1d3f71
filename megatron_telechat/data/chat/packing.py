"""Dialogs packed into rows of the sequence length, none lost, in an order that seed and epoch decide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_telechat.config.schema import DataConfig
from megatron_telechat.data.blend import Share
from megatron_telechat.data.chat.files import ChatDataset
from megatron_telechat.data.chat.template import ANSWER, learned
from megatron_telechat.data.corpus import Marks, share_of
from megatron_telechat.data.pieces import IndexFolder, roomy
from megatron_telechat.errors import DataError

OPEN_ROWS = 32
"""Rows that wait for a dialog that still fits."""
_LEAST_ROWS = 1 << 8
_BEYOND = 1 << 10
"""Dialogs of the next epoch after which the row that an epoch left open is closed, however short they are."""
_ALL_ROWS = 1 << 62
"""More than there are: packing ends with the orders that it is given."""


@dataclass(frozen=True)
class Usable:
    """The dialogs of a split that something is learned from.

    Attributes:
        dialogs: int32, numbers of the dialogs.
        lengths: int32, tokens of each that are used.
        cut: how many are cut to the row.
        without_answer: how many are left out, because no token of an answer lies within the row.
        too_long: how many are left out, because they are longer than a row and may not be cut.
    """

    dialogs: np.ndarray
    lengths: np.ndarray
    cut: int
    without_answer: int
    too_long: int

    kind: ClassVar[str] = "dialog"

    @property
    def left_out(self) -> dict[str, int]:
        """How many are cut or left out, by what becomes of them."""
        return {
            "cut to the row": self.cut,
            "left out as too long": self.too_long,
            "left out because their answer lies beyond the row": self.without_answer,
        }

    def nothing_in(self, sequence_length: int) -> str:
        """Why there is none, after the name of a file that holds … ."""
        found = f"no {self.kind} that can be used"
        left_out = self.too_long + self.without_answer
        return f"{found}: {left_out} are too long for --seq-length {sequence_length}" if left_out else found


def usable_dialogs(dataset: ChatDataset, dialogs: range, row: int, overlong: str) -> Usable:
    """Dialogs of a range that fit into a row of this many tokens, or are cut to it (``overlong``: truncate or drop)."""
    numbers = np.arange(dialogs.start, dialogs.stop, dtype=np.int32)
    lengths = dataset.sequence_lengths[dialogs.start : dialogs.stop].astype(np.int32)
    long = lengths > row
    keep = ~long if overlong == "drop" else np.ones_like(long)
    for at in np.flatnonzero(long & keep):
        # The first token of a row is nobody's label.
        keep[at] = bool(np.any(dataset.roles_of(int(numbers[at]))[1:row] == ANSWER))
    dropped = int(long.sum()) if overlong == "drop" else 0
    empty = int((~keep).sum()) - dropped
    return Usable(numbers[keep], np.minimum(lengths, row)[keep], int((long & keep).sum()), empty, dropped)


def epochs(dialogs: int, seed: int, split: str) -> Iterator[np.ndarray]:
    """The order of the dialogs of one epoch after the other."""
    number = 0
    while True:
        key = (seed, number, *split.encode())
        yield np.random.default_rng(key).permutation(dialogs)
        number += 1


def pack(
    lengths: np.ndarray, row: int, orders: Iterator[np.ndarray], rows_wanted: int | None, packing: bool
) -> list[list[int]]:
    """Rows of dialogs whose lengths sum to ``row`` at most.

    Args:
        lengths: tokens of each dialog, none longer than a row.
        orders: orders of the epochs; packing goes on over their border.
        rows_wanted: stop at this many rows; unset: one epoch, the last rows included.
        packing: False puts every dialog into a row of its own.

    A dialog joins the first open row with room for it, else it begins a new one and the oldest is closed; an epoch ends
    with all but its newest row closed. So none is lost, whatever its length, and none waits for long. The first rows do
    not depend on how many are wanted.
    """
    done: list[list[int]] = []
    open_rows: list[list[int]] = []
    room: list[int] = []

    def close(at: int) -> None:
        done.append(open_rows.pop(at))
        room.pop(at)

    for order in orders:
        for dialog in order.tolist():
            length = int(lengths[dialog])
            place = next((at for at, free in enumerate(room) if free >= length), None) if packing else None
            if place is None:
                place = len(room)
                open_rows.append([])
                room.append(row)
            open_rows[place].append(dialog)
            room[place] -= length
            if room[place] == 0 or not packing:
                close(place)
            elif len(room) > OPEN_ROWS:
                close(0)
            if rows_wanted is not None and len(done) >= rows_wanted:
                return done[:rows_wanted]
        while len(room) > 1:
            close(0)
        if rows_wanted is None:
            break
    return (done + open_rows)[:rows_wanted]


class ChatSamples:
    """Packed rows of one encoded file, as a source of samples of ``sequence_length`` + 1 tokens.

    ``require`` says how many before any is read.

    Args:
        dataset: the encoded file.
        share: (begin, end) of its dialogs that belong to this split.
        split: train, valid or test.
        data: the data section: convention of the mask, packing, what becomes of long dialogs.

    Raises:
        DataError: no dialog of the split can be used.
    """

    def __init__(
        self,
        dataset: ChatDataset,
        share: tuple[float, float],
        split: str,
        sequence_length: int,
        seed: int,
        data: DataConfig,
    ):
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.row = sequence_length + 1
        self.convention = data.sft_loss_mask
        self.usable = self._find_usable(share, data)
        if not self.usable.dialogs.size:
            raise DataError(
                f"the {split} split of {dataset.source} holds {self.usable.nothing_in(sequence_length)}",
                dataset.source,
                f"give it a larger share with --split, more {self.usable.kind}s, or raise --seq-length",
            )
        self._split, self._seed, self._packing = split, seed, data.sft_packing
        self._size = 0

    def _find_usable(self, share: Share, data: DataConfig) -> Usable:
        return usable_dialogs(self.dataset, share_of(self.dataset, share), self.row, data.sft_overlong)

    def samples_in(self, epochs: float, once: bool) -> int:
        """Rows of so many epochs. Of an epoch that is not whole, that share of the rows that it adds."""
        whole, part = int(epochs), epochs % 1
        rows = self._rows_in(whole, once)
        return rows + math.ceil(round(part * (self._rows_in(whole + 1, once) - rows), 9)) if part else rows

    def _rows_in(self, whole: int, once: bool) -> int:
        """The first rows that hold all dialogs of so many epochs; where another follows, a few of its dialogs fill the
        row that was left open."""
        count = self.usable.dialogs.size
        if not whole:
            return 0
        if once:
            return len(pack(self.usable.lengths, self.row, epochs(count, self._seed, self._split), None, self._packing))
        first = enumerate(islice(epochs(count, self._seed, self._split), whole + 1))
        # Numbered through, so that the same dialog in the next epoch is told from it.
        orders = (order[: count if epoch < whole else _BEYOND] + epoch * count for epoch, order in first)
        rows = pack(np.tile(self.usable.lengths, whole + 1), self.row, orders, _ALL_ROWS, self._packing)
        return 1 + max(at for at, row in enumerate(rows) if min(row) < whole * count)

    def require(self, size: int | None, index: IndexFolder, name: str) -> None:
        """Make the first ``size`` rows readable, reading the dialogs again as often as it takes.

        Args:
            size: None: the rows of one epoch, the last ones included.
            index: the folder of the index.
            name: of this source there.

        Raises:
            FileNotFoundError, ResourceError: see :meth:`IndexFolder.piece`.
        """
        # The first rows do not depend on how many are made.
        wanted = None if size is None else roomy(size, _LEAST_ROWS)

        def build(folder: Path) -> None:
            index.say(f"packing {self.dataset.source} for {self._split}")
            orders = epochs(self.usable.dialogs.size, self._seed, self._split)
            rows = pack(self.usable.lengths, self.row, orders, wanted, self._packing)
            np.save(folder / "dialogs.npy", np.array([dialog for row in rows for dialog in row], np.int32))
            np.save(folder / "rows.npy", np.cumsum([0, *map(len, rows)], dtype=np.int64))

        folder = index.piece(f"{name}-{'epoch' if wanted is None else f'rows-{wanted}'}", build)
        self._items, self._rows = (np.load(folder / f"{file}.npy", mmap_mode="r") for file in ("dialogs", "rows"))
        self._size = self._rows.shape[0] - 1 if size is None else size

    def __len__(self) -> int:
        return self._size

    def packed(self, sample: int) -> list[int]:
        """Numbers of what was packed into a row, in order."""
        items = self._items[int(self._rows[sample]) : int(self._rows[sample + 1])]
        return [int(self.usable.dialogs[item]) for item in items]

    def dialogs(self, sample: int) -> list[int]:
        """Numbers of the dialogs of a row, in order."""
        return self.packed(sample)

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [sequence_length + 1], padded at the end."""
        out = np.full(self.row, self.dataset.pad, np.int64)
        at = 0
        for dialog in self.dialogs(sample):
            part = self.dataset[dialog][: self.row]
            out[at : at + part.size] = part
            at += part.size
        return out

    def marks(self, sample: int) -> Marks:
        """Which tokens are learned, and where dialogs and the padding begin."""
        is_learned = np.zeros(self.row, bool)
        starts = []
        at = 0
        for dialog in self.dialogs(sample):
            roles = self.dataset.roles_of(dialog)[: self.row]
            is_learned[at : at + roles.size] = learned(roles, self.convention)
            starts.append(at)
            at += roles.size
        return Marks(is_learned, np.array([*starts, at] if at < self.row else starts, np.int64), at)

    def cuts(self, sample: int) -> np.ndarray:
        """None: nothing is laid end to end anew."""
        return np.empty(0, np.int64)

    def pieces(self, sample: int) -> list[tuple[int, str]]:
        """First token, and name, of each dialog of a row, and of its padding."""
        out, at = [], 0
        for dialog in self.dialogs(sample):
            out.append((at, self.dataset.origin(dialog)))
            at += min(int(self.dataset.sequence_lengths[dialog]), self.row)
        return [*out, (at, "padding")] if at < self.row else out

    def origin(self, sample: int) -> str:
        """Where the dialogs of a row come from, for messages."""
        names = list(dict.fromkeys(str(self.dataset.line_of(dialog)) for dialog in self.dialogs(sample)))
        return f"{self.dataset.source}, lines {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"

    def find_token(self, sample: int, token: int) -> str:
        """The line of the first dialog of the row that holds a token."""
        for dialog in self.dialogs(sample):
            if np.any(self.dataset[dialog] == token):
                return self.dataset.origin(dialog)
        return self.origin(sample)

    def summary(self, split: str, drawn: int) -> str:
        """The line of the banner."""
        used = self._items[: int(self._rows[min(drawn, len(self))])]
        fill = float(self.usable.lengths[used].sum(dtype=np.int64)) / max(1, min(drawn, len(self)) * self.row)
        notes = "".join(f", {count:,} {what}" for what, count in self.usable.left_out.items() if count)
        return (
            f"{split}: {self.dataset.source}  {self.usable.dialogs.size:,} {self.usable.kind}s{notes}  "
            f"{drawn:,} samples = {used.size / self.usable.dialogs.size:.2f} epochs, {fill:.1%} of a row filled"
        )
