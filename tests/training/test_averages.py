"""Averages of the weights inside a run: what they are, in any layout, over stops and saves beside the training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_telechat.checkpoint.format import CheckpointReader
from tests.harness import CaseReport, run_cases
from tests.training.worker_averages import DECAY, START, STEPS, WINDOW

WORKER = Path(__file__).with_name("worker_averages.py")
FOUR = "dense_tp2_pp2_interleaved"
SLOW = {"moe_ep2_distributed", FOUR}
"""With the tests marked slow; the kill storm and the layouts of checkpoints hold their parts too."""
RUNS = {
    "dense": 1,
    "moe_fp16": 1,
    "dense_bf16_distributed_overlap": 2,
    "moe_ep2_distributed": 2,
    FOUR: 4,
}
"""Case → ranks."""
OTHERS = {1: ["switched_on_and_off"], 2: ["beside_the_training", "weights_that_no_master_gives_back"], 4: []}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS]
REPEATED = ("loss", "grad_norm", "lr", "loss_scale", "skipped_steps", "consumed_samples")

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def report(folder, request):
    done: dict[int, CaseReport] = {}
    slow = any(item.get_closest_marker("slow") for item in request.session.items if item.path == request.path)

    def of(ranks: int) -> CaseReport:
        if ranks not in done:
            names = [name for name, count in RUNS.items() if count == ranks and (slow or name not in SLOW)]
            names += OTHERS[ranks]
            done[ranks] = run_cases(WORKER, ranks, names, timeout=300, env={"AVERAGES_DIR": str(folder)})
        return done[ranks]

    return of


def tensors(run: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    """Global tensors of a checkpoint by the model's key; None of them is an empty dictionary."""
    reader = CheckpointReader(run / "checkpoints" / f"iter_{step:07d}", verify=True)
    found = {key.removeprefix(prefix): reader.read(key) for key in reader.entries if key.startswith(prefix)}
    return found


def masters(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The fp32 weights after a step."""
    return tensors(run, step, "optimizer/master/") or tensors(run, step, "model/")


def manifest(run: Path, step: int = STEPS) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"iter_{step:07d}" / "manifest.json").read_text())


def records(run: Path, key: str = "loss") -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if key in line}


def require_close(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and found
    for key in wanted:
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key].double(), wanted[key], rtol=2e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_each_checkpoint_holds_what_a_plain_loop_over_the_saved_weights_gives(report, folder, name):
    """The loop is in fp64, over the master weights of the checkpoints of all steps."""
    report(RUNS[name]).check(name)
    run = folder / f"{name}_whole"
    skipped = {step for step in range(1, STEPS + 1) if records(run)[step]["grad_norm"] is None}
    assert 6 in skipped and 2 < len(skipped) < STEPS - 2 if name == "moe_fp16" else not skipped
    weights = {step: {key: one.double() for key, one in masters(run, step).items()} for step in range(1, STEPS + 1)}
    ema, updates = weights[START], 0
    for step in range(START, STEPS + 1):
        if step > START and step not in skipped:
            ema = {key: DECAY * ema[key] + (1 - DECAY) * weights[step][key] for key in ema}
            updates += 1
        require_close(tensors(run, step, "average/ema/"), ema)
        told = manifest(run, step)["extra"]["averages"]
        assert told["ema"] == {"decay": DECAY, "since": START, "updates": updates}

        last = step // WINDOW * WINDOW
        windows = {"window": range(last - WINDOW + 1, last + 1), "window_under_way": range(last + 1, step + 1)}
        for kind, steps in windows.items():
            if not steps or steps[0] <= START:
                assert not tensors(run, step, f"average/{kind}/") and kind not in told
                continue
            entered = [weights[each] for each in steps if each not in skipped]
            assert told[kind]["averaged"] == len(entered) and told[kind]["first"] == steps[0]
            mean = {key: sum(each[key] for each in entered) / len(entered) for key in ema} if entered else {}
            if mean:
                require_close(tensors(run, step, f"average/{kind}/"), mean)
            else:
                assert not tensors(run, step, f"average/{kind}/")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_stopped_in_a_window_has_the_averages_of_the_one_that_was_not(report, folder, name):
    for found in report(RUNS[name]).check(name):
        assert [found[part]["code"] for part in ("whole", "stopped", "parts")] == [0, 0, 0], found
    whole, parts = folder / f"{name}_whole", folder / f"{name}_parts"
    assert manifest(whole)["extra"] == manifest(parts)["extra"]
    one, other = tensors(whole, STEPS, ""), tensors(parts, STEPS, "")
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    assert records(whole, "valid_loss") == records(parts, "valid_loss")


@pytest.mark.parametrize("name", NAMES)
def test_averages_and_their_evaluation_leave_the_training_bitwise_alone(report, folder, name):
    report(RUNS[name]).check(name)
    whole, plain = folder / f"{name}_whole", folder / f"{name}_plain"
    kept = {run: {step: [line.get(key) for key in REPEATED] for step, line in records(run).items()} for run in
            (whole, plain)}  # fmt: skip
    assert kept[whole] == kept[plain]
    one, other = tensors(whole, STEPS, ""), tensors(plain, STEPS, "")
    assert {key for key in one if not key.startswith("average/")} == other.keys()
    assert all(one[key].equal(other[key]) for key in other)


@pytest.mark.parametrize("name", NAMES)
def test_the_validation_loss_is_told_of_the_averages_too(report, folder, name):
    report(RUNS[name]).check(name)
    told = records(folder / f"{name}_whole", "valid_loss")
    assert sorted(told) == [2, 4, 6, 8]
    assert "valid_loss_window" not in told[4] and "valid_loss_window" in told[6], "steps 4 to 6 are the first window"
    assert len({told[STEPS][f"valid_loss{kind}"] for kind in ("", "_ema", "_window")}) == 3
    for line in told.values():
        assert line["valid_loss_ema"] == pytest.approx(line["valid_loss"], abs=0.2)


@pytest.mark.slow
def test_the_averages_of_a_layout_are_those_of_one_rank(report, folder):
    for name in ("dense", FOUR):
        report(RUNS[name]).check(name)
    one, four = folder / "dense_whole", folder / f"{FOUR}_whole"
    for kind in ("ema", "window", "window_under_way"):
        wanted, found = (tensors(run, STEPS, f"average/{kind}/") for run in (one, four))
        assert wanted.keys() == found.keys() and wanted
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5, msg=key)
    for step, line in records(one, "valid_loss").items():
        other = records(four, "valid_loss")[step]
        assert other["valid_loss_ema"] == pytest.approx(line["valid_loss_ema"], rel=1e-5)


def test_an_evaluation_waits_for_the_copies_of_a_save_beside_the_training(report, folder):
    assert report(2).check("beside_the_training") == [{"sync": 0, "async": 0}] * 2
    for step in (5, STEPS):
        one, other = (tensors(folder / mode, step, "") for mode in ("sync", "async"))
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one), step


def test_an_average_that_a_run_begins_changes_or_drops_is_told(report, folder):
    found = report(1).check("switched_on_and_off")[0]
    assert [part["code"] for part in found.values()] == [0] * 5, found
    assert "the moving average (ema) begins here: the checkpoint holds none" in found["on"]["resumed"]
    assert "holds no mean over a window; the next whole window is averaged" in found["on"]["resumed"]
    assert "window under way has other steps and is dropped" not in found["on"]["resumed"]
    run = folder / "switched"
    assert manifest(run, 5)["extra"]["averages"] == {"ema": {"decay": 0.9, "since": 4, "updates": 1}}
    assert "begins here" not in found["other"]["resumed"]
    assert manifest(run, 6)["extra"]["averages"]["ema"]["updates"] == 2
    dropped = found["off_again"]["resumed"]
    assert "warning: the checkpoint's moving average of 2 updates is dropped; --ema-decay keeps it" in dropped
    assert not tensors(run, STEPS, "average/") and "averages" not in manifest(run)["extra"]
    assert manifest(folder / "tuned", 2)["extra"]["averages"]["ema"] == {"decay": 0.9, "since": 0, "updates": 2}


def test_weights_are_given_back_that_their_masters_do_not_give(report):
    for found in report(2).check("weights_that_no_master_gives_back"):
        assert found == {"same": True, "moved": True}
