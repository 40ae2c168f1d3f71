"""How many parameters a model has, in all and on one rank: sums over the table of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_telechat.config.schema import ModelConfig, ParallelConfig
from megatron_telechat.tensors.pieces import number_of_pieces
from megatron_telechat.tensors.table import TensorSpec, tensor_table


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all of them, and those that act on one token (top-k experts)."""

    total: int
    active: int


@dataclass(frozen=True)
class LocalCount:
    """Parameters that one rank holds: those shared by the attention domain, and those of its experts."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """Parameters that the rank holds."""
        return self.dense + self.expert

    def __add__(self, other: LocalCount) -> LocalCount:
        return LocalCount(self.dense + other.dense, self.expert + other.expert)


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the whole model, and those one token meets: of the routed experts only top-k.

    Both embedding matrices are counted, as in the published sizes; one where they are tied.
    """
    total = active = 0
    for spec in tensor_table(model).values():
        total += spec.numel
        # axis 0 of a routed expert's tensor counts the experts
        active += spec.numel // spec.shape[0] * model.moe_router_topk if spec.expert else spec.numel
    return ParameterCount(total, active)


def local_count(table: Mapping[str, TensorSpec], parallel: ParallelConfig) -> LocalCount:
    """Parameters one rank holds of the tensors in `table` (those of its pipeline stage)."""
    dense = expert = 0
    for spec in table.values():
        share = spec.numel // number_of_pieces(spec, parallel)
        if spec.expert:
            expert += share
        else:
            dense += share
    return LocalCount(dense, expert)
