"""jsonl and parquet to indexed datasets: what Megatron's ``tools/preprocess_data.py`` writes, byte for byte.

One thread reads ahead, others parse and encode, this one writes; the encoders work without the interpreter lock. Blocks
under way are limited, so memory does not grow with the input; no other process writes (tokenizer_process.py reads).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_telechat.data.indexed.dataset import token_dtype
from megatron_telechat.data.text.documents import find_inputs, quoted
from megatron_telechat.data.text.encode import Encoded, encode_block
from megatron_telechat.data.text.engines import Engine, EngineUnfit, Reference, engine_names, limit_threads, open_engine
from megatron_telechat.data.text.readers import Block, Span, read_blocks, shard_of, spans
from megatron_telechat.data.text.self_check import EngineDiffers, SelfCheck
from megatron_telechat.data.text.unicode_guard import guarded
from megatron_telechat.data.text.workspace import Workspace
from megatron_telechat.data.tokenizers import Tokenizer
from megatron_telechat.errors import ConfigError, DataError, UserError

# Bad lines that are remembered word for word; all are counted and written to a list.
REMEMBERED = 20
JOURNAL_SECONDS = 5.0
_LISTS = {"fail": (), "skip": ("skipped.txt",), "quarantine": ("skipped.txt", "quarantine.jsonl")}


class Interrupted(Exception):
    """The run was asked to stop; what it did is kept where the journal says so."""


@dataclass
class Report:
    """Counts of one run, resumed parts included: documents_in = documents_out + skipped."""

    documents_in: int = 0
    documents_out: int = 0
    skipped: int = 0
    input_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    engine: str = ""
    resumed_bytes: int = 0
    outputs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What does not change while a run goes."""

    files: list[Path]
    parts: list[Span]
    keys: tuple[str, ...]
    tokenizer: Tokenizer
    eod: int | None
    workers: int
    on_error: str
    shard: tuple[int, int] | None
    log_interval: int
    log: Callable[[str], None]
    stop: Callable[[], bool]
    journal_seconds: float


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
    engine: str = "auto",
    shard: tuple[int, int] | None = None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    stop: Callable[[], bool] = lambda: False,
    journal_seconds: float = JOURNAL_SECONDS,
) -> Report:
    """Write ``{output_prefix}_{key}_document.bin/.idx`` and checksums for each key.

    Args:
        inputs: files, globs, folders.
        append_eod: end each document that has a token with the tokenizer's end-of-document id.
        workers: threads that encode.
        on_error: a bad line ends the run (``fail``), is left out and listed (``skip``), or is put aside
            (``quarantine``).
        log_interval: documents between two progress lines.
        engine: ``auto``, or one of ``engines.ENGINES``.
        shard: (i, n): only part i of n, 0 <= i < n, written under ``{output_prefix}.shard-i-of-n``.
        stop: asked after each block; true ends the run with ``Interrupted``.

    Raises:
        ConfigError: append_eod with a tokenizer that has no end-of-document id; an engine that cannot be used.
        DataError: a bad line (file:line and the reason), no input, no document at all. Nothing is written then.
        ResourceError: the output cannot be written, or another run writes it.
        Interrupted: ``stop`` said so.
    """
    keys = tuple(dict.fromkeys(json_keys))
    if unfit := [key for key in keys if not key or "/" in key or "\0" in key]:
        raise ConfigError(
            f"the key {unfit[0]!r} cannot be part of a file name", "--json-keys", "rename the key in the input"
        )
    names = engine_names(engine, tokenizer)
    files = find_inputs(inputs)
    parts = spans(files)
    limit_threads(workers)
    opened = [
        _opened(names[0], tokenizer, workers)
    ]  # before the tokenizer is asked anything: it may be on its way (tokenizer_process.py)
    if append_eod and tokenizer.eod is None:
        raise ConfigError(
            "--append-eod: the tokenizer has no end-of-document token",
            "--tokenizer-model",
            "use a tokenizer with <_end>, </s> or <|endoftext|>, or drop --append-eod",
        )
    prefix = output_prefix
    if shard is not None:
        parts, prefix = shard_of(parts, *shard), f"{output_prefix}.shard-{shard[0]}-of-{shard[1]}"
    job = Job(
        files,
        parts,
        keys,
        tokenizer,
        tokenizer.eod if append_eod else None,
        workers,
        on_error,
        shard,
        log_interval,
        log,
        stop,
        journal_seconds,
    )
    work = Workspace(prefix, keys, token_dtype(tokenizer.vocab_size), _identity(job), _LISTS[on_error])
    try:
        return _with_engines(job, work, names, opened)
    except OSError as error:
        refused = work.refused(error, _needed(work, job))
        _leave(work)
        raise refused from error
    except Interrupted:
        _leave(work)
        raise
    except BaseException as error:
        work.remove() if isinstance(error, UserError) else _leave(work)
        raise


def _leave(work: Workspace) -> None:
    """Keep the folder only if the same command can go on from it."""
    work.close() if work.journalled else work.remove()


def _identity(job: Job) -> dict[str, Any] | None:
    """What the output depends on; None where the tokenizer cannot be told from another."""
    digest = getattr(job.tokenizer, "digest", None)
    if digest is None:
        return None
    stats = [path.stat() for path in job.files]
    listing = json.dumps(
        [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in zip(job.files, stats, strict=True)]
    )
    return {
        "format": 1,
        "inputs": hashlib.sha256(listing.encode()).hexdigest(),
        "tokenizer": digest,
        "keys": list(job.keys),
        "eod": job.eod,
        "on_error": job.on_error,
        "shard": list(job.shard) if job.shard else None,
    }


def _needed(work: Workspace, job: Job) -> int:
    """Bytes of the whole output, by what the part written so far took; a token for two bytes where nothing is."""
    total = sum(path.stat().st_size for path in job.files) // (job.shard[1] if job.shard else 1)
    done = work.source_bytes
    if done < 1 << 16 or not work.output_bytes:
        return max(work.output_bytes, total * work.dtype.itemsize // 2)
    return max(work.output_bytes, round(work.output_bytes * max(1.0, total / done)))


def _opened(name: str, tokenizer: Tokenizer, workers: int) -> Engine | EngineUnfit:
    try:
        return open_engine(name, tokenizer, workers)
    except EngineUnfit as error:
        return error


def _with_engines(job: Job, work: Workspace, names: Sequence[str], opened: list[Engine | EngineUnfit]) -> Report:
    """The run with the first engine that is fit; ``opened`` holds that of ``names[0]``, and lets go of it."""
    resume = True
    for place, name in enumerate(names):
        following = names[place + 1] if place + 1 < len(names) else None
        engine = opened.pop() if opened else _opened(name, job.tokenizer, job.workers)
        try:
            if isinstance(engine, EngineUnfit):
                raise engine
            return _run(job, work, engine, resume)
        except (EngineUnfit, EngineDiffers) as error:
            if following is None:
                raise ConfigError(f"--engine {name} cannot be used: {error}", "--engine", "omit --engine") from error
            resume = resume and not isinstance(error, EngineDiffers)
            again = "" if isinstance(error, EngineUnfit) else "; its output is discarded"
            job.log(f"engine {name} is not used ({error}){again}; next: {following}")
    raise AssertionError("engine_names gives at least one name")


def _run(job: Job, work: Workspace, engine: Engine, resume: bool) -> Report:
    """One pass over the input with one engine."""
    position = work.load() if resume else None
    report = Report(**(position or {}).get("report", {}))
    if position and position.get("renamed"):
        job.log("an earlier run of this command had only the renaming left: done now")
        return _reported(work, report)
    work.open(fresh=position is None)
    parts, first_part = job.parts, 0
    if position:
        first_part, begin = position["span"], position["skip"]
        parts = [replace(job.parts[first_part], skip=begin, line=position["line"]), *job.parts[first_part + 1 :]]
        report.resumed_bytes = report.input_bytes
        job.log(f"an earlier run of this command left {report.documents_in:,} documents: continuing from there")
    report.engine = engine.name
    if not isinstance(engine, Reference):
        engine = guarded(engine, job.tokenizer, job.log)
    progress = Progress(job, report)
    with SelfCheck(engine, job.tokenizer) as check, closing(_pipeline(job, parts, engine)) as encoded_blocks:
        journalled = time.monotonic()
        for block, encoded in encoded_blocks:
            check.settle(wait=False)
            check.offer(*encoded.sample)
            _take(work, job, report, block, encoded)
            work.source_bytes = report.input_bytes
            progress.step()
            stopping = job.stop()
            if stopping or time.monotonic() - journalled > job.journal_seconds:
                check.settle()
                work.journal(_position(report, first_part + block.span, block.done, block.end_line))
                journalled = time.monotonic()
            if stopping:
                raise Interrupted
        check.settle()
    if not report.documents_out and job.shard is None:
        what = "the input holds no document" if not report.skipped else f"all {report.skipped:,} documents are bad"
        raise DataError(what, quoted(job.files), "nothing was written")
    position = _position(report, len(job.parts), 0, 1)
    work.finish(position)
    return _reported(work, report)


def _reported(work: Workspace, report: Report) -> Report:
    report.outputs = [work.final(key) for key in work.keys]
    report.tokens = {key: work.totals[key][0] for key in work.keys}
    return report


def _position(report: Report, span: int, skip: int, line: int) -> dict[str, Any]:
    return {"span": span, "skip": skip, "line": line, "report": {**vars(report), "resumed_bytes": 0, "outputs": []}}


def _take(work: Workspace, job: Job, report: Report, block: Block, encoded: Encoded) -> None:
    """Write one block and count it."""
    if encoded.bad and job.on_error == "fail":
        number, reason = encoded.bad[0]
        raise DataError(reason, block.place(number), "fix the line, or give --on-error skip; nothing was written")
    for number, reason in encoded.bad:
        place = block.place(number)
        if len(report.bad) < REMEMBERED:
            report.bad.append(f"{place}: {reason}")
        work.add_line("skipped.txt", f"{place}: {reason}".encode("utf-8", "replace"))
        if job.on_error == "quarantine":
            item = block.items[number]
            content = item.removesuffix(b"\n") if isinstance(item, bytes) else json.dumps(item, default=str).encode()
            work.add_line("quarantine.jsonl", content)
    for key, arrays in encoded.keys.items():
        work.add(key, *arrays)
        report.tokens[key] = work.totals[key][0]
    report.documents_in += encoded.documents + len(encoded.bad)
    report.documents_out += encoded.documents
    report.skipped += len(encoded.bad)
    report.input_bytes += block.source_bytes


def _pipeline(job: Job, parts: Sequence[Span], engine: Engine) -> Generator[tuple[Block, Encoded], None, None]:
    """Blocks and what became of them, in order; a few are read ahead, a few encoded at once."""
    dtype = np.dtype(token_dtype(job.tokenizer.vocab_size))

    def work(block: Block) -> tuple[Block, Encoded]:
        return block, encode_block(block, job.keys, engine, job.tokenizer, job.eod, dtype)

    return _in_order(_read_ahead(read_blocks(parts, job.keys)), work, max(engine.threads, 1))


def _read_ahead(items: Iterable, depth: int = 2) -> Iterator:
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, iterator, end) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, iterator, end))
                yield item
        finally:
            for future in pending:
                future.cancel()


def _in_order(items: Iterator, work: Callable, workers: int) -> Generator[Any, None, None]:
    """``map(work, items)`` on threads: results in order, at most one item more than threads under way."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class Progress:
    """One line every ``log_interval`` documents: count, rates, time left by the bytes of the files."""

    def __init__(self, job: Job, report: Report):
        total = sum(path.stat().st_size for path in job.files)
        self.total = total // job.shard[1] if job.shard else total
        self.interval, self.log, self.report = job.log_interval, job.log, report
        self.begin = time.monotonic()
        self.documents, self.bytes = report.documents_in, report.input_bytes
        self.next = (report.documents_in // max(self.interval, 1) + 1) * self.interval

    def step(self) -> None:
        """Print the line if it is due; to be called after each block. With an interval of 0 there is none."""
        report = self.report
        if not self.interval or report.documents_in < self.next:
            return
        self.next = (report.documents_in // self.interval + 1) * self.interval
        elapsed = max(time.monotonic() - self.begin, 1e-9)
        rate = max((report.input_bytes - self.bytes) / elapsed, 1e-9)
        left = max(0.0, self.total - report.input_bytes) / rate
        share = min(100.0, 100 * report.input_bytes / max(self.total, 1))
        self.log(
            f"{report.documents_in:,} documents, {share:.0f}% ({(report.documents_in - self.documents) / elapsed:,.0f} "
            f"documents/s, {rate / 1e6:.1f} MB/s, {left:.0f} s left)"
        )
