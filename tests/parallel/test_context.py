"""Attention over four ranks is the attention of one: exact in fp32, as good as one rank's kernel in bf16, no byte more
than planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases
from tests.parallel.worker_context import LAYOUTS

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report():
    return run_cases(Path(__file__).with_name("worker_context.py"), nproc=4, timeout=240)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_exact(report, name):
    assert max(rank["worst"][name] for rank in report.check("layouts")) < 1e-6


def test_nothing_travels_beside_the_plan(report):
    assert all(rank["wire"] == [0] for rank in report.check("layouts"))


def test_bf16_is_as_good_as_on_one_rank(report):
    assert max(report.check("narrow_types")[0]["ratios"]) <= 1.25


def test_heads_go_and_come_back(report):
    assert all(rank == {"same": [True] * 3, "exposed": True} for rank in report.check("heads_for_tokens"))
