"""Every layout is the one-rank run: 20 losses and gradient norms, and every parameter's first gradient, to 1e-5; its
last weights.

Mixtures are compared under one routing, that of the one-rank run. What a layout would have chosen itself is compared
apart: it may be another choice only where the logits are nearer to each other than `parity.TIE`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_telechat.costs.op_order import rank_ops
from tests.training.parity import Launches
from tests.training.runs import DENSE, MOE, QKNORM, SHARED
from tests.training.worker_parity import GROUPED, LAYOUTS, SLOW

WORKER = Path(__file__).with_name("worker_parity.py")
BASE = {"dense": DENSE, "moe": MOE, "shared": SHARED, "qknorm": QKNORM}
REFERENCES = [f"{model}_one" for model in BASE]
ALL = [
    pytest.param(world, name, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for world, layouts in LAYOUTS.items()
    for name in layouts
]
MIXTURES = [one for one in ALL if not one.id.startswith(("dense", "qknorm")) and one.id not in REFERENCES]

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Launches(WORKER, BASE, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("world,name", ALL)
def test_equals_one_rank(runs, world, name, tmp_path):
    runs.require_equal(world, name, name in SLOW, tmp_path)


@pytest.mark.parametrize("world,name", MIXTURES)
def test_chooses_the_experts_of_one_rank_up_to_ties(runs, world, name):
    runs.require_choices(world, name, name in SLOW)


def test_ops_run_in_the_planned_order(runs):
    """Micro-batches in groups of three: forwards and backwards of both ranks as the planner counts with them."""
    for rank, found in enumerate(runs(2).check(GROUPED)):
        planned = [(op.forward, op.virtual_stage, op.microbatch) for op in rank_ops(rank, 2, 2, 8, 3)]
        assert [tuple(op) for op in found["ops"]] == planned
        assert planned != [(op.forward, op.virtual_stage, op.microbatch) for op in rank_ops(rank, 2, 2, 8)]


def test_the_runs_learn(runs):
    """A comparison of runs that do nothing would prove nothing."""
    for name in REFERENCES:
        losses = runs(1).check(name)[0]["loss"]
        assert losses[-1] < losses[0] - 0.3
