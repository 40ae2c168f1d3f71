"""Every layout is the one-rank run: 20 losses and gradient norms, and every parameter's first gradient, to 1e-5; its last weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_telechat.costs import parameter_table
from tests.harness import run_cases
from tests.training.runs import DENSE, MOE, SHARED, assemble, load
from tests.training.worker_parity import LAYOUTS

WORKER = Path(__file__).with_name("worker_parity.py")
TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-3
"""Adam divides by the size of a gradient: where that is next to nothing, rounding decides the direction of a step."""
BASE = {"dense": DENSE, "moe": MOE, "shared": SHARED}
REFERENCE = {"dense": "dense_one", "moe": "moe_one", "shared": "shared_one"}
ALL = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts]

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of a world size, launched once, on first use."""
    folder = tmp_path_factory.mktemp("parity")
    done = {}

    def of(world: int):
        if world not in done:
            done[world] = run_cases(WORKER, world, timeout=600, env={"PARITY_DIR": str(folder)})
        return done[world]

    of.folder = folder
    return of


def tensors(folder: Path, name: str, model: str, tmp: Path):
    run = load(BASE[model], tmp)
    return assemble(sorted(folder.glob(f"{name}.rank*.safetensors")), parameter_table(run.model))


def worst_error(runs, name: str, reference: str, model: str, tmp: Path) -> tuple[str, float]:
    """The tensor that differs most from that of the reference run, and its relative error."""
    ours, theirs = (tensors(runs.folder, one, model, tmp) for one in (name, reference))
    errors = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs}
    worst = max(errors, key=errors.get)
    return worst, errors[worst]


@pytest.mark.parametrize("world,name", ALL, ids=[name for _, name in ALL])
def test_equals_one_rank(runs, world, name, tmp_path):
    model = name.split("_")[0]
    expected = runs(1).check(REFERENCE[model])[0]
    by_rank = runs(world).check(name)
    assert all(found == by_rank[0] for found in by_rank), "the ranks report different losses"
    assert by_rank[0]["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert by_rank[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * TOLERANCE)
    worst, error = worst_error(runs, name, REFERENCE[model], model, tmp_path)
    assert error <= TOLERANCE, f"gradient of {worst}: relative error {error:.2e}"
    worst, error = worst_error(runs, f"{name}.weights", f"{REFERENCE[model]}.weights", model, tmp_path)
    assert error <= WEIGHT_TOLERANCE, f"{worst} after the last step: relative error {error:.2e}"


def test_the_runs_learn(runs):
    """A comparison of runs that do nothing would prove nothing."""
    for name in REFERENCE.values():
        losses = runs(1).check(name)[0]["loss"]
        assert losses[-1] < losses[0] - 0.3
