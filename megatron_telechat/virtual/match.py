"""Do the ranks of a world meet? Compares what they started, group by group; needs no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from megatron_telechat.virtual.records import Call, RankRecord

MESSAGES = ("send", "receive")
MOST_SHOWN = 20


@dataclass(frozen=True)
class Match:
    """What a comparison found.

    Attributes:
        groups, compared: groups with more than one rank, and collectives and messages that were compared.
        problems: what would hang or mix up data, a line each; at most one for each group and kind of problem.
    """

    groups: int
    compared: int
    problems: tuple[str, ...]


def match(records: Iterable[RankRecord]) -> Match:
    """Compare all ranks of a world.

    Of every group, its ranks must start the same collectives in the same order: kind, type, bytes, and for an
    all-to-all rows that one sends and the other expects. Every message must be expected, in order and with its size.

    Args:
        records: of every rank; a group with a rank that was not executed is a problem.
    """
    members: dict[str, dict[int, tuple[int, list[Call]]]] = defaultdict(dict)
    for record in records:
        by_group: dict[str, list[Call]] = defaultdict(list)
        for call in record.calls:
            by_group[call.group].append(call)
        for group, calls in by_group.items():
            members[group][calls[0].rank] = (record.rank, calls)
    problems: list[str] = []
    compared = 0
    for _, ranks in sorted(members.items()):
        first = next(iter(ranks.values()))[1][0]
        numbers = ", ".join(map(str, sorted(rank for rank, _ in ranks.values())))
        name = f"{first.description or 'group'} of ranks {numbers}"
        if len(ranks) < first.size:
            missing = first.size - len(ranks)
            problems.append(f"{name}: {_text(first)} is started, and {missing} of its {first.size} ranks start nothing")
            continue
        ordered = [ranks[place] for place in range(first.size)]
        compared += _collectives(name, ordered, problems)
        compared += _messages(name, ordered, problems)
    return Match(len(members), compared, tuple(problems))


def _collectives(name: str, ranks: Sequence[tuple[int, list[Call]]], problems: list[str]) -> int:
    """Compare the collectives of a group, and stop at the first difference: what comes after it means nothing."""
    lists = [[call for call in calls if call.kind not in MESSAGES] for _, calls in ranks]
    for number, calls in enumerate(zip_longest(*lists)):
        fault = _fault([rank for rank, _ in ranks], calls)
        if fault:
            problems.append(f"{name}: collective {number + 1}: {fault}")
            return number
    return len(lists[0])


def _fault(ranks: Sequence[int], calls: Sequence[Call | None]) -> str | None:
    there = [call for call in calls if call is not None]
    if len(there) < len(calls):
        missing = [rank for rank, call in zip(ranks, calls, strict=True) if call is None]
        return f"{_text(there[0])} is not started by rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    first = there[0]
    for rank, call in zip(ranks, there, strict=True):
        if (call.kind, call.dtype) != (first.kind, first.dtype):
            return f"rank {ranks[0]} starts {_text(first)}, rank {rank} {_text(call)}"
        if not call.splits and call.bytes != first.bytes:
            return f"rank {ranks[0]} starts {_text(first)}, rank {rank} {_text(call)}"
    if not first.splits:
        return None
    for a, sender in enumerate(there):
        for b, receiver in enumerate(there):
            sent, expected = sender.splits[1][b], receiver.splits[0][a]
            if sent != expected:
                return f"rank {ranks[a]} sends {sent} rows to rank {ranks[b]}, which expects {expected}"
    return None


def _messages(name: str, ranks: Sequence[tuple[int, list[Call]]], problems: list[str]) -> int:
    """Every message from one rank to another, in order."""
    compared = 0
    for a, (sender, sent_calls) in enumerate(ranks):
        for b, (receiver, received_calls) in enumerate(ranks):
            sent = [call for call in sent_calls if call.kind == "send" and call.peer == b]
            received = [call for call in received_calls if call.kind == "receive" and call.peer == a]
            if len(sent) != len(received):
                problems.append(
                    f"{name}: rank {sender} sends {len(sent)} messages to rank {receiver}, which expects "
                    f"{len(received)}"
                )
                continue
            for number, (one, other) in enumerate(zip(sent, received, strict=True), 1):
                if (one.bytes, one.dtype) != (other.bytes, other.dtype):
                    problems.append(
                        f"{name}: message {number} from rank {sender} to rank {receiver} is {_text(one)}, expected is "
                        f"{_text(other)}"
                    )
                    break
            compared += len(sent)
    return compared


def _text(call: Call) -> str:
    return f"{call.kind} of {call.bytes} bytes of {call.dtype} ({call.scope})"
