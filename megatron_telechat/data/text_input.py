"""Lines out of jsonl files, plain or gzipped, each with the place it came from."""

from __future__ import annotations

import glob
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, Sequence

import orjson

from megatron_telechat.errors import DataError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_BOM = b"\xef\xbb\xbf"


class BadLine(Exception):
    """Why a line is not a document."""


@dataclass(frozen=True)
class Line:
    """One line of input: its bytes, and where it stands (numbers from 1)."""

    content: bytes
    file: str
    number: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files, globs and folders as a list of files; each pattern's files in sorted order.

    Raises:
        DataError: a pattern matches nothing.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"no input file matches {pattern}", "--input", "name jsonl files, globs, or a folder of them")
        files.extend(found)
    return files


def read_lines(files: Sequence[Path]) -> Iterator[Line]:
    """The lines of the files, one after another.

    Raises:
        DataError: a file cannot be read, or its compression is damaged.
    """
    for path in files:
        number = 0
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
                for number, content in enumerate(file, 1):
                    yield Line(content, str(path), number)
        except (OSError, EOFError) as error:
            raise DataError(f"cannot read on: {error}", f"{path}:{number + 1}", "copy or compress the file again") from error


def chunks(lines: Iterable[Line], most_lines: int = 512, most_bytes: int = 1 << 20) -> Iterator[list[Line]]:
    """Lines in groups of at most ``most_lines`` lines and about ``most_bytes`` bytes."""
    group: list[Line] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line.content)
        if len(group) >= most_lines or size >= most_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def parse_document(line: Line, keys: Sequence[str]) -> dict[str, list[str]]:
    """The texts of one line: for each key its sentences (one for a plain string).

    Raises:
        BadLine: not a JSON object, a key is missing, a value is no text.
    """
    document = _parse_json(line.content)
    if not isinstance(document, dict):
        raise BadLine(f"a JSON object is meant, this is {_name(document)}")
    out: dict[str, list[str]] = {}
    for key in keys:
        if key not in document:
            raise BadLine(f"the key {key!r} is missing (there: {', '.join(map(repr, list(document)[:6])) or 'none'})")
        value = document[key]
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str):
                raise BadLine(f"{key!r} is {_name(text)}, not a text")
        out[key] = texts
    return out


def _parse_json(content: bytes):
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        reason = str(error)
    if content.startswith(_BOM):
        raise BadLine("the line begins with a UTF-8 byte-order mark; take it away: sed -i '1s/^\\xEF\\xBB\\xBF//' FILE")
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
        raise BadLine("a text holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    except (ValueError, RecursionError):
        raise BadLine(f"the line is not JSON: {reason}") from None
    return document


def _name(value) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
             str: "a text"}
    return names.get(type(value), type(value).__name__)
