"""Input files cut into spans (what a shard or a resumed run reads) and read in blocks of whole lines or rows."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from megatron_telechat.data.text.documents import LARGEST_LINE, Line, TooLong, count_lines, quoted
from megatron_telechat.errors import ConfigError, DataError

BLOCK_BYTES = 2 << 20
_BUFFER_BYTES = 1 << 20
_ROWS = 1024
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"


@dataclass(frozen=True)
class Span:
    """A part of one file, begin <= position < end: bytes of a plain file, row groups of a parquet file.

    Attributes:
        kind: plain, gzip, zstd or parquet. Only plain and parquet files can be cut; the others are whole (end None).
        skip: decompressed bytes, or rows of the span, that an earlier run has done.
        line: number of the first line after ``skip``, 1 at the span's begin.
    """

    path: str
    kind: str
    begin: int = 0
    end: int | None = None
    skip: int = 0
    line: int = 1


@dataclass
class Block:
    """Whole lines (bytes, their ends included) or rows (dicts) of one file.

    Attributes:
        first: number of the first item. Lines count from 1 at the span's begin, which is byte ``counted_from`` of the
            file; rows from 1 at the begin of the file.
        span: index of the span in the list that is read; ``done``: its ``skip`` after this block.
        source_bytes: bytes of the (compressed) file that this block stands for.
    """

    file: str
    items: list[Any]
    first: int
    span: int
    done: int
    source_bytes: int
    counted_from: int = 0

    @property
    def end_line(self) -> int:
        """Number of the item that follows the block, counted as ``first``."""
        return self.first + len(self.items)

    def place(self, number: int) -> str:
        """file:line of item ``number``; reads the file from its front if the block comes from its middle."""
        before = count_lines(self.file, self.counted_from) if self.counted_from else 0
        return f"{self.file}:{before + self.first + number}"


def spans(files: Sequence[Path]) -> list[Span]:
    """One span for each file, its kind told by its first bytes.

    Raises:
        DataError: a file cannot be read or is not what its name says.
    """
    return [Span(str(path), _kind(path)) for path in files]


def _kind(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}", "--input", "fix the permissions of the file"
        ) from error
    if head.startswith(_PARQUET):
        return "parquet"
    kind = "gzip" if head.startswith(_GZIP) else "zstd" if head.startswith(_ZSTD) else "plain"
    named = {".gz": "gzip", ".zst": "zstd", ".parquet": "parquet"}.get(path.suffix)
    if kind == "plain" and named:
        what = "is empty" if not head else f"does not begin like a {named} file"
        raise DataError(f"{path} {what}", str(path), "copy the file again, or give it the name of what it is")
    return kind


def shard_of(parts: Sequence[Span], index: int, count: int) -> list[Span]:
    """Part ``index`` of ``count`` of the input: contiguous, of about equal bytes, the shards in order give the whole.

    Plain files are cut at lines, parquet files at row groups; gzip and zstd files go whole to the shard they begin in.
    """
    total = sum(os.path.getsize(part.path) for part in parts)
    low, high = total * index // count, total * (index + 1) // count
    out, at = [], 0
    for part in parts:
        size = os.path.getsize(part.path)
        begin, end = max(low - at, 0), min(high - at, size)
        if part.kind == "plain":
            begin, end = _line_start(part.path, begin), _line_start(part.path, end)
            if begin < end:
                out.append(replace(part, begin=begin, end=end))
        elif part.kind == "parquet":
            groups = _parquet(part.path).num_row_groups
            begin, end = (-(-groups * max(0, min(edge, size)) // size) for edge in (low - at, high - at))
            if begin < end:
                out.append(replace(part, begin=begin, end=end))
        elif low <= at < high:
            out.append(part)
        at += size
    return out


def _line_start(path: str, offset: int) -> int:
    """The first byte at or after ``offset`` at which a line begins; the size of the file if there is none."""
    size = os.path.getsize(path)
    if offset <= 0 or offset >= size:
        return max(0, min(offset, size))
    with open(path, "rb") as file:
        file.seek(offset - 1)
        while chunk := file.readline(1 << 20):
            if chunk.endswith(b"\n"):
                return file.tell()
    return size


def read_blocks(parts: Sequence[Span], keys: Sequence[str] | None = None, size: int = 0) -> Iterator[Block]:
    """Read spans in blocks of about ``size`` bytes (0: BLOCK_BYTES).

    Args:
        keys: columns read of parquet files; None reads all.

    Raises:
        DataError: a file cannot be read to its end (file:line), a line is too long, a column is missing.
        ConfigError: the package that reads a format is not installed.
    """
    for number, part in enumerate(parts):
        line = part.line
        try:
            if part.kind == "parquet":
                blocks = _row_blocks(part, number, keys)
            else:
                blocks = _text_blocks(part, number, size or BLOCK_BYTES)
            for block in blocks:
                line = block.end_line
                yield block
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"cannot read on: {error}", f"{part.path}:{line}", "copy or compress the file again"
            ) from error


def read_lines(files: Sequence[Path]) -> Iterator[Line]:
    """The lines of jsonl files, one after another; rows of parquet files come as JSON.

    Raises:
        DataError: a file cannot be read, or its compression is damaged.
    """
    for block in read_blocks(spans(files)):
        for place, item in enumerate(block.items):
            content = item.removesuffix(b"\n") if isinstance(item, bytes) else json.dumps(item, default=str).encode()
            yield Line(content, block.file, block.first + place)


def _open(part: Span) -> tuple[BinaryIO, BinaryIO]:
    """The stream of text, and the file under it (whose position tells the progress)."""
    file = open(part.path, "rb", buffering=_BUFFER_BYTES)
    if part.kind == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER_BYTES), file
    if part.kind == "zstd":
        return io.BufferedReader(ZstdStream(file, part.path), _BUFFER_BYTES), file
    return file, file


def _text_blocks(part: Span, number: int, size: int) -> Iterator[Block]:
    stream, file = _open(part)
    plain = part.kind == "plain"
    with file:
        if plain:
            file.seek(part.begin + part.skip)
        else:
            _discard(stream, part.skip)
        line, done, source = part.line, part.skip, 0 if not plain else part.begin + part.skip
        while True:
            room = size if part.end is None else min(size, part.end - part.begin - done)
            items, held = _lines(stream, room)
            if not items:
                return
            done += held
            position = part.begin + done if plain else file.tell()
            yield Block(part.path, items, line, number, done, position - source, part.begin)
            line, source = line + len(items), position


def _lines(stream: BinaryIO, room: int) -> tuple[list[Any], int]:
    """Lines with their ends, until they take ``room`` bytes, and those bytes.

    A line at a time is several times as fast as cutting a block: its memory is small enough to be used again at once.
    """
    items: list[Any] = []
    held = 0
    while held < room and (text := stream.readline(LARGEST_LINE + 1)):
        held += len(text)
        if len(text) <= LARGEST_LINE:
            items.append(text)
            continue
        whole = len(text)
        while not text.endswith(b"\n") and (text := stream.readline(_BUFFER_BYTES)):
            whole, held = whole + len(text), held + len(text)
        items.append(TooLong(whole))
    return items, held


def _discard(stream: Any, count: int) -> None:
    """Pass over what an earlier run has done of a compressed file."""
    while count > 0 and (chunk := stream.read(min(count, 1 << 20))):
        count -= len(chunk)


class ZstdStream(io.RawIOBase):
    """The text of the frames of a zstd file; a file that ends inside a frame is an error (zstandard's own reader takes
    it for the end)."""

    def __init__(self, file: BinaryIO, path: str):
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(
                f"{path} is packed with zstd, which needs the package zstandard",
                "--input",
                "pip install 'megatron_telechat[data]'",
            ) from error
        self._module, self._file = zstandard, file
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._rest = b""

    def readable(self) -> bool:
        """True; asked by ``io.BufferedReader``."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with text, as far as one chunk of the file gives it; 0 at the end of the file.

        Raises:
            OSError: damaged data.
            EOFError: the file ends inside a frame.
        """
        while not self._ready and self._fill():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _fill(self) -> bool:
        chunk = self._rest or self._file.read(1 << 16)
        self._rest = b""
        if not chunk:
            if self._frame is not None:
                raise EOFError("the zstd file ends inside a frame")
            return False
        try:
            if self._frame is None:
                self._frame = self._module.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        except self._module.ZstdError as error:
            raise OSError(f"damaged zstd data ({error})") from error
        return True


def _parquet(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path} is parquet, which needs the package pyarrow", "--input", "pip install 'megatron_telechat[data]'"
        ) from error
    import pyarrow

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a complete parquet file: {error}", path, "copy the file again") from error


def _row_blocks(part: Span, number: int, keys: Sequence[str] | None) -> Iterator[Block]:
    file = _parquet(part.path)
    import pyarrow

    columns = None
    if keys is not None:
        there = file.schema_arrow.names
        missing = [key for key in keys if key not in there]
        if missing:
            raise DataError(
                f"the column {missing[0]!r} is missing (there: {quoted(there)})", part.path, "correct --json-keys"
            )
        columns = list(dict.fromkeys(keys))
    groups = range(part.begin, file.num_row_groups if part.end is None else part.end)
    before = sum(file.metadata.row_group(group).num_rows for group in range(part.begin))
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    row_bytes = os.path.getsize(part.path) / max(file.metadata.num_rows, 1)
    done = 0
    try:
        for batch in (
            file.iter_batches(_ROWS, row_groups=list(groups), columns=columns, use_threads=False) if rows else ()
        ):
            begin, done = done, done + batch.num_rows
            if done <= part.skip:
                continue
            if begin < part.skip:
                batch, begin = batch.slice(part.skip - begin), part.skip
            values = [_column(column) for column in batch.columns]
            items = [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*values, strict=True)]
            yield Block(part.path, items, before + begin + 1, number, done, round(row_bytes * len(items)))
    except pyarrow.ArrowException as error:
        raise DataError(
            f"cannot read on: {error}", f"{part.path}:{before + done + 1}", "copy the file again"
        ) from error
    if done != rows:
        raise DataError(f"{done:,} rows were read where the file promises {rows:,}", part.path, "copy the file again")


def _column(column: Any) -> list:
    """Values of a column; texts that are not UTF-8 stay bytes, which no key takes."""
    import pyarrow

    kinds = pyarrow.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if not (
        kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_binary(kind) or kinds.is_large_binary(kind)
    ):
        return column.to_pylist()
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            column = column.cast(pyarrow.large_binary())
    return [None if value is None else _decoded(value) for value in column.to_pylist()]


def _decoded(value: bytes) -> Any:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
