"""Random balance problems that exhaustive search can still finish."""

from __future__ import annotations

import random
from dataclasses import replace

from megatron_telechat.config.microbatch_groups import possible_groups
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.op_graph import op_graph
from megatron_telechat.planner.problem import BalanceProblem, Block, LayerGroup, Mode


def small_problem(seed: int) -> BalanceProblem:
    """One of any kind: V 1 to 3, micro-batches in groups of all sizes, with and without a slow stage, one or two
    groups of layers, one to three modes, MTP, p2p, m < P, tight and loose memory, whole and fractional times, empty
    stages, blocks with and without a working set."""
    rng = random.Random(seed)
    P, V = rng.choice([(1, 1), (2, 1), (3, 1), (4, 1), (4, 1), (2, 2), (2, 2), (3, 2), (2, 3)])
    m = rng.choice([1, 2, 3, 4, 5, 6, 8])
    try:
        op_graph(P, V, m)
    except ConfigError:
        m = P * rng.randint(1, 2)
    whole = rng.random() < 0.7

    def amount(low: float, high: float) -> float:
        return rng.randint(int(low), int(high)) if whole else round(rng.uniform(low, high), 3)

    stages = P * V
    layers = rng.randint(max(2, stages - 1), max(3, {1: 8, 2: 12, 3: 10, 4: 10}.get(stages, 8)))
    num_groups = 2 if rng.random() < 0.35 and layers >= 4 else 1
    counts = [layers]
    if num_groups == 2:
        first = rng.randint(1, layers - 1)
        counts = [first, layers - first]
    num_modes = rng.choice([1, 2, 2, 3]) if stages <= 4 else rng.choice([1, 1, 2])
    groups = []
    for count in counts:
        f, act = amount(60, 130), amount(60, 130)
        modes = [Mode("none", 0, act, 0)]
        if num_modes > 2:
            modes.append(Mode("selective", amount(8, 20), int(act * 0.6), int(act * 0.4)))
        if num_modes > 1:
            modes.append(Mode("full", f, amount(5, 10), act - 8))
        groups.append(LayerGroup(count, f, amount(120, 270), amount(100, 400), tuple(modes)))
    mtp = None
    if rng.random() < 0.3 and stages > 1:
        mtp = Block(amount(80, 160), amount(160, 320), amount(100, 300), amount(60, 120))
    minimum = rng.choice([1, 1, 0]) if layers >= stages else 0
    tight = rng.random() < 0.65
    mean_w = sum(group.count * group.w for group in groups) / P
    limit = int(rng.uniform(1.0, 2.6) * mean_w + rng.uniform(0.3, 1.2) * 100 * layers * V) if tight else 10**9
    problem = BalanceProblem(
        P, V, m, limit, rng.choice([0, 100]), rng.choice([0, 0, amount(1, 20)]), tuple(groups),
        embed=Block(amount(0, 10), amount(0, 10), amount(50, 250), amount(5, 20)),
        head=Block(amount(30, 150), amount(60, 300), amount(50, 250), amount(30, 110)),
        mtp=mtp, min_layers=minimum, min_layers_first=min(minimum, rng.choice([0, 1])), min_layers_last=0,
    )  # fmt: skip
    if V > 1 and rng.random() < 0.5:
        problem = replace(problem, group_size=rng.choice([None, *possible_groups(m, P)]))
    if P > 1 and rng.random() < 0.25:
        problem = replace(problem, slow_stage=rng.choice([0.05, 0.3]))
    if rng.random() < 0.5:
        return problem
    blocks = {key: replace(getattr(problem, key), ws=amount(0, 150)) for key in ("embed", "head")}
    return replace(problem, **blocks, mtp=mtp and replace(mtp, ws=amount(0, 150)))


def binding_problem(seed: int) -> BalanceProblem:
    """One with 6 to 10 virtual stages and a memory limit between what recompute of all layers needs and what none
    needs."""
    rng = random.Random(seed)
    P, V = rng.choice([(2, 3), (3, 2), (2, 4), (4, 2), (3, 3), (2, 5)])
    m = P * rng.randint(1, 3)
    layers = P * V + rng.randint(0, 5 if P * V < 9 else 2)
    f, act, w = rng.randint(60, 130), rng.randint(60, 130), rng.randint(100, 400)
    modes = (Mode("none", 0, act, rng.choice([0, 40])), Mode("full", f, rng.randint(4, 10), act - 8))
    group = LayerGroup(layers, f, rng.randint(120, 270), w, modes)
    held, mean = P * V, layers / P
    least, most = (mean * (w + held / V * one.act) for one in reversed(modes))
    return BalanceProblem(
        P, V, m, int(least + rng.uniform(0.0, 0.9) * (most - least)) + w // 2, 0, rng.choice([0, rng.randint(1, 20)]),
        (group,), embed=Block(5, 5, rng.randint(50, 250), 10),
        head=Block(rng.randint(30, 150), rng.randint(60, 300), rng.randint(50, 250), 60, rng.choice([0, 50])),
        min_layers_first=rng.choice([0, 1]) if layers >= P * V else 0,
    )  # fmt: skip
