"""The header of an ``.idx`` file: read and written here alone. Needs no numpy.

Layout of ``.idx``, little endian: ``MMIDIDX\\0\\0`` · u64 version 1 · u8 dtype code · u64 S sequences ·
u64 D = documents + 1 · int32[S] lengths in tokens · int64[S] byte offsets in ``.bin`` · int64[D] document
boundaries (0, then cumulative sequence counts) · optional int8[S] modes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from megatron_telechat.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_REST = struct.Struct("<QBQQ")
HEADER_BYTES = len(MAGIC) + _REST.size
_DTYPES = {
    1: ("uint8", 1),
    2: ("int8", 1),
    3: ("int16", 2),
    4: ("int32", 4),
    5: ("int64", 8),
    6: ("float64", 8),
    7: ("float32", 4),
    8: ("uint16", 2),
}
"""Code → name and bytes of an entry. Tokens are integers; the format has codes of floats too."""


class IndexHeader(NamedTuple):
    """What the header of an index says.

    Attributes:
        dtype: name of the dtype of the tokens, an integer.
        item_bytes: bytes of a token.
        sequences: how many there are.
        boundaries: entries of the list of document boundaries, one more than there are documents.
    """

    dtype: str
    item_bytes: int
    sequences: int
    boundaries: int


def damaged(what: str, path: Path) -> DataError:
    """The error of a file of a dataset that is not what it should be."""
    return DataError(what, str(path), "write the dataset again with tools/preprocess_data.py, or copy both files again")


def read_header(path: Path) -> IndexHeader:
    """The header of an index, held against the size of the file.

    Raises:
        DataError: not an index, of another version or dtype, or of another size than its header means.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    if not header.startswith(MAGIC):
        raise damaged("not an index of Megatron's format (wrong magic bytes)", path)
    if len(header) < HEADER_BYTES:
        raise damaged(f"the index ends inside its header ({size} bytes)", path)
    version, code, sequences, boundaries = _REST.unpack(header[len(MAGIC) :])
    if version != _VERSION:
        raise damaged(f"index version {version} is unknown ({_VERSION} is expected)", path)
    dtype, item_bytes = _DTYPES.get(code, ("", 0))
    if "int" not in dtype:
        raise damaged(f"dtype code {code} is not an integer type of tokens", path)
    expected = HEADER_BYTES + 12 * sequences + 8 * boundaries
    if boundaries < 1 or size not in (expected, expected + sequences):
        raise damaged(
            f"the index has {size:,} bytes where its header ({sequences:,} sequences, "
            f"{boundaries - 1:,} documents) means {expected:,}",
            path,
        )
    return IndexHeader(dtype, item_bytes, sequences, boundaries)


def header_bytes(dtype: str, sequences: int, documents: int) -> bytes:
    """The header of an index of tokens of this dtype."""
    code = next(code for code, (name, _) in _DTYPES.items() if name == dtype)
    return MAGIC + _REST.pack(_VERSION, code, sequences, documents + 1)
