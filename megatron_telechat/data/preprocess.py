"""jsonl to indexed datasets: what Megatron's ``tools/preprocess_data.py`` writes, byte for byte.

One thread reads and writes, others parse and encode (the tokenizers let go of the interpreter lock). Groups of
lines in flight are limited, so memory does not grow with the input; there are no processes to lose.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Optional, Sequence

import numpy as np

from megatron_telechat.data.indexed import IndexedWriter, token_dtype
from megatron_telechat.data.text_input import BadLine, Line, chunks, find_inputs, parse_document, read_lines
from megatron_telechat.data.tokenizers import Tokenizer
from megatron_telechat.errors import ConfigError, DataError

# Bad lines that are remembered word for word; all are counted.
REMEMBERED = 20


@dataclass
class Report:
    """Counts of one run: documents_in = documents_out + skipped."""

    documents_in: int = 0
    documents_out: int = 0
    skipped: int = 0
    input_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)


@dataclass
class Encoded:
    """One group of lines: for each key flat tokens, sequence lengths and sequences of each document."""

    keys: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    documents: int
    bad: list[tuple[str, str]]
    input_bytes: int


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    on_error: str = "fail",
    log_interval: int = 1000,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Report:
    """Write ``{output_prefix}_{key}_document.bin/.idx`` for each key.

    Args:
        inputs: files, globs, folders.
        append_eod: end each document that has a token with the tokenizer's end-of-document id.
        workers: threads that parse and encode.
        on_error: ``fail`` at the first bad line, or ``skip`` and count.
        log_interval: documents between two progress lines.

    Raises:
        ConfigError: append_eod with a tokenizer that has no end-of-document id.
        DataError: a bad line (file:line and the reason), no input, no document at all. Nothing is written then.
        ResourceError: the output cannot be written.
    """
    if append_eod and tokenizer.eod is None:
        raise ConfigError("--append-eod: the tokenizer has no end-of-document token", "--tokenizer-model",
                          "use a tokenizer with <_end>, </s> or <|endoftext|>, or drop --append-eod")
    # Our threads encode side by side; the tokenizer must not start as many again under each of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    files = find_inputs(inputs)
    report = Report()
    progress = Progress(files, log_interval, log)
    eod = tokenizer.eod if append_eod else None
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedWriter(f"{output_prefix}_{key}_document", token_dtype(tokenizer.vocab_size)))
            for key in dict.fromkeys(json_keys)
        }
        keys = tuple(writers)
        for group in _in_order(chunks(read_lines(files)), lambda g: encode_lines(g, keys, tokenizer, eod), workers):
            _take_bad(group, report, on_error)
            for key, arrays in group.keys.items():
                writers[key].add_documents(*arrays)
            report.documents_in += group.documents + len(group.bad)
            report.documents_out += group.documents
            report.input_bytes += group.input_bytes
            progress.step(report)
        if not report.documents_out:
            what = "the input holds no document" if not report.skipped else f"all {report.skipped:,} documents are bad"
            raise DataError(what, ", ".join(map(str, files[:3])), "nothing was written")
    report.tokens = {key: writer.tokens for key, writer in writers.items()}
    return report


def _take_bad(group: Encoded, report: Report, on_error: str) -> None:
    if group.bad and on_error == "fail":
        place, reason = group.bad[0]
        raise DataError(reason, place, "mend the line, or give --on-error skip; nothing was written")
    report.skipped += len(group.bad)
    room = REMEMBERED - len(report.bad)
    report.bad.extend(f"{place}: {reason}" for place, reason in group.bad[: max(0, room)])


def _in_order(items: Iterator, work: Callable, workers: int) -> Iterator:
    """``map(work, items)`` on threads: results in order, at most two items a thread under way."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def encode_lines(lines: Sequence[Line], keys: Sequence[str], tokenizer: Tokenizer, eod: Optional[int]) -> Encoded:
    """Parse and encode a group of lines. A document is one line: bad in one key, it is left out of all."""
    documents, bad = [], []
    for line in lines:
        try:
            documents.append((line, parse_document(line, keys)))
        except BadLine as reason:
            bad.append((line.place, str(reason)))
    documents, ids = _encode(documents, keys, tokenizer, bad)
    out = {}
    for key in keys:
        flat, lengths, counts = [], [], []
        for sentences in ids[key]:
            kept = [sentence for sentence in sentences if len(sentence)]
            if kept and eod is not None:
                kept[-1] = [*kept[-1], eod]
            flat.extend(np.asarray(sentence, np.int64) for sentence in kept)
            lengths.extend(map(len, kept))
            counts.append(len(kept))
        tokens = np.concatenate(flat) if flat else np.empty(0, np.int64)
        out[key] = (tokens, np.asarray(lengths, np.int64), np.asarray(counts, np.int64))
    order = {line.place: place for place, line in enumerate(lines)}
    bad.sort(key=lambda entry: order[entry[0]])
    return Encoded(out, len(documents), bad, sum(len(line.content) for line in lines))


def _encode(documents: list, keys: Sequence[str], tokenizer: Tokenizer, bad: list) -> tuple[list, dict[str, list]]:
    """Ids of all sentences in one call for each key; one document at a time only where that fails."""
    try:
        return documents, {key: _encode_key([texts[key] for _, texts in documents], tokenizer) for key in keys}
    except DataError:
        if len(documents) == 1:
            raise
    except Exception as error:  # a tokenizer's own exceptions have no common base
        if len(documents) == 1:
            raise DataError(f"the tokenizer fails: {error}", documents[0][0].place) from error
    kept, ids = [], {key: [] for key in keys}
    for document in documents:
        try:
            _, one = _encode([document], keys, tokenizer, bad)
        except DataError as error:
            bad.append((document[0].place, error.problems[0].what))
            continue
        kept.append(document)
        for key in keys:
            ids[key].extend(one[key])
    return kept, ids


def _encode_key(documents: list[list[str]], tokenizer: Tokenizer) -> list[list[list[int]]]:
    encoded = iter(tokenizer.encode_batch([text for texts in documents for text in texts]))
    return [[next(encoded) for _ in texts] for texts in documents]


class Progress:
    """One line every ``interval`` documents: count, rates, time left by the bytes read."""

    def __init__(self, files: Sequence[Path], interval: int, log: Callable[[str], None]):
        # The size of a gzipped file says little about its text: then no time left is told.
        plain = all(path.suffix != ".gz" for path in files)
        self.total_bytes = sum(path.stat().st_size for path in files) if plain else 0
        self.interval, self.log = interval, log
        self.begin = time.monotonic()
        self.next = interval

    def step(self, report: Report) -> None:
        if not self.interval or report.documents_in < self.next:
            return
        self.next = (report.documents_in // self.interval + 1) * self.interval
        elapsed = max(time.monotonic() - self.begin, 1e-9)
        rate = report.input_bytes / elapsed
        left = f", {max(0.0, self.total_bytes - report.input_bytes) / rate:.0f} s left" if self.total_bytes else ""
        self.log(
            f"{report.documents_in:,} documents ({report.documents_in / elapsed:,.0f} documents/s, {rate / 1e6:.1f} MB/s{left})"
        )
