"""The space of a sweep: every way to lay a run out over its ranks, each with its balance problem.

A layout is made from one loaded run by changing sizes, which takes no time; whether the configuration takes it is asked
(`Layout.loaded`) only of those that are solved.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_telechat.config.context import head_sizes, least_traffic
from megatron_telechat.config.microbatch_groups import possible_groups, schedule_takes
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.time import TimeModel
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.build import group_size
from megatron_telechat.planner.context import KEEP, SIZE, SPLIT, context_sizes, keep_flags, keeping, split_over
from megatron_telechat.planner.plan import Question
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.step import other_virtual_stages, whole_step

MOST_VIRTUAL_STAGES = 8
TENSOR, PIPELINE, VIRTUAL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
)
GROUP = "microbatch_group_size_per_virtual_pipeline_stage"
EXPERT, EXPERT_TENSOR, MICRO = "expert_model_parallel_size", "expert_tensor_parallel_size", "micro_batch_size"
OFFLOAD, OFFLOAD_SHARE, OFFLOAD_BESIDE = (
    "optimizer_cpu_offload",
    "optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d",
)
FLAGS = {
    TENSOR: "--tensor-model-parallel-size",
    PIPELINE: "--pipeline-model-parallel-size",
    SIZE: "--context-parallel-size",
    VIRTUAL: "--num-virtual-stages-per-pipeline-rank",
    GROUP: "--microbatch-group-size-per-virtual-pipeline-stage",
    EXPERT: "--expert-model-parallel-size",
    EXPERT_TENSOR: "--expert-tensor-parallel-size",
    MICRO: "--micro-batch-size",
}
"""Sizes that a sweep varies, and how to ask for them."""
VARIED = (*FLAGS, *SPLIT, KEEP, OFFLOAD)
"""All that a sweep varies, unless it is fixed."""
NO_FOLD = "--no-fold-tensor-into-experts"
Load = Callable[..., RunConfig]


@dataclass(frozen=True)
class Layout:
    """One layout of the space.

    Attributes:
        number: its place in the space, the same for the same question.
        flags: of the training, that ask for its sizes.
        question: with the run of this layout.
        problem: of its whole step.
    """

    number: int
    flags: tuple[str, ...]
    question: Question
    problem: BalanceProblem

    @property
    def schedule(self) -> tuple[int, int, int, int]:
        """What the graph of its ops depends on."""
        return self.problem.schedule

    def loaded(self, load: Load) -> Layout:
        """The same as the configuration makes it.

        Raises:
            ConfigError: it does not take these sizes together.
        """
        wanted = self.question.run.training
        flags, run = self.flags, load(*self.flags)
        if run.training.global_batch_size != wanted.global_batch_size:  # one that nobody gave grows with the ranks
            flags = (*flags, "--global-batch-size", str(wanted.global_batch_size))
            run = load(*flags)
        run = replace(run, training=replace(run.training, device=wanted.device))
        asked = self.question.of(run)
        problem = self.problem if _same_costs(run, self.question.run) else step_problem(asked)
        return replace(self, flags=flags, question=asked, problem=problem)


def step_problem(question: Question) -> BalanceProblem:
    """The problem of the whole step of a run.

    Raises:
        ConfigError: see `Question.problem`.
    """
    return whole_step(question.problem(), question.run, question.device, question.software)


def _same_costs(one: RunConfig, other: RunConfig) -> bool:
    """Whether two runs differ in nothing that the costs read; a split of layers stands in where it is open."""
    open_ = {"pipeline_model_parallel_layout": None, "plan": None, "overlap_p2p_communication": None}
    parallel = (replace(run.parallel, **open_) for run in (one, other))
    return (
        next(parallel) == next(parallel)
        and one.training.micro_batch_size == other.training.micro_batch_size
        and (one.training.global_batch_size == other.training.global_batch_size)
    )


def layouts(question: Question, load: Load, fixed: Mapping[str, Any], offload: bool = False) -> list[Layout]:
    """The whole space of a run's ranks.

    Args:
        load: the run with some flags added; raises ConfigError where they do not go together.
        fixed: those of VARIED that keep their value.
        offload: the state of the optimizer may go to the host.
    """
    found: list[Layout] = []
    makers = _Maker(question, load)
    for sizes, schedules in _sizes(question.run, fixed):
        for flags, run in makers.runs(sizes, fixed, offload):
            asked = question.of(run)
            try:
                one = step_problem(asked)
            except ConfigError:
                continue  # nothing is known of its speed, or of its recompute
            measured = TimeModel(run, question.device, question.software).measured is not None
            for number, group in schedules:
                more, virtual = _interleaved(run, number, group)
                try:
                    problem = other_virtual_stages(one, number, group_size(virtual.parallel), measured)
                except ConfigError:
                    continue  # more ops than are simulated
                found.append(Layout(len(found), (*flags, *more), replace(asked, run=virtual), problem))
    return found


def _interleaved(run: RunConfig, number: int, group: int | None) -> tuple[tuple[str, ...], RunConfig]:
    """The run with so many virtual stages, and micro-batches in groups of this size (None: one virtual stage)."""
    parallel, flags = run.parallel, (FLAGS[VIRTUAL], str(number))
    default = group == parallel.pipeline_model_parallel_size
    if group is None or default and parallel.microbatch_group_size_per_virtual_pipeline_stage is None:
        return flags, replace(run, parallel=replace(parallel, num_virtual_stages_per_pipeline_rank=number))
    changes: dict[str, Any] = {VIRTUAL: number, GROUP: group}
    return (*flags, FLAGS[GROUP], str(group)), replace(run, parallel=replace(parallel, **changes))


class _Maker:
    """Makes runs of given sizes from loaded ones: of each tensor-parallel size one is loaded, since what follows from
    it (sequence parallelism) depends on who said so."""

    def __init__(self, question: Question, load: Load):
        self.question, self.load = question, load
        self.bases: dict[int, RunConfig] = {}

    def base(self, sizes: Mapping[str, int]) -> RunConfig | None:
        tensor = sizes[TENSOR]
        if tensor not in self.bases:
            try:
                one = (FLAGS[VIRTUAL], "1")  # what a preset or a file says of them does not go with one stage
                run = self.load(*_words(sizes), *_unfold(self.question.run, sizes), *one)
            except ConfigError:
                return None
            asked = self.question.run.training
            training = replace(run.training, device=asked.device, global_batch_size=asked.global_batch_size)
            self.bases[tensor] = replace(run, training=training)
        return self.bases[tensor]

    def runs(
        self, sizes: Mapping[str, int], fixed: Mapping[str, Any], offload: bool
    ) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
        """Runs of these sizes in all ways to share a row and to keep the optimizer's state, with one virtual stage."""
        base = self.base(sizes)
        if base is None:
            return
        unfold = _unfold(self.question.run, sizes)
        names = {name: size for name, size in sizes.items() if name != MICRO}
        parallel = replace(
            base.parallel,
            **names,
            num_virtual_stages_per_pipeline_rank=1,
            fold_tensor_into_experts=base.parallel.fold_tensor_into_experts and not unfold,
        )
        run = replace(base, parallel=parallel, training=replace(base.training, micro_batch_size=sizes[MICRO]))
        for more, way in _ways(run, fixed, self.question.plain):
            yield (*_words(sizes), *unfold, *more), way
            if offload:
                flags = ("--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d")
                kept = replace(
                    way.parallel, optimizer_cpu_offload=True, optimizer_offload_fraction=1.0,
                    overlap_cpu_optimizer_d2h_h2d=True,
                )  # fmt: skip
                yield (*_words(sizes), *unfold, *more, *flags), replace(way, parallel=kept)


def _words(sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(word for name, size in sizes.items() for word in (FLAGS[name], str(size)))


def _unfold(run: RunConfig, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The flag that takes back a folded tensor domain, where these expert sizes are none."""
    folds = run.parallel.fold_tensor_into_experts and run.model.is_moe
    fits = sizes.get(EXPERT_TENSOR, 1) == 1 and sizes.get(EXPERT, 1) % sizes[TENSOR] == 0
    return (NO_FOLD,) if folds and not fits else ()


def _ways(run: RunConfig, fixed: Mapping[str, Any], plain: bool) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """The run in all ways in which context-parallel ranks may share a row."""
    size = run.parallel.context_parallel_size
    if size == 1:
        yield (), _shared(run, "auto", ())
        return
    if {*SPLIT} & {*fixed}:
        kind, sizes = run.parallel.cp_comm_type, fixed.get(SPLIT[1]) or ()
        open_ = _shared(run, kind, tuple(sizes))
        if not sizes:
            open_ = _shared(run, kind, least_traffic(open_) if kind == "auto" else open_.parallel.context_sizes)
        splits = [((), open_)]
    else:
        splits = [split_over(run, heads) for heads in head_sizes(run)]
    for flags, way in splits:
        if KEEP in fixed or plain or way.parallel.context_sizes[1] == 1:
            yield flags, way
            continue
        for each in (keeping(way, keep) for keep in (False, True)):
            yield (*flags, *keep_flags(each)), each


def _shared(run: RunConfig, kind: str, sizes: tuple[int, ...]) -> RunConfig:
    changes: dict[str, Any] = {"cp_comm_type": kind, "hierarchical_context_parallel_sizes": sizes}
    return replace(run, parallel=replace(run.parallel, **changes))


def _sizes(run: RunConfig, fixed: Mapping[str, Any]) -> Iterator[tuple[dict[str, int], list[tuple[int, int | None]]]]:
    """Sizes that divide what they must, each with the numbers of virtual stages, and groups of micro-batches, that go
    with them."""
    parallel, model = run.parallel, run.model
    world, node = parallel.world_size, parallel.node_size
    batch = run.training.global_batch_size

    def choices(name: str, values: Iterable[int]) -> Sequence[int]:
        return [fixed[name]] if name in fixed else list(values)

    heads = (model.num_attention_heads, model.query_groups, model.vocab_size)
    tensors = choices(TENSOR, (size for size in divisors(node) if all(number % size == 0 for number in heads)))
    stages = choices(PIPELINE, (size for size in divisors(world) if size <= model.num_layers))
    virtual = choices(VIRTUAL, range(1, MOST_VIRTUAL_STAGES + 1))
    experts: Sequence[int] = [0]
    pieces: Sequence[int] = [0]
    if model.num_experts:
        width = model.moe_ffn_hidden_size or model.ffn_hidden_size
        experts = choices(EXPERT, divisors(model.num_experts))
        pieces = choices(EXPERT_TENSOR, (size for size in divisors(node) if width % size == 0))
    contexts = choices(SIZE, context_sizes(run))
    names_context = contexts != [1] or parallel.context_parallel_size > 1
    for tensor, stage, context, expert, piece in itertools.product(tensors, stages, contexts, experts, pieces):
        shared = tensor * stage * context
        if world % shared or expert and world // stage % (expert * piece):
            continue
        data = world // shared
        for micro in choices(MICRO, _powers_of_two(batch // data)):
            count, left = divmod(batch, data * micro)
            if left or not count:
                continue
            several = [number for number in virtual if number > 1 and stage * number <= model.num_layers]
            groups = _groups(count, stage, fixed.get(GROUP)) if stage > 1 else []
            schedules: list[tuple[int, int | None]] = [(1, None)] if 1 in virtual else []
            schedules += itertools.product(several, groups)
            sizes = {TENSOR: tensor, PIPELINE: stage, **({SIZE: context} if names_context else {}), MICRO: micro}
            if schedules:
                yield sizes | ({EXPERT: expert, EXPERT_TENSOR: piece} if expert else {}), schedules


def _groups(count: int, stages: int, fixed: int | None) -> list[int]:
    """Sizes of a group of micro-batches that are tried: the two smallest that the schedule takes, 2 P, and all.

    With P, a rank waits for the messages of every micro-batch that comes back from the last rank; with more it has
    others to go on with, and holds more of them. From 2 P on no message is left to hide, and all at once is the other
    end: nothing is between them but memory.
    """
    if fixed is not None:
        return [fixed] if schedule_takes(count, fixed, stages) else []
    possible = possible_groups(count, stages)
    return [size for at, size in enumerate(possible) if at < 2 or size in (2 * stages, count)]


def _powers_of_two(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]
