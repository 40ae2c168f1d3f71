"""What would make an infeasible plan fit: each small change is tried, none is guessed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_telechat.config.loss_chunks import smaller_rows
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.context import context_sizes
from megatron_telechat.planner.least_memory import least_memory
from megatron_telechat.planner.plan import Question
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import peak_bytes
from megatron_telechat.planner.solve import solve

TRIAL_S = 2.0
"""Seconds of search for a change; its time is the best found by then."""
TRIAL_GAP = 0.02
PAIRS_S = 10.0
"""Seconds spent on pairs of changes."""
Load = Callable[..., RunConfig]


@dataclass(frozen=True)
class Shortage:
    """The stage that lacks most where as little as can be is lacking.

    Attributes:
        lacking_bytes: over the limit, in the best case.
        needed_bytes: of each stage in that case, without the reserve.
        proved: whether no assignment lacks less.
    """

    stage: int
    lacking_bytes: float
    needed_bytes: tuple[float, ...]
    proved: bool


@dataclass(frozen=True)
class Change:
    """Something that makes it fit.

    Attributes:
        flags: to be added.
        text: in words.
        makespan: pipeline seconds of an iteration with it.
        tokens_per_s: tokens of the iteration over those seconds.
    """

    flags: tuple[str, ...]
    text: str
    makespan: float
    tokens_per_s: float


def shortage(problem: BalanceProblem, time_limit_s: float = 10.0) -> Shortage | None:
    """Which stage lacks how much at least; None where the trouble is not memory."""
    least = least_memory(problem, time_limit_s)
    if least.assignment is None:
        return None
    peaks = peak_bytes(problem, least.assignment)
    stage = max(range(problem.P), key=lambda rank: peaks[rank])
    lacking = peaks[stage] - problem.mem_limit
    needed = tuple(peak - problem.const_mem for peak in peaks)
    return Shortage(stage, lacking, needed, least.at_least >= lacking - 1e-5 * problem.mem_limit)


def remedies(question: Question, load: Load) -> list[Change]:
    """The changes that fit, smallest first: one alone, and if none does, two together.

    Smallest: recompute (mildest kind first, it costs time only), then the loss in chunks, then sharding the optimizer,
    then a smaller micro-batch, then more stages, more tensor-parallel and more context-parallel ranks of the same
    number, then more ranks.

    Args:
        load: the run with some flags added; raises ConfigError where they do not go together.
    """
    single = [(flags, text) for flags, text in _singles(question, load)]
    found: list[Change] = []
    for flags, text in single:
        # of one kind of change (its last flag) the smallest that fits is enough
        kind = flags[-2] if flags[0] == "--world-size" else flags[0]
        if kind != "--recompute-kinds" and any(kind in change.flags for change in found):
            continue
        change = _tried(question, load, flags, text)
        if change is not None:
            found.append(change)
    if found:
        return found
    pairs = (
        (one[0] + other[0], f"{one[1]}, and {other[1]}")
        for one, other in itertools.combinations(single, 2)
        if one[0][0] != other[0][0]
    )
    deadline = time.process_time() + PAIRS_S
    timely = itertools.takewhile(lambda pair: time.process_time() < deadline, pairs)
    tried = (_tried(question, load, flags, text) for flags, text in timely)
    return list(itertools.islice((change for change in tried if change), 3))


def _singles(question: Question, load: Load) -> Iterator[tuple[tuple[str, ...], str]]:
    run = question.run
    parallel, block = run.parallel, "moe" if run.model.is_moe else "mlp"
    allowed = {kind for kind in question.kinds if kind != "none"}
    for kind in ("core_attn", "layernorm", f"core_attn+{block}", f"core_attn+{block}+layernorm", "full"):
        if kind not in allowed:
            kinds = ",".join([*sorted(allowed), kind])
            yield ("--recompute-kinds", kinds), f"allow recompute of {'whole layers' if kind == 'full' else kind}"
    rows = smaller_rows(run)
    if rows is not None:
        yield ("--loss-chunk-rows", str(rows)), f"the loss in chunks of {rows:,} rows"
    shards = parallel.data_parallel_size * parallel.context_parallel_size
    if shards > 1 and not parallel.use_distributed_optimizer:
        yield ("--use-distributed-optimizer",), f"shard the optimizer state over {shards} ranks"
    size = run.training.micro_batch_size
    while size > 1:
        size = max(divisor for divisor in range(1, size) if run.training.micro_batch_size % divisor == 0)
        yield ("--micro-batch-size", str(size)), f"micro-batches of {size} instead of {run.training.micro_batch_size}"
    for name, label, factors in (
        ("pipeline", "pipeline stages", (2, 4)),
        ("tensor", "tensor-parallel ranks", (2, 4, 8)),
    ):
        now = getattr(parallel, f"{name}_model_parallel_size")
        for factor in factors:
            flag = f"--{name}-model-parallel-size"
            yield (flag, str(now * factor)), f"{now * factor} {label} instead of {now}"
    now = parallel.context_parallel_size
    for size in context_sizes(run):
        if size > now and size % now == 0:
            yield ("--context-parallel-size", str(size)), f"{size} ranks that share a row instead of {now}"
    ranks = parallel.world_size
    for factor in (2, 4, 8):
        more = ("--world-size", str(ranks * factor))
        text = f"{ranks * factor} ranks instead of {ranks}"
        if parallel.use_distributed_optimizer:
            yield more, f"{text}, which share the optimizer state"
        stages = parallel.pipeline_model_parallel_size * factor
        yield (*more, "--pipeline-model-parallel-size", str(stages)), f"{text}, in {stages} pipeline stages"


def _tried(question: Question, load: Load, flags: tuple[str, ...], text: str) -> Change | None:
    """The change, if with it the run is one and fits."""
    kinds, rest = question.kinds, list(flags)
    if "--recompute-kinds" in rest:
        at = rest.index("--recompute-kinds")
        kinds = tuple(rest[at + 1].split(","))
        del rest[at : at + 2]
    try:
        run = load(*rest)
        device = replace(run, training=replace(run.training, device=question.run.training.device))
        problem = replace(question.of(device), kinds=kinds).problem()
    except ConfigError:
        return None
    if run.num_microbatches < 1:
        return None
    solution = solve(problem, TRIAL_S, gap=TRIAL_GAP)
    if solution.assignment is None or not solution.makespan:
        return None
    tokens = run.training.global_batch_size * run.training.seq_length
    return Change(flags, text, solution.makespan, tokens / solution.makespan)
