"""Which part of which global tensor every local parameter is.

Global tensors are those of `costs.parameters.parameter_table`: their keys and shapes know no layout.
Initialisation, checkpoints, weight conversion and the start-up check all speak of parameters
through the pieces made here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import nn

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.parameters import (
    is_expert_key,
    is_replicated_over_tensor_parallel,
    parameter_table,
)
from megatron_telechat.errors import ConfigError, Problem
from megatron_telechat.parallel.agreement import gather_objects
from megatron_telechat.parallel.state import ParallelState

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One box of a global tensor, stored row-major in a contiguous flat range of a local parameter.

    Attributes:
        key, global_shape: the global tensor.
        global_offset, shape: the box.
        flat_start: where it begins in the flattened local parameter.
    """

    key: str
    global_shape: Shape
    global_offset: Shape
    shape: Shape
    flat_start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class LocalParameter:
    """One local parameter and the pieces it consists of.

    Attributes:
        chunk: number of the virtual chunk on this rank.
        name: name of the parameter in that chunk.
        is_expert: belongs to the routed experts, whose replicas are the expert-data-parallel ranks.
        writer: of all ranks that hold these pieces, this is the one that counts; the pieces of all
            writers tile every global tensor exactly once.
    """

    chunk: int
    name: str
    parameter: nn.Parameter
    pieces: tuple[Piece, ...]
    is_expert: bool
    writer: bool


# Axis of the global tensor that is cut over the tensor-parallel ranks (expert-tensor-parallel ones for the
# experts, whose axis 0 is cut over the expert-parallel ranks besides). By the end of the key, first match.
_CUT_AXIS = (
    ("mlp.experts.linear_fc1.weight", 2),
    ("mlp.experts.linear_fc2.weight", 2),
    ("linear_fc1.weight", 1),
    ("linear_fc2.weight", 1),
    ("linear_proj.weight", 1),
    ("linear_qkv.weight", 0),
    ("word_embeddings.weight", 0),
    ("output_layer.weight", 0),
)

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")

# TransformerEngine keeps a norm's weight inside the linear layer that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def parameter_shards(chunks: Sequence[nn.Module], run: RunConfig, state: ParallelState) -> list[LocalParameter]:
    """The parameters of this rank with their places in the global tensors, in chunk and model order.

    Args:
        chunks: model chunks of this rank, bare or wrapped (``.module``).
    """
    table = parameter_table(run.model)
    out = []
    for number, wrapped in enumerate(chunks):
        chunk = unwrap(wrapped)
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            key = global_key(name, numbers)
            assert key in table, f"{name} is no parameter of the model's table ({key})"
            piece = local_piece(key, table[key], state)
            assert piece.numel == parameter.numel(), f"{name} {tuple(parameter.shape)} is not {piece}"
            out.append(
                LocalParameter(
                    chunk=number,
                    name=name,
                    parameter=parameter,
                    pieces=(piece,),
                    is_expert=is_expert_key(key),
                    writer=is_writer(key, state),
                )
            )
    return out


def unwrap(chunk: nn.Module) -> nn.Module:
    """The model chunk inside its data-parallel wrapper."""
    while not hasattr(chunk, "decoder"):
        chunk = chunk.module
    return chunk


def global_key(name: str, layer_numbers: Sequence[int]) -> str:
    """Global key of a parameter of a chunk whose layers have these global numbers."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    local, rest = int(match.group(1)), match.group(2)
    return f"decoder.layers.{layer_numbers[local]}.{_FUSED_NORMS.get(rest, rest)}"


def local_piece(key: str, global_shape: Shape, state: ParallelState) -> Piece:
    """The box of a global tensor that the ranks at these coordinates hold; it fills the local parameter.

    A dense linear_fc1 is [2, ffn, hidden] globally and [2*ffn / tp, hidden] locally, gate rows first:
    the box [2, ffn / tp, hidden] in row-major order.
    """
    offset, shape = [0] * len(global_shape), list(global_shape)

    def cut(axis: int, size: int, rank: int) -> None:
        assert shape[axis] % size == 0, f"{key} {global_shape} is not divisible by {size} along axis {axis}"
        shape[axis] //= size
        offset[axis] = rank * shape[axis]

    expert = is_expert_key(key)
    if expert:
        cut(0, state.ep_size, state.ep_rank)
    axis = next((axis for suffix, axis in _CUT_AXIS if key.endswith(suffix)), None)
    if axis is not None:
        cut(axis, *((state.etp_size, state.etp_rank) if expert else (state.tp_size, state.tp_rank)))
    return Piece(key, global_shape, tuple(offset), tuple(shape), 0)


def is_writer(key: str, state: ParallelState) -> bool:
    """Whether this rank is the first of those that hold the same piece."""
    if is_expert_key(key):
        return state.edp_rank == 0 and (state.etp_rank == 0 or not key.endswith(".bias"))
    whole = is_replicated_over_tensor_parallel(key)
    return state.dp_rank == 0 and state.cp_rank == 0 and (state.tp_rank == 0 or not whole)


def verify_tiling(shards: Iterable[LocalParameter], run: RunConfig, state: ParallelState) -> None:
    """Check that the writers of all ranks together hold every global tensor exactly once; collective.

    Raises:
        ConfigError: on every rank, naming the layers and tensors that are missing, held twice or of wrong size.
    """
    mine = [
        (piece.key, piece.global_shape, piece.global_offset, piece.shape)
        for shard in shards
        if shard.writer
        for piece in shard.pieces
    ]
    problems = tiling_problems([piece for pieces in gather_objects(mine) for piece in pieces], run)
    if problems:
        raise ConfigError(problems).on_every_rank()


def tiling_problems(pieces: Iterable[tuple[str, Shape, Shape, Shape]], run: RunConfig) -> list[Problem]:
    """What keeps these (key, global shape, offset, shape) from tiling the parameter table exactly."""
    table = parameter_table(run.model)
    boxes: Mapping[str, list[tuple[Shape, Shape]]] = defaultdict(list)
    wrong = []
    for key, global_shape, offset, shape in pieces:
        if table.get(key) != global_shape:
            wrong.append(Problem(f"{key} was built with global shape {global_shape}, the model has {table.get(key)}"))
        elif any(at < 0 or at + size > whole for at, size, whole in zip(offset, shape, global_shape, strict=True)):
            wrong.append(Problem(f"{key} was built at {offset} with shape {shape}, outside of {global_shape}"))
        boxes[key].append((offset, shape))
    missing, partial, double = [], [], []
    for key, global_shape in table.items():
        held = sum(math.prod(shape) for _, shape in boxes[key])
        if held == 0:
            missing.append(key)
        elif any(_overlap(a, b) for a, b in combinations(boxes[key], 2)):
            double.append(key)
        elif held != math.prod(global_shape):
            partial.append(key)
    return [
        *wrong,
        *_missing_problems(missing, run),
        *(Problem(f"{key}: only a part of it was built") for key in partial),
        *(Problem(f"{key}: built more than once") for key in double),
    ]


def _overlap(a: tuple[Shape, Shape], b: tuple[Shape, Shape]) -> bool:
    return all(
        max(at_a, at_b) < min(at_a + size_a, at_b + size_b) for at_a, size_a, at_b, size_b in zip(*a, *b, strict=True)
    )


def _missing_problems(missing: Sequence[str], run: RunConfig) -> list[Problem]:
    """Whole missing layers as one problem, single tensors one by one."""
    if not missing:
        return []
    of_layer: Mapping[int, set[str]] = defaultdict(set)
    rest = []
    for key in missing:
        match = _LAYER.fullmatch(key)
        if match:
            of_layer[int(match.group(1))].add(key)
        else:
            rest.append(key)
    expected: Mapping[int, int] = defaultdict(int)
    for key in parameter_table(run.model):
        match = _LAYER.fullmatch(key)
        if match:
            expected[int(match.group(1))] += 1
    whole = [layer for layer, keys in sorted(of_layer.items()) if len(keys) == expected[layer]]
    rest += [key for layer, keys in of_layer.items() if layer not in whole for key in sorted(keys)]
    problems = [Problem(f"{key}: not built on any rank") for key in rest]
    if whole:
        parallel, total = run.parallel, run.model.num_layers
        stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
        names = f"layer {whole[0]} is" if len(whole) == 1 else f"layers {', '.join(map(str, whole))} are"
        problems.insert(
            0,
            Problem(
                f"{total} layers on {stages} pipeline stages built only {total - len(whole)}: {names} missing",
                where="pipeline_model_parallel_layout",
                fix="give a layout that holds every layer",
            ),
        )
    return problems
