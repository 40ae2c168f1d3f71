"""Which tokens of a micro-batch count in the losses and figures of a router, and how much the micro-batch weighs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_telechat.moe.pooled import ChoicePool


def real_tokens(tokens: Tensor, padding: Tensor | None) -> int:
    """How many of these tokens are no padding; both on the host, [b, s]; None: all."""
    return tokens.numel() if padding is None else padding.numel() - int(padding.sum())


@dataclass(frozen=True)
class CountedTokens:
    """What a router must know of a micro-batch in which some tokens are padding, or are not learned, or whose balancing
    loss is one over all layers.

    It belongs to one forward call: several micro-batches are under way at once, and a layer may be computed again.

    Attributes:
        total: tokens that are no padding, over all ranks that hold parts of these sequences.
        weight: fp32 [] on the device, or a number; the mean of a loss over those tokens is multiplied by this.
        real: bool, True where a token is no padding: [b, s] of the whole sequences, or [n] in the order of a router's
            rows (:meth:`rows`). None: there is no padding.
        pool: takes the choices of all layers; None: each layer has a balancing loss of its own.
    """

    total: int
    weight: Tensor | float
    real: Tensor | None = None
    pool: ChoicePool | None = None

    @classmethod
    def of(
        cls, tokens: Tensor, padding: Tensor | None, learned_share: Tensor, real: int | None = None, ranks: int = 1
    ) -> CountedTokens:
        """Of one micro-batch.

        The gradients of a step are divided by the learned tokens of the global batch, N. The loss of a router is a mean
        over the R tokens of the global batch that are no padding. So a micro-batch with r of them weighs r N / R.

        Args:
            tokens: [b, s], on the host; of this context-parallel rank.
            padding: bool [b, s] on the host, True where a token is padding; None: there is none.
            learned_share: fp32 [] on the device, N / R of the global batch.
            real: tokens of the whole rows that are no padding, where the rows are spread over ranks and hold padding.
            ranks: context-parallel ranks that the rows are spread over.
        """
        whole = tokens.numel() * ranks
        total = whole if padding is None else real if real is not None else real_tokens(tokens, padding)
        # The same on every rank of the rows: some hold no padding, and count like the others.
        here = ~padding.to(learned_share.device, non_blocking=True) if padding is not None and total < whole else None
        return cls(total, learned_share * total, here)

    def rows(self, part: int, parts: int) -> CountedTokens:
        """The same, for the rows [s / parts, b] that one rank of a tensor group routes."""
        if self.real is None:
            return self
        return replace(self, real=self.real.t().chunk(parts)[part].flatten())
