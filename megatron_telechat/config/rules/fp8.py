"""Rules of products in FP8, which Transformer Engine computes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.fields import fields_by_name, values_of
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.rules.model import has_dense_layers
from megatron_telechat.config.rules.parallel import TP
from megatron_telechat.config.rules.recompute import GRANULARITY, MODULES, PLAN
from megatron_telechat.device_kinds import planned_device
from megatron_telechat.errors import Problem

FORMAT = "fp8_format"
RECIPE = "fp8_recipe"
OF_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")

MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""Recipe → what divides both dimensions of an operand of its products (Transformer Engine's documentation of
``autocast``, and its ``MXFP8_BLOCK_SCALING_SIZE``)."""

OFF = "drop --fp8-format"


def settings_go_with_fp8(check: Check) -> Iterator[Problem]:
    """The settings of a recipe need FP8, and those of delayed scaling this recipe."""
    asked, recipe = check.take(FORMAT, RECIPE)
    values = values_of(check.run)
    for name in (RECIPE, *OF_DELAYED):
        if name in check.bad or not check.said_by_person(name) or values[name] == fields_by_name()[name].default:
            continue
        if asked is None:
            yield check.problem(
                f"{name}={values[name]} without {FORMAT}: nothing is computed in FP8",
                name,
                fix=f"{flag(FORMAT, 'hybrid')}, or drop {fields_by_name()[name].flag}",
            )
        elif name in OF_DELAYED and recipe != "delayed":
            yield check.problem(
                f"{name}={values[name]} belongs to {RECIPE} delayed, which is {recipe}",
                name,
                RECIPE,
                fix=f"{flag(RECIPE, 'delayed')}, or drop {fields_by_name()[name].flag}",
            )


def fp8_is_of_bf16(check: Check) -> Iterator[Problem]:
    """What is not FP8 is bf16: it has the range of fp32, so that no loss scale is needed."""
    precision = check.take("precision")
    if _asked(check) and precision != "bf16":
        yield check.problem(
            f"{FORMAT}={check.take(FORMAT)} with precision={precision}: what is not FP8 must be bf16",
            FORMAT,
            "precision",
            fix=f"{flag('precision', 'bf16')}, or {OFF}",
        )


def device_has_fp8(check: Check) -> Iterator[Problem]:
    """Transformer Engine has kernels for the device. Whether it is installed is asked when a run starts."""
    device = check.take("device")
    if _asked(check) and not planned_device(device).transformer_engine:
        yield check.problem(
            f"{FORMAT}={check.take(FORMAT)}: FP8 is computed by Transformer Engine, which has no kernels for "
            f"device={device}",
            FORMAT,
            "device",
            fix=OFF,
        )


def operands_have_whole_blocks(check: Check) -> Iterator[Problem]:
    """Tokens and widths on a rank are multiples of what the recipe's products take."""
    tensor, hidden, heads, head = check.take(TP, "hidden_size", "num_attention_heads", "kv_channels")
    sequence, micro, width, recipe = check.take("seq_length", "micro_batch_size", "ffn_hidden_size", RECIPE)
    check.take("num_query_groups", "sequence_parallel")
    if not _asked(check):
        return
    model, parallel, unit = check.run.model, check.run.parallel, MULTIPLE[recipe]
    query, key = heads * model.head_dim, model.query_groups * model.head_dim
    operands = {
        "tokens of a micro-batch": (sequence * micro // parallel.sequence_parallel_size, ("seq_length", TP)),
        "hidden_size": (hidden, ("hidden_size",)),
        "rows of the query, key and value projection": ((query + 2 * key) // tensor, ("num_attention_heads", TP)),
        "columns of the output projection": (query // tensor, ("num_attention_heads", TP)),
    }
    if has_dense_layers(check):
        operands["ffn_hidden_size"] = (width // tensor, ("ffn_hidden_size", TP))
    for what, (size, names) in operands.items():
        if size % unit:
            yield check.problem(
                f"{RECIPE}={recipe} needs multiples of {unit}; {what} on a rank: {size}",
                *names,
                RECIPE,
                fix=f"sizes that are multiples of {unit}, or {OFF}",
            )


def norms_are_kept(check: Check) -> Iterator[Problem]:
    """Recompute of norms frees the input that an FP8 product would have kept as FP8 anyway."""
    granularity, modules, layout = check.take(GRANULARITY, MODULES, PLAN)
    named = PLAN if layout is not None and "layernorm" in layout else None
    if granularity == "selective" and "layernorm" in modules:
        named = MODULES
    if _asked(check) and named is not None:
        yield check.problem(
            f"{named} names layernorm, which is not recomputed with {FORMAT}: the products keep their inputs in FP8, "
            "so that nothing would be saved",
            named,
            FORMAT,
            fix="full, core_attn, mlp or moe in its place",
        )


def what_fp8_means(check: Check) -> Iterator[Problem]:
    """Notes: what stays bf16, what a prediction leaves out, what a checkpoint does not keep."""
    asked, recipe, experts = check.take(FORMAT, RECIPE, "num_experts")
    deterministic = check.take("deterministic")
    if asked is None:
        return
    check.notes.append(f"{FORMAT}={asked} is not modelled: predicted times, MFU and memory are those of bf16 products")
    if check.described:
        return
    if experts is not None:
        rest = "" if has_dense_layers(check) else "; FP8 is in the projections of the attention only"
        check.notes.append(f"{FORMAT}={asked}: the experts stay bf16{rest}")
    if recipe == "delayed":
        check.notes.append(
            f"{RECIPE}=delayed: checkpoints do not keep the largest values seen: a resume begins with scales of 1"
            + (" and is not bitwise equal to a run without a break" if deterministic else "")
        )
    yield from ()


def _asked(check: Check) -> bool:
    """Whether a run of our training computes in FP8; a planner leaves FP8 out and says so."""
    return check.take(FORMAT) is not None and not check.described


RULES: tuple[Rule, ...] = (
    settings_go_with_fp8,
    fp8_is_of_bf16,
    device_has_fp8,
    operands_have_whole_blocks,
    norms_are_kept,
    what_fp8_means,
)
