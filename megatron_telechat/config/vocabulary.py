"""How many tokens the tokenizer of a Megatron-LM command has: read from its files, without a tokenizer's library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KNOWN = {
    "GPT2BPETokenizer": 50257,
    "Llama2Tokenizer": 32000,
    "Llama3Tokenizer": 128256,
    "TikTokenizer": 2**17,  # Megatron-LM's own limit where --vocab-size says none
}
"""Megatron-LM's names of tokenizers → their size, where the name alone tells it."""

NAMED = (
    ("deepseek[-_]?v3|deepseek[-_]?r1", 128815),
    ("deepseek[-_]?v2|deepseek[-_]?coder[-_]?v2", 100002),
    ("qwen3", 151669),
    ("qwen2[._]?5", 151665),
    ("qwen", 151646),
    ("llama[-_]?4", 201135),
    ("llama[-_]?3", 128256),
    ("code[-_]?llama", 32016),
    ("llama", 32000),
    ("mistral[-_]?nemo", 131072),
    ("mixtral|mistral", 32000),
    ("kimi[-_]?k2", 163840),
    ("bloom|bigscience", 250680),
    ("gpt[-_]?neox|pythia", 50277),
    ("gpt[-_]?oss", 200019),
    ("minitron|nemotron|gemma", 256000),
    ("glm[-_]?4", 151343),
    ("baichuan2", 125696),
    ("baichuan", 64000),
    ("internlm2", 92544),
    ("aquila", 100008),
    ("yi[-_]\\d+b", 64000),
    ("falcon", 65024),
    ("starcoder", 49152),
    ("gpt2", 50257),
)
"""Pattern in the name of a published tokenizer → tokens it has, its added ones too; the first that fits counts. From
the tokenizer files of the published models."""
ASSUMED = 2**17
"""Taken, and said, where nothing tells the size."""

WORDPIECE = ("BertWordPieceLowerCase", "BertWordPieceCase")


@dataclass(frozen=True)
class Vocabulary:
    """Number of tokens, and what says so."""

    size: int
    source: str


def named_vocabulary(given: Mapping[str, tuple[str, ...]]) -> Vocabulary | None:
    """The vocabulary of the tokenizer that these flags name; None where neither a file that is here nor the name tells
    it.

    Args:
        given: flag without its hyphens → its values.
    """
    kind, model, vocab_file, merges = (
        (given.get(name) or ("",))[0] for name in ("tokenizer-type", "tokenizer-model", "vocab-file", "merge-file")
    )
    folder = (given.get("tokenizer-name-or-path") or ("",))[0]
    if kind == "" and (vocab_file or merges):
        kind = "GPT2BPETokenizer"
    for text in (vocab_file,) if kind == "GPT2BPETokenizer" or kind in WORDPIECE else (model, folder):
        size = vocabulary_of_file(Path(text)) if text and kind != "TikTokenizer" else None
        if size:
            return Vocabulary(size, text)
    if kind in KNOWN and kind != "TikTokenizer":
        return Vocabulary(KNOWN[kind], kind)
    names = (
        model,
        *(word for name in ("tokenizer-name-or-path", "patch-tokenizer-type") for word in given.get(name, ())),
    )
    for name in filter(None, (*names, kind)):
        size = next((size for pattern, size in NAMED if re.search(pattern, name.lower())), None)
        if size is not None:
            return Vocabulary(size, f"{name}, by its name")
    return Vocabulary(KNOWN[kind], kind) if kind in KNOWN else None


def vocabulary_of_file(path: Path) -> int | None:
    """Number of tokens of a tokenizer's file or folder; None where it is not there or is none of these:

    tokenizer.json, a folder with one, a SentencePiece model, a vocab.json, a vocab.txt with one token a line.
    """
    try:
        if path.is_dir():
            return _of_folder(path)
        if path.suffix == ".model":
            return _sentencepiece(path.read_bytes())
        if path.suffix == ".txt":
            return len(path.read_text(encoding="utf-8").splitlines()) or None
        return _of_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None


def _of_folder(path: Path) -> int | None:
    """A Hugging Face folder: the fast tokenizer, else the slow one's file and the tokens added to it."""
    if (path / "tokenizer.json").is_file():
        return vocabulary_of_file(path / "tokenizer.json")
    size = next(
        (
            found
            for name in ("tokenizer.model", "vocab.json", "vocab.txt")
            if (found := vocabulary_of_file(path / name))
        ),
        None,
    )
    added = path / "added_tokens.json"
    if size is None or not added.is_file():
        return size
    return size + sum(number >= size for number in set(json.loads(added.read_text(encoding="utf-8")).values()))


def _of_json(content: Any) -> int | None:
    """A tokenizer.json (its vocabulary and the tokens added to it), or a plain map from token to number."""
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        tokens = content["model"]["vocab"]  # a map, or of a unigram model a list of [token, score]
        names = set(tokens) if isinstance(tokens, dict) else {token for token, _ in tokens}
        return len(names | {token["content"] for token in content.get("added_tokens", ())}) or None
    if isinstance(content, dict) and content and all(type(number) is int for number in content.values()):
        return len(content)
    return None


def _sentencepiece(data: bytes) -> int | None:
    """Pieces of a SentencePiece model: the repeated field 1 of its protocol buffer (sentencepiece_model.proto)."""
    at = pieces = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            _, at = _varint(data, at)
        elif wire == 2:
            size, at = _varint(data, at)
            at += size
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            return None
        pieces += field == 1 and wire == 2
    return pieces if at == len(data) and pieces else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("no number")
