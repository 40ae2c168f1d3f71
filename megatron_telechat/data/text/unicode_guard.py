r"""Characters that an engine takes for another kind than the reference does.

The patterns that split text (``\p{L}``, ``\p{N}``, ``\s``) stand on tables of Unicode, and each package brings a
version of its own: what one knows as a letter since last year is no character at all for another. The ids differ then,
in one document of ten thousand, and no sample finds it. So each character that is not as old as any table is compared
when it is first met, and a text that holds one with another outcome is encoded by the reference.
"""

from __future__ import annotations

import json
import threading
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from megatron_telechat.data.text.engines import Engine, EngineUnfit, Reference, byte_letters, open_engine
from megatron_telechat.data.tokenizers import HuggingFaceTokenizer, Tokenizer

# A character beside letters of both cases, digits, signs, blanks and line ends. Two signs stand between each two
# of it, so that each side shows by itself whether the text was split there.
CONTEXT = "a{0}B A{0}1a  {0}\",\n '{0}s{0}{0}  {0}\r\n"
# Letters without case since Unicode 1.1 and 2.0, and alphabets, signs and kana that are looked up (_is_old).
_IDEOGRAPHS, _HANGUL, _ALPHABETS = (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x80, 0x33FF)
# Halves of characters beyond 16 bits, which count by their whole; no text holds one alone.
_SURROGATES = (0xD800, 0xDFFF)
_SAME, _DIFFERS, _UNKNOWN = 0, 1, 2
_GROUP = 1 << 14  # characters looked at together: few enough for the caches


class Guarded:
    """An engine whose ids are the reference's whatever characters the texts hold.

    Args:
        reference: encodes the texts that the engine would get wrong.
        log: told of characters that differ: of the first, and when they are ten times as many.
        probes: an engine and a reference that show where those two split a text; unset: they themselves.
    """

    def __init__(
        self, engine: Engine, reference: Reference, log: Callable[[str], None], probes: Sequence[Engine] | None = None
    ):
        self.name, self.threads = engine.name, engine.threads
        self._engine, self._reference, self._log = engine, reference, log
        self._probes = probes or (engine, reference)
        self._kinds = np.full(0x110000, _UNKNOWN, np.uint8)
        self._kinds[:128] = _SAME  # the self-check compares them all
        for first, last in (_IDEOGRAPHS, _HANGUL, _SURROGATES):
            self._kinds[first : last + 1] = _SAME
        self._kinds[[code for code in range(_ALPHABETS[0], _ALPHABETS[1] + 1) if _is_old(chr(code))]] = _SAME
        self._lock = threading.Lock()
        self._differing, self._tell_at = 0, 1

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`. Texts with a character that the engine takes for another kind go to the reference, too."""
        flat, lengths = self._engine.encode_batch(texts)
        wrong = self._wrong(texts)
        if not wrong:
            return flat, lengths
        right, right_lengths = self._reference.encode_batch([texts[place] for place in wrong])
        return _replaced(flat, lengths, wrong, right, right_lengths)

    def _wrong(self, texts: Sequence[str]) -> list[int]:
        """Places of the texts with a character that the engine takes for another kind."""
        wrong: list[int] = []
        group: list[int] = []
        size = 0
        for place, text in enumerate(texts):
            if text.isascii():
                continue
            group.append(place)
            size += len(text)
            if size > _GROUP:
                wrong += self._wrong_among(texts, group)
                group, size = [], 0
        return wrong + self._wrong_among(texts, group) if group else wrong

    def _wrong_among(self, texts: Sequence[str], places: list[int]) -> list[int]:
        units = _utf16("".join([texts[place] for place in places]))
        # All of ASCII and most of Chinese leave here; what is smaller than the first wraps around.
        odd = np.flatnonzero((units > 127) & (units - np.uint16(_IDEOGRAPHS[0]) > _IDEOGRAPHS[1] - _IDEOGRAPHS[0]))
        codes = units[odd].astype(np.int32)
        pairs = np.flatnonzero((codes & 0xFC00) == 0xD800)
        codes[pairs] = 0x10000 + ((codes[pairs] & 0x3FF) << 10) + (units[odd[pairs] + 1] & 0x3FF)
        kinds = self._kinds[codes]
        if (kinds == _UNKNOWN).any():
            self._learn(np.unique(codes[kinds == _UNKNOWN]))
            kinds = self._kinds[codes]
        found = odd[kinds == _DIFFERS]
        if not found.size:
            return []
        ends = np.cumsum([_utf16(texts[place]).size for place in places])
        return [places[i] for i in np.unique(np.searchsorted(ends, found, side="right"))]

    def _learn(self, codes: np.ndarray) -> None:
        """Compare characters in a text of their own."""
        with self._lock:
            codes = codes[self._kinds[codes] == _UNKNOWN]
            if not codes.size:
                return
            same = self.same(codes)
            self._kinds[codes] = np.where(same, _SAME, _DIFFERS)
            self._tell(codes[~same].tolist())

    def same(self, codes: np.ndarray) -> np.ndarray:
        """Which of some characters leave the same ids (bool)."""
        texts = [CONTEXT.format(chr(code)) for code in codes.tolist()]
        (ids, lengths), (right, right_lengths) = (probe.encode_batch(texts) for probe in self._probes)
        return _same(ids, lengths, right, right_lengths)

    def _tell(self, codes: list[int]) -> None:
        self._differing += len(codes)
        if self._differing < self._tell_at:
            return
        self._tell_at = 10 * self._differing
        names = ", ".join(f"U+{code:04X}" for code in codes[:4]) + (", ..." if self._differing > len(codes[:4]) else "")
        self._log(
            f"engine {self.name} splits text at {names} differently from the tokenizer: texts with such a character "
            "are encoded by the tokenizer itself"
        )


def _is_old(character: str) -> bool:
    """A letter, mark, digit or sign since Unicode 3.2 (2002), whose other case is not of ASCII: all tables have it
    so."""
    kind = unicodedata.category(character)
    return (
        kind[0] in "LMNPS"
        and unicodedata.ucd_3_2_0.category(character) == kind
        and not (character.upper().isascii() or character.lower().isascii())
    )


def guarded(engine: Engine, tokenizer: Tokenizer, log: Callable[[str], None]) -> Guarded:
    """An engine of this tokenizer, guarded. Where a text is split shows in the ids only by the merges that happen to be
    in the vocabulary: of byte-level tokenizers the characters are compared with all merges that tell."""
    reference, probes = Reference(tokenizer, 1), None
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.splitting is not None:
        splits = Splits(tokenizer.splitting)
        try:
            probes = (open_engine(engine.name, splits, 1), Reference(splits, 1))
        except EngineUnfit:
            probes = None  # it takes the vocabulary of the tokenizer, and not this one
    return Guarded(engine, reference, log, probes)


class Splits(HuggingFaceTokenizer):
    """A byte-level tokenizer that splits as another does and joins, of what is not split, all bytes of different
    characters that meet in ``CONTEXT``: its ids show every split."""

    def __init__(self, splitting: dict):
        from tokenizers import Tokenizer as Backend

        letters = {byte: letter for letter, byte in byte_letters().items()}
        begins, ends = ([letters[byte] for byte in bytes_] for bytes_ in (range(0xC2, 0xF5), range(0x80, 0xC0)))
        beside = [letters[byte] for byte in sorted(set(CONTEXT.format("").encode()))]
        merges = [
            (left, right)
            for lefts, rights in ((beside, begins), (ends, beside), (ends, begins))
            for left in lefts
            for right in rights
        ]
        names = [letters[byte] for byte in range(256)] + [left + right for left, right in merges]
        model = {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [f"{left} {right}" for left, right in merges],
        }
        self._content = json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": splitting["normalizer"],
                "pre_tokenizer": splitting["pre_tokenizer"],
                "post_processor": None,
                "decoder": None,
                "model": {
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "ignore_merges": False,
                    **model,
                },
            }
        )
        self.backend = Backend.from_str(self._content)

    def content(self) -> bytes:
        """Its tokenizer.json, which lies in no file."""
        return self._content.encode()


def _utf16(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")


def _same(flat: np.ndarray, lengths: np.ndarray, right: np.ndarray, right_lengths: np.ndarray) -> np.ndarray:
    """Which of some texts got the same ids (bool)."""
    ends, right_ends = np.cumsum(lengths), np.cumsum(right_lengths)
    return np.array(
        [
            np.array_equal(flat[end - length : end], right[right_end - right_length : right_end])
            for end, length, right_end, right_length in zip(ends, lengths, right_ends, right_lengths, strict=True)
        ],
        bool,
    )


def _replaced(
    flat: np.ndarray, lengths: np.ndarray, places: Sequence[int], right: np.ndarray, right_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and lengths of texts, those at ``places`` replaced."""
    parts = np.split(flat, np.cumsum(lengths)[:-1])
    for place, part in zip(places, np.split(right, np.cumsum(right_lengths)[:-1]), strict=True):
        parts[place] = part
    lengths = lengths.copy()
    lengths[places] = right_lengths
    return np.concatenate(parts), lengths
