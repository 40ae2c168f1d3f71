"""Several processes find and prove what one does, whatever becomes of them."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from megatron_telechat.errors import ResourceError
from megatron_telechat.planner import solve as solving
from megatron_telechat.planner import team, worker
from megatron_telechat.planner.budget import Budget
from megatron_telechat.planner.incumbent import Incumbent
from megatron_telechat.planner.op_graph import op_graph
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.solve import solve
from megatron_telechat.planner.team import Team
from tests.planner.small_problems import binding_problem, small_problem
from tests.planner.test_solve import large_problem
from tools.bench.yardsticks.exhaustive import solve_exhaustively

pytestmark = pytest.mark.heavy


@pytest.fixture
def started(monkeypatch):
    """The processes of the workers that were started."""
    found = []
    start = worker._start

    def counted():
        found.append(start())
        return found[-1]

    monkeypatch.setattr(worker, "_start", counted)
    yield found
    assert all(process.poll() is not None for process in found), "none is left"


def searched(problem: BalanceProblem, seconds: float = 60.0, processes: int = 2) -> Team:
    """A search whose workers do everything but the first relaxation."""
    deadline = time.perf_counter() + seconds
    incumbent = Incumbent(problem, deadline)
    with Team(problem, op_graph(*problem.schedule), incumbent, Budget(deadline), 0.0, processes, 0.0) as search:
        while not search.ready():
            time.sleep(0.01)
        search.run(search.root_node())
    return search


def test_workers_prove_what_exhaustive_search_finds(started, monkeypatch):
    problems = [small_problem(seed) for seed in range(12)] + [binding_problem(seed) for seed in range(12)]
    requests = Counter()
    ask = worker.Worker.ask

    def counted(self, request):
        requests[type(request).__name__] += 1
        ask(self, request)

    monkeypatch.setattr(worker.Worker, "ask", counted)
    for seed, problem in enumerate(problems):
        truth = solve_exhaustively(problem)
        search = searched(problem)
        if truth.makespan is None:
            assert search.incumbent.assignment is None and not search.heap, seed
            continue
        assert search.incumbent.makespan == pytest.approx(truth.makespan, rel=1e-6), seed
        assert truth.makespan * (1 - 2e-7) - 1 <= search.lower_bound() <= truth.makespan * (1 + 1e-12), seed
    assert len(started) == requests["Begin"] == 2 * len(problems)
    assert requests["Narrow"] > 10 and requests["Search"] > 10, requests


def test_a_long_search_is_shared_and_ends_with_the_same_value(started, monkeypatch):
    monkeypatch.setattr(solving, "WAIT_S", 0.2)
    problem = large_problem(8, 3)
    alone, shared = solve(problem, 60), solve(problem, 60, processes=2)
    assert alone.status == shared.status == "optimal" and alone.makespan == shared.makespan
    assert len(started) == 2


def test_when_time_is_up_what_was_lent_is_open(started):
    problem = large_problem(8, 3)
    best = solve(problem, 60).makespan
    before = time.perf_counter()
    search = searched(problem, 3.0)
    assert time.perf_counter() - before < 3 + team.GRACE_S
    assert search.lower_bound() <= best * (1 + 1e-12)
    assert search.heap or search.incumbent.makespan == best


def test_a_worker_that_does_not_answer_in_time_is_left(started, monkeypatch):
    monkeypatch.setattr(team, "GRACE_S", 0.2)
    problem = large_problem(8, 3)
    best = solve(problem, 60).makespan
    ask = worker.Worker.ask

    def deaf(self, request):
        if isinstance(request, team.Search):
            return
        ask(self, request)

    monkeypatch.setattr(worker.Worker, "ask", deaf)
    search = searched(problem, 3.0)
    assert search.heap and 0 < search.lower_bound() <= best * (1 + 1e-12)


def test_a_worker_that_ends_is_an_error(started, monkeypatch):
    ask = worker.Worker.ask

    def killed(self, request):
        if isinstance(request, team.Search | team.Narrow):
            self._process.kill()
            self._process.wait()
        ask(self, request)

    monkeypatch.setattr(worker.Worker, "ask", killed)
    with pytest.raises(ResourceError, match="ended before it had answered"):
        searched(large_problem(8, 3), 20.0)
