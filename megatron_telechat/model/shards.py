"""The parameters of this rank and the pieces of the model's tensors that they hold.

What a tensor is, and which piece of it a rank holds, is said in `megatron_telechat.tensors`. Here the modules that were
built are held to it: a parameter without a row in the table, or of another size than its piece, is an error.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from megatron_telechat.config.layout import pipeline_layout
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError, Problem
from megatron_telechat.parallel.agreement import gather_objects
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.parallel.topology import Topology
from megatron_telechat.tensors.pieces import Piece, is_writer, piece_at, tiling_problems, virtual_stage_table
from megatron_telechat.tensors.table import layer_key, layer_of, layer_table, tensor_table

_TABLE = "megatron_telechat/tensors/table.py"
_REPORT = "this is a bug, please report it"
_SHOWN = 8


@dataclass(frozen=True)
class LocalParameter:
    """One local parameter and the piece it holds.

    Attributes:
        virtual_stage: number of the virtual stage on this rank.
        name: name of the parameter in that virtual stage.
        writer: of all ranks that hold this piece, this is the one that counts; the pieces of all writers tile every
            tensor exactly once.
    """

    virtual_stage: int
    name: str
    parameter: nn.Parameter
    piece: Piece
    writer: bool


_LOCAL_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")

# TransformerEngine keeps a norm's weight inside the linear layer that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def parameter_shards(virtual_stages: Sequence[nn.Module], run: RunConfig, state: ParallelState) -> list[LocalParameter]:
    """The parameters of this rank with their pieces, in the order of virtual stages and model.

    Args:
        virtual_stages: those of this rank, bare or wrapped (``.module``).

    Raises:
        ConfigError: naming every parameter that has no row in the table, not the size of its piece, or the gradient
            reduction of the other domain.
    """
    table = tensor_table(run.model)
    found: list[LocalParameter] = []
    problems: list[Problem] = []
    for number, wrapped in enumerate(virtual_stages):
        virtual_stage = unwrap(wrapped)
        numbers = [layer.layer_number - 1 for layer in virtual_stage.decoder.layers]
        for name, parameter in virtual_stage.named_parameters():
            key = global_key(name, numbers)
            if key not in table:
                fix = f"give the tensor a row in {_TABLE}"
                problems.append(Problem(f"the model has a parameter {key} without a row in its table", "model", fix))
                continue
            piece = piece_at(table[key], state)
            if piece.numel != parameter.numel():
                what = f"{key} was built with shape {tuple(parameter.shape)}, its piece on this rank is"
                problems.append(Problem(f"{what} {piece.box.shape} of {piece.spec.shape}", name, f"correct {_TABLE}"))
            if getattr(parameter, "allreduce", True) == piece.spec.expert:
                problems.append(_wrong_domain(piece, name))
            found.append(LocalParameter(number, name, parameter, piece, is_writer(piece.spec, state)))
    if problems:
        raise ConfigError(problems)
    return found


def _wrong_domain(piece: Piece, name: str) -> Problem:
    """A parameter whose mark ``allreduce`` (megatron-core: reduced over the data-parallel ranks, not the
    expert-data-parallel ones) says something else than its row."""
    said = "belongs" if piece.spec.expert else "does not belong"
    what = f"{piece.key} {said} to the routed experts by the table of tensors, and its module says otherwise"
    return Problem(what, name, "set the parameter's attribute allreduce to False for the experts only")


class VirtualStage(Protocol):
    """What is asked of a virtual stage here: its parameters, and which layers it holds."""

    decoder: Any

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(name, parameter) of each; layers are numbered from 0 in the virtual stage."""
        ...


def unwrap(virtual_stage: nn.Module) -> VirtualStage:
    """The virtual stage inside its data-parallel wrapper."""
    inner: Any = virtual_stage
    while not hasattr(inner, "decoder"):
        inner = inner.module
    return inner


def global_key(name: str, layer_numbers: Sequence[int]) -> str:
    """Key of a parameter of a virtual stage whose layers have these global numbers."""
    match = _LOCAL_LAYER.fullmatch(name)
    if match is None:
        return name
    local, rest = int(match.group(1)), match.group(2)
    return layer_key(layer_numbers[local], _FUSED_NORMS.get(rest, rest))


def verify_tiling(shards: Iterable[LocalParameter], run: RunConfig, state: ParallelState) -> None:
    """Check that the writers of all ranks together hold every tensor exactly once; collective.

    By arithmetic, the pieces of all places tile the table, and the topology gives each rank a place of its own. So it
    is enough that each rank stands at its place and has built exactly the pieces of that place; what is exchanged is
    what is wrong, which does not grow with the model.

    Raises:
        ConfigError: on every rank, naming the tensors that are missing or held twice and the ranks, or what the layout
            of the pipeline leaves out.
    """
    mine = [*_misplaced(run, state), *_differences(shards, run, state)]
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, found in enumerate(gather_objects(mine)):
        for what in found:
            ranks_of[what].append(rank)
    problems = tiling_problems(run)
    problems += [Problem(what, _rank_names(ranks), _REPORT) for what, ranks in ranks_of.items()]
    if problems:
        raise ConfigError(problems).on_every_rank()


def _misplaced(run: RunConfig, state: ParallelState) -> list[str]:
    """Where the groups of this rank put it beside its place in the topology, on which pieces and plans rest."""
    meant = vars(Topology.from_config(run.parallel).coordinates(state.rank))
    return [
        f"the groups put this rank at {name} {number}, its place is {name} {meant[name]}"
        for name, number in state.coordinates().items()
        if number != meant[name]
    ]


def _differences(shards: Iterable[LocalParameter], run: RunConfig, state: ParallelState) -> list[str]:
    """What this rank has built beside, or in place of, the tensors that the layout gives to it."""
    layout = pipeline_layout(run)
    wanted = {
        (virtual_stage, key)
        for virtual_stage in range(layout.num_virtual_stages)
        for key in virtual_stage_table(run.model, layout, state.pp_rank, virtual_stage)
    }
    built = Counter((shard.virtual_stage, shard.piece.key) for shard in shards)
    missing = {key for _, key in wanted - set(built)}
    layers = sorted({layer for layer in map(layer_of, missing) if layer is not None})
    whole = [layer for layer in layers if set(layer_table(run.model, layer)) <= missing]
    return [
        *(f"layer {layer} was not built" for layer in whole),
        *(f"{key} was not built" for key in sorted(missing) if layer_of(key) not in whole),
        *(f"{key} was built, and the layout gives it to another rank" for _, key in sorted(set(built) - wanted)),
        *(f"{key} was built {count} times" for (_, key), count in sorted(built.items()) if count > 1),
    ]


def _rank_names(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_SHOWN]))}{more}"
