"""Every layout is the one-rank run: 20 losses and gradient norms, and every parameter's first gradient, to 1e-5; its
last weights.

Mixtures are compared under one routing, that of the one-rank run. What a layout would have chosen itself is compared
apart: it may be another choice only where the logits are nearer to each other than `TIE`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_telechat.config.routing import read_recording
from megatron_telechat.tensors.table import tensor_table
from megatron_telechat.training.routing_compare import common_steps, differences
from tests.harness import run_cases
from tests.training.runs import DENSE, MOE, QKNORM, SHARED, assemble, load
from tests.training.worker_parity import LAYOUTS, SLOW

WORKER = Path(__file__).with_name("worker_parity.py")
TOLERANCE = 1e-5
TIE = 1e-4
"""Of logits around 0.1. Sums in another order move them by 1e-8 in the first step and, through Adam, by up to 1e-6 in
the last."""
WEIGHT_TOLERANCE = 1e-3
"""Adam divides by the size of a gradient: where that is next to nothing, rounding decides the direction of a step."""
BASE = {"dense": DENSE, "moe": MOE, "shared": SHARED, "qknorm": QKNORM}
REFERENCE = {"dense": "dense_one", "moe": "moe_one", "shared": "shared_one", "qknorm": "qknorm_one"}
ALL = [
    pytest.param(world, name, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for world, layouts in LAYOUTS.items()
    for name in layouts
]
MIXTURES = [one for one in ALL if not one.id.startswith(("dense", "qknorm")) and one.id not in REFERENCE.values()]

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of a world size (of its slow layouts apart), launched once, on first use."""
    folder = tmp_path_factory.mktemp("parity")
    done = {}

    def of(world: int, slow: bool = False):
        if (world, slow) not in done:
            if world != 1:
                of(1)  # records the choices that the others replay
            environment = {"PARITY_DIR": str(folder), "PARITY_SLOW": "1" if slow else ""}
            done[world, slow] = run_cases(WORKER, world, timeout=600, env=environment)
        return done[world, slow]

    of.folder = folder
    return of


def tensors(folder: Path, name: str, model: str, tmp: Path):
    run = load(BASE[model], tmp)
    return assemble(
        sorted(folder.glob(f"{name}.rank*.safetensors")),
        {key: spec.shape for key, spec in tensor_table(run.model).items()},
    )


def worst_error(runs, name: str, reference: str, model: str, tmp: Path) -> tuple[str, float]:
    """The tensor that differs most from that of the reference run, and its relative error."""
    ours, theirs = (tensors(runs.folder, one, model, tmp) for one in (name, reference))
    errors = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs}
    worst = max(errors, key=errors.get)
    return worst, errors[worst]


@pytest.mark.parametrize("world,name", ALL)
def test_equals_one_rank(runs, world, name, tmp_path):
    model = name.split("_")[0]
    expected = runs(1).check(REFERENCE[model])[0]
    by_rank = runs(world, name in SLOW).check(name)
    assert all(found == by_rank[0] for found in by_rank), "the ranks report different losses"
    assert by_rank[0]["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert by_rank[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * TOLERANCE)
    worst, error = worst_error(runs, name, REFERENCE[model], model, tmp_path)
    assert error <= TOLERANCE, f"gradient of {worst}: relative error {error:.2e}"
    worst, error = worst_error(runs, f"{name}.weights", f"{REFERENCE[model]}.weights", model, tmp_path)
    assert error <= WEIGHT_TOLERANCE, f"{worst} after the last step: relative error {error:.2e}"


@pytest.mark.parametrize("world,name", MIXTURES)
def test_chooses_the_experts_of_one_rank_up_to_ties(runs, world, name):
    runs(1).check(REFERENCE[name.split("_")[0]])
    runs(world, name in SLOW).check(name)
    ours, reference = (read_recording(runs.folder / f"{run}.routing") for run in (name, REFERENCE[name.split("_")[0]]))
    steps = common_steps(ours, reference)
    assert steps == tuple(range(1, 21))
    parted = list(differences(ours, reference, steps, TIE))
    assert not [layer for layer in parted if layer.beyond_ties]
    assert sum(layer.different for layer in parted) <= 20, "so many ties are none"


def test_the_runs_learn(runs):
    """A comparison of runs that do nothing would prove nothing."""
    for name in REFERENCE.values():
        losses = runs(1).check(name)[0]["loss"]
        assert losses[-1] < losses[0] - 0.3
