"""Rules of the local checkpoints and of their copies on other nodes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.errors import Problem
from megatron_telechat.locations import is_url

INTERVAL, KIND, FOLDER = "non_persistent_save_interval", "non_persistent_ckpt_type", "non_persistent_local_ckpt_dir"
COPIES, JUMP, FACTOR = "replication", "replication_jump", "replication_factor"


def local_checkpoints_have_a_place(check: Check) -> Iterator[Problem]:
    """An interval, the type and a folder belong together."""
    interval, kind, folder = check.take(INTERVAL, KIND, FOLDER)
    given = {INTERVAL: interval, KIND: kind, FOLDER: folder}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        said = next(name for name in given if name not in missing)
        examples = {INTERVAL: 100, KIND: "local", FOLDER: "DIR"}
        yield check.problem(
            f"{said}={given[said]} without {' and '.join(missing)}",
            said,
            fix=f"{' '.join(flag(name, examples[name]) for name in missing)}, or drop it for no local checkpoints",
        )
    if is_url(folder):
        yield check.one(f"{FOLDER}={folder} is a URL", FOLDER, fix="a folder on a disk of each node, or /dev/shm/NAME")


def copies_are_of_local_checkpoints(check: Check) -> Iterator[Problem]:
    """Copies without checkpoints, or a jump without copies, would protect nothing, silently."""
    copies, jump, kind = check.take(COPIES, JUMP, KIND)
    if copies and kind is None:
        yield check.problem(
            f"{COPIES} copies local checkpoints, and none are made",
            COPIES,
            fix=f"{flag(INTERVAL, 100)} {flag(KIND, 'local')} {flag(FOLDER, 'DIR')}, or drop {flag(COPIES, True)}",
        )
    if jump is not None and not copies:
        yield check.problem(f"{JUMP}={jump} without {COPIES} copies nothing", JUMP, fix=flag(COPIES, True))


def copies_lie_on_other_nodes(check: Check) -> Iterator[Problem]:
    """The ranks fall into groups of replication_factor ranks, replication_jump apart, on as many nodes."""
    copies, jump, factor, world = check.take(COPIES, JUMP, FACTOR, "world_size")
    if not copies:
        return
    node = check.run.parallel.node_size
    if factor < 2:
        yield check.one(
            f"{FACTOR}={factor} holds no copy", FACTOR, fix=f"{flag(FACTOR, 2)}, or drop {flag(COPIES, True)}"
        )
    elif jump is None:
        fix = f"{flag(JUMP, node)}: the next node"
        yield check.problem(f"{COPIES} does not say where the copies lie: {JUMP} is not set", COPIES, fix=fix)
    elif jump < node:
        yield check.problem(
            f"{JUMP}={jump} is on the same node for some of its {node} ranks: the loss of the node loses both",
            JUMP,
            "ranks_per_node",
            fix=f"{flag(JUMP, node)}; on one node drop {flag(COPIES, True)}",
        )
    elif world % (jump * factor):
        yield check.problem(
            f"{JUMP}={jump} times {FACTOR}={factor} does not divide the {world} ranks",
            JUMP,
            FACTOR,
            "world_size",
            fix=f"{flag(JUMP, world // factor)}" if world % factor == 0 else "another number of nodes",
        )


RULES: tuple[Rule, ...] = (
    local_checkpoints_have_a_place,
    copies_are_of_local_checkpoints,
    copies_lie_on_other_nodes,
)
