"""Whether an engine gives the reference's ids: hard texts first, then a sample of the input, to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from megatron_telechat.data.text.engines import Engine, Reference
from megatron_telechat.data.text.unicode_guard import CONTEXT
from megatron_telechat.data.tokenizers import HuggingFaceTokenizer, Tokenizer

# Characters compared: all of the first documents up to this, then one character in SHARE of the rest.
FIRST = 100_000
SHARE = 1_000
LONGEST = 20_000
HARD = (
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    " \n \n",
    "a",
    " a",
    "a ",
    "  two  spaces  ",
    "end\n\n\nnext\n",
    "tab\tline\r\nend",
    "12 345 6789",
    "１２３ ٣٤ ⅷ x²",
    "don't I'LL we'Ve 's",
    "   if x:\n        return\t\t1\n",
    "天地玄黄，宇宙洪荒。",
    "中 文mixed英文 123字",
    "\u3000全角\u3000",
    "🙂👩‍👩‍👧‍👦🇨🇳",
    "e\u0301 é ﬁ Å",
    "a\u2028b\u2029c\u0085d\u00a0e\u200bf",
    "\x00\x01\x7f",
    "\ufeffbom",
    "ﷺ \u0627\u0644\u0633",
    "नमस्ते สวัสดี 안녕",
    "\U0010ffff\ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "-" * 70,
    " " * 37 + "x",
    "\n" * 9,
    "http://a.b/c?d=e&f=%20#g",
    "x" * 300,
    "\ufdd00\ufdd1",
    "<_end>",
    "</s>",
    "<|endoftext|>",
    "<_user>hi<_bot>",
    "▁x ▁ y",
    "<0x41>",
)


class EngineDiffers(Exception):
    """An engine gave other ids than the reference."""


class SelfCheck:
    """Compares on a thread of its own. ``settle`` waits for what was offered; nothing is kept before it returned."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.reference = engine, Reference(tokenizer, 1)
        self.needed = not isinstance(engine, Reference)
        self.seen = self.compared = self.documents = 0
        self._pool = ThreadPoolExecutor(1) if self.needed else None
        self._pending: list[Future] = []
        if self.needed:
            texts = [*HARD, *map(CONTEXT.format, map(chr, range(128))), *_around_added(tokenizer)]
            self._later(self._hard, texts)

    def __enter__(self) -> SelfCheck:
        return self

    def __exit__(self, *unused) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _later(self, task: Callable[..., None], *given: object) -> None:
        assert self._pool is not None, "the reference needs no check"
        self._pending.append(self._pool.submit(task, *given))

    def _hard(self, texts: Sequence[str]) -> None:
        self._compare(texts, *self.engine.encode_batch(texts))

    def offer(self, texts: Sequence[str], flat: np.ndarray, lengths: np.ndarray) -> None:
        """Take a sample of what the engine encoded. One thread calls this."""
        if not self.needed or not texts:
            return
        self.seen += sum(map(len, texts)) + len(texts)
        budget = min(self.seen, FIRST) + max(0, self.seen - FIRST) // SHARE - self.compared
        starts = np.cumsum(lengths) - lengths
        # From another place of the block each time, so that no kind of document is always left out.
        first = self.documents * 7919
        for step in range(len(texts)):
            place = (first + step) % len(texts)
            text = texts[place]
            if budget <= 0:
                break
            if len(text) > LONGEST:
                text = text[:LONGEST]
                self._later(self._hard, [text])
            else:
                ids = flat[starts[place] : starts[place] + lengths[place]].copy()
                self._later(self._compare, [text], ids, lengths[place : place + 1])
            budget -= len(text) + 1
            self.compared += len(text) + 1
            self.documents += 1

    def _compare(self, texts: Sequence[str], flat: np.ndarray, lengths: np.ndarray) -> None:
        right, right_lengths = self.reference.encode_batch(texts)
        if np.array_equal(lengths, right_lengths) and np.array_equal(flat, right):
            return
        ends, right_ends = np.cumsum(lengths), np.cumsum(right_lengths)
        for place, text in enumerate(texts):
            ours = flat[ends[place] - lengths[place] : ends[place]]
            theirs = right[right_ends[place] - right_lengths[place] : right_ends[place]]
            if not np.array_equal(ours, theirs):
                raise EngineDiffers(f"its ids differ from the tokenizer's own on {_short(text)}")

    def settle(self, wait: bool = True) -> None:
        """Raise what was found.

        Raises:
            EngineDiffers: a text got other ids.
        """
        left = []
        for future in self._pending:
            if wait or future.done():
                future.result()
            else:
                left.append(future)
        self._pending = left


def _around_added(tokenizer: Tokenizer) -> list[str]:
    """Added tokens and user-defined pieces inside, beside and between words."""
    names: list[str] = []
    if isinstance(tokenizer, HuggingFaceTokenizer):
        names = tokenizer.added_tokens
    elif (backend := getattr(tokenizer, "backend", None)) is not None and hasattr(backend, "IdToPiece"):
        first = range(min(600, backend.GetPieceSize()))
        names = [backend.IdToPiece(i) for i in first if not backend.IsByte(i) and (i < 200 or backend.IsControl(i))]
    return [text for name in names[:300] for text in (f"a{name}b", f" {name} {name}{name}\n", f"x {name}  y")]


def _short(text: str | None) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:60]}... ({len(text or ''):,} characters)"
