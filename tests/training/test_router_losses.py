"""Auxiliary and z loss have one strength, whatever the loss mask, packing, padding or layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.chat_material import letters_tokenizer, numbered, write_lines
from tests.harness import reports_by_ranks
from tests.moe.reference import relative_error
from tests.training.worker_router_losses import LAYOUTS

WORKER = Path(__file__).with_name("worker_router_losses.py")

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router_losses")
    letters_tokenizer(folder)
    write_lines(folder / "d.jsonl", numbered(120))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return reports_by_ranks(WORKER, timeout=240, env={"ROUTER_DIR": str(folder)})


def gradients(folder: Path, name: str) -> dict:
    from safetensors.torch import load_file

    return {key: box for path in folder.glob(f"{name}.rank*.safetensors") for key, box in load_file(path).items()}


KINDS = ("packed_apart", "packed", "hf", "one")
PAIRS = [
    (1, "recompute_full", "one"),
    (1, "hf_recompute_full", "hf"),
    *((2, name, next(kind for kind in KINDS if name.startswith(kind) or kind == "one")) for name in LAYOUTS[2]),
    *(pytest.param(4, name, "hf", marks=pytest.mark.slow) for name in LAYOUTS[4]),
]


@pytest.mark.parametrize("world,name,reference", PAIRS)
def test_the_losses_are_the_same_in_every_layout(runs, folder, world, name, reference):
    expected, found = runs(1).check(reference)[0], runs(world).check(name)[0]
    assert found["load"] == expected["load"]
    assert found["aux_loss"] == pytest.approx(expected["aux_loss"], rel=1e-5)
    right, mine = gradients(folder, reference), gradients(folder, name)
    assert mine.keys() == right.keys() and len(right) > 1
    assert max(relative_error(mine[key], right[key]) for key in right) < 1e-3


def test_the_gradient_is_that_of_plain_torch_whatever_the_mask(runs):
    found = runs(1).check("against_plain_torch")[0]
    assert max(case["error"] for case in found.values()) < 1e-3, found
    for kind in ("", "_padded"):
        norms = [found[f"{mask}{kind}"]["norm"] for mask in ("all", "few", "uneven")]
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-3)


def test_the_formula_hf_is_that_of_transformers(runs):
    found = runs(1).check("hf_is_transformers")[0]
    assert found["formula"] == "hf" and found["padding"] > 8 and 8 < found["learned"] < 4 * 64 - found["padding"]
    for mine, theirs in (found["loss"], found["aux_loss"]):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert found["aux_loss"][0] > 2.01, "2 is even"
    assert max(found["errors"].values()) < 1e-5, found["errors"]


def test_a_padded_row_gives_the_figures_of_the_row(runs):
    found = runs(1).check("padded_row_is_the_row")[0]
    assert 8 < found["used"] < 56
    assert found["counts"][0] == found["counts"][1]
    assert found["aux_loss"][0] == pytest.approx(found["aux_loss"][1], rel=1e-5)
    assert found["error"] < 1e-3


def test_a_step_that_learns_nothing_is_not_taken_and_said(runs):
    found = runs(1).check("nothing_to_learn")[0]
    assert found["code"] == 0 and found["same"] == [True, False] and found["evaluation"] is None
    steps = {line["step"]: line for line in found["lines"] if "event" not in line}
    assert steps[2]["loss"] is None and steps[2]["skipped_steps"] == 1 and steps[2]["grad_norm"] is None
    assert steps[1]["loss"] and steps[3]["loss"] and "skipped_steps" not in steps[3]
    (event,) = [line for line in found["lines"] if line.get("event") == "skipped_step"]
    assert event["step"] == 2 and "no token" in event["reason"]
