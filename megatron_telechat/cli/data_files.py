"""What the headers of the indexed datasets say: read for --dry-run, without opening a token."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from megatron_telechat.config.schema import DataConfig
from megatron_telechat.data.blend import data_plan
from megatron_telechat.data.chat.dialogs import dialogs_in
from megatron_telechat.errors import DataError, Problem

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


@dataclass(frozen=True)
class DataFile:
    """One indexed dataset, or with sft one file of dialogs; `weight` is None where the run names none.

    The tokens of a file of dialogs are unknown before it is encoded (None), its dialogs where it is compressed.
    """

    prefix: str
    weight: float | None
    tokens: int | None
    documents: int | None


def _read_header(prefix: str, weight: float | None) -> DataFile | Problem:
    index, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    fix = "write the dataset again with tools/preprocess_data.py"
    for path in (index, binary):
        if not path.is_file():
            return Problem(
                f"{path} is missing", prefix, "correct the prefix (no suffix), or make it with tools/preprocess_data.py"
            )
    try:
        with open(index, "rb") as file:
            raw = file.read(_HEADER.size)
    except OSError as error:
        return Problem(f"cannot read {index}: {error.strerror}", str(index), "fix the permissions of the file")
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        return Problem(f"{index} is not the index of an indexed dataset", str(index), fix)
    _, version, code, sequences, boundaries = _HEADER.unpack(raw)
    if version != 1 or code not in _ITEM_BYTES:
        return Problem(
            f"{index}: version {version}, type code {code} are not those of an indexed dataset", str(index), fix
        )
    if os.path.getsize(index) < _HEADER.size + 12 * sequences + 8 * boundaries:
        return Problem(f"{index} is cut short: {sequences} sequences do not fit in it", str(index), fix)
    tokens, rest = divmod(os.path.getsize(binary), _ITEM_BYTES[code])
    if rest:
        return Problem(f"{binary} does not hold whole tokens of {_ITEM_BYTES[code]} bytes", str(binary), fix)
    return DataFile(prefix, weight, tokens, max(boundaries - 1, 0))


def _count_dialogs(path: str, weight: float | None) -> DataFile | Problem:
    try:
        return DataFile(path, weight, None, dialogs_in(path))
    except OSError as error:
        return Problem(f"cannot read {path}: {error.strerror}", path, "correct the path of the jsonl file")


def data_files(data: DataConfig) -> list[DataFile]:
    """The datasets a run names, each once.

    Raises:
        ConfigError: the data section contradicts itself.
        DataError: files that are missing or damaged; all of them at once.
    """
    found: dict[str, DataFile | Problem] = {}
    for blend in data_plan(data).blends:
        if blend is None:
            continue
        weights = blend.weights or (None,) * len(blend.prefixes)
        for prefix, weight in zip(blend.prefixes, weights, strict=True):
            if prefix not in found:
                found[prefix] = (_count_dialogs if data.sft else _read_header)(prefix, weight)
    problems = [entry for entry in found.values() if isinstance(entry, Problem)]
    if problems:
        raise DataError(problems)
    return [entry for entry in found.values() if isinstance(entry, DataFile)]
