"""Micro-batches in a fixed order, prepared ahead by background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.datasets import Ranks
from megatron_telechat.data.samples import TokenDataset
from megatron_telechat.errors import DataError, UserError
from megatron_telechat.parallel.context.layout import Costs
from megatron_telechat.parallel.context.rows import RowSplit

EVEN_COSTS = Costs(seconds_per_pair=1e-9, seconds_per_row=1e-6, seconds_per_transfer=1e-3)
"""Of a rank that measured nothing: a row of keys and values costs as much as attention to a thousand."""


def micro_batch_samples(micro_batch: int, dp_rank: int, dp_size: int, micro_batch_size: int, consumed: int) -> range:
    """Sample ids of micro-batch number ``micro_batch`` (counted from ``consumed``) on a data-parallel rank.

    Micro-batch j of rank r begins at consumed + (j * dp_size + r) * micro_batch_size: the ids of an optimizer
    step are consecutive whatever the data-parallel and micro-batch sizes.
    """
    begin = consumed + (micro_batch * dp_size + dp_rank) * micro_batch_size
    return range(begin, begin + micro_batch_size)


class BatchIterator:
    """Iterator over the micro-batches of one data-parallel rank; ends where a whole step is no longer there.

    The threads prepare a few batches ahead; their number changes neither order nor content. ``close`` (or the
    ``with`` statement) stops them. An error of a thread is raised by the ``next`` that asks for its batch.
    """

    def __init__(
        self, dataset: TokenDataset, run: RunConfig, state: Ranks, consumed_samples: int, costs: Costs = EVEN_COSTS
    ):
        self._dataset = dataset
        self._dp_rank, self._dp_size = state.dp_rank, state.dp_size
        self._micro_batch_size = run.training.micro_batch_size
        self._consumed = consumed_samples
        steps = max(0, len(dataset) - consumed_samples) // run.training.global_batch_size
        self._count = steps * (run.training.global_batch_size // (self._micro_batch_size * self._dp_size))
        self._next = 0
        self._finish: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._ahead = 2 * run.data.num_workers
        if run.routers_read_masks:
            # The training looks through all micro-batches of a step before the first: let them be there.
            self._ahead = max(self._ahead, run.num_microbatches)
        self._split: RowSplit | None = None
        if run.parallel.context_parallel_size > 1:
            self._split = RowSplit(run.parallel.context_sizes, state.cp_rank, run.parallel.cp_layout, costs)
        self._pending: deque[Future] = deque()
        self._pool: ThreadPoolExecutor | None = None
        if run.data.num_workers:
            self._pool = ThreadPoolExecutor(run.data.num_workers, thread_name_prefix="batches")

    def __len__(self) -> int:
        """Micro-batches of this rank from the start of the iterator to its end."""
        return self._count

    def __iter__(self) -> BatchIterator:
        return self

    def finish_with(self, finish: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """From the next batch that is begun: hand its tensors to this function, in the thread that prepares it, and
        give out what it returns."""
        self._finish = finish

    def _make(self, number: int) -> dict[str, Any]:
        batch: dict[str, Any] = self._read(number)
        if self._split is not None:
            batch = self._split(batch)
        finish = self._finish
        if finish is None:
            return batch
        return {name: finish(part) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}

    def _read(self, number: int) -> dict[str, torch.Tensor]:
        samples = micro_batch_samples(number, self._dp_rank, self._dp_size, self._micro_batch_size, self._consumed)
        try:
            return self._dataset.batch(samples)
        except UserError:
            raise
        except Exception as error:
            where = self._dataset.source.origin(samples[0])
            raise DataError(
                f"sample {samples[0]} cannot be read: {type(error).__name__}: {error}",
                where,
                "check that the dataset was not changed or moved while the run reads it",
            ) from error

    def __next__(self) -> dict[str, Any]:
        if self._pool is None:
            if self._next >= self._count:
                raise StopIteration
            self._next += 1
            return self._make(self._next - 1)
        while len(self._pending) < self._ahead and self._next < self._count:
            self._pending.append(self._pool.submit(self._make, self._next))
            self._next += 1
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def close(self) -> None:
        """Stop the threads; the iterator is at its end."""
        self._next = self._count
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, kind, value, trace) -> None:
        self.close()


def batches(
    dataset: TokenDataset, run: RunConfig, state: Ranks, consumed_samples: int, costs: Costs = EVEN_COSTS
) -> BatchIterator:
    """Micro-batches from sample ``consumed_samples`` on: dicts of CPU tensors tokens, labels, loss_mask, position_ids,
    each [micro_batch_size, seq_length], and where they have a meaning segment_lengths and padding (`TokenDataset`). A
    context-parallel rank gets its own tokens and the plan of its attention (`RowSplit`).

    Args:
        costs: by which rows of several documents are laid out over context-parallel ranks.

    Each virtual stage that reads data takes an iterator of its own; close it at the end.

    Raises:
        DataError: from ``next``, when a sample cannot be read or holds a token outside the vocabulary.
    """
    return BatchIterator(dataset, run, state, consumed_samples, costs)
