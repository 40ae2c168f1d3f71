"""Chunks of the input in every layout: one launch of four ranks, many cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases
from tests.moe.worker_chunks import WORLD, cases

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report():
    return run_cases(Path(__file__).with_name("worker_chunks.py"), WORLD)


@pytest.mark.parametrize("name", cases.names)
def test_chunks(report, name):
    report.check(name)
