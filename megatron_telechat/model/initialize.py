"""Initial weights that do not depend on the layout.

Every global tensor is cut into blocks of whole rows, each with a generator of its own, seeded by
(seed, key, block). A rank makes only the blocks that its pieces touch, so that any layout of any
number of ranks starts from the same bits (on one kind of device: CPU and GPU generators differ).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.model.shards import LocalParameter
from megatron_telechat.tensors.pieces import Piece
from megatron_telechat.tensors.table import Constant, Normal

BLOCK_ELEMENTS = 1 << 20
"""Elements of a block, rounded down to whole rows. Part of what a seed means: another value gives other weights."""


@torch.no_grad()
def initialize_weights(shards: Iterable[LocalParameter], run: RunConfig) -> None:
    """Fill the parameters with the values that the table of tensors begins with: N(0, std^2) for embeddings, linear
    layers and routers, zero biases, norms of one. In fp32, then rounded to the type of the parameter."""
    for shard in shards:
        fill(shard.piece, shard.parameter.data.view(shard.piece.box.shape), run.training.seed)


def fill(piece: Piece, target: Tensor, seed: int) -> None:
    """Fill a box of a global tensor.

    Args:
        target: of the box's shape.
    """
    match piece.spec.initial:
        case Constant(value):
            target.fill_(value)
        case Normal(std):
            _fill_normal(piece, target, std, seed)


def _fill_normal(piece: Piece, target: Tensor, std: float, seed: int) -> None:
    columns = piece.spec.shape[-1]
    total_rows = piece.spec.numel // columns
    block_rows = max(1, BLOCK_ELEMENTS // columns)
    first_column = piece.box.offset[-1]
    window = slice(first_column, first_column + piece.box.shape[-1])
    out = target.view(-1, piece.box.shape[-1])
    block, block_begin, block_end = target.new_empty(0), 0, 0
    written = 0
    for start, stop in _row_ranges(piece):
        while start < stop:
            if not block_begin <= start < block_end:
                number = start // block_rows
                block_begin, block_end = number * block_rows, min((number + 1) * block_rows, total_rows)
                block = _block(f"{seed}/{piece.key}/{number}", block_end - block_begin, columns, std, target.device)
            taken = min(stop, block_end) - start
            inside = start - block_begin
            out[written : written + taken].copy_(block[inside : inside + taken, window])
            start += taken
            written += taken
    assert written == out.shape[0]


def _block(name: str, rows: int, columns: int, std: float, device: torch.device) -> Tensor:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device=device).mul_(std)


def _row_ranges(piece: Piece) -> Iterator[tuple[int, int]]:
    """Rows of the global tensor, flattened to two dimensions, that the box covers, in the order of the box."""
    *lead_shape, rows, _ = piece.spec.shape
    *lead_offset, row_offset, _ = piece.box.offset
    *lead_box, row_box, _ = piece.box.shape
    for index in itertools.product(*(range(at, at + size) for at, size in zip(lead_offset, lead_box, strict=True))):
        slab = 0
        for position, size in zip(index, lead_shape, strict=True):
            slab = slab * size + position
        start = slab * rows + row_offset
        yield start, start + row_box
