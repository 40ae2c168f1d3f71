"""One call of a block: its input in chunks, whose dispatch, experts and combine overlap.

The order in which transfers are issued and awaited stands in two places: :class:`ForwardPass` and
:class:`BackwardPass`. It is the same on every rank, whatever the local timing.

Recomputation keeps the rows that arrived and repeats the first product alone, while a chunk's gradient is on its way.
No dispatch is ever repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_telechat.backend import traits_of
from megatron_telechat.moe.backward_pass import BackwardInPlace, BackwardOverLink, BackwardPass
from megatron_telechat.moe.dispatch import Dispatch
from megatron_telechat.moe.engine import Engine, ExpertWeights, Gradients
from megatron_telechat.moe.forward_pass import ForwardInPlace, ForwardOverLink, ForwardPass, Saved
from megatron_telechat.moe.link import Link
from megatron_telechat.moe.overlap_model import PassCosts, fillings
from megatron_telechat.parallel.clock import ExchangeClock, PassClock

MAX_PENDING = 8
"""How many chunks' weight gradients may wait for a gap; each keeps its activations alive."""
MAX_PENDING_RECOMPUTED = 1
"""The same where activations are recomputed to save their memory."""
WEIGHT_SHARE = 3 / 6
"""Part of a backward's products that is gradients of weights: of three matrices, gate, up and down, beside as many for
gradients of inputs."""
WEIGHT_SHARE_RECOMPUTED = 3 / 8
"""The same where gate and up are computed once more."""


@dataclass(frozen=True)
class ChunkPipeline:
    """Runs the chunks of one call of a block: first one forward, then at most one backward.

    Attributes:
        dispatch: which rows go where.
        link: among the ranks that share the experts; with one rank it is never used.
        engine: multiplies.
        clock: of the block; measures what was not hidden.
        layer: zero-based number of the layer, for traces.
        recompute: keep no output of the first product, and repeat it in the backward.
        backward_costs: of a backward of such a block, measured; says where gradients of weights fill the waits on a
            device whose host does not wait. None: they come last there.
    """

    dispatch: Dispatch
    link: Link
    engine: Engine
    clock: ExchangeClock = field(default_factory=ExchangeClock)
    layer: int | None = None
    recompute: bool = False
    backward_costs: PassCosts | None = None

    def forward(
        self, tokens: Tensor, probabilities: Tensor, weights: ExpertWeights, keep: bool
    ) -> tuple[Tensor, list[Saved]]:
        """Tokens to their experts and back, weighted and summed.

        Args:
            tokens: [n, h], contiguous.
            probabilities: [n, k].
            weights: the local experts.
            keep: a backward will follow.

        Returns:
            [n, h]; and what the backward needs of every chunk, nothing without `keep`.
        """
        clock = self._pass_clock(False, tokens.device)
        if self.dispatch.local:
            transport = ForwardInPlace(self.dispatch, tokens, probabilities)
        else:
            transport = ForwardOverLink(self.dispatch, self.link, clock, tokens, probabilities)
        forward = ForwardPass(self.dispatch, transport, self.engine, weights, clock)
        return forward.run(keep, keep_gate_up=keep and not self.recompute)

    def backward(
        self, grad: Tensor, weights: ExpertWeights, kept: list[Saved], gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """Gradients of tokens and probabilities; those of the weights are added into `gradients`.

        Args:
            grad: [n, h], of the output.
            weights: the local experts, outside of autograd.
            kept: what the forward kept; its gate and up are overwritten, and the list is emptied.
            gradients: where the gradients of the weights add up.

        Returns:
            [n, h], and [n, k] in the type that probabilities travel in.
        """
        clock, grad = self._pass_clock(True, grad.device), grad.contiguous()
        if self.dispatch.local:
            transport = BackwardInPlace(self.dispatch, grad)
        else:
            transport = BackwardOverLink(self.dispatch, self.link, clock, grad, self._plan(grad.device))
        max_pending = MAX_PENDING_RECOMPUTED if self.recompute else MAX_PENDING
        backward = BackwardPass(self.dispatch, transport, self.engine, weights, gradients, clock, max_pending)
        return backward.run(kept)

    def _plan(self, device: torch.device) -> tuple[int, ...] | None:
        """How many weight gradients go before each wait; None where the host sees what has arrived, or where nothing
        was measured."""
        if self.backward_costs is None or traits_of(device).host_waits_for_transfers:
            return None
        share = WEIGHT_SHARE_RECOMPUTED if self.recompute else WEIGHT_SHARE
        return fillings(self.backward_costs, len(self.dispatch.arrivals), share)

    def _pass_clock(self, backward: bool, device: torch.device) -> PassClock:
        return PassClock(self.clock, self.layer, backward, device)
