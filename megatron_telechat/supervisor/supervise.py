"""Starts the ranks, ends them together, starts them again where that is worth it, and answers with the job's code."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_telechat.errors import EXIT_OK, EXIT_SIGNAL, ResourceError
from megatron_telechat.supervisor.goodput import Goodput
from megatron_telechat.supervisor.nodes import LocalNode, Node, Others, RemoteNode, free_port
from megatron_telechat.supervisor.processes import Ended, Layout
from megatron_telechat.supervisor.verdict import (
    cause,
    code_of_stopped,
    exit_code,
    grace_s,
    is_worth_a_restart,
    what_happened,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_LEFT_ALONE_WHEN_IGNORED = (signal.SIGINT, signal.SIGHUP)
_TURN_S = 0.02
_PASS_ON_S = 5.0
_LONGEST_BACK_OFF_S = 60.0


class Progress(Protocol):
    """What a supervisor sees of the run."""

    def newest_checkpoint(self) -> tuple[int, str] | None:
        """Step and digest of the newest checkpoint; None without one."""
        ...


@dataclass(frozen=True)
class Limits:
    """When a job is given up.

    Attributes:
        restarts: at most so many in all; None: any number.
        without_progress: as many ranks lost in a row without a new checkpoint between.
        join_s: seconds that a node may be missing.
    """

    restarts: int | None = None
    without_progress: int = 3
    join_s: float = 600.0


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """The signals that come while the block runs, in order, in place of their effect. What is ignored, under nohup,
    stays ignored."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in SIGNALS
        if not (number in _LEFT_ALONE_WHEN_IGNORED and signal.getsignal(number) is signal.SIG_IGN)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Supervisor:
    """Leads a job from node 0.

    Args:
        local, others: the nodes.
        address: where the ranks of all nodes reach this one.
        limits: when the job is given up.
        say: how lines are told.
        progress: the checkpoints of the run; None: the program is not ours, and every end counts.
        goodput: the account; None: there is none.
    """

    def __init__(
        self,
        local: LocalNode,
        others: Others,
        address: str,
        limits: Limits,
        say: Callable[[str], None],
        progress: Progress | None = None,
        goodput: Goodput | None = None,
    ):
        self._local, self._others, self._address = local, others, address
        self._limits, self._say = limits, say
        self._progress, self._goodput = progress, goodput
        self._without_progress = 0
        self._passed_on = False
        """Whether the stop of one rank was passed on to the others."""

    def run(self) -> int:
        """Run the job to its end. Returns its exit code.

        Raises:
            ResourceError: a node was missing for too long.
        """
        code, why = 1, "the supervisor failed"
        try:
            code, why = self._attempts()
            return code
        except ResourceError as error:
            code, why = error.exit_code, error.problems[0].what
            raise
        finally:
            self._local.end()
            self._others.finish(code)
            if self._goodput is not None:
                self._goodput.ended(code, why, (self._newest() or (0, ""))[0])

    def _attempts(self) -> tuple[int, str]:
        attempt = 0
        while True:
            before = self._newest()
            if not self._gather():
                return EXIT_SIGNAL, "stopped while no rank was running"
            ended = self._attempt(attempt)
            first = cause(ended)
            asked = [*self._asked(), *([signal.SIGTERM] if self._passed_on else [])]
            if asked:
                return code_of_stopped(ended, asked), "stop request"
            if not is_worth_a_restart(first.code):
                return exit_code(first.code), "" if first.code == EXIT_OK else what_happened(first)
            refusal = self._refusal(attempt, self._newest() != before)
            if refusal:
                self._say(f"{what_happened(first)}; not started again: {refusal}")
                return exit_code(first.code), f"{what_happened(first)}; {refusal}"
            attempt += 1
            delay = 0.0 if self._without_progress < 2 else min(2.0 ** (self._without_progress - 1), _LONGEST_BACK_OFF_S)
            self._say(f"{what_happened(first)}; restart {attempt}" + (f" in {delay:.0f} s" if delay else ""))
            if not self._wait(delay):
                return EXIT_SIGNAL, "stopped while no rank was running"

    def _attempt(self, attempt: int) -> list[Ended]:
        """Start the ranks and see them to their end. Returns those that ended by themselves, in order."""
        nodes = self._nodes()
        port, first, world = free_port(), 0, sum(node.ranks for node in nodes)
        for node in nodes:
            node.start(Layout(attempt, first, node.ranks, world, node.number, self._address, port))
            first += node.ranks
        if self._goodput is not None:
            self._goodput.started()
        ended: list[Ended] = []
        noticed: float | None = None
        passed = {node.number: 0 for node in nodes}
        while any(node.running for node in nodes):
            for node in nodes:
                ended += node.ended()
                for number in node.asked[passed[node.number] :]:
                    self._say(f"{signal.Signals(number).name}: passed to all ranks; waiting for them to save and end")
                    for other in nodes:
                        other.signal(number)
                passed[node.number] = len(node.asked)
            failed = [one for one in ended if one.code != EXIT_OK]
            if failed and noticed is None:
                noticed = time.monotonic()
            if noticed is not None and not self._passed_on and cause(failed).code == EXIT_SIGNAL:
                # The others end by themselves, unless one was asked alone, before the first step.
                if time.monotonic() > noticed + _PASS_ON_S:
                    self._passed_on = True
                    for node in nodes:
                        node.signal(signal.SIGTERM)
            if noticed is not None and time.monotonic() >= noticed + grace_s(cause(failed).code):
                break
            if self._goodput is not None:
                self._goodput.look()
            time.sleep(_TURN_S)
        self._end(nodes)
        worst = cause(ended)
        if self._goodput is not None and is_worth_a_restart(worst.code) and not self._asked():
            now = time.monotonic()
            self._goodput.died(what_happened(worst), noticed or now, now)
        return ended

    def _end(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.end()
        while any(node.running for node in nodes):
            for node in nodes:
                node.ended()
            time.sleep(_TURN_S)

    def _nodes(self) -> list[LocalNode | RemoteNode]:
        return [self._local, *self._others.nodes]

    def _asked(self) -> list[int]:
        return [number for node in self._nodes() for number in node.asked]

    def _newest(self) -> tuple[int, str] | None:
        return self._progress.newest_checkpoint() if self._progress is not None else None

    def _refusal(self, attempt: int, progressed: bool) -> str:
        """Why the job is not started again; "" if it is."""
        self._without_progress = 1 if progressed else self._without_progress + 1
        if self._limits.restarts is not None and attempt >= self._limits.restarts:
            return f"--max-restarts {self._limits.restarts}"
        if self._without_progress >= self._limits.without_progress:
            return (
                f"{self._without_progress} times in a row without a new checkpoint (--max-restarts-without-progress "
                f"{self._limits.without_progress})"
            )
        return ""

    def _gather(self) -> bool:
        """Wait until every node is there; False after a stop request."""
        deadline, told = time.monotonic() + self._limits.join_s, False
        while not self._others.gathered():
            if self._asked():
                return False
            missing = ", ".join(map(str, self._others.missing()))
            if not told:
                told = True
                self._say(f"waiting for node{'s' if ',' in missing else ''} {missing}")
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"after {self._limits.join_s:.0f} s there is no node {missing}",
                    "--nnodes",
                    "start the same command on every node; --join-timeout gives them more time",
                )
            time.sleep(_TURN_S)
        return not self._asked()

    def _wait(self, seconds: float) -> bool:
        """Let time pass; False after a stop request."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._asked():
            time.sleep(_TURN_S)
        return not self._asked()
