"""Rules of the ranks: what tensor, expert and data parallelism must divide."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.rules.model import has_dense_layers, nearest_divisor
from megatron_telechat.errors import Problem

TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
CP = "context_parallel_size"
EP = "expert_model_parallel_size"
ETP = "expert_tensor_parallel_size"


def tensor_parallel_divides(check: Check) -> Iterator[Problem]:
    """The tensor-parallel size divides heads, groups, widths and the vocabulary."""
    for name in (
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "vocab_size",
    ):
        tensor = check.take(TP)
        if name in check.bad:
            continue
        size = check.take(name)
        if name == "ffn_hidden_size" and not has_dense_layers(check):
            continue
        if name == "num_query_groups" and (size is None or _same_as_heads(check)):
            continue
        if size and size % tensor:
            if name == "vocab_size":
                fix = (
                    f"{flag(name, -(-size // tensor) * tensor)} (the vocabulary is never padded), or "
                    f"{flag(TP, _largest_tp(check, size))}"
                )
            else:
                fix = flag(TP, _largest_tp(check, size))
            yield check.problem(f"{TP}={tensor} does not divide {name}={size}", TP, name, fix=fix)


def _same_as_heads(check: Check) -> bool:
    """Derived from the heads, which get the complaint."""
    return not check.said("num_query_groups")


def _largest_tp(check: Check, size: int) -> int:
    tensor = check.take(TP)
    return max(d for d in range(1, tensor + 1) if size % d == 0 and tensor % d == 0)


def sequence_parallel_divides(check: Check) -> Iterator[Problem]:
    """Sequence parallelism needs a sequence length that the tensor-parallel size divides."""
    tensor, sequence, on = check.take(TP, "seq_length", "sequence_parallel")
    if on and sequence % tensor:
        yield check.problem(
            f"sequence_parallel splits seq_length={sequence} over {TP}={tensor}, which does not divide it",
            "seq_length",
            TP,
            fix=flag("seq_length", -(-sequence // tensor) * tensor),
        )


def experts_need_sequence_parallel(check: Check) -> Iterator[Problem]:
    """Experts with tensor parallelism need sequence parallelism: each token reaches the router once."""
    tensor, experts, on = check.take(TP, "num_experts", "sequence_parallel")
    if experts is not None and tensor > 1 and on is False:
        yield check.problem(
            f"sequence_parallel is off, but experts with {TP}={tensor} need it (each token must reach the router once)",
            "sequence_parallel",
            TP,
            fix=flag("sequence_parallel", True),
        )


def world_divides(check: Check) -> Iterator[Problem]:
    """TP x PP x CP divides the world size."""
    world, tensor, pipeline, context = check.take("world_size", TP, PP, CP)
    size = tensor * pipeline * context
    if world % size:
        what = f"world_size={world} does not divide by {TP}={tensor} x {PP}={pipeline}" + (
            f" x {CP}={context}" if context > 1 else ""
        )
        want = -(-world // size) * size
        start = (
            f"--world-size {want}"
            if check.dry_run
            else f"torchrun --nproc-per-node {min(want, 8)}" + (f" --nnodes {-(-want // 8)}" if want > 8 else "")
        )
        yield check.problem(
            what, "world_size", TP, PP, fix=f"a multiple of {size} ranks, such as {start}, or smaller parallel sizes"
        )
        check.bad.add("world_size")


def nodes_are_full(check: Check) -> Iterator[Problem]:
    """ranks_per_node divides the world size."""
    world, node = check.take("world_size", "ranks_per_node")
    if node is not None and world % node:
        more = node > world
        yield check.problem(
            f"ranks_per_node={node} "
            + (f"is more than world_size={world}" if more else f"does not divide world_size={world}"),
            "ranks_per_node",
            "world_size",
            fix=flag("ranks_per_node", world if more else nearest_divisor(world, node)),
        )


def experts_divide(check: Check) -> Iterator[Problem]:
    """The expert-parallel size divides the number of experts."""
    experts, size = check.take("num_experts", EP)
    if experts is None or size is None or experts % size == 0:
        return
    if check.said(EP):
        fix = flag(EP, nearest_divisor(experts, size))
    else:
        fix = f"{flag(TP, nearest_divisor(experts, size))}, or {flag('fold_tensor_into_experts', False)}"
    yield check.problem(f"{EP}={size} does not divide num_experts={experts}", EP, "num_experts", fix=fix)
    check.bad.add(EP)


def fold_is_consistent(check: Check) -> Iterator[Problem]:
    """A folded tensor domain means ETP 1 and an EP that is a multiple of TP."""
    fold, experts, tensor, size, expert_tensor = check.take("fold_tensor_into_experts", "num_experts", TP, EP, ETP)
    if not fold or experts is None:
        return
    off = flag("fold_tensor_into_experts", False)
    if expert_tensor is not None and expert_tensor != 1:
        yield check.problem(
            f"fold_tensor_into_experts leaves no tensor domain inside an expert, but {ETP}={expert_tensor}",
            ETP,
            "fold_tensor_into_experts",
            fix=f"{flag(ETP, 1)}, or {off}",
        )
        check.bad.add(ETP)
    if size is not None and size % tensor:
        yield check.problem(
            f"fold_tensor_into_experts spreads the experts over whole tensor domains, but {EP}={size} is not a "
            f"multiple of {TP}={tensor}",
            EP,
            TP,
            "fold_tensor_into_experts",
            fix=f"{flag(EP, tensor)}, or {off}",
        )


def expert_domain_fits(check: Check) -> Iterator[Problem]:
    """EP x ETP divides the ranks of a pipeline stage."""
    world, pipeline, size, expert_tensor, experts = check.take("world_size", PP, EP, ETP, "num_experts")
    if experts is None or size is None or expert_tensor is None:
        return
    domain = size * expert_tensor
    ranks = world // pipeline
    if ranks % domain:
        named = f"{EP}={size}" + (f" x {ETP}={expert_tensor}" if expert_tensor > 1 else "")
        yield check.problem(
            f"the experts take {named}, which does not divide the {ranks} ranks of a pipeline stage "
            f"(world_size={world} / {PP}={pipeline})",
            EP,
            ETP,
            "world_size",
            PP,
            fix=f"a multiple of {domain * pipeline} ranks, or a smaller {EP}",
        )


def expert_tensor_parallel_divides(check: Check) -> Iterator[Problem]:
    """The expert-tensor-parallel size divides the width of an expert."""
    experts, size, width = check.take("num_experts", ETP, "moe_ffn_hidden_size")
    if experts is not None and size and width and width % size:
        yield check.problem(
            f"{ETP}={size} does not divide moe_ffn_hidden_size={width}",
            ETP,
            "moe_ffn_hidden_size",
            fix=flag(ETP, nearest_divisor(width, size)),
        )


def param_gather_needs_distributed_optimizer(check: Check) -> Iterator[Problem]:
    """overlap_param_gather needs the distributed optimizer and overlap_grad_reduce."""
    gather, distributed, reduce = check.take("overlap_param_gather", "use_distributed_optimizer", "overlap_grad_reduce")
    if gather and not distributed:
        yield check.problem(
            "overlap_param_gather needs use_distributed_optimizer",
            "overlap_param_gather",
            "use_distributed_optimizer",
            fix=flag("use_distributed_optimizer", True),
        )
    if gather and not reduce:
        yield check.problem(
            "overlap_param_gather needs overlap_grad_reduce",
            "overlap_param_gather",
            "overlap_grad_reduce",
            fix=flag("overlap_grad_reduce", True),
        )


RULES: tuple[Rule, ...] = (
    world_divides,
    nodes_are_full,
    tensor_parallel_divides,
    sequence_parallel_divides,
    experts_need_sequence_parallel,
    experts_divide,
    fold_is_consistent,
    expert_domain_fits,
    expert_tensor_parallel_divides,
    param_gather_needs_distributed_optimizer,
)
