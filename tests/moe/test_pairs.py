"""Rounding, a loss curve, and ranks that disagree; two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases
from tests.moe.worker_pairs import WORLD, cases

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report():
    return run_cases(Path(__file__).with_name("worker_pairs.py"), WORLD)


@pytest.mark.parametrize("name", cases.names)
def test_pairs(report, name):
    report.check(name)
