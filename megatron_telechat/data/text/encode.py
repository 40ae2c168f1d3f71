"""One block of lines or rows to tokens, lengths and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_telechat.data.indexed.dataset import MAX_SEQUENCE_TOKENS
from megatron_telechat.data.text.documents import parse_items
from megatron_telechat.data.text.engines import Engine, Reference, explain
from megatron_telechat.data.text.readers import Block
from megatron_telechat.data.tokenizers import Tokenizer


@dataclass
class Encoded:
    """A block after encoding.

    Attributes:
        keys: for each key flat tokens in the dataset's dtype, int32 sequence lengths, int32 sequences of each document.
        bad: (number of the item, reason), in order.
        sample: texts of the first key with the ids the engine gave, flat, and their lengths.
    """

    keys: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    documents: int
    bad: list[tuple[int, str]]
    sample: tuple[Sequence[str], np.ndarray, np.ndarray]


def encode_block(
    block: Block, keys: Sequence[str], engine: Engine, tokenizer: Tokenizer, eod: int | None, dtype: np.dtype
) -> Encoded:
    """Parse and encode a block. A document that is bad in one key is left out of all."""
    documents, numbers, bad = parse_items(block.items, keys)
    try:
        columns = [_encode_column([document[place] for document in documents], engine) for place in range(len(keys))]
        _check_ids(columns, dtype)
    except Exception:  # packages have exceptions of their own: the documents are tried one by one
        documents, columns, more = _one_by_one(documents, numbers, len(keys), Reference(tokenizer, 1), dtype)
        bad = sorted(bad + more)
    out = {key: _assemble(*column[1:], len(documents), eod, dtype) for key, column in zip(keys, columns, strict=True)}
    texts, flat, lengths, _ = columns[0] if columns else _joined([])
    return Encoded(out, len(documents), bad, (texts, flat, lengths))


Column = tuple[list[str], np.ndarray, np.ndarray, np.ndarray | None]


def _encode_column(documents: Sequence[Any], engine: Engine) -> Column:
    """Texts of one key, their ids, lengths, and the document of each text (None: one text a document)."""
    owners = None
    texts = list(documents)
    if any(isinstance(document, list) for document in documents):
        texts, owner = [], []
        for place, document in enumerate(documents):
            sentences = document if isinstance(document, list) else [document]
            texts.extend(sentences)
            owner.extend([place] * len(sentences))
        owners = np.asarray(owner, np.int64)
    flat, lengths = engine.encode_batch(texts)
    assert lengths.size == len(texts) and int(lengths.sum()) == flat.size
    return texts, flat, lengths, owners


class _Unfit(Exception):
    """Ids or lengths that the format cannot hold."""


def _check_ids(columns: Sequence[Column], dtype: np.dtype) -> None:
    limits = np.iinfo(dtype)
    for _, flat, lengths, _ in columns:
        if not flat.size:
            continue
        low, high = int(flat.min()), int(flat.max())
        if low < limits.min or high > limits.max:
            raise _Unfit(f"token id {low if low < limits.min else high} does not fit {dtype.name}")
        if int(lengths.max()) >= MAX_SEQUENCE_TOKENS:
            raise _Unfit(
                f"a document of {int(lengths.max()):,} tokens does not fit the format (less than "
                f"{MAX_SEQUENCE_TOKENS:,})"
            )


def _one_by_one(
    documents: Sequence[tuple], numbers: Sequence[int], keys: int, engine: Engine, dtype: np.dtype
) -> tuple[list[tuple], list[Column], list[tuple[int, str]]]:
    """With the reference, each document alone: the slow way, which finds the one the tokenizer refuses."""
    kept: list[tuple] = []
    parts: list[list[Column]] = [[] for _ in range(keys)]
    bad: list[tuple[int, str]] = []
    for document, number in zip(documents, numbers, strict=True):
        try:
            columns = [_encode_column([value], engine) for value in document]
            _check_ids(columns, dtype)
        except _Unfit as error:
            bad.append((number, str(error)))
        except Exception as error:  # as above
            bad.append((number, f"the tokenizer fails: {explain(error)}"))
        else:
            for part, column in zip(parts, columns, strict=True):
                owner = np.full(len(column[0]), len(kept), np.int64)
                part.append((*column[:3], owner))
            kept.append(document)
    return kept, [_joined(part) for part in parts], bad


def _joined(parts: Sequence[Column]) -> Column:
    if not parts:
        empty = np.empty(0, np.int64)
        return [], empty, empty, empty
    texts = [text for part in parts for text in part[0]]
    flat, lengths = np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])
    return texts, flat, lengths, np.concatenate([part[3] for part in parts if part[3] is not None])


def _assemble(
    flat: np.ndarray, lengths: np.ndarray, owners: np.ndarray | None, documents: int, eod: int | None, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drop empty sequences, end each document that has a token with ``eod``."""
    kept = lengths > 0
    if owners is None:
        counts, kept_lengths, last = kept.astype(np.int32), lengths[kept], None
    else:
        counts = np.bincount(owners[kept], minlength=documents).astype(np.int32)
        kept_lengths = lengths[kept]
        last = np.cumsum(counts)[counts > 0] - 1
    if eod is None or not kept_lengths.size:
        return flat.astype(dtype), kept_lengths.astype(np.int32), counts
    ends = np.cumsum(kept_lengths)
    if last is not None:
        ends = ends[last]
    tokens = np.empty(flat.size + ends.size, dtype)
    text = np.ones(tokens.size, bool)
    text[ends + np.arange(ends.size)] = False
    tokens[text] = flat
    tokens[~text] = eod
    kept_lengths = kept_lengths.astype(np.int32)
    kept_lengths[slice(None) if last is None else last] += 1
    return tokens, kept_lengths, counts
