"""The attention of the product, with other links and kernels in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from context.links import RecordingLink
from context.problem import Inputs, Result
from megatron_telechat.backend.block_attention import BlockAttention
from megatron_telechat.model.context_attention import ContextCoreAttention
from megatron_telechat.parallel.context.plan import ContextPlan
from megatron_telechat.parallel.groups import ContextGroups


def open_groups(heads: int, ring: int) -> ContextGroups:
    """Groups of a2a, whose ranks are neighbours, and groups of the ring; this rank's of each. Collective."""
    mine: dict[str, dist.ProcessGroup] = {}
    kinds = {"heads": (heads, range(0, heads * ring, heads), 1), "ring": (ring, range(heads), heads)}
    for name, (size, firsts, step) in kinds.items():
        for first in firsts if size > 1 else ():
            members = list(range(first, first + size * step, step))
            group = dist.new_group(members)
            if dist.get_rank() in members:
                assert isinstance(group, dist.ProcessGroup)
                mine[name] = group
    return ContextGroups(**mine)


class Ours:
    """Attention over ranks as the product computes it.

    Args:
        groups: of this rank.
        plan: of this rank.
        kernel: of the blocks.
        pieces, keep: see `Way`.
    """

    def __init__(
        self, groups: ContextGroups, plan: ContextPlan, kernel: BlockAttention, pieces: int, keep: bool = False
    ):
        config: Any = SimpleNamespace(attention_dropout=0.0)
        collection: Any = SimpleNamespace(context=groups)
        self.core = ContextCoreAttention(config, 1, collection, pieces, keep)
        self.core.kernel = kernel
        self.plan = plan
        self._step: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def record(self, inputs: Inputs) -> RecordingLink:
        """The transfers of a step. Collective."""
        usual = self.core.link
        self.core.link = link = RecordingLink(usual)
        self.forward(inputs)
        self.backward(inputs)
        self.core.link = usual
        return link

    def forward(self, inputs: Inputs) -> Tensor:
        """Attention of this rank's tokens, [t, heads, d]; what the backward needs is kept."""
        leaves = tuple(each.detach().unsqueeze(1).requires_grad_() for each in inputs[:3])
        out = self.core(*leaves, self.plan)
        self._step = out, leaves
        return out.detach().view(inputs.query.shape)

    def backward(self, inputs: Inputs) -> Result:
        """Gradients for that of the output; ends a step."""
        assert self._step is not None, "a forward goes before"
        out, leaves = self._step
        self._step = None
        out.backward(inputs.grad.view(out.shape))
        grads = [each.grad.squeeze(1) for each in leaves if each.grad is not None]
        return Result(out.detach().view(inputs.query.shape), *grads)

    def exposed(self) -> float:
        """Seconds of waiting for transfers since it was last asked."""
        return self.core.clock.take_exposed_s()
