"""Initial weights that do not depend on the layout.

Every global tensor is cut into blocks of whole rows, each with a generator of its own, seeded by
(seed, key, block). A rank makes only the blocks that its pieces touch, so that any layout of any
number of ranks starts from the same bits (on one kind of device: CPU and GPU generators differ).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.model.shards import LocalParameter, Piece

BLOCK_ELEMENTS = 1 << 20
"""Elements of a block, rounded down to whole rows. Part of what a seed means: another value gives other weights."""


@torch.no_grad()
def initialize_weights(shards: Iterable[LocalParameter], run: RunConfig) -> None:
    """Fill the parameters: N(0, init_method_std) for embeddings and linear layers, router_init_std for routers,
    zero biases, norms of one. In fp32, then rounded to the type of the parameter."""
    for shard in shards:
        flat = shard.parameter.data.view(-1)
        for piece in shard.pieces:
            fill(piece, flat[piece.flat_start : piece.flat_start + piece.numel].view(piece.shape), run)


def fill(piece: Piece, target: Tensor, run: RunConfig) -> None:
    """Fill a box of a global tensor.

    Args:
        target: of the box's shape.
    """
    if piece.key.endswith("layernorm.weight"):
        target.fill_(1.0)
    elif piece.key.endswith(".bias"):
        target.zero_()
    else:
        _fill_normal(piece, target, standard_deviation(piece.key, run.model), run.training.seed)


def standard_deviation(key: str, model: ModelConfig) -> float:
    return model.router_init_std if key.endswith("mlp.router.weight") else model.init_method_std


def _fill_normal(piece: Piece, target: Tensor, std: float, seed: int) -> None:
    columns = piece.global_shape[-1]
    total_rows = math.prod(piece.global_shape[:-1])
    block_rows = max(1, BLOCK_ELEMENTS // columns)
    first_column = piece.global_offset[-1]
    window = slice(first_column, first_column + piece.shape[-1])
    out = target.view(-1, piece.shape[-1])
    number: int | None = None
    written = 0
    for start, stop in _row_ranges(piece):
        while start < stop:
            if number != start // block_rows:
                number = start // block_rows
                rows = min(block_rows, total_rows - number * block_rows)
                block = _block(f"{seed}/{piece.key}/{number}", rows, columns, std, target.device)
            taken = min(stop, (number + 1) * block_rows) - start
            inside = start - number * block_rows
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
    *lead_shape, rows, _ = piece.global_shape
    *lead_offset, row_offset, _ = piece.global_offset
    *lead_box, row_box, _ = piece.shape
    for index in itertools.product(*(range(at, at + size) for at, size in zip(lead_offset, lead_box, strict=True))):
        slab = 0
        for position, size in zip(index, lead_shape, strict=True):
            slab = slab * size + position
        start = slab * rows + row_offset
        yield start, start + row_box
