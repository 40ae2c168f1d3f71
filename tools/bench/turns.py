"""What the benches with several variants ("arms") share: turns over one link, medians, rates, checks.

The arms of a run take their turns within each round, so that a change of the machine's pace meets all of them. A time
is that of the slowest rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from throttled_links import INTERFACE, LINKS_VARIABLE

CALIBRATION_MBIT = 400.0


class ArmsDisagree(Exception):
    """An arm computes something else than the others: its time means nothing."""


@dataclass(frozen=True)
class Sample:
    """Seconds of this rank; bytes that left its network interface, protocol included."""

    forward_s: float
    backward_s: float
    exposed_s: float = 0.0
    interface_bytes: int = 0


class Arm(Protocol):
    """Something that is timed."""

    def run(self) -> Sample:
        """One forward and backward."""
        ...


class Stopwatch:
    """Times a forward and a backward, and counts what leaves the interface meanwhile; starts when it is made."""

    def __init__(self) -> None:
        self._sent, self._begin = interface_bytes(), time.perf_counter()
        self._middle = self._begin

    def forward_ends(self) -> None:
        """The backward begins."""
        self._middle = time.perf_counter()

    def sample(self, exposed: Callable[[], float] = lambda: 0.0) -> Sample:
        """The backward is over.

        Args:
            exposed: seconds of waiting for transfers; asked after the time is taken.
        """
        end = time.perf_counter()
        return Sample(self._middle - self._begin, end - self._middle, exposed(), interface_bytes() - self._sent)


def interface_bytes() -> int:
    """Bytes sent so far over this rank's own interface; 0 where ranks share one."""
    if LINKS_VARIABLE not in os.environ:
        return 0
    with open("/proc/net/dev") as file:
        for line in file:
            interface, _, numbers = line.partition(":")
            if interface.strip() == INTERFACE:
                return int(numbers.split()[8])
    return 0


def take_turns(arms: Mapping[str, Arm], rounds: int) -> dict[str, list[tuple[float, ...]]]:
    """By arm and round: forward, backward, total, exposed seconds and interface bytes, each the largest of the ranks.

    One more round goes before, to warm up. Collective.
    """
    names = list(arms)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            dist.barrier()
            sample = arms[name].run()
            if number:  # the first round warms up
                samples[name].append(sample)
    values = torch.tensor(
        [
            [
                [s.forward_s, s.backward_s, s.forward_s + s.backward_s, s.exposed_s, s.interface_bytes]
                for s in samples[name]
            ]
            for name in names
        ],
        dtype=torch.float64,
    )
    return {name: [tuple(run) for run in runs] for name, runs in zip(names, slowest(values).tolist(), strict=True)}


def slowest(values: torch.Tensor) -> torch.Tensor:
    """The largest of the ranks. Collective."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def reshape(set_rate: Callable[[float | None], None] | None, mbit: float | None) -> None:
    """Give the links a rate while no rank sends. Collective.

    Args:
        set_rate: reshapes them; None where there are none.
        mbit: Mbit/s, None: no limit.
    """
    dist.barrier()
    if set_rate is not None and dist.get_rank() == 0:
        set_rate(mbit)
    dist.barrier()


def rates(ratio_at: Callable[[float], float], wanted: Sequence[float]) -> dict[float, float]:
    """Mbit/s for which the link takes so many times as long as the computation.

    Args:
        ratio_at: measures the ratio at so many Mbit/s.
    """
    first = CALIBRATION_MBIT * ratio_at(CALIBRATION_MBIT)
    found = {}
    for ratio in wanted:
        # The link's time is not quite its bytes over its rate: look once where that leads, and correct.
        guess = first / ratio
        found[ratio] = guess * ratio_at(guess) / ratio
    return found


def agree_on_errors(errors: Mapping[str, float], limit: float, against: str) -> dict[str, float]:
    """The largest error of each arm over the ranks. Collective.

    Raises:
        ArmsDisagree: on all ranks, with the arms over the limit.
    """
    values = slowest(torch.tensor(list(errors.values()), dtype=torch.float64)).tolist()
    worst = dict(zip(errors, values, strict=True))
    bad = {name: error for name, error in worst.items() if not error <= limit}
    if bad:
        raise ArmsDisagree(f"output or gradients differ from {against} by more than {limit}: {bad}")
    return worst


class Check(NamedTuple):
    """One line of what a run must reach."""

    what: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def ok(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def check_lines(found: Sequence[Check]) -> Iterator[str]:
    yield ""
    for check in found:
        sign = ">=" if check.at_least else "<="
        yield f"  {'ok  ' if check.ok else 'MISS'} {check.what}: {check.value:.3f} ({sign} {check.bound})"


def link_label(mbit: float | None) -> str:
    return f"{mbit:.0f} Mbit/s" if mbit else "no limit"
