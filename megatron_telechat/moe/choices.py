"""Choices of a router that are taken from elsewhere: from the first pass of a layer that is computed twice, or from a
recording.

Top-k is not continuous. Where the k-th and the next logit of a token are closer than rounding, two computations of the
same numbers (another layout, another kernel, the second pass of a recomputed layer) may send the token to different
experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def pack(experts: Tensor, num_experts: int) -> Tensor:
    """Numbers of experts in as few bytes as hold them: uint8 up to 256 experts, int16 up to 32,768, else int32."""
    return experts.to(torch.uint8 if num_experts <= 256 else torch.int16 if num_experts <= 32768 else torch.int32)


class _Picked(torch.autograd.Function):
    """``logits.gather(1, experts)`` for experts that differ within a row. torch's own backward adds up, in an order
    that changes on a GPU or in a slow one under deterministic algorithms; here, as in the backward of top-k, nothing
    has to be added."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(experts)
        ctx.num_experts = logits.shape[1]
        return logits.gather(1, experts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (experts,) = ctx.saved_tensors
        return grad.new_zeros(grad.shape[0], ctx.num_experts).scatter_(1, experts, grad), None


def picked(logits: Tensor, experts: Tensor) -> Tensor:
    """The [n, k] logits of these experts, with their gradient.

    Args:
        logits: [n, experts].
        experts: [n, k] int64, no two alike in a row.
    """
    return _Picked.apply(logits, experts)


def gap_to_runner_up(logits: Tensor, experts: Tensor) -> Tensor:
    """How clear a choice of the largest logits is.

    Args:
        logits: [n, experts].
        experts: [n, k] int64, the largest k of each row.

    Returns:
        [n] fp32: the smallest chosen logit less the largest that was not chosen; infinite where all are chosen.
    """
    with torch.no_grad():
        last = logits.gather(1, experts).amin(1)
        runner_up = logits.scatter(1, experts, -torch.inf).amax(1)
        return (last - runner_up).float()


class FirstPass:
    """Experts that a router chose in the first pass of one checkpointed call, for the pass that repeats it.

    One object belongs to one call of one layer, and lives in what the checkpoint runs: micro-batches in flight,
    interleaved virtual stages and an evaluation in between cannot mix theirs up. A choice takes a byte (two from 257
    experts on).
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None

    def keep(self, experts: Tensor, num_experts: int) -> None:
        """Remember the [n, k] choices of the first pass."""
        self._packed = pack(experts, num_experts)

    @property
    def experts(self) -> Tensor | None:
        """[n, k] int64; None before the first pass."""
        return None if self._packed is None else self._packed.long()


class Noted(NamedTuple):
    """What a router would choose by itself in one call.

    Attributes:
        experts: [n, k], packed.
        gap: [n] fp32, see :func:`gap_to_runner_up`.
    """

    experts: Tensor
    gap: Tensor


class RoutingTape:
    """What a router is given, and what is noted of it, during one optimizer step.

    The calls of a layer come in the order of the micro-batches under every pipeline schedule; the second pass of a
    recomputed layer is no call of its own.

    Args:
        given: for every micro-batch the [n, k] choices to take instead of the router's own; None: the router chooses.
        notes: whether to note the router's own choices.

    Attributes:
        noted: one entry for each micro-batch; empty without ``notes``.
        calls: micro-batches that were routed.
    """

    def __init__(self, given: Sequence[Tensor] | None, notes: bool):
        self._given = given
        self._notes = notes
        self.noted: list[Noted] = []
        self.calls = 0

    def rewind(self) -> None:
        """The step is taken again from its first micro-batch."""
        self.noted.clear()
        self.calls = 0

    def choose(self, logits: Tensor, own: Tensor) -> Tensor:
        """The [n, k] int64 experts of the next micro-batch.

        Args:
            logits: [n, experts].
            own: [n, k] int64, the router's own choice.
        """
        if self._notes:
            self.noted.append(Noted(pack(own, logits.shape[1]), gap_to_runner_up(logits, own)))
        number, self.calls = self.calls, self.calls + 1
        if self._given is None:
            return own
        given = self._given[number]
        assert given.shape == own.shape, f"choices {tuple(given.shape)} given for tokens and top-k {tuple(own.shape)}"
        return given.to(own)
