"""Rules of context parallelism: what its sizes divide, and what it excludes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.context import head_sizes
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.rules.parallel import CP, TP
from megatron_telechat.device_kinds import planned_device
from megatron_telechat.errors import Problem

SIZES = "hierarchical_context_parallel_sizes"
KIND = "cp_comm_type"
PIECES = "cp_pieces"
KEEP = "cp_keep_received"
LAYOUT = "cp_layout"
IMPLEMENTATION = "cp_implementation"
RECORDINGS = ("moe_routing_record", "moe_routing_replay")
MOST_PIECES = 16


def sequence_is_cut(check: Check) -> Iterator[Problem]:
    """Every context-parallel rank holds two equal chunks of a sample, and sequence parallelism cuts its part again."""
    size, length = check.take(CP, "seq_length")
    check.take(TP, "sequence_parallel")
    if size == 1:
        return
    tensor = check.run.parallel.sequence_parallel_size
    unit = 2 * size * tensor
    if length % unit:
        over = f" x {TP}={tensor}" if tensor > 1 else ""
        yield check.problem(
            f"seq_length={length} does not divide by 2 x {CP}={size}{over}: every rank holds two equal chunks of a "
            "sample",
            "seq_length",
            CP,
            *([TP] if tensor > 1 else []),
            fix=flag("seq_length", -(-length // unit) * unit),
        )


def sizes_multiply(check: Check) -> Iterator[Problem]:
    """The sizes of a2a and p2p are two, and multiply to the context-parallel size."""
    sizes, kind, size = check.take(SIZES, KIND, CP)
    if kind == "a2a+p2p" and not check.said(SIZES):
        if size > 1:
            yield check.problem(
                f"{KIND}=a2a+p2p needs the ranks of each",
                KIND,
                fix=f"{flag(SIZES, f'2 {max(size // 2, 1)}')}, or {flag(KIND, 'auto')}",
            )
            check.bad.add(SIZES)
        return
    if not sizes or not check.said(SIZES):
        return
    if len(sizes) != 2 or min(sizes) < 1 or sizes[0] * sizes[1] != size:
        yield check.problem(
            f"{SIZES}={' '.join(map(str, sizes))} are not two sizes whose product is {CP}={size}",
            SIZES,
            CP,
            fix=f"{flag(SIZES, f'1 {size}')}, or leave it out",
        )
        check.bad.add(SIZES)
        return
    wanted = {"p2p": (1, size), "a2a": (size, 1)}.get(kind, sizes)
    if tuple(sizes) != wanted:
        yield check.problem(
            f"{KIND}={kind} means {wanted[0]} {wanted[1]}, not {SIZES}={' '.join(map(str, sizes))}",
            KIND,
            SIZES,
            fix=f"{flag(KIND, 'a2a+p2p')}, or leave the sizes out",
        )
        check.bad.add(SIZES)


def heads_are_exchanged_whole(check: Check) -> Iterator[Problem]:
    """An a2a group divides the heads and the groups of a tensor-parallel rank."""
    sizes, heads, groups, tensor, size = check.take(SIZES, "num_attention_heads", "num_query_groups", TP, CP)
    check.take(KIND)
    if size == 1 or not groups or heads % tensor or groups % tensor:
        return
    exchanged = check.run.parallel.context_sizes[0]
    allowed = head_sizes(check.run)
    if exchanged not in allowed:
        yield check.problem(
            f"a2a over {exchanged} ranks cuts the {heads // tensor} heads and {groups // tensor} groups of a "
            f"tensor-parallel rank, and it does not divide both",
            KIND,
            SIZES,
            TP,
            fix=f"{flag(KIND, 'p2p')}, or at most {allowed[-1]} ranks of a2a",
        )


def the_other_ring_is_asked_what_it_can(check: Check) -> Iterator[Problem]:
    """TransformerEngine's attention over ranks: a ring of whole shards on CUDA, one document a sample."""
    name, size, kind, device = check.take(IMPLEMENTATION, CP, KIND, "device")
    sizes, apart, keep, pieces, trace = check.take(SIZES, "reset_attention_mask", KEEP, PIECES, "cp_trace")
    if name == "own":
        return
    own = flag(IMPLEMENTATION, "own")
    if size == 1:
        yield check.problem(
            f"{IMPLEMENTATION}={name}, but with {CP}=1 every rank holds whole samples", IMPLEMENTATION, CP, fix=own
        )
        return
    if not planned_device(device).transformer_engine:
        yield check.problem(
            f"{IMPLEMENTATION}={name}: Transformer Engine has no kernels for device={device}",
            IMPLEMENTATION,
            "device",
            fix=own,
        )
    if kind not in ("auto", "p2p") or (sizes and sizes[0] > 1):
        yield check.problem(f"{IMPLEMENTATION}={name} is p2p alone", IMPLEMENTATION, KIND, SIZES, fix=flag(KIND, "p2p"))
    if apart:
        yield check.problem(
            f"{IMPLEMENTATION}={name} does not keep documents apart: its packed form has given wrong attention without "
            "an error (Transformer Engine, issue 3331)",
            IMPLEMENTATION,
            "reset_attention_mask",
            fix=own,
        )
    for setting, given in ((KEEP, keep), (PIECES, pieces != "auto"), ("cp_trace", trace is not None)):
        if given:
            yield check.problem(
                f"{setting} belongs to {IMPLEMENTATION}=own", setting, IMPLEMENTATION, fix=f"drop it, or {own}"
            )


def no_attention_dropout(check: Check) -> Iterator[Problem]:
    """The blocks of a context-parallel attention have no common random numbers."""
    size, dropout = check.take(CP, "attention_dropout")
    if size > 1 and dropout:
        yield check.problem(
            f"attention_dropout={dropout} is not possible with {CP}={size}: the parts of a row of probabilities are "
            "computed on different ranks",
            "attention_dropout",
            CP,
            fix=flag("attention_dropout", 0.0),
        )


def pieces_are_some(check: Check) -> Iterator[Problem]:
    """cp_pieces is auto or a small positive number."""
    pieces = check.take(PIECES)
    if pieces != "auto" and not 1 <= pieces <= MOST_PIECES:
        yield check.one(f"{PIECES}={pieces} is not between 1 and {MOST_PIECES}", PIECES, fix=flag(PIECES, "auto"))


def a_trace_has_an_exchange(check: Check) -> Iterator[Problem]:
    """cp_trace needs ranks that exchange keys and values, or heads."""
    steps, size = check.take("cp_trace", CP)
    if steps is not None and size == 1:
        yield check.problem(
            f"cp_trace={steps}, but with {CP}=1 no rank exchanges anything for its attention",
            "cp_trace",
            CP,
            fix=f"leave --cp-trace out, or {flag(CP, 2)}",
        )


def recordings_have_fixed_places(check: Check) -> Iterator[Problem]:
    """A recording of the routing is of fixed positions a rank, which other layouts choose for each sample."""
    record, replay, layout, size, apart = check.take(*RECORDINGS, LAYOUT, CP, "reset_attention_mask")
    if (record or replay) and size > 1 and apart and layout != "zigzag":
        name = RECORDINGS[0] if record else RECORDINGS[1]
        yield check.problem(
            f"{LAYOUT}={layout} gives a rank other positions in every sample, but {name} needs fixed ones",
            LAYOUT,
            name,
            fix=flag(LAYOUT, "zigzag"),
        )


RULES: tuple[Rule, ...] = (
    sequence_is_cut,
    sizes_multiply,
    heads_are_exchanged_whole,
    the_other_ring_is_asked_what_it_can,
    no_attention_dropout,
    pieces_are_some,
    a_trace_has_an_exchange,
    recordings_have_fixed_places,
)
