"""The schedule run the slow way: devices that look for work, moment by moment. Shares no code with the simulator."""

from __future__ import annotations

from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.problem import BalanceProblem


def device_queue(P: int, V: int, m: int, N: int, device: int) -> list[tuple[str, int, int]]:
    """Ops of a device as the paper on interleaved schedules tells them, in groups of N micro-batches: (kind, virtual
    stage, micro-batch)."""
    groups = [range(0, m)] if V == 1 else [range(at, min(at + N, m)) for at in range(0, m, N)]
    forwards = [
        ("F", virtual_stage * P + device, item) for group in groups for virtual_stage in range(V) for item in group
    ]
    backwards = [
        ("B", (V - 1 - virtual_stage) * P + device, item)
        for group in groups
        for virtual_stage in range(V)
        for item in group
    ]
    warmup = P - 1 - device if V == 1 else 2 * (P - device - 1) + (V - 1) * N
    warmup = min(warmup, m * V)
    queue = forwards[:warmup]
    for at in range(m * V):
        queue += forwards[warmup + at : warmup + at + 1] + backwards[at : at + 1]
    return queue


def run(problem: BalanceProblem, assignment: Assignment) -> tuple[float, list[float]]:
    """(makespan in the worst case, peak bytes of each device)."""
    cases = [None, *(range(problem.P) if problem.slow_stage else ())]
    found = [_case(problem, assignment, slow) for slow in cases]
    return max(makespan for makespan, _ in found), found[0][1]


def _case(problem: BalanceProblem, assignment: Assignment, slow: int | None) -> tuple[float, list[float]]:
    """The same, where this device is slower."""
    P, V, m = problem.P, problem.V, problem.m
    f, b, w, act, ws = _stages(problem, assignment)
    if slow is not None:
        for stage in range(slow, P * V, P):
            f[stage] *= 1 + problem.slow_stage
            b[stage] *= 1 + problem.slow_stage
    queues = [device_queue(P, V, m, problem.group_size or P, device) for device in range(P)]
    done: dict[tuple[str, int, int], float] = {}
    free, held, peak = [0.0] * P, [0.0] * P, [0.0] * P
    while any(queues):
        # the op that can start first, over the heads of all queues
        heads = []
        for device, queue in enumerate(queues):
            if queue:
                ready = _ready(queue[0], device, P, V, done, problem.p2p)
                if ready is not None:
                    heads.append((max(ready, free[device]), device))
        start, device = min(heads)
        kind, stage, item = queues[device].pop(0)
        free[device] = start + (f if kind == "F" else b)[stage]
        done[kind, stage, item] = free[device]
        held[device] += act[stage] if kind == "F" else 0.0
        peak[device] = max(peak[device], held[device] + (ws[stage] if kind == "B" else 0.0))
        held[device] -= act[stage] if kind == "B" else 0.0
    weights = [sum(w[device::P]) for device in range(P)]
    return max(free), [problem.const_mem + weight + most for weight, most in zip(weights, peak, strict=True)]


def _ready(op: tuple[str, int, int], device: int, P: int, V: int, done: dict, p2p: float) -> float | None:
    kind, stage, item = op
    if kind == "F":
        need = ("F", stage - 1, item) if stage else None
    else:
        need = ("B", stage + 1, item) if stage < P * V - 1 else ("F", stage, item)
    if need is None:
        return 0.0
    if need not in done:
        return None
    return done[need] + (p2p if need[1] % P != device else 0.0)


def _stages(problem: BalanceProblem, assignment: Assignment) -> tuple[list[float], ...]:
    layers = [group for group in problem.groups for _ in range(group.count)]
    f, b, w, act, ws = [], [], [], [], []
    at, last = 0, problem.P * problem.V - 1
    for stage, modes in enumerate(assignment.modes):
        mine = layers[at : at + len(modes)]
        at += len(modes)
        used = [layer.modes[mode] for layer, mode in zip(mine, modes, strict=True)]
        blocks = [problem.embed] * (stage == 0) + [problem.head] * (stage == last)
        blocks += [problem.mtp] * (stage == assignment.mtp_stage)
        f.append(sum(x.f for x in [*mine, *blocks]))
        b.append(sum(x.b for x in [*mine, *blocks]) + sum(mode.extra_b for mode in used))
        w.append(sum(x.w for x in [*mine, *blocks]))
        act.append(sum(x.act for x in [*used, *blocks]))
        ws.append(max([x.ws for x in [*used, *blocks]], default=0.0))
    return f, b, w, act, ws
