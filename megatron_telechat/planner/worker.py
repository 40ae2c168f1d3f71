"""Problems of a sweep solved in processes of their own; what comes out is the same for any number of them.

A worker is `python -m megatron_telechat.planner.worker`: it reads tasks from its standard input until that ends, which
it does with the process that started it, however that ends.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_telechat.errors import ResourceError
from megatron_telechat.planner.assignment import Assignment, Solution
from megatron_telechat.planner.budget import Budget
from megatron_telechat.planner.path_cuts import PathCut
from megatron_telechat.planner.problem import BalanceProblem, Block, DeviceCost, LayerGroup, Mode
from megatron_telechat.planner.solve import solve_below

_ROOT = Path(__file__).resolve().parents[2]
_LENGTH = 8
"""Bytes before each message that say how long it is."""


@dataclass(frozen=True)
class Task:
    """A problem for `solve_below`; `seconds`: until the search of all ends."""

    problem: BalanceProblem
    limit: float
    work: int
    gap: float
    cuts: tuple[PathCut, ...]
    warm_start: Assignment | None
    seconds: float

    def solved(self) -> tuple[Solution, tuple[PathCut, ...]]:
        """The answer, and the paths that were met."""
        cuts = dict.fromkeys(self.cuts)
        budget = Budget(time.perf_counter() + self.seconds, self.work)
        answer = solve_below(self.problem, self.limit, budget, self.gap, cuts, self.warm_start)
        return answer, tuple(cut for cut in cuts if cut not in set(self.cuts))


class Workers:
    """So many processes, or none for one: then tasks run here. They start at the first tasks that come after `wait_s`
    seconds: a short search is over before they would be there."""

    def __init__(self, number: int, wait_s: float = 1.0):
        self.number = number
        self._from = time.perf_counter() + wait_s
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def run(self, tasks: Sequence[Task]) -> list[tuple[Solution, tuple[PathCut, ...]]]:
        """The answers, in the order of the tasks.

        Raises:
            ResourceError: a process ended before it had answered.
        """
        if self.number == 1 or len(tasks) == 1 or time.perf_counter() < self._from:
            return [task.solved() for task in tasks]
        if not self._processes:
            self._processes = [_start() for _ in range(self.number)]
        answers: dict[int, tuple[Solution, tuple[PathCut, ...]]] = {}
        waiting = list(enumerate(tasks))[::-1]
        busy: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
        idle = list(self._processes)
        while waiting or busy:
            while waiting and idle:
                process = idle.pop()
                number, task = waiting.pop()
                assert process.stdin is not None and process.stdout is not None
                _send(process.stdin, task)
                busy[process.stdout.fileno()] = number, process
            for ready in select.select(list(busy), [], [])[0]:
                number, process = busy.pop(ready)
                assert process.stdout is not None
                answers[number] = _received(process.stdout)
                idle.append(process)
        return [answers[number] for number in range(len(tasks))]


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_telechat.planner.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **threads, "PYTHONPATH": path},
        start_new_session=True,  # an interrupt at the terminal is for the one who started it
    )


def _send(stream: IO[bytes], task: Task) -> None:
    data = json.dumps(asdict(task)).encode()
    try:
        stream.write(len(data).to_bytes(_LENGTH, "little") + data)
        stream.flush()
    except OSError:
        raise _gone() from None


def _received(stream: IO[bytes]) -> tuple[Solution, tuple[PathCut, ...]]:
    length = stream.read(_LENGTH)
    data = stream.read(int.from_bytes(length, "little")) if len(length) == _LENGTH else b""
    if not data or len(data) < int.from_bytes(length, "little"):
        raise _gone()
    return _answer(json.loads(data))


def _task(found: dict[str, Any]) -> Task:
    warm = found["warm_start"]
    return Task(
        **{
            **found,
            "problem": _problem(found["problem"]),
            "cuts": _cuts(found["cuts"]),
            "warm_start": warm and Assignment.from_json(warm),
        }
    )


def _problem(found: dict[str, Any]) -> BalanceProblem:
    groups = (
        LayerGroup(**{**group, "modes": tuple(Mode(**mode) for mode in group["modes"])}) for group in found["groups"]
    )
    rest = (tuple(DeviceCost(**{**cost, "layers": tuple(cost["layers"])}) for cost in costs) for costs in found["rest"])
    blocks = {name: found[name] and Block(**found[name]) for name in ("embed", "head", "mtp")}
    return BalanceProblem(**{**found, **blocks, "groups": tuple(groups), "rest": tuple(rest)})


def _cuts(found: list[dict[str, Any]]) -> tuple[PathCut, ...]:
    return tuple(PathCut(cut["lags"], tuple(cut["visits"])) for cut in found)


def _answer(found: list[Any]) -> tuple[Solution, tuple[PathCut, ...]]:
    answer, cuts = found
    plan, peaks = answer["assignment"], answer["peak_bytes"]
    own = {"assignment": plan and Assignment.from_json(plan), "peak_bytes": peaks and tuple(peaks)}
    return Solution(**{**answer, **own}), _cuts(cuts)


def _gone() -> ResourceError:
    return ResourceError(
        "a process of the search ended before it had answered",
        "--sweep",
        "see its message above, if there is one; with too little memory, --processes 1",
    )


def _serve(tasks: IO[bytes], answers: IO[bytes]) -> None:
    while True:
        length = tasks.read(_LENGTH)
        if len(length) < _LENGTH:
            return
        task = _task(json.loads(tasks.read(int.from_bytes(length, "little"))))
        answer, cuts = task.solved()
        data = json.dumps([asdict(answer), [asdict(cut) for cut in cuts]]).encode()
        try:
            answers.write(len(data).to_bytes(_LENGTH, "little") + data)
            answers.flush()
        except OSError:
            return  # nobody waits for it any more


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    _serve(sys.stdin.buffer, out)
