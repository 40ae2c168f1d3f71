"""What takes turns: one forward and backward of the attention each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor
from turns import Sample, Stopwatch

from context.links import OnlyLink, ReplayLink, WaitingLink
from context.ours import Ours, open_groups
from context.peers import Peer
from context.problem import Inputs, Problem, Result
from context.stand_in import StandIn
from context.torchs import TorchRing
from megatron_telechat.backend import Backend
from megatron_telechat.backend.block_attention import BlockAttention, block_attention
from megatron_telechat.parallel.context.layout import Layout, zigzag
from megatron_telechat.parallel.context.plan import plan_rows
from megatron_telechat.parallel.context.rows import own_positions
from megatron_telechat.parallel.groups import ContextGroups
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.context import ContextSetting, set_context


class Attention(Protocol):
    """A way to compute the attention of this rank's tokens."""

    def forward(self, inputs: Inputs, /) -> Tensor: ...

    def backward(self, inputs: Inputs, /) -> Result: ...


Kind = TypeVar("Kind", bound=Attention)


@dataclass
class AttentionArm(Generic[Kind]):
    """One way, with the tokens that it gives to this rank.

    Attributes:
        way: forward and backward.
        inputs: of this rank's tokens.
        positions: where they lie in the row.
        exposed: seconds of waiting since it was last asked; None where that is not known.
    """

    way: Kind
    inputs: Inputs
    positions: np.ndarray
    exposed: Callable[[], float] | None = None

    def run(self) -> Sample:
        if self.exposed:
            self.exposed()
        watch = Stopwatch()
        self.way.forward(self.inputs)
        watch.forward_ends()
        self.way.backward(self.inputs)
        return watch.sample(self.exposed or (lambda: 0.0))

    def result(self) -> Result:
        """Output and gradients of a step."""
        self.way.forward(self.inputs)
        return self.way.backward(self.inputs)


class Arms:
    """Makes the arms of one problem; making one may be collective.

    Args:
        problem: the row.
        stand_in: GFLOP/s of the stand-in device, None: real products.
    """

    def __init__(self, problem: Problem, stand_in: float | None):
        self.problem = problem
        assert dist.group.WORLD is not None, "the process group is there"
        self.group, self.rank = dist.group.WORLD, dist.get_rank()
        self.stand_in = StandIn(stand_in) if stand_in else None
        self.kernel: BlockAttention = self.stand_in or block_attention(problem.inputs.query)
        self._groups: dict[int, ContextGroups] = {}

    def ours(self, pieces: int, keep: bool = False, layout: Layout | None = None, heads: int = 1) -> AttentionArm[Ours]:
        """The product's attention.

        Args:
            pieces, keep: see `parallel.context.direct.Way`.
            layout: of the row over the ranks of the ring; None: zigzag.
            heads: ranks of a2a; the others form the ring.
        """
        problem, ring = self.problem, self.problem.ranks // heads
        if heads not in self._groups:
            self._groups[heads] = open_groups(heads, ring)
        place, part = divmod(self.rank, heads)
        plan = plan_rows([layout or zigzag(problem.length, ring)], [problem.documents], place)
        way = Ours(self._groups[heads], plan, self.kernel, pieces, keep)
        return self._arm(way, own_positions(plan, part, heads)[0], way.exposed)

    def control(self, pieces: int, layout: Layout | None = None) -> AttentionArm[Ours]:
        """Ours, waiting for each transfer at once."""
        arm = self.ours(pieces, layout=layout)
        arm.way.core.link = WaitingLink(arm.way.core.link)
        return arm

    def alone(self, pieces: int, layout: Layout | None = None) -> tuple[AttentionArm[Ours], OnlyLink]:
        """Ours without transfers, and its transfers without ours. Collective."""
        arm = self.ours(pieces, layout=layout)
        core = arm.way.core
        link = core.link
        passes = arm.way.record(arm.inputs).passes
        core.link = ReplayLink(passes)
        return arm, OnlyLink(link, passes)

    def peer(self, kind: type[Peer], layout: Layout | None = None) -> AttentionArm[Peer]:
        """Another exchange of whole shards."""
        layout = layout or self.problem.zigzag()
        way = kind(layout, self.problem.documents, self.kernel, self.group)
        return self._arm(way, layout.positions(self.rank))

    def torch(self, rotation: str) -> AttentionArm[TorchRing]:
        """torch's own; one document a row."""
        way = TorchRing(rotation, self.stand_in, self.group)
        return self._arm(way, self.problem.zigzag().positions(self.rank))

    def _arm(self, way: Kind, positions: np.ndarray, exposed: Callable[[], float] | None = None) -> AttentionArm[Kind]:
        return AttentionArm(way, self.problem.inputs.of_rows(positions), positions, exposed)


class Chooser:
    """What the product settles at the start of a run: pieces, and what attention and transfers cost. Collective.

    Args:
        arms: of the problem.
        state, backend: of the ranks.
    """

    def __init__(self, arms: Arms, state: ParallelState, backend: Backend):
        self.arm, self.state, self.backend = arms.ours(1), state, backend
        self.run = arms.problem.run()

    def choose(self) -> ContextSetting:
        """Measured on the link as it is now."""
        setting = set_context([self.arm.way.core], self.run, self.state, self.backend)
        assert setting is not None, "there is a ring"
        return setting
