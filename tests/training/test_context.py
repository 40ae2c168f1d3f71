"""Context parallelism is the one-rank run, at a length where NTK and attention scaling act: losses, every parameter's
first gradient, last weights, the choice of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.chat_material import letters_tokenizer, numbered, write_lines
from tests.harness import ROOT, launch
from tests.training.parity import Launches
from tests.training.runs import DENSE, MOE
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
    models = {"dense": [*DENSE, *LONG], "moe": [*MOE, *LONG]}
    return Launches(WORKER, models, tmp_path_factory.mktemp("context"))


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
    assert "measured before" in run.stdout and "cp exposed" in run.stdout
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
    runs.require_equal(world, name, name not in QUICK, tmp_path)


@pytest.mark.parametrize("world,name", [each for each in ALL if each.id.startswith("moe")])
def test_chooses_the_experts_of_one_rank_up_to_ties(runs, world, name):
    runs.require_choices(world, name, name not in QUICK)
