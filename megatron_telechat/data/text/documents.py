"""Documents out of jsonl (plain, gzip, zstd) and parquet, in blocks, each with the place it came from.

Files are told by their first bytes, not by their names. A block is a few megabytes of whole lines or rows; reading
holds one block and what was decompressed ahead, never a file.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_telechat.errors import DataError

TEXT_SUFFIXES = (".jsonl", ".json")
PACKED_SUFFIXES = (".gz", ".zst")
SUFFIXES = (*TEXT_SUFFIXES, *(text + packed for text in TEXT_SUFFIXES for packed in PACKED_SUFFIXES), ".parquet")
# A document this long would take tens of gigabytes of memory on its way and may not fit the format.
LARGEST_LINE = 1 << 30
_BOM = b"\xef\xbb\xbf"


class BadLine(Exception):
    """Why a line is not a document."""


@dataclass(frozen=True)
class TooLong:
    """Stands for a line of more than LARGEST_LINE bytes, which was passed over."""

    size: int


@dataclass(frozen=True)
class Line:
    """One line of input: its bytes, and where it stands (numbers from 1)."""

    content: bytes
    file: str
    number: int

    @property
    def place(self) -> str:
        """``file:line``, for messages."""
        return f"{self.file}:{self.number}"


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files, globs and folders as a list of files; each pattern's files in sorted order.

    Raises:
        DataError: a pattern matches nothing, a file is named twice, or a folder holds a text both packed and plain.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
            _refuse_copies(found)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
            _refuse_copies(found)
        if not found:
            what = (
                f"the folder {pattern} holds no {', '.join(SUFFIXES)}"
                if path.is_dir()
                else f"no input file matches {pattern}"
            )
            raise DataError(what, "--input", "name jsonl or parquet files, globs, or a folder of them")
        files.extend(found)
    for real, count in Counter(os.path.realpath(path) for path in files).items():
        if count > 1:
            raise DataError(f"the file {real} is named {count} times", "--input", "name each file once")
    return files


def _refuse_copies(files: Sequence[Path]) -> None:
    """A folder that holds a.jsonl and a.jsonl.gz holds one text twice, most likely."""
    seen: dict[str, Path] = {}
    for path in files:
        name = str(path.with_suffix("")) if path.suffix in PACKED_SUFFIXES else str(path)
        if name in seen:
            raise DataError(
                f"{seen[name]} and {path} look like one text, plain and packed",
                "--input",
                "name the files one by one, or move one of the two elsewhere",
            )
        seen[name] = path


def parse_items(items: Sequence[Any], keys: Sequence[str]) -> tuple[list[tuple], list[int], list[tuple[int, str]]]:
    """Lines (bytes, with or without their ends) or rows (dicts) as documents.

    Returns:
        The documents (for each key a text or a list of texts), the number of the item each came from, and
        (number, reason) of the items that are none.
    """
    loads = orjson.loads
    try:  # nearly always all lines are good; a second, careful pass finds the one that is not
        if isinstance(items[0], dict):
            raise BadLine
        if len(keys) == 1:
            key = keys[0]
            documents: list[tuple] = [(loads(line)[key],) for line in items]
        else:
            documents = [tuple(map(loads(line).__getitem__, keys)) for line in items]
        if all(type(text) is str for texts in documents for text in texts):
            return documents, list(range(len(items))), []
    except (BadLine, orjson.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError):
        pass
    documents, numbers, bad = [], [], []
    for number, item in enumerate(items):
        try:
            for document in _documents(item, keys):
                documents.append(document)
                numbers.append(number)
        except BadLine as reason:
            bad.append((number, str(reason)))
    return documents, numbers, bad


def _documents(item: Any, keys: Sequence[str]) -> list[tuple]:
    if isinstance(item, TooLong):
        raise BadLine(f"the line is longer than {LARGEST_LINE:,} bytes; split the document")
    if isinstance(item, dict):
        return [_check(item, keys)]
    try:
        return [_check(_parse_json(item), keys)]
    except BadLine:
        if b"\r" not in item.rstrip(b"\r\n"):
            raise
        # A text file may end its lines with a carriage return alone; inside a JSON text one cannot stand.
        parts = item.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")
        try:
            return [_check(_parse_json(part), keys) for part in parts]
        except BadLine:
            pass
        raise


def parse_document(line: Line, keys: Sequence[str]) -> dict[str, list[str]]:
    """The texts of one line: for each key its sentences (one for a plain string).

    Raises:
        BadLine: not a JSON object, a key is missing, a value is no text.
    """
    texts = _check(_parse_json(line.content), keys)
    return {key: text if isinstance(text, list) else [text] for key, text in zip(keys, texts, strict=True)}


def _check(document: Any, keys: Sequence[str]) -> tuple:
    if not isinstance(document, dict):
        raise BadLine(f"a JSON object is expected, not {_name(document)}")
    out = []
    for key in keys:
        if key not in document:
            raise BadLine(f"the key {key!r} is missing (there: {', '.join(map(repr, list(document)[:6])) or 'none'})")
        value = document[key]
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                raise BadLine(f"{key!r} is {_name(text)}, not a text")
        out.append(value)
    return tuple(out)


def _parse_json(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        reason = str(error)
    if content.startswith(_BOM):
        raise BadLine("the line begins with a UTF-8 byte-order mark; remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' FILE")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadLine("the file is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE")
    if not content.strip():
        raise BadLine("the line is blank")
    try:
        # Python's own reader takes what Megatron takes and orjson does not: NaN, Infinity, very large numbers.
        document = json.loads(content.decode("utf-8"))
        # A lone surrogate passes json and fails in every tokenizer.
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"the line is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise BadLine("a text contains half of a surrogate pair (\\ud800 to \\udfff)") from None
    except (ValueError, RecursionError):
        raise BadLine(f"the line is not JSON: {reason}") from None
    return document


def _name(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a text",
        bytes: "bytes that are not UTF-8",
    }
    return names.get(type(value), type(value).__name__)


def count_lines(path: str, end: int | None = None) -> int:
    """Newlines in the first ``end`` bytes of a file."""
    count, left = 0, end if end is not None else os.path.getsize(path)
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 22))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def quoted(items: Iterable[Any]) -> str:
    """A few names for a message."""
    names = list(items)
    return ", ".join(map(str, names[:6])) + (", ..." if len(names) > 6 else "")
