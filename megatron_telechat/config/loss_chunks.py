"""How many rows of the output layer's logits are held at once: asked for, or by the size of a micro-batch's logits.

A function of the configuration alone: the training, the costs and the planner ask the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron_telechat.config.schema import RunConfig

AUTO_BYTES = 4 * 2**30
"""fp32 logits of a micro-batch on one rank, above which ``auto`` cuts them. Up to there, which is 8,192 rows of 131,072
tokens, a rank holds 6 GiB of them in bf16, and cutting would cost a product of the output layer for little."""
CHUNK_BYTES = 2**30
"""fp32 logits of one chunk."""
LEAST_ROWS, MOST_ROWS = 1024, 8192
"""Every chunk adds into the whole weight gradient. With fewer rows than this that takes as long as its product; with
more nothing is gained."""
WEIGHT_PIECES = 8
"""Pieces that the gradient of the output layer's weight is computed in, chunk by chunk, where it has another type than
its sum: no more than one piece of a product is there at a time."""
_FP32 = 4


def logits_bytes(run: RunConfig) -> float:
    """fp32 logits of one micro-batch on a rank of the last stage."""
    return _FP32 * _rows(run) * _columns(run)


def loss_chunk_rows(run: RunConfig) -> int:
    """Rows of a chunk of this run, those of all ranks that share them together; 0: the logits stay whole."""
    return chunk_rows(run.training.loss_chunk_rows, _rows(run), _columns(run))


def chunk_rows(asked: int | Literal["auto"], rows: float, columns: float) -> int:
    """Rows of a chunk; 0: the logits stay whole.

    Args:
        asked: `TrainingConfig.loss_chunk_rows`.
        rows: of a micro-batch.
        columns: of the logits, on one rank.
    """
    if asked != "auto":
        return asked
    if _FP32 * rows * columns <= AUTO_BYTES:
        return 0
    return _cut(columns)


def smaller_rows(run: RunConfig) -> int | None:
    """Rows of chunks that would lower the memory of this run, whose logits are whole; None: none would."""
    rows = _cut(_columns(run))
    return rows if not loss_chunk_rows(run) and rows < _rows(run) else None


def _cut(columns: float) -> int:
    return min(max(int(CHUNK_BYTES / (_FP32 * columns)), LEAST_ROWS), MOST_ROWS)


def loss_lines(run: RunConfig) -> Iterator[str]:
    """How the loss is computed, for people; nothing where the logits are whole and small."""
    rows, size = loss_chunk_rows(run), f"{logits_bytes(run) / 2**30:.1f} GiB"
    if run.training.loss_chunk_rows != "auto" and (rows or logits_bytes(run) > AUTO_BYTES):
        yield f"{_chunks_text(rows)} (--loss-chunk-rows); fp32 logits of a micro-batch: {size} a rank"
    elif rows:
        yield f"{_chunks_text(rows)} (auto: fp32 logits of a micro-batch would take {size} a rank)"


def _chunks_text(rows: int) -> str:
    return f"in chunks of {rows:,} rows" if rows else "of all rows at once"


def _rows(run: RunConfig) -> float:
    return run.training.seq_length * run.training.micro_batch_size / run.parallel.context_parallel_size


def _columns(run: RunConfig) -> float:
    return run.model.vocab_size / run.parallel.tensor_model_parallel_size
