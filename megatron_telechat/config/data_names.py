"""The names a run gives its data: data.json, and which of the names stand for the same data. Needs no numpy."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_telechat.config.data_formats import INDEXED, DataFormat
from megatron_telechat.errors import DataError

_END_BYTES = 1 << 16
"""Compared at each end of two files of one size."""


def data_json_entries(path: str, format: DataFormat = INDEXED) -> list[tuple[str, float]]:
    """Names and weights of a data.json as TeleChat writes it: {path: number of copies}.

    Relative names count from here, then from the file.

    Args:
        format: of the data that is named.

    Raises:
        DataError: missing, not JSON, not {text: number}, or a name stands there twice (JSON would keep the last one).
    """
    fix = 'write {"prefix_text_document": weight, ...}'
    try:
        with open(path, encoding="utf-8") as file:
            pairs = json.load(file, object_pairs_hook=_Pairs)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "data_json", "correct --data-json") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", "data_json", fix) from error
    numbers = isinstance(pairs, _Pairs) and all(
        isinstance(w, (int, float)) and not isinstance(w, bool) for _, w in pairs
    )
    if not pairs or not numbers:
        raise DataError(f"{path} is not of the form {{prefix: weight}}", "data_json", fix)
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise DataError(
            f"{path} names {', '.join(twice)} more than once",
            "data_json",
            "name each once, with the sum of the weights",
        )
    return [(_place(name, path, format), float(weight)) for name, weight in pairs]


class _Pairs(list):
    """The entries of a JSON object in order, the ones of equal names included."""


def _place(name: str, path: str, format: DataFormat) -> str:
    complaint = format.entry_complaint(name)
    if complaint is not None:
        raise DataError(complaint.what, path, complaint.fix)
    here = os.path.isabs(name) or os.path.exists(format.files(name)[-1])
    return name if here else str(Path(path).parent / name)


class Same(NamedTuple):
    """Names that stand for the same data, in the order given, and how that is known."""

    names: tuple[str, ...]
    how: str


def same_data(names: Iterable[str], format: DataFormat = INDEXED, copies: bool = True) -> list[Same]:
    """Names of one list that stand for the same data: one file under two paths, links, copies.

    Copies are told by the sizes of their files and the first and last 64 KiB of each. All files of a name take part.
    Names of files that are not there stand for themselves.

    Args:
        format: of the data that is named.
        copies: whether copies count, or links and paths alone.
    """
    given = list(names)
    by_file: dict[object, list[int]] = defaultdict(list)
    for number, name in enumerate(given):
        by_file[_file_of(format.files(name)[0])].append(number)
    groups = list(by_file.values())
    joined = (
        _join_copies(groups, [format.files(given[group[0]]) for group in groups]) if copies else [[g] for g in groups]
    )
    return [
        Same(
            tuple(given[number] for number in sorted(sum(parts, []))),
            "one file" if len(parts) == 1 else "copies of the same bytes",
        )
        for parts in joined
        if len(parts) > 1 or len(parts[0]) > 1
    ]


def _join_copies(groups: Sequence[list[int]], files: Sequence[tuple[str, ...]]) -> list[list[list[int]]]:
    """Groups whose files are copies of each other put together; only files of one size are read."""
    by_size: dict[object, list[int]] = defaultdict(list)
    for number, paths in enumerate(files):
        sizes = _sizes(paths)
        by_size[sizes if all(sizes) else number].append(number)
    by_content: dict[object, list[list[int]]] = defaultdict(list)
    for sizes, alike in by_size.items():
        for number in alike:
            by_content[sizes, _ends(files[number]) if len(alike) > 1 else ""].append(groups[number])
    return list(by_content.values())


def _file_of(path: str) -> object:
    """The same for every path and every link, hard or symbolic, of one file."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _sizes(files: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(os.path.getsize(file) for file in files)
    except OSError:
        return (0,) * len(files)


def _ends(files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as file:
                digest.update(file.read(_END_BYTES))
                file.seek(max(0, os.path.getsize(path) - _END_BYTES))
                digest.update(file.read(_END_BYTES))
        except OSError:
            digest.update(path.encode())  # cannot be read, which another rule tells: like no other
    return digest.hexdigest()
