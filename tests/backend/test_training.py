"""A stock megatron-core GPT trains on the CPU backend, and every layout gives the losses of one rank.

Stock: no code of model/ or moe/. It tells a fault of the backend from one of ours above it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backend.worker_training import LAYOUTS
from tests.harness import run_cases

WORKER = Path(__file__).with_name("worker_training.py")
REFERENCE = {None: "dense_one", 4: "moe_one"}


@pytest.fixture(scope="module")
def reports():
    """The report of every world size, launched when first asked for."""
    found = {}

    def report(world: int):
        if world not in found:
            found[world] = run_cases(WORKER, world)
        return found[world]

    return report


def of(world: int) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if layout[0] == world]


@pytest.mark.gloo
@pytest.mark.parametrize("name", of(2) + of(4))
def test_losses_are_those_of_one_rank(reports, name):
    world, _, experts, _, _ = LAYOUTS[name]
    reference = reports(1).check(REFERENCE[experts])[0]
    for losses in reports(world).check(name):
        assert losses == pytest.approx(reference, rel=1e-5)


@pytest.mark.gloo
def test_bf16_is_close(reports):
    assert reports(1).check("dense_bf16_one")[0] == pytest.approx(reports(1).check("dense_one")[0], rel=1e-2)


@pytest.mark.gloo
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_print_nothing(reports, world):
    assert reports(world).launch.ok().stderr == ""
