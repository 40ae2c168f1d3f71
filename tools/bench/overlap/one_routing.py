"""One routing for all arms of a training bench: at a near tie of two experts rounding must not let their curves
part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class OneRouting:
    """In every step the first arm chooses the experts, and the others take its choices. What they would choose is not
    looked at."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._chosen: dict[int, list[Tensor]] = {}

    @contextmanager
    def step(self, virtual_stages: Sequence[nn.Module], number: int) -> Iterator[None]:
        """Around one arm's step with this number; its MoE layers are ours or megatron-core's."""
        from megatron.core.transformer.moe.router import TopKRouter

        from megatron_telechat.moe import Router
        from megatron_telechat.moe.choices import RoutingTape

        if number != self._step:
            self._step, self._chosen = number, {}
        first = not self._chosen
        routers: list[Any] = [
            module for stage in virtual_stages for module in stage.modules() if isinstance(module, TopKRouter)
        ]
        tapes = [RoutingTape(self._chosen.get(router.layer_number), notes=first) for router in routers]
        for router, tape in zip(routers, tapes, strict=True):
            if isinstance(router, Router):
                router.tape = tape
            else:
                router.router_replay = _CoreTape(tape)
        try:
            yield
        finally:
            for router in routers:
                router.tape = router.router_replay = None
        if first:
            self._chosen = {
                router.layer_number: [noted.experts for noted in tape.noted]
                for router, tape in zip(routers, tapes, strict=True)
            }


class _CoreTape:
    """A tape in the place of megatron-core's router replay, which keeps the choices of one call only."""

    def __init__(self, tape: Any):
        self.tape = tape

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """megatron-core's call: the scores [tokens, top-k] and experts of the tape's choice."""
        assert default_compute_topk is not None
        _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        experts = self.tape.choose(scores, own)
        return scores.gather(1, experts), experts
