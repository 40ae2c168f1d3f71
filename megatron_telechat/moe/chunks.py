"""How the input is cut: consecutive tokens, the first and the last chunk half as large as the others.

The first dispatch and the last combine have nothing to hide behind, nor have their counterparts in the backward; the
smaller they are, the less of the link is exposed, for the same number of transfers.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_telechat.errors import ConfigError


class ChunkRange(NamedTuple):
    """Tokens [start, stop) of the rank's input."""

    start: int
    stop: int


def chunk_parts(num_chunks: int) -> tuple[int, ...]:
    """Relative sizes of the chunks.

    Raises:
        ConfigError: below 1.
    """
    if num_chunks < 1:
        raise ConfigError(f"the input of the experts cannot be cut into {num_chunks} pieces", "model", "use 1 or more")
    return (1,) * num_chunks if num_chunks < 3 else (1, *(2,) * (num_chunks - 2), 1)


def chunk_ranges(num_tokens: int, num_chunks: int) -> tuple[ChunkRange, ...]:
    """Where each chunk begins and ends; some are empty where there are more chunks than tokens.

    Raises:
        ConfigError: no chunk at all.
    """
    parts = chunk_parts(num_chunks)
    edges, before = [0], 0
    for part in parts:
        before += part
        edges.append(-(-num_tokens * before // sum(parts)))
    return tuple(ChunkRange(start, stop) for start, stop in zip(edges, edges[1:], strict=False))
