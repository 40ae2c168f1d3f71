"""Tables of ranks, nodes and expert groups for --dry-run, a screenful whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_telechat.cli.text import ranges, table
from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.parallel.topology import ATTENTION_AXES, EXPERT_AXES, Topology, expert_groups_text

ALL_RANKS = 32
"""Up to this many ranks each has a row of its own; beyond, each node has one."""
MOST_ROWS = 24


def shown_rows(count: int, most: int = MOST_ROWS) -> list[int]:
    """Which of `count` rows are printed: all, or the first and the last ones."""
    if count <= most:
        return list(range(count))
    tail = most // 4
    return [*range(most - tail), *range(count - tail, count)]


def shown_nodes(topology: Topology) -> list[int]:
    """Which nodes are printed: all; else the first two and the last of each pipeline stage where that is few enough."""
    if topology.num_nodes <= MOST_ROWS:
        return list(range(topology.num_nodes))
    per_stage = topology.world_size // topology.pp
    nodes: set[int] = set()
    for stage in range(topology.pp):
        first, last = topology.node_of(stage * per_stage), topology.node_of((stage + 1) * per_stage - 1)
        nodes |= {first, min(first + 1, last), last}
    return sorted(nodes) if len(nodes) <= MOST_ROWS else shown_rows(topology.num_nodes)


def _with_gaps(header: list[str], rows: dict[int, list[str]], count: int, what: str) -> list[str]:
    """The table of these numbered rows, with a line for every gap."""
    out: list[Sequence[str]] = [header]
    previous = -1
    for number, row in rows.items():
        if number != previous + 1:
            out.append([_gap(number - previous - 1, what)])
        out.append(row)
        previous = number
    if previous != count - 1:
        out.append([_gap(count - 1 - previous, what)])
    return table(out)


def _gap(count: int, what: str) -> str:
    return f"  ... {count} more {what}{'s' * (count > 1)}"


def rank_table(topology: Topology, is_moe: bool) -> list[str]:
    """One row a rank for few ranks, else one a node with the range of each coordinate on it."""
    axes = [*ATTENTION_AXES, *(axis for axis in EXPERT_AXES if is_moe and axis != "pp")]
    if topology.world_size <= ALL_RANKS:
        header = ["rank", "node", *axes]
        places = [topology.coordinates(rank) for rank in range(topology.world_size)]
        return table([header, *([str(p.rank), str(p.node), *(str(getattr(p, a)) for a in axes)] for p in places)])
    rows = {}
    for node in shown_nodes(topology):
        ranks = range(node * topology.ranks_per_node, min((node + 1) * topology.ranks_per_node, topology.world_size))
        places = [topology.coordinates(rank) for rank in ranks]
        rows[node] = [str(node), ranges(ranks), *(ranges(getattr(place, axis) for place in places) for axis in axes)]
    return _with_gaps(["node", "ranks", *axes], rows, topology.num_nodes, "node")


def group_table(topology: Topology, is_moe: bool) -> list[str]:
    """Each kind of group: size, number, ranks of the first, how many cross nodes."""
    rows = [["group", "size", "count", "first group", "across nodes"]]
    for kind in ("tp", "cp", "pp", "dp", "ep", "etp", "edp"):
        if topology.size(kind) == 1 or (kind in ("ep", "etp", "edp") and not is_moe):
            continue
        groups, crossing = topology.groups(kind), topology.crossing(kind)
        across = "none" if not crossing else "all" if crossing == len(groups) else f"{crossing} of {len(groups)}"
        rows.append([kind, str(topology.size(kind)), str(len(groups)), ranges(groups[0]), across])
    return table(rows, left=(0, 3, 4)) if len(rows) > 1 else ["one rank, no groups"]


def expert_table(topology: Topology, model: ModelConfig, folded: bool) -> list[str]:
    """Which experts the ranks of the first expert group hold, and how the tensor domain enters it."""
    experts = model.num_experts or 0
    each = experts // topology.ep
    lines = [
        f"{experts} experts, top-{model.moe_router_topk}; EP {topology.ep} x ETP {topology.etp} x EDP {topology.edp}: "
        f"{each} expert{'s' * (each != 1)} a rank" + (f", each cut {topology.etp} ways" if topology.etp > 1 else "")
    ]
    if folded and topology.tp > 1:
        lines.append(
            f"the tensor domain is folded in: the {topology.ep} ranks of an expert group are "
            f"{topology.ep // topology.tp} tensor group{'s' * (topology.ep > topology.tp)} of TP {topology.tp}"
        )
    group = topology.groups("etp-ep")[0]
    rows = {}
    for place in shown_rows(topology.ep, 16):
        ranks = group[place * topology.etp : (place + 1) * topology.etp]
        held = range(place * each, (place + 1) * each)
        rows[place] = [str(place), ranges(held), ranges(ranks), ranges(topology.nodes_of(ranks))]
    lines += _with_gaps(["ep", "experts", "ranks", "node"], rows, topology.ep, "place")
    lines.append(expert_groups_text(topology))
    return lines
