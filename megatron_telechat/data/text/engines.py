"""Ways to encode many texts at once, and the check that each gives the reference's ids.

The reference is the tokenizer itself (``tokenizers.py``), which gives the ids Megatron's tool writes. A faster engine
is taken only while it agrees with it: on texts made to be hard, and on a sample of the input that goes on to its end.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_telechat.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_telechat.errors import ConfigError, UserError

ENGINES = ("gigatoken", "tiktoken", "reference")
# Encoders remember pretokens without a limit; an encoder that has grown this much since its first characters, when all
# buffers of the tool are in use, is opened anew. That takes half a second, and the words have to be met again.
GROWTH_BYTES = 64 << 20
_FIRST_LOOK, _LOOK_EVERY = 16 << 20, 32 << 20


class EngineUnfit(Exception):
    """Why an engine cannot take the place of a tokenizer."""


class Engine(Protocol):
    """Encodes many texts. ``threads`` of Python that call it at once bring something."""

    name: str
    threads: int

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, flat, and the int64 number of ids of each."""
        ...


def open_engine(name: str, tokenizer: Tokenizer, workers: int) -> Engine:
    """The engine of that name for a tokenizer.

    Raises:
        EngineUnfit: the package is not there, or it does not take this tokenizer.
    """
    if name == "reference":
        return Reference(getattr(tokenizer, "here", tokenizer), workers)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        kind = {"gigatoken": Gigatoken, "tiktoken": Tiktoken}[name]
    elif isinstance(tokenizer, SentencePieceTokenizer) and name == "gigatoken":
        kind = Gigatoken
    else:
        raise EngineUnfit(f"{name} does not read a {type(tokenizer).__name__}")
    try:
        return kind(tokenizer, workers)
    except EngineUnfit:
        raise
    except ImportError as error:
        raise EngineUnfit(f"the package {name} is not installed; pip install 'megatron_telechat[data]'") from error
    except BaseException as error:  # each package has exceptions of its own; a panic of Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise EngineUnfit(
            f"{name} does not take this tokenizer: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def engine_names(wanted: str, tokenizer: Tokenizer) -> list[str]:
    """The engines to try, best first.

    Raises:
        ConfigError: no such engine.
    """
    if wanted == "auto":
        if isinstance(tokenizer, HuggingFaceTokenizer):
            return list(ENGINES)
        return ["gigatoken", "reference"] if isinstance(tokenizer, SentencePieceTokenizer) else ["reference"]
    if wanted not in ENGINES:
        raise ConfigError(f"no engine is named {wanted!r}", "--engine", f"auto, {', '.join(ENGINES)}")
    return [wanted]


def flatten(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as one flat array and lengths."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths


class Reference:
    """The tokenizer itself. Hugging Face's and sentencepiece start threads of their own for a batch."""

    name = "reference"

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self.tokenizer = tokenizer
        self.sentencepiece = tokenizer.backend if isinstance(tokenizer, SentencePieceTokenizer) else None
        self.workers = workers
        self.threads = (
            min(workers, 2) if isinstance(tokenizer, (HuggingFaceTokenizer, SentencePieceTokenizer)) else workers
        )

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`. Raises what the package raises for a text that it refuses."""
        if self.sentencepiece is not None and texts:
            return flatten(self.sentencepiece.EncodeAsIds(list(texts), num_threads=self.workers))
        return flatten(self.tokenizer.encode_batch(texts))


def affixes(tokenizer: HuggingFaceTokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after every text (BOS, EOS)."""
    if tokenizer.affixes is None:
        raise EngineUnfit("the post-processor of the tokenizer does more than put ids before and after a text")
    return tokenizer.affixes


def add_affixes(
    flat: np.ndarray, lengths: np.ndarray, head: list[int], tail: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of texts with ``head`` before and ``tail`` after each of them, empty texts included.

    Args:
        flat: ids of all texts.
        lengths: int64, number of ids of each.

    Returns:
        Both anew.
    """
    ends = np.cumsum(lengths)
    if head:
        flat = np.insert(flat, np.repeat(ends - lengths, len(head)), np.tile(head, lengths.size))
        lengths = lengths + len(head)
        ends = np.cumsum(lengths)
    if tail:
        flat = np.insert(flat, np.repeat(ends, len(tail)), np.tile(tail, lengths.size))
        lengths = lengths + len(tail)
    return flat, lengths


class Gigatoken:
    """gigatoken on a tokenizer.json or a sentencepiece model; two calls at once keep its threads busy."""

    name = "gigatoken"

    def __init__(self, tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer, workers: int):
        self.threads = min(workers, 2)
        self.parallel = workers > 1
        self.head: list[int] = []
        self.tail: list[int] = []
        self.space = False
        self.tokenizer = tokenizer
        if isinstance(tokenizer, HuggingFaceTokenizer):
            give_back_large_blocks()
        self.backend: Any = self._open()
        self.backend.encode_batch([""])  # imports what its answers are made of, before the tokenizer is asked
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self.head, self.tail = affixes(tokenizer)
        self._turn = threading.Condition()
        self._calls, self._renewing = 0, False
        self.before: int | None = None
        self.encoded = 0

    def _open(self) -> Any:
        from gigatoken.gigatoken_rs import load_hf_json

        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            return load_hf_json(self.tokenizer.content())
        content, self.space = sentencepiece_json(self.tokenizer)
        return load_hf_json(content)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`; may be called by several threads. Raises RuntimeError where the package panics."""
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        if self.space:
            texts = [" " + text if text else text for text in texts]
        with self._turn:
            self._turn.wait_for(lambda: not self._renewing)
            self._calls += 1
        try:
            layout = self.backend.encode_batch(list(texts), parallel=self.parallel).layout
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a panic of Rust is no Exception for Python
                raise
            raise RuntimeError(f"gigatoken gave up: {error}") from error
        finally:
            with self._turn:
                self._calls -= 1
                self._turn.notify_all()
        offsets = np.asarray(layout.offsets.data).astype(np.int64)
        flat, lengths = np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
        self._renew(sum(map(len, texts)))
        return add_affixes(flat, lengths, self.head, self.tail) if self.head or self.tail else (flat, lengths)

    def _renew(self, characters: int) -> None:
        self.encoded += characters
        if self.before is None:
            if self.encoded > _FIRST_LOOK:
                self.before = _resident_bytes()
        elif self.encoded > _LOOK_EVERY:
            self.encoded = 0
            if _resident_bytes() > self.before + GROWTH_BYTES:
                self._open_anew()

    def _open_anew(self) -> None:
        """Alone: the old encoder is gone before there is a new one, so that there are never two."""
        with self._turn:
            if self._renewing:
                return
            self._renewing = True
            self._turn.wait_for(lambda: not self._calls)
        try:
            self.backend = None
            self.backend = self._open()
            # What stays is not the encoder's: opening it again and again would not help.
            self.before = max(self.before or 0, _resident_bytes() - GROWTH_BYTES // 2)
        finally:
            with self._turn:
                self._renewing = False
                self._turn.notify_all()


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> tuple[str, bool]:
    """A BPE model as a tokenizer.json, and whether each text gets a space in front.

    gigatoken puts the dummy prefix behind each user-defined piece too: here the space is put before the text instead.
    Control pieces written in a text are plain characters for sentencepiece: they are no added tokens here, and their
    names in the vocabulary, which no merge may reach, are changed.
    """
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    backend = tokenizer.backend
    content = json.loads(sentencepiece_to_tokenizer_json(backend.serialized_model_proto()))
    control = {
        backend.IdToPiece(i): i for i in range(backend.GetPieceSize()) if backend.IsControl(i) or backend.IsUnused(i)
    }
    unknown = content["model"]["unk_token"]
    if any(backend.IsUnused(i) for i in control.values()):
        raise EngineUnfit("gigatoken does not know unused pieces")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in control]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {
        f"\ufdd0{i}\ufdd1" if i in control.values() else piece: i for piece, i in vocabulary.items()
    }
    content["model"]["merges"] = [
        pair
        for pair in content["model"]["merges"]
        if not {pair[0], pair[1], pair[0] + pair[1]} & ({*control} | {unknown})
    ]
    steps = content["normalizer"]["normalizers"]
    kept = [step for step in steps if step["type"] != "Prepend"]
    content["normalizer"]["normalizers"] = kept
    return json.dumps(content, ensure_ascii=False), len(kept) < len(steps)


class Tiktoken:
    """tiktoken on a byte-level BPE tokenizer.json whose pretokenizer is one pattern."""

    name = "tiktoken"

    def __init__(self, tokenizer: HuggingFaceTokenizer, workers: int):
        import tiktoken

        self.threads, self.workers = 1, workers
        self.head, self.tail = affixes(tokenizer)
        content = json.loads(tokenizer.backend.to_str())
        model = content["model"]
        if model["type"] != "BPE" or content.get("normalizer") or model.get("dropout") or model.get("ignore_merges"):
            raise EngineUnfit("tiktoken takes byte-level BPE without a normalizer only")
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in content["added_tokens"]):
            raise EngineUnfit("tiktoken does not know added tokens that take spaces along")
        letters = byte_letters()
        vocabulary = {piece: i for piece, i in model["vocab"].items() if piece not in added}
        ranks = {bytes(letters[letter] for letter in piece): i for piece, i in vocabulary.items()}
        merged = [vocabulary["".join(pair if isinstance(pair, list) else pair.split(" "))] for pair in model["merges"]]
        if any(later < earlier for earlier, later in zip(merged, merged[1:], strict=False)):
            raise EngineUnfit("the ids of the tokenizer do not follow the order of its merges")
        if not tokenizer.special_tokens_in_text:
            added = {token["content"]: token["id"] for token in content["added_tokens"] if not token["special"]}
        self.known = set(added)
        self.backend = tiktoken.Encoding(
            "own", pat_str=_pattern(content["pre_tokenizer"]), mergeable_ranks=ranks, special_tokens=added
        )

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`. Added tokens are cut out of a text; special ones if `special_tokens_in_text`."""
        flat, lengths = flatten(
            self.backend.encode_batch(list(texts), num_threads=self.workers, allowed_special=self.known)
        )
        return add_affixes(flat, lengths, self.head, self.tail) if self.head or self.tail else (flat, lengths)


# The split of GPT-2, which ByteLevel does by itself; and the same after single digits were set apart, where a run
# of spaces before a digit is whole.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


def _pattern(pretokenizer: dict | None) -> str:
    """The pretokenizer of a tokenizer.json as one pattern.

    Raises:
        EngineUnfit: it is not one of the shapes known here.
    """
    steps = (pretokenizer or {}).get("pretokenizers") or [pretokenizer or {}]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise EngineUnfit("tiktoken takes byte-level tokenizers without a space in front only")
    if len(steps) == 1 and last.get("use_regex", True):
        return _GPT2
    if len(steps) == 2 and steps[0].get("type") == "Split" and not steps[0].get("invert"):
        pattern = steps[0]["pattern"].get("Regex")
        if pattern and steps[0].get("behavior") == "Isolated" and not last.get("use_regex", True):
            return pattern
        if pattern == r"\p{N}" and steps[0].get("behavior") == "Isolated":
            return _GPT2_DIGITS
    raise EngineUnfit("the pretokenizer of the tokenizer is no single pattern")


def byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + place): byte for place, byte in enumerate(rest)}}


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h
_MMAP_BYTES = 1 << 20


def limit_threads(workers: int) -> None:
    """Threads and heaps of the packages; they read the variables once, when they first start threads."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"
    # glibc keeps a heap for each thread, and what one thread freed stays in its heap: two heaps are enough here.
    _mallopt(_M_ARENA_MAX, 2)


def give_back_large_blocks() -> None:
    """What is large gets pages of its own, which go back when it is freed.

    Left alone glibc raises this limit to 32 MiB, and the heap of a gigabyte's run grew by 100 MB. Not for every
    encoder: gigatoken takes and frees large blocks for each text of a sentencepiece model, and new pages each time took
    three times as long as the work.
    """
    _mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def _mallopt(option: int, value: int) -> None:
    try:
        import ctypes

        ctypes.CDLL(None).mallopt(option, value)
    except (OSError, AttributeError):
        return  # another C library: nothing to set


def explain(error: BaseException) -> str:
    """The first line of what an engine says."""
    text = error.problems[0].what if isinstance(error, UserError) else str(error)
    return text.splitlines()[0] if text else repr(error)
