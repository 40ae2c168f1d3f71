"""The way of the tokens to their experts and back, as a value.

A token chosen by several experts of one rank travels there once. What a rank receives from another is a *segment*:

    rows of the tokens, in their order | their routing probabilities, packed into whole rows

so that tokens and probabilities take one exchange, and every row stays aligned. The way back of the gradients has the
same form (gradient of a token's row | gradients of its probabilities); outputs and their gradients need the rows alone.

The input is cut into chunks of consecutive tokens (:mod:`megatron_telechat.moe.chunks`). All ranks tell each other
their choice of experts once, for all chunks; from then on everything about every chunk is known, on the device, and the
sizes of all messages on the host: one device-to-host copy in a forward, none in a backward.

Terms: a *token row* is a token on its way to a rank, an *expert row* the same token in the hands of one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_telechat.backend import traits_of
from megatron_telechat.errors import ConfigError
from megatron_telechat.moe.chunks import ChunkRange, chunk_ranges
from megatron_telechat.moe.router import Routing


@dataclass(frozen=True)
class ExpertGroups:
    """The ranks that share the experts of a layer.

    Attributes:
        ep: ranks with different experts.
        etp: ranks that each hold a slice of the same experts.
        all: their product, expert-tensor-parallel rank fastest.
    """

    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    all: dist.ProcessGroup


class RowFormat(NamedTuple):
    """How probabilities are packed into rows of `hidden` numbers of `dtype`."""

    hidden: int
    dtype: torch.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """Probabilities and their gradients: fp32, or fp64 beside fp64 rows."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def weights_per_row(self) -> int:
        """Probabilities that one row has room for."""
        return self.hidden * self.dtype.itemsize // self.weight_dtype.itemsize

    def flat_weights(self, rows: Tensor) -> Tensor:
        """A buffer of rows seen as a flat array of probabilities."""
        return rows.view(self.weight_dtype).view(-1)


@dataclass(frozen=True)
class Outgoing:
    """One chunk seen from the rank of its tokens. With one rank in the group nothing is sent.

    Attributes:
        send: rows to each rank, probabilities included; the same number comes back with the gradients.
        send_tokens: rows to each rank without probabilities; the same number comes back with the outputs.
        row_tokens: [sum(send)] token of every row sent (any token where probabilities go).
        output_tokens: [sum(send_tokens)] token of every row whose output comes back.
        weight_slots: [ranks of a slice group, tokens * k] where each probability lies in the flat buffer.
        bags: [sum(send_tokens)] rows of the outputs, grouped by token.
        gradient_bags: [sum(send_tokens)] the same rows where they lie among the returned gradients.
        bag_starts: [tokens] where each token's group begins in both.
    """

    send: tuple[int, ...]
    send_tokens: tuple[int, ...]
    row_tokens: Tensor
    output_tokens: Tensor
    weight_slots: Tensor
    bags: Tensor
    gradient_bags: Tensor
    bag_starts: Tensor


@dataclass(frozen=True)
class Arrivals:
    """One chunk seen from the rank of the experts.

    Attributes:
        receive: rows from each rank, probabilities included.
        receive_tokens: rows from each rank without them.
        counts: expert rows of each local expert, on the host.
        offsets: [local experts] int32, where each expert's rows end; on the device.
        rows: [N] the buffer row of every expert row, which are sorted by expert.
        token_rows: [N] the same, counted without the rows of probabilities.
        weight_slots: [N] where its probability lies in the flat buffer.
        bags: [N] expert rows, grouped by token row.
        bag_starts: [sum(receive_tokens)] where each token row's group begins.
        buffer_bag_starts: [sum(receive)] the same with an empty group for each row of probabilities.
    """

    receive: tuple[int, ...]
    receive_tokens: tuple[int, ...]
    counts: tuple[int, ...]
    offsets: Tensor
    rows: Tensor
    token_rows: Tensor
    weight_slots: Tensor
    bags: Tensor
    bag_starts: Tensor
    buffer_bag_starts: Tensor

    @property
    def num_rows(self) -> int:
        """N: the expert rows of all local experts."""
        return sum(self.counts)


class Dispatch:
    """Which rows of one call of a block go where: ranges, outgoing and arriving sides of all chunks.

    The outgoing side is laid out by the constructor, the arriving side by :meth:`lay_out_arrivals`, which can run
    while the first chunk is on its way.

    Attributes:
        num_tokens, topk: n and k of the routing.
        ranges: the tokens of every chunk.
        local: one rank holds all experts; nothing is sent, and there is no outgoing side.
        outgoing: every chunk seen from this rank's tokens.
        arrivals: every chunk seen from this rank's experts; empty until it is laid out.

    Args:
        routing: what the router chose on this rank. All ranks of the group must hold equally many tokens.
        groups: the ranks that share the experts.
        num_chunks: pieces of the input, the same on all ranks of the group.
        rows: how the rows are sent.
        waiting: context around the wait for the other ranks' choices.

    Raises:
        ConfigError: the ranks of the group do not hold one number of chunks; on all of them, before anything is sent.
    """

    def __init__(
        self,
        routing: Routing,
        groups: ExpertGroups,
        num_chunks: int,
        rows: RowFormat,
        waiting: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.num_tokens, self.topk = routing.experts.shape
        self.ranges = chunk_ranges(self.num_tokens, num_chunks)
        self.outgoing: tuple[Outgoing, ...] = ()
        self.arrivals: tuple[Arrivals, ...] = ()
        num_experts = routing.tokens_per_expert.numel()
        choices = _gather_choices(routing.experts, num_experts, num_chunks, groups.all, waiting)
        layout = Layout(choices, groups, self.ranges, rows)
        self._layout: Layout | None = layout
        self._incoming = tuple(map(tuple, layout.host_in_sizes))
        self.local = layout.group_size == 1
        if not self.local:
            self.outgoing = layout.outgoing()

    def incoming_sizes(self, chunk: int) -> tuple[int, ...]:
        """Rows from each rank, known before the arrivals are laid out."""
        return self._incoming[chunk]

    def lay_out_arrivals(self) -> None:
        """Fill :attr:`arrivals`; to be called once."""
        assert self._layout is not None, "the arrivals were laid out before"
        self.arrivals = self._layout.arrivals()
        self._layout = None


class Choices(NamedTuple):
    """What the ranks of an expert group tell each other.

    Attributes:
        experts: [ranks, n, k] uint8 or int32, the choices of all ranks.
        chunks: [ranks] int32, how many pieces each rank cuts its input into.
        num_experts: experts of the layer.
    """

    experts: Tensor
    chunks: Tensor
    num_experts: int


def sizes_on_host(sizes: Tensor, layout: Layout) -> list[int]:
    """The sizes of all messages and products of a call, as numbers: the one place where a forward waits for the device.

    Args:
        sizes: int64, flat, on the device.
        layout: whose sizes these are; a virtual rank, whose tensors hold no numbers, works them out from it.
    """
    return sizes.cpu().tolist()


class Layout:
    """Index arithmetic of a dispatch, for all chunks at once. Shapes: c chunks, s ranks of the group, e expert-parallel
    ranks, m tokens of a chunk, k choices of a token.

    Args:
        choices: of all ranks of the group.
        groups: the ranks that share the experts.
        ranges: the tokens of every chunk.
        rows: how the rows are sent.

    Raises:
        ConfigError: the ranks do not hold one number of chunks.
    """

    def __init__(self, choices: Choices, groups: ExpertGroups, ranges: tuple[ChunkRange, ...], rows: RowFormat):
        self.choices, self.groups, self.row_format = choices, groups, rows
        self.topk = choices.experts.shape[2]
        self.num_experts = choices.num_experts
        self.ep, self.etp = groups.ep.size(), groups.etp.size()
        self.group_size = self.ep * self.etp
        self.ep_rank, me = groups.ep.rank(), groups.all.rank()
        self.local_experts = self.num_experts // self.ep
        self.ranges, self.chunks = ranges, len(ranges)
        self.per_row = rows.weights_per_row
        self.device = choices.experts.device
        edges = torch.tensor(ranges)  # [c, 2]
        if traits_of(self.device).pins_uploads:
            edges = edges.pin_memory().to(self.device, non_blocking=True)
        self.starts = edges[:, 0]
        # [c, m]: the token in every place of every chunk; the shorter chunks have places that are not filled.
        self.tokens = self.starts.unsqueeze(1) + torch.arange(max(b - a for a, b in ranges), device=self.device)
        self.filled = self.tokens < edges[:, 1:]

        ids = self._padded(choices.experts)  # [s, c, m, k]
        destination = ids // self.local_experts
        # Which of my tokens and choices go to each expert-parallel rank: [c, e, m], [c, e, m, k].
        ranks = torch.arange(self.ep, device=self.device, dtype=ids.dtype).view(-1, 1, 1)
        self.pairs_out = destination[me].unsqueeze(1) == ranks
        self.tokens_out = self.pairs_out.any(-1)
        # Which tokens and choices of all ranks come here: [c, s, m], [c, s, m, k].
        self.pairs_in = (destination == self.ep_rank).transpose(0, 1).contiguous()
        self.tokens_in = self.pairs_in.any(-1)
        local = ids.transpose(0, 1).long() - self.ep_rank * self.local_experts
        # [c, s * m * k]: the local expert, or one past the last.
        self.experts_in = torch.where(self.pairs_in, local, self.local_experts).flatten(1)
        self._count()

    def _padded(self, ids: Tensor) -> Tensor:
        """[s, n, k] → [s, c, m, k]; what is added goes nowhere."""
        padded = ids.index_select(1, self.tokens.clamp(max=max(ids.shape[1] - 1, 0)).flatten())
        padded = padded.view(ids.shape[0], *self.tokens.shape, self.topk)
        return padded.masked_fill_(~self.filled.unsqueeze(-1), torch.iinfo(ids.dtype).max)

    def _count(self) -> None:
        """Sizes of everything: on the device for the arithmetic, on the host for the messages; the one copy."""
        per_expert = torch.zeros(self.chunks, self.local_experts + 1, dtype=torch.int64, device=self.device)
        per_expert.scatter_add_(1, self.experts_in, torch.ones_like(self.experts_in))
        self.out_rows, out_pairs = self.tokens_out.sum(-1), self.pairs_out.sum((-1, -2))
        self.in_rows, in_pairs = self.tokens_in.sum(-1), self.pairs_in.sum((-1, -2))
        self.out_sizes = self.out_rows + self._weight_rows(out_pairs)
        self.in_sizes = self.in_rows + self._weight_rows(in_pairs)
        per_expert = per_expert[:, : self.local_experts]
        self.expert_ends = per_expert.cumsum(1)
        parts = (self.out_rows, self.out_sizes, self.in_rows, self.in_sizes, per_expert)
        widths = [part.shape[1] for part in parts]
        width = sum(widths)
        numbers = sizes_on_host(torch.cat((torch.cat(parts, 1).flatten(), self.choices.chunks.long())), self)
        _same_everywhere(numbers[self.chunks * width :])
        edges = [0, *accumulate(widths)]
        self.host_out_rows, self.host_out_sizes, self.host_in_rows, self.host_in_sizes, self.host_experts = (
            [numbers[c * width + begin : c * width + end] for c in range(self.chunks)] for begin, end in pairwise(edges)
        )

    def _weight_rows(self, pairs: Tensor) -> Tensor:
        """Rows that the probabilities of a segment fill; none where nothing is sent."""
        if self.group_size == 1:
            return torch.zeros_like(pairs)
        return (pairs + self.per_row - 1) // self.per_row

    # ---- the side of the tokens ---------------------------------------------------------------

    def outgoing(self) -> tuple[Outgoing, ...]:
        """Every chunk seen from the rank of its tokens."""
        sliced = range(self.etp)
        # Position of a token's row in its segment, and of its first slice-group segment in the buffers: [c, e, m].
        place = self.tokens_out.cumsum(-1) - 1
        starts = self.etp * _before(self.out_sizes)
        plain_starts = self.etp * _before(self.out_rows)
        rows = torch.stack([place + (starts + t * self.out_sizes).unsqueeze(-1) for t in sliced], 2)
        plain_rows = torch.stack([place + (plain_starts + t * self.out_rows).unsqueeze(-1) for t in sliced], 2)
        mask = self.tokens_out.unsqueeze(2).expand_as(rows)  # [c, e, t, m]
        token = self.tokens[:, None, None].expand_as(rows)
        send = [[size for size in sizes for _ in sliced] for sizes in self.host_out_sizes]
        send_tokens = [[size for size in sizes for _ in sliced] for sizes in self.host_out_rows]
        totals, plain_totals = [sum(sizes) for sizes in send], [sum(sizes) for sizes in send_tokens]

        row_tokens = _place(token, rows, mask, totals)
        output_tokens = _place(token, plain_rows, mask, plain_totals)
        # The same rows by token: [c, m, e, t].
        by_token = mask.permute(0, 3, 1, 2)
        order = by_token.flatten(1).cumsum(1).view(by_token.shape) - 1
        bags = _place(plain_rows.permute(0, 3, 1, 2), order, by_token, plain_totals)
        gradient_bags = _place(rows.permute(0, 3, 1, 2), order, by_token, plain_totals)
        per_token = by_token.flatten(2).sum(-1)
        bag_starts = _before(per_token)
        slots = self._outgoing_slots(starts)
        return tuple(
            Outgoing(
                send=tuple(send[c]),
                send_tokens=tuple(send_tokens[c]),
                row_tokens=row_tokens[c],
                output_tokens=output_tokens[c],
                weight_slots=slots[:, c, : (stop - start) * self.topk],
                bags=bags[c],
                gradient_bags=gradient_bags[c],
                bag_starts=bag_starts[c, : stop - start].to(torch.int32),
            )
            for c, (start, stop) in enumerate(self.ranges)
        )

    def _outgoing_slots(self, starts: Tensor) -> Tensor:
        """[t, c, m * k]: where each of my probabilities lies, in the segments to every slice of its expert."""
        pairs = self.pairs_out  # [c, e, m, k]; one e for each choice
        within = pairs.flatten(2).cumsum(-1).view(pairs.shape) - 1
        slots = []
        for t in range(self.etp):
            first = (starts + t * self.out_sizes + self.out_rows) * self.per_row
            slots.append(torch.where(pairs, within + first[..., None, None], 0).sum(1).flatten(1))
        return torch.stack(slots)

    # ---- the side of the experts --------------------------------------------------------------

    def arrivals(self) -> tuple[Arrivals, ...]:
        """Every chunk seen from the rank of the experts."""
        totals = [sum(sizes) for sizes in self.host_in_sizes]
        plain_totals = [sum(sizes) for sizes in self.host_in_rows]
        expert_totals = [sum(counts) for counts in self.host_experts]
        mask = self.tokens_in  # [c, s, m]
        place = mask.cumsum(-1) - 1
        starts = _before(self.in_sizes)
        rows = place + starts.unsqueeze(-1)
        token_rows = place + _before(self.in_rows).unsqueeze(-1)
        if self.group_size == 1:  # the input itself is the buffer, of all chunks together
            rows = rows + self.starts.view(-1, 1, 1)

        order = self.experts_in.sort(dim=1, stable=True).indices  # [c, s * m * k] choices, those for here first
        owner = order // self.topk
        slots = self._arriving_slots(starts).gather(1, order)
        rows_of, token_rows_of = rows.flatten(1).gather(1, owner), token_rows.flatten(1).gather(1, owner)

        # Expert rows by token row: which choice of its token for this rank (k-th) each one is.
        flat_pairs = self.pairs_in.flatten(1)
        rank = (flat_pairs.cumsum(1) - 1).gather(1, order)
        valid = flat_pairs.gather(1, order)
        number = torch.arange(order.shape[1], device=self.device).expand_as(order)
        bags = _place(number, rank, valid, expert_totals)
        per_token = self.pairs_in.sum(-1).flatten(1)
        token_starts = _before(per_token).view(mask.shape)
        bag_starts = _place(token_starts, token_rows, mask, plain_totals)
        buffer_bag_starts = self._starts_with_gaps(token_starts, rows, mask, totals, expert_totals)
        return tuple(
            Arrivals(
                receive=tuple(self.host_in_sizes[c]),
                receive_tokens=tuple(self.host_in_rows[c]),
                counts=tuple(self.host_experts[c]),
                offsets=self.expert_ends[c].to(torch.int32),
                rows=rows_of[c, :count].to(torch.int32),
                token_rows=token_rows_of[c, :count].to(torch.int32),
                weight_slots=slots[c, :count].clone(),
                bags=bags[c],
                bag_starts=bag_starts[c],
                buffer_bag_starts=buffer_bag_starts[c],
            )
            for c, count in enumerate(expert_totals)
        )

    def _arriving_slots(self, starts: Tensor) -> Tensor:
        """[c, s * m * k]: where the probability of every choice for here lies in the buffer; without an exchange in the
        probabilities of all tokens."""
        if self.group_size == 1:
            return self.starts.unsqueeze(1) * self.topk + torch.arange(self.experts_in.shape[1], device=self.device)
        within = self.pairs_in.flatten(2).cumsum(-1) - 1  # [c, s, m * k]
        return (within + ((starts + self.in_rows) * self.per_row).unsqueeze(-1)).flatten(1)

    def _starts_with_gaps(
        self, token_starts: Tensor, rows: Tensor, mask: Tensor, totals: list[int], expert_totals: list[int]
    ) -> list[Tensor]:
        """For every chunk where the group of each row of the buffer begins; see :class:`Arrivals`.

        Args:
            token_starts: [c, s, m], where the group of each token row begins.
            rows: [c, s, m], the place of each token row in the buffer.
            mask: [c, s, m], which tokens come here.
            totals: rows of the buffer of each chunk.
            expert_totals: expert rows of each chunk.
        """
        if self.group_size == 1:
            return [token_starts.new_empty(0, dtype=torch.int32)] * self.chunks
        # A row of probabilities owns no expert row: its group begins where that of the next token row does.
        spread = _place(token_starts, rows, mask, totals, fill=torch.iinfo(torch.int32).max)
        return [
            starts.flip(0).clamp(max=count).cummin(0).values.flip(0) if starts.numel() else starts
            for starts, count in zip(spread, expert_totals, strict=True)
        ]


def _gather_choices(
    experts: Tensor,
    num_experts: int,
    num_chunks: int,
    group: dist.ProcessGroup,
    waiting: Callable[[], AbstractContextManager],
) -> Choices:
    """The choices of this rank, [n, k], to those of all, one byte a choice where that is enough. Every rank's number of
    chunks rides along: ranks that cut differently would wait for each other's transfers for ever."""
    ids = experts.to(torch.uint8 if num_experts <= torch.iinfo(torch.uint8).max else torch.int32)
    chunks = torch.full((1,), num_chunks, dtype=torch.int32, device=ids.device)
    if group.size() == 1:
        return Choices(ids.unsqueeze(0), chunks, num_experts)
    message = torch.cat((ids.flatten(), chunks.view(ids.dtype)))
    gathered = message.new_empty(group.size() * message.numel())
    with waiting():
        dist.all_gather_into_tensor(gathered, message, group=group)
    gathered = gathered.view(group.size(), -1)
    choices, chunks = gathered[:, : ids.numel()], gathered[:, ids.numel() :].contiguous()
    return Choices(choices.reshape(group.size(), *ids.shape), chunks.view(torch.int32).flatten(), num_experts)


def _same_everywhere(chunks: list[int]) -> None:
    """Raises ConfigError, on every rank of the group, if their numbers of chunks differ."""
    if len(set(chunks)) > 1:
        raise ConfigError(
            f"the ranks that share experts cut their input into {', '.join(map(str, chunks))} pieces",
            "model",
            "give every rank the same number",
        ).on_every_rank()


def _before(sizes: Tensor) -> Tensor:
    """Sum of the sizes before each, along the last axis."""
    return sizes.cumsum(-1) - sizes


def _place(values: Tensor, positions: Tensor, mask: Tensor, lengths: list[int], fill: int = 0) -> list[Tensor]:
    """For every chunk an int32 array of its length with the masked values at their positions; no host copy."""
    chunks, longest = len(lengths), max(lengths)
    placed = torch.full((chunks, longest + 1), fill, dtype=torch.int32, device=values.device)
    index = torch.where(mask, positions, longest).reshape(chunks, -1)
    placed.scatter_(1, index, values.to(torch.int32).reshape(chunks, -1))
    # A copy: a view would keep the longest of all alive for each.
    return [placed[c, :length].clone() for c, length in enumerate(lengths)]
