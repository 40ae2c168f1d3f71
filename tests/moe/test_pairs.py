"""Rounding, a loss curve, and ranks that disagree or die; two ranks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.harness import launch, run_cases
from tests.moe.worker_pairs import WORLD, cases

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report():
    return run_cases(Path(__file__).with_name("worker_pairs.py"), WORLD)


@pytest.mark.parametrize("name", cases.names)
def test_pairs(report, name):
    report.check(name)


@pytest.mark.parametrize("how", ("killed", pytest.param("stopped", marks=pytest.mark.slow)))
def test_lost_rank_ends_the_other(how):
    """A killed rank closes its connections; one that stands still is met by the timeout of the transfers."""
    found = launch(Path(__file__).with_name("worker_lost.py"), WORLD, how, timeout=90, grace=2)
    assert found.ranks[0].returncode == 7, found.tails()
    assert "lost after" in found.ranks[0].stdout
    assert found.ranks[1].returncode == -signal.SIGKILL  # its own, or the launcher's for one that stopped
