"""Which activations each layer computes again in the backward pass."""

from __future__ import annotations

import re

from megatron_telechat.config.layout import pipeline_layout
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError, Problem

MODULES = ("core_attn", "mlp", "moe", "layernorm")
"""What selective recompute can repeat: the core attention, a dense MLP, a MoE block, the norms."""

Modes = tuple[str, ...]


def recompute_plan(run: RunConfig) -> tuple[Modes, ...]:
    """For every global layer: ``("full",)``, the modules repeated, or ``()``.

    ``moe`` is left out for a dense layer and ``mlp`` for a MoE layer, so one list serves a model that mixes them.

    Raises:
        ConfigError: if recompute_layout does not fit the pipeline layout.
    """
    training = run.training
    if training.recompute_layout is not None:
        plan = _plan_of_layout(run, training.recompute_layout)
    elif training.recompute_granularity == "selective":
        plan = [training.recompute_modules] * run.model.num_layers
    elif training.recompute_granularity == "full":
        plan = _plan_of_full(run)
    else:
        plan = [()] * run.model.num_layers
    return tuple(_applicable(modes, run.model.layer_is_moe(layer)) for layer, modes in enumerate(plan))


def _applicable(modes: Modes, is_moe: bool) -> Modes:
    other = "mlp" if is_moe else "moe"
    return tuple(mode for mode in modes if mode != other)


def _plan_of_full(run: RunConfig) -> list[Modes]:
    count = run.training.recompute_num_layers
    if run.training.recompute_method == "uniform" or count is None:
        return [("full",)] * run.model.num_layers
    plan: list[Modes] = []
    for layers in pipeline_layout(run).counts:
        taken = min(count, layers)
        plan += [("full",)] * taken + [()] * (layers - taken)
    return plan


def _plan_of_layout(run: RunConfig, text: str) -> list[Modes]:
    stages = parse_recompute_layout(text)
    counts = pipeline_layout(run).counts
    problems = []
    if len(stages) != len(counts):
        problems.append(
            Problem(
                f"recompute_layout has {len(stages)} entries, the pipeline {len(counts)} virtual stages",
                fix="one entry per virtual stage, separated by |: "
                + "|".join(f"full*{count}" if count else "" for count in counts),
            )
        )
    else:
        for number, (entry, count) in enumerate(zip(stages, counts, strict=True), 1):
            if len(entry) != count:
                problems.append(
                    Problem(
                        f"entry {number} of recompute_layout names {len(entry)} layers, "
                        f"virtual stage {number} has {count}",
                        fix=f"items that add up to {count} layers, such as full*{count} or none*{count}",
                    )
                )
    if problems:
        raise ConfigError(problems)
    return [modes for entry in stages for modes in entry]


def parse_recompute_layout(text: str) -> list[list[Modes]]:
    """Read a recompute layout such as ``full*2,none*3|core_attn+mlp*4``: for each virtual stage the modes of its
    layers.

    Raises:
        ConfigError: for an item that is not one.
    """
    stages = []
    problems = []
    for entry in text.replace(" ", "").split("|"):
        layers: list[Modes] = []
        for item in filter(None, entry.split(",")):
            match = re.fullmatch(r"([A-Za-z_+]+)(?:\*(\d{1,4}))?", item)
            if match is None:
                problems.append(Problem(f"recompute_layout: cannot read {item!r}", fix=_ITEM_HELP))
                continue
            name, count = match.group(1), int(match.group(2) or 1)
            modes = () if name == "none" else tuple(name.split("+"))
            unknown = [mode for mode in modes if mode not in MODULES]
            if unknown and modes != ("full",):
                problems.append(
                    Problem(f"recompute_layout: unknown module {', '.join(unknown)} in {item!r}", fix=_ITEM_HELP)
                )
            layers += [modes] * count
        stages.append(layers)
    if problems:
        raise ConfigError(problems)
    return stages


_ITEM_HELP = f"full*N, none*N, or modules joined by +, such as core_attn+mlp*N; modules: {', '.join(MODULES)}"
