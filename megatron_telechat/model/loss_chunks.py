"""Output layer and cross entropy in chunks of rows: the logits of all rows are never there at once.

Of each row the forward keeps the largest logit and the sum of the exponentials, both over the whole vocabulary. The
backward makes the logits of a chunk again. A rank of the tensor group holds the columns of its part of the vocabulary.
The arithmetic of the softmax is fp32, as in megatron-core's `vocab_parallel_cross_entropy`:

    loss = log(sum_j exp(l_j - max)) - (l_label - max),    gradient of l_j = g (exp(l_j - max) / sum - [j = label])

A rank sums the exponentials over its own largest logit first. So two all-reduces serve all chunks: one of the largest
logits, one of the sums and the labels' logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_telechat.config.loss_chunks import WEIGHT_PIECES
from megatron_telechat.moe.gradients import WeightGradient


class AddProduct(Protocol):
    """A kernel that adds the gradient of a weight straight into its sum."""

    def __call__(self, rows: Tensor, grad: Tensor, buffer: Tensor, /) -> None:
        """``buffer += grad.t() @ rows``, for rows [c, h], gradients [c, v] and an fp32 buffer [v, h]."""
        ...


@dataclass(frozen=True)
class Layout:
    """How rows and vocabulary lie on the ranks.

    Attributes:
        group: of the tensor-parallel ranks; None: this rank is alone.
        cuts_rows: each rank of the group has a part of the rows of its own (sequence parallelism); else all have all.
        chunk_rows: rows of a chunk, those of all ranks together.
        add_product: adds into the fp32 sum of the weight's gradients; None: a product, then an addition.
    """

    group: dist.ProcessGroup | None
    cuts_rows: bool
    chunk_rows: int
    add_product: AddProduct | None = None

    @property
    def parts(self) -> int:
        """Ranks that the rows are cut over."""
        return self.group.size() if self.group is not None and self.cuts_rows else 1

    def chunks(self, rows: int) -> list[slice]:
        """Chunks of the rows of this rank, as equal as can be: no product of a tiny rest.

        Args:
            rows: of this rank.
        """
        number = min(-(-rows * self.parts // self.chunk_rows), rows)
        edges = [rows * edge // number for edge in range(number + 1)]
        return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]

    def pick(self, values: Tensor, chunk: slice) -> Tensor:
        """[c]: of the values of all rows, [n], those of a chunk, rank by rank."""
        return values.view(self.parts, -1)[:, chunk].reshape(-1)

    def put(self, values: Tensor, chunk: slice, new: Tensor) -> None:
        """Write the values of a chunk, [c], to their places in those of all rows, [n]."""
        values.view(self.parts, -1)[:, chunk] = new.view(self.parts, -1)


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """Cross entropy of every token in nats, fp32 [b, s].

    Args:
        hidden: [s (/ tp under sequence parallelism), b, h].
        weight: [vocab / tp, h]. Its gradient is added to its ``main_grad``, where it has one.
        labels: int64 [b, s].
        layout: of rows and vocabulary.
    """
    batch, length = labels.shape
    # The weight twice: once for autograd to see it, once by name for its main_grad.
    losses: Any = _ChunkedLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.t().reshape(-1), layout, weight
    )
    return losses.view(length, batch).t().contiguous()


class _Logits:
    """This rank's columns of the logits, and room for those of one chunk.

    Args:
        weight: [v, h].
        labels: int64 [n] of all rows.
        layout: of rows and vocabulary.
        rows: of the largest chunk.
    """

    def __init__(self, weight: Tensor, labels: Tensor, layout: Layout, rows: int):
        self._weight, columns = weight, weight.shape[0]
        first = columns * layout.group.rank() if layout.group is not None else 0
        self.has_label = (labels >= first) & (labels < first + columns)
        self.column = (labels - first).clamp_(0, columns - 1)
        """[n]: that of the label; of another rank's label, any."""
        self._made = weight.new_empty(rows, columns)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self._wide = self._made if weight.dtype == wide else self._made.new_empty(rows, columns, dtype=wide)

    def of(self, rows: Tensor) -> Tensor:
        """fp32 [c, v] of these rows, [c, h]. To be overwritten, by the caller and by the next call."""
        count = rows.shape[0]
        made = torch.mm(rows, self._weight.t(), out=self._made[:count])
        return made if self._wide is self._made else self._wide[:count].copy_(made)

    def narrow(self, wide: Tensor) -> Tensor:
        """[c, v] in the type of the weight; of what came from :meth:`of`."""
        return wide if self._wide is self._made else self._made[: wide.shape[0]].copy_(wide)


def _inputs(hidden: Tensor, chunks: Sequence[slice], layout: Layout) -> Iterator[Tensor]:
    """The rows of each chunk, [c, h], those of all ranks that have their own; the gather of the next chunk runs beside
    the work on this one."""

    def start(chunk: slice) -> tuple[Tensor, dist.Work | None]:
        own = hidden[chunk]
        if layout.parts == 1:
            return own, None
        rows = own.new_empty(own.shape[0] * layout.parts, own.shape[1])
        return rows, dist.all_gather_into_tensor(rows, own, group=layout.group, async_op=True)

    coming = start(chunks[0])
    for number in range(len(chunks)):
        rows, gather = coming
        if number + 1 < len(chunks):
            coming = start(chunks[number + 1])
        if gather is not None:
            gather.wait()
        yield rows


class _Gradient:
    """The gradient of this rank's rows: sums over the tensor group, chunk by chunk, beside the products of the weight's
    gradient."""

    def __init__(self, hidden: Tensor, layout: Layout):
        self.rows = torch.empty_like(hidden)
        self._layout = layout
        self._sum: tuple[dist.Work, Tensor] | None = None

    def send(self, chunk: slice, of_logits: Tensor, weight: Tensor) -> None:
        """Compute it for a chunk, and start its sum.

        Args:
            chunk: rows of this rank.
            of_logits: [c, v].
            weight: [v, h].
        """
        layout, own = self._layout, self.rows[chunk]
        if layout.group is None:
            torch.mm(of_logits, weight, out=own)
            return
        part = torch.mm(of_logits, weight) if layout.cuts_rows else torch.mm(of_logits, weight, out=own)
        self.finish()
        if layout.cuts_rows:
            work = dist.reduce_scatter_tensor(own, part, group=layout.group, async_op=True)
        else:
            work = dist.all_reduce(part, group=layout.group, async_op=True)
        assert work is not None, "an exchange that was not waited for can be waited for"
        self._sum = work, part

    def finish(self) -> None:
        """Wait for the sum that was started last."""
        if self._sum is not None:
            self._sum[0].wait()
        self._sum = None


class _ChunkedLoss(torch.autograd.Function):
    """fp32 losses of all rows, [n], from those of this rank, [n (/ tp under sequence parallelism), h]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, layout: Layout, parameter: Tensor) -> Tensor:
        """Keeps its inputs, and of each row the largest logit and the sum of the exponentials."""
        chunks = layout.chunks(hidden.shape[0])
        logits = _Logits(weight, labels, layout, _largest(chunks, layout))
        largest = hidden.new_empty(labels.shape, dtype=torch.float32)
        sums, labelled = both = hidden.new_empty((2, *labels.shape), dtype=torch.float32)
        for chunk, rows in zip(chunks, _inputs(hidden, chunks, layout), strict=True):
            made = logits.of(rows)
            layout.put(labelled, chunk, made.gather(1, layout.pick(logits.column, chunk)[:, None]))
            top = made.amax(dim=1)
            layout.put(largest, chunk, top)
            layout.put(sums, chunk, made.sub_(top[:, None]).exp_().sum(dim=1))
        labelled.masked_fill_(~logits.has_label, 0.0)
        if layout.group is not None:
            own = largest.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=layout.group)
            sums.mul_(own.sub_(largest).exp_())
            dist.all_reduce(both, group=layout.group)
        ctx.save_for_backward(hidden, weight, labels, largest, both)
        ctx.layout, ctx.parameter = layout, parameter
        return sums.log() - (labelled - largest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Gradients of this rank's rows and of its part of the weight.

        Args:
            grad: fp32 [n].
        """
        hidden, weight, labels, largest, both = ctx.saved_tensors
        layout: Layout = ctx.layout
        chunks = layout.chunks(hidden.shape[0])
        logits = _Logits(weight, labels, layout, _largest(chunks, layout))
        share, of_label = grad / both[0], grad.masked_fill(~logits.has_label, 0.0)
        of_rows = _Gradient(hidden, layout) if ctx.needs_input_grad[0] else None
        of_weight = WeightGradient(ctx.parameter, len(chunks)) if ctx.needs_input_grad[1] else None
        for chunk, rows in zip(chunks, _inputs(hidden, chunks, layout), strict=True):
            wide = logits.of(rows).sub_(layout.pick(largest, chunk)[:, None]).exp_()
            wide.mul_(layout.pick(share, chunk)[:, None])
            column = layout.pick(logits.column, chunk)[:, None]
            wide.scatter_(1, column, wide.gather(1, column) - layout.pick(of_label, chunk)[:, None])
            of_logits = logits.narrow(wide)
            if of_rows is not None:
                of_rows.send(chunk, of_logits, weight)
            if of_weight is not None:
                _add(of_weight, rows, of_logits, layout)
        if of_rows is not None:
            of_rows.finish()
        del logits, wide, of_logits  # what autograd is handed for the weight takes their place
        return of_rows and of_rows.rows, of_weight and of_weight.result(), None, None, None


def _largest(chunks: Sequence[slice], layout: Layout) -> int:
    """Rows of the largest chunk, those of all ranks together."""
    return max(chunk.stop - chunk.start for chunk in chunks) * layout.parts


def _add(gradient: WeightGradient, rows: Tensor, of_logits: Tensor, layout: Layout) -> None:
    """Add the share of one chunk, rows [c, h] and gradients of logits [c, v], to the gradient of the weight."""
    buffer = gradient.buffer
    if layout.add_product is not None and gradient.into_main and buffer.dtype == torch.float32:
        layout.add_product(rows, of_logits, buffer)
    else:
        pieces = 1 if buffer.dtype == rows.dtype else WEIGHT_PIECES
        step = -(-buffer.shape[0] // pieces)
        for start in range(0, buffer.shape[0], step):
            part = slice(start, start + step)
            gradient.add_product(part, of_logits[:, part].t(), rows)
    gradient.end_chunk()
