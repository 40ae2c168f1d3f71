"""Context parallelism is the one-rank run, at a length where NTK and attention scaling act: losses, every parameter's
first gradient, last weights, the choice of experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_telechat.config.routing import read_recording
from megatron_telechat.tensors.table import tensor_table
from megatron_telechat.training.routing_compare import common_steps, differences
from tests.harness import run_cases
from tests.training.runs import DENSE, MOE, assemble, load
from tests.training.test_parity import TIE, TOLERANCE, WEIGHT_TOLERANCE
from tests.training.worker_context import LAYOUTS, LONG

WORKER = Path(__file__).with_name("worker_context.py")
ALL = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts if world > 1]

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    done = {}

    def of(world: int):
        if world not in done:
            if world != 1:
                of(1)  # records the choices that the others replay
            done[world] = run_cases(WORKER, world, timeout=600, env={"CONTEXT_DIR": str(folder)})
        return done[world]

    of.folder = folder
    return of


def tensors(folder: Path, name: str, model: str, tmp: Path):
    run = load([*(MOE if model == "moe" else DENSE), *LONG], tmp)
    shapes = {key: spec.shape for key, spec in tensor_table(run.model).items()}
    return assemble(sorted(folder.glob(f"{name}.rank*.safetensors")), shapes)


@pytest.mark.parametrize("world,name", ALL, ids=[name for _, name in ALL])
def test_equals_one_rank(runs, world, name, tmp_path):
    model = name.split("_")[0]
    expected, by_rank = runs(1).check(f"{model}_one")[0], runs(world).check(name)
    assert all(found == by_rank[0] for found in by_rank), "the ranks report different losses"
    assert by_rank[0]["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert by_rank[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * TOLERANCE)
    for suffix, limit in (("", TOLERANCE), (".weights", WEIGHT_TOLERANCE)):
        ours, theirs = (tensors(runs.folder, f"{one}{suffix}", model, tmp_path) for one in (name, f"{model}_one"))
        errors = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs}
        worst = max(errors, key=errors.get)
        assert errors[worst] <= limit, f"{worst}{suffix}: relative error {errors[worst]:.2e}"


@pytest.mark.parametrize("world,name", [each for each in ALL if each[1].startswith("moe")])
def test_chooses_the_experts_of_one_rank_up_to_ties(runs, world, name):
    runs(world).check(name)
    ours, reference = (read_recording(runs.folder / f"{run}.routing") for run in (name, "moe_one"))
    parted = list(differences(ours, reference, common_steps(ours, reference), TIE))
    assert not [layer for layer in parted if layer.beyond_ties]
    assert sum(layer.different for layer in parted) <= 20, "so many ties are none"
