"""Context parallelism is the one-rank run, at a length where NTK and attention scaling act: losses, every parameter's
first gradient, last weights, the choice of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_telechat.config.routing import read_recording
from megatron_telechat.tensors.table import tensor_table
from megatron_telechat.training.routing_compare import common_steps, differences
from tests.data.chat_material import letters_tokenizer, numbered, write_lines
from tests.harness import ROOT, launch, run_cases
from tests.training.runs import DENSE, MOE, assemble, load
from tests.training.test_parity import TIE, TOLERANCE, WEIGHT_TOLERANCE
from tests.training.worker_context import LAYOUTS, LONG, QUICK

PRETRAIN = ROOT / "pretrain" / "pretrain_telechat2.py"
WORKER = Path(__file__).with_name("worker_context.py")
ALL = [
    pytest.param(world, name, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
    for world, layouts in LAYOUTS.items()
    for name in layouts
    if world > 1
]

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    done = {}

    def of(world: int, slow: bool = False):
        if (world, slow) not in done:
            if world != 1:
                of(1)  # records the choices that the others replay
            environment = {"CONTEXT_DIR": str(folder), "CONTEXT_SLOW": "1" if slow else ""}
            done[world, slow] = run_cases(WORKER, world, timeout=600, env=environment)
        return done[world, slow]

    of.folder = folder
    return of


def tensors(folder: Path, name: str, model: str, tmp: Path):
    run = load([*(MOE if model == "moe" else DENSE), *LONG], tmp)
    shapes = {key: spec.shape for key, spec in tensor_table(run.model).items()}
    return assemble(sorted(folder.glob(f"{name}.rank*.safetensors")), shapes)


def test_a_packed_run_goes_on_bitwise_and_evaluates(tmp_path):
    """What was measured for the layouts of its rows is kept: the resumed ranks hold the same tokens."""
    letters_tokenizer(tmp_path)
    write_lines(tmp_path / "d.jsonl", numbered(120))
    flags = [
        *(word for word in DENSE if word != "--mock-data"),
        *"--vocab-size 320 --seq-length 64 --sft --split 90,10,0 --num-workers 1 --context-parallel-size 2".split(),
        *"--reset-position-ids --reset-attention-mask --train-iters 6 --eval-interval 2 --eval-iters 1".split(),
        *("--data-path", str(tmp_path / "d.jsonl"), "--tokenizer-model", str(tmp_path / "tokenizer.json")),
    ]
    launch(PRETRAIN, 2, *flags, "--save-interval", "3", "--run-dir", str(tmp_path / "whole"), timeout=240).ok()
    begin = ["--load", str(tmp_path / "whole" / "checkpoints"), "--load-step", "3"]
    run = launch(PRETRAIN, 2, *flags, *begin, "--run-dir", str(tmp_path / "parts"), timeout=240).ok()
    assert "from the checkpoint" in run.stdout and "cp exposed" in run.stdout
    whole, parts = (losses(tmp_path / folder) for folder in ("whole", "parts"))
    assert parts == {key: loss for key, loss in whole.items() if key[1] > 3} and ("valid_loss", 4) in parts


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    """Losses by kind and step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        (key, line["step"]): line[key] for line in lines for key in ("loss", "valid_loss") if line.get(key) is not None
    }


@pytest.mark.parametrize("world,name", ALL)
def test_equals_one_rank(runs, world, name, tmp_path):
    model = name.split("_")[0]
    expected, by_rank = runs(1).check(f"{model}_one")[0], runs(world, name not in QUICK).check(name)
    assert all(found == by_rank[0] for found in by_rank), "the ranks report different losses"
    assert by_rank[0]["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert by_rank[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * TOLERANCE)
    for suffix, limit in (("", TOLERANCE), (".weights", WEIGHT_TOLERANCE)):
        ours, theirs = (tensors(runs.folder, f"{one}{suffix}", model, tmp_path) for one in (name, f"{model}_one"))
        errors = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs}
        worst = max(errors, key=errors.get)
        assert errors[worst] <= limit, f"{worst}{suffix}: relative error {errors[worst]:.2e}"


@pytest.mark.parametrize("world,name", [each for each in ALL if each.id.startswith("moe")])
def test_chooses_the_experts_of_one_rank_up_to_ties(runs, world, name):
    runs(world, name not in QUICK).check(name)
    ours, reference = (read_recording(runs.folder / f"{run}.routing") for run in (name, "moe_one"))
    parted = list(differences(ours, reference, common_steps(ours, reference), TIE))
    assert not [layer for layer in parted if layer.beyond_ties]
    assert sum(layer.different for layer in parted) <= 20, "so many ties are none"
