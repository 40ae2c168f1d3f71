"""How long a block takes with its input in k chunks: a model of events, from four measured times.

The pipeline of :mod:`megatron_telechat.moe.pipeline` is replayed with the computation and the link as two machines,
each doing one thing at a time. A chunk of computation takes its share of the whole plus a fixed cost (small products,
launches), a transfer its share plus the fixed cost of a collective:

    forward, compute-bound (A >= B):  T(k) = A + B/k + ...     link-bound:  T(k) = B + ...

with A the time of the computation and B that of the link; both fall towards max(A, B) until the fixed costs win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from megatron_telechat.moe.chunks import chunk_parts


@dataclass(frozen=True)
class PassCosts:
    """One direction, in milliseconds.

    Attributes:
        compute: of all chunks together, without the fixed costs.
        per_chunk: fixed cost of a chunk of computation.
        link: both transfers of all chunks together, without the fixed costs.
        per_transfer: fixed cost of a transfer.
    """

    compute: float
    per_chunk: float
    link: float
    per_transfer: float

    @classmethod
    def fit(cls, compute_ms: Mapping[int, float], link_ms: Mapping[int, float]) -> PassCosts:
        """From the times of computation alone and of transfers alone at two or more numbers of chunks."""
        compute, per_chunk = _line(compute_ms)
        link, per_pair = _line(link_ms)
        return cls(compute, per_chunk, link, per_pair / 2)

    def chunks_ms(self, k: int) -> list[float]:
        """Computation of each of k chunks."""
        return [self.compute * share + self.per_chunk for share in _shares(k)]

    def transfers_ms(self, k: int) -> list[float]:
        """One transfer of each of k chunks."""
        return [self.link / 2 * share + self.per_transfer for share in _shares(k)]


def _shares(k: int) -> list[float]:
    parts = chunk_parts(k)
    return [part / sum(parts) for part in parts]


def _line(times: Mapping[int, float]) -> tuple[float, float]:
    """Least squares of time = a + b k with b >= 0 and a >= 0."""
    ks, ts = list(times), list(times.values())
    mean_k, mean_t = sum(ks) / len(ks), sum(ts) / len(ts)
    spread = sum((k - mean_k) ** 2 for k in ks)
    slope = sum((k - mean_k) * (t - mean_t) for k, t in zip(ks, ts, strict=True)) / spread if spread else 0.0
    slope = min(max(slope, 0.0), mean_t / mean_k)
    return mean_t - slope * mean_k, slope


def forward_ms(costs: PassCosts, k: int) -> float:
    """Makespan of a forward: all dispatches queued at once, each combine when its chunk is computed."""
    transfers = costs.transfers_ms(k)
    computed = []
    now = 0.0
    for chunk, arrival in zip(costs.chunks_ms(k), accumulate(transfers), strict=True):
        now = max(now, arrival) + chunk
        computed.append(now)
    return _returned(computed, transfers)


def backward_ms(costs: PassCosts, k: int, weight_share: float = 0.5) -> float:
    """Makespan of a backward: gradients of inputs first, those of weights in the gaps and at the end.

    Args:
        weight_share: part of the computation that is gradients of weights (two of the four products).
    """
    transfers = costs.transfers_ms(k)
    computed, waiting = [], []
    now = 0.0
    for chunk, arrival in zip(costs.chunks_ms(k), accumulate(transfers), strict=True):
        while waiting and now < arrival:
            now += waiting.pop(0)
        now = max(now, arrival) + chunk * (1 - weight_share)
        computed.append(now)
        waiting.append(chunk * weight_share)
    return max(now + sum(waiting), _returned(computed, transfers))


def fillings(costs: PassCosts, k: int, weight_share: float = 0.5) -> tuple[int, ...]:
    """For each chunk of a backward, how many chunks' gradients of weights fit before its arrival.

    For devices whose host cannot see what has arrived. Those that fit by less than half wait for a larger gap, or for
    the end, where they run beside the way back.

    Args:
        weight_share: part of the computation that is gradients of weights.
    """
    counts, waiting = [], []
    now = 0.0
    for chunk, arrival in zip(costs.chunks_ms(k), accumulate(costs.transfers_ms(k)), strict=True):
        count = 0
        while waiting and arrival - now > waiting[0] / 2:
            now += waiting.pop(0)
            count += 1
        counts.append(count)
        now = max(now, arrival) + chunk * (1 - weight_share)
        waiting.append(chunk * weight_share)
    return tuple(counts)


def _returned(computed: list[float], transfers: list[float]) -> float:
    """When the last chunk is back: the way back of each begins when it is computed and the link is free."""
    link = sum(transfers)
    for ready, transfer in zip(computed, transfers, strict=True):
        link = max(link, ready) + transfer
    return link


def predicted_ms(forward: PassCosts, backward: PassCosts, k: int) -> float:
    """Forward and backward of one block."""
    return forward_ms(forward, k) + backward_ms(backward, k)


def ideal_ms(forward: PassCosts, backward: PassCosts) -> float:
    """The limit of many chunks without fixed costs: whichever is busier, link or computation."""
    return max(forward.compute, forward.link) + max(backward.compute, backward.link)
