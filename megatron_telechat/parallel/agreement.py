"""Ranks that agree, and fail together.

A rank that raises alone leaves the others waiting in their next collective. So what can fail on
one rank is followed by `all_ranks_ok`, and what must be equal everywhere passes through `agree`:
both raise on every rank, with one message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from megatron_telechat.errors import ConfigError, Problem, ResourceError, UserError

MAX_DIFFERENCES = 20
T = TypeVar("T")


def agree(name: str, value: Any, state: Any = None) -> None:
    """Check that every rank holds the same value; a collective over all ranks.

    Args:
        name: what the value is, for the message ("configuration").
        value: dataclass, mapping, sequence or scalar; nested. Compared by the text of its leaves.
        state: the ParallelState, once it exists: the message then says where the ranks stand.

    Raises:
        ConfigError: on all ranks, when one differs; names the key, the ranks and their values.
    """
    leaves = flatten(value)
    text = json.dumps(leaves, sort_keys=True)
    digests = gather_objects(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone: list[dict[str, str]] = gather_objects(leaves)
    raise ConfigError(_differences(name, everyone, _places(state)))


def all_ranks_ok(error: BaseException | None, state: Any = None) -> None:
    """Raise on all ranks when one of them met an error; a collective over all ranks.

    Args:
        error: what this rank met, or None.
        state: the ParallelState, once it exists: the message then says where the rank stands.

    Raises:
        UserError: of the class of the first failing rank's error, the same text everywhere.
        RuntimeError: the first failing rank's error is not the user's. On the failing rank it is the cause.
    """
    outcome = (
        None if error is None else (type(error).__name__, str(error), error if isinstance(error, UserError) else None)
    )
    outcomes = gather_objects(outcome)
    failed = [rank for rank, found in enumerate(outcomes) if found is not None]
    if not failed:
        return
    kind, text, user_error = outcomes[failed[0]]
    where = _ranks(failed, _places(state))
    if user_error is not None:
        first, *rest = user_error.problems
        located = dataclasses.replace(first, what=f"{where}: {first.what}")
        raise type(user_error)([located, *rest]).on_every_rank() from error
    raise RuntimeError(f"{where}: {kind}: {text}") from error


_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What this rank does by itself, such as an export: inside, it agrees with nobody and is the first."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextlib.contextmanager
def together(state: Any = None) -> Iterator[None]:
    """Run a block that may fail on one rank, then raise on all ranks if it did.

    The block must hold no collective of its own.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    all_ranks_ok(error, state)


@contextlib.contextmanager
def lost_ranks_reported(who: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn a collective that broke, because a rank died or hangs, into a readable error.

    Args:
        who: asked which ranks are gone; "" where that is not known.

    Raises:
        ResourceError: a collective of this block failed or ran out of time.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        gone = who()
        raise ResourceError(
            f"lost contact with another rank: {f'{gone}; here: ' if gone else ''}{first_line}",
            "torch.distributed",
            "look at the output of the rank that ended first; a rank that is only slow needs a larger "
            "--distributed-timeout-minutes",
        ) from error


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that a peer is gone or did not answer in time (gloo, NCCL, the store)."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError)):
        return True
    text = str(error)
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Timed out waiting",
        "Application timeout",
        "gloo/transport",
        "Broken pipe",
        "NCCL communicator was aborted",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, by rank; a collective for small host objects."""
    import torch.distributed as dist

    if _alone.get() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_on_rank_0(value: T) -> list[T]:
    """The value of every rank, by rank, on rank 0; nothing on the others. A collective for host objects."""
    import torch.distributed as dist

    if _alone.get() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    first = dist.get_rank() == 0
    gathered: list[Any] = [None] * dist.get_world_size() if first else []
    dist.gather_object(value, gathered if first else None, dst=0)
    return gathered


def this_rank() -> int:
    """Of the default group; 0 where there is none, and inside `alone`."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() and not _alone.get() else 0


def from_rank_0(value: T | None) -> T:
    """Rank 0's value on every rank; a collective for small host objects.

    Args:
        value: read on rank 0 alone; the others may give None.
    """
    import torch.distributed as dist

    box: list[Any] = [value]
    if dist.is_initialized() and dist.get_world_size() > 1 and not _alone.get():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of a nested value as text, by dotted key."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {prefix: repr(value)}
    if not items:
        return {prefix: repr(value)}
    out: dict[str, str] = {}
    for key, item in items:
        out.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return out


def _places(state: Any) -> list[str]:
    """Where every rank stands, such as "tp 1, pp 0"; a collective, on the way to an error only."""
    return gather_objects("" if state is None else state.place())


def _differences(name: str, everyone: Sequence[Mapping[str, str]], places: Sequence[str]) -> list[Problem]:
    """One problem a key: which ranks differ from what most ranks hold."""
    keys = sorted({key for leaves in everyone for key in leaves})
    problems = []
    for key in keys:
        values = [leaves.get(key, "nothing") for leaves in everyone]
        common, _ = Counter(values).most_common(1)[0]
        for value in sorted(set(values) - {common}):
            ranks = [rank for rank, found in enumerate(values) if found == value]
            label = f"{name} {key}" if key else name
            problems.append(Problem(f"{label} is {value} on {_ranks(ranks, places)} and {common} elsewhere"))
    if len(problems) > MAX_DIFFERENCES:
        more = len(problems) - MAX_DIFFERENCES
        problems = [*problems[:MAX_DIFFERENCES], Problem(f"and {more} more differences")]
    fix = "start every rank with the same command, files and code"
    return [dataclasses.replace(problems[0], fix=fix), *problems[1:]]


def _ranks(ranks: Sequence[int], places: Sequence[str]) -> str:
    if len(ranks) == 1:
        place = places[ranks[0]]
        return f"rank {ranks[0]} ({place})" if place else f"rank {ranks[0]}"
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
