"""Rules of activation recompute."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.recompute import parse_recompute_layout, recompute_plan
from megatron_telechat.config.rules.model import has_dense_layers
from megatron_telechat.config.rules.pipeline import LAYOUT, PP, VIRTUAL_STAGES
from megatron_telechat.errors import ConfigError, Problem

GRANULARITY = "recompute_granularity"
METHOD = "recompute_method"
LAYERS = "recompute_num_layers"
MODULES = "recompute_modules"
PLAN = "recompute_layout"
DEFAULT_MODULES = ("core_attn",)


def one_way_to_say_it(check: Check) -> Iterator[Problem]:
    """recompute_layout and recompute_granularity exclude each other."""
    plan, granularity = check.take(PLAN, GRANULARITY)
    if plan is not None and granularity is not None:
        yield check.problem(
            f"{PLAN} and {GRANULARITY}={granularity} contradict each other",
            PLAN,
            GRANULARITY,
            fix=f"{flag(GRANULARITY, 'none')}, or {flag(PLAN, 'none')}",
        )
        check.bad.add(PLAN)


def details_go_with_full(check: Check) -> Iterator[Problem]:
    """recompute_method and recompute_num_layers belong to full recompute."""
    granularity, method, layers = check.take(GRANULARITY, METHOD, LAYERS)
    if layers is not None and granularity != "full":
        yield check.problem(
            f"{LAYERS}={layers} belongs to {GRANULARITY} full, which is {granularity or 'unset'}",
            LAYERS,
            GRANULARITY,
            fix=f"{flag(GRANULARITY, 'full')}, or drop --recompute-num-layers",
        )
    elif layers is not None and layers > 1 and method == "uniform":
        yield check.problem(
            f"{METHOD} uniform recomputes every layer by itself; {LAYERS}={layers} would mean groups of layers",
            LAYERS,
            METHOD,
            fix=f"drop --recompute-num-layers, or {flag(METHOD, 'block')} to recompute {layers} layers of each virtual "
            f"stage",
        )
    if method == "uniform" and granularity != "full":
        yield check.problem(
            f"{METHOD}={method} belongs to {GRANULARITY} full, which is {granularity or 'unset'}",
            METHOD,
            GRANULARITY,
            fix=f"{flag(GRANULARITY, 'full')}, or drop --recompute-method",
        )


def modules_go_with_selective(check: Check) -> Iterator[Problem]:
    """recompute_modules belongs to selective recompute, and names modules that the model has."""
    granularity, modules, experts = check.take(GRANULARITY, MODULES, "num_experts")
    if granularity != "selective":
        if modules != DEFAULT_MODULES and check.said_by_person(MODULES):
            yield check.problem(
                f"{MODULES} belongs to {GRANULARITY} selective, which is {granularity or 'unset'}",
                MODULES,
                GRANULARITY,
                fix=f"{flag(GRANULARITY, 'selective')}, or drop --recompute-modules",
            )
        return
    if not modules:
        yield check.problem(
            f"{GRANULARITY} selective with no {MODULES}", MODULES, GRANULARITY, fix="--recompute-modules core_attn"
        )
    if "moe" in modules and experts is None:
        yield check.problem(f"{MODULES} names moe, but the model has no experts", MODULES, fix="mlp in its place")
    if "mlp" in modules and experts is not None and not has_dense_layers(check):
        yield check.problem(
            f"{MODULES} names mlp, but every layer of the model has experts", MODULES, fix="moe in its place"
        )


def layout_fits_the_stages(check: Check) -> Iterator[Problem]:
    """recompute_layout can be read and covers each layer of each virtual stage once."""
    text = check.take(PLAN)
    if text is None:
        return
    try:
        parse_recompute_layout(text)
        check.take("num_layers", PP, VIRTUAL_STAGES, LAYOUT, "moe_layer_freq", "moe_layer_pattern")
        recompute_plan(check.run)
    except ConfigError as error:
        for problem in error.problems:
            yield check.problem(problem.what, PLAN, fix=problem.fix)


RULES: tuple[Rule, ...] = (one_way_to_say_it, details_go_with_full, modules_go_with_selective, layout_fits_the_stages)
