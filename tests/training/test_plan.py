"""A plan from calibration to training on two real ranks; prediction and measurement side by side."""

from __future__ import annotations

import json
import statistics

import pytest

from megatron_telechat.cli.plan_pipeline import main as plan_pipeline
from megatron_telechat.config import load_run_config
from megatron_telechat.costs.devices import read_device_file
from megatron_telechat.planner.predict import predict
from megatron_telechat.training.forecast import FIRST_REPORT, Forecast
from megatron_telechat.training.metrics_file import read_metrics
from tests.harness import ROOT, launch
from tests.training.runs import DENSE

PRETRAIN, PLAN = ROOT / "pretrain" / "pretrain_telechat2.py", ROOT / "tools" / "plan_pipeline.py"
PP2 = [
    *DENSE,
    "--pipeline-model-parallel-size",
    "2",
    "--num-layers",
    "7",
    "--num-virtual-stages-per-pipeline-rank",
    "2",
]
STEPS = FIRST_REPORT + 2
FLAGS = [word for word in PP2 if word not in ("--device", "cpu")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Calibrate on two ranks, plan with the file it wrote and little memory, train with the plan."""
    folder = tmp_path_factory.mktemp("plan")
    device, plan, run_dir = folder / "mine.yaml", folder / "plan.json", folder / "run"
    measured = launch(PLAN, 2, *FLAGS, "--calibrate", "--rounds", "2", "--output", str(device), timeout=200).ok()
    words = [*FLAGS, "--world-size", "2", "--device", str(device), "--reserve-gib", "0"]
    # so little that some layers must be recomputed, and others need not
    assert plan_pipeline([*words, "--memory-gib", "0.0034", "--output", str(plan)]) == 0
    flags = [*PP2, "--train-iters", str(STEPS), "--run-dir", str(run_dir), "--plan", str(plan)]
    return measured, device, json.loads(plan.read_text()), run_dir, launch(PRETRAIN, 2, *flags, timeout=240).ok()


@pytest.mark.gloo
def test_calibration_writes_a_device_file(trained):
    measured, device, _, _, _ = trained
    assert "medians of 2 rounds" in measured.stdout and f"plan with --device {device}" in measured.stdout
    (entry,) = read_device_file(device).measured
    assert entry.layers["dense"]["forward"] > 0 and "extra.full" in entry.layers["dense"]


@pytest.mark.gloo
def test_training_takes_the_plan(trained):
    _, _, plan, run_dir, result = trained
    recompute = plan["sets"]["recompute_layout"]
    assert recompute is not None and "full" in recompute and "none" in recompute
    assert f"layout    {plan['sets']['pipeline_model_parallel_layout']}" in result.stdout
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len([record for record in records if "loss" in record]) == STEPS
    for record in records:
        assert record["predicted_iteration_s"] == plan["predicted"]["iteration_s"]
        assert record["predicted_memory_gib"] == pytest.approx(max(plan["predicted"]["memory_gib"]), abs=1e-4)


@pytest.mark.gloo
def test_prediction_stands_beside_measurement(trained):
    lines = trained[-1].stdout.splitlines()
    said = [at for at, line in enumerate(lines) if line.startswith("predicted ")]
    assert len(said) == 2, "once after some steps, once at the end"
    assert lines[said[0] - 1].startswith(f"step {FIRST_REPORT}/") and lines[said[1] + 1].startswith("done:")
    assert "(the plan, for cpu), measured" in lines[said[1]] and f"median of {STEPS - 1}" in lines[said[1]]


@pytest.mark.gloo
def test_a_run_says_how_fast_its_parts_are(trained, tmp_path):
    _, device, _, run_dir, _ = trained
    again = tmp_path / "again.yaml"
    assert plan_pipeline(["--calibrate", "--from", str(run_dir), "--device", str(device), "--output", str(again)]) == 0
    records = read_metrics(run_dir).settled()[3:]
    seen = statistics.median(record["iteration_time_s"] for record in records)
    run = load_run_config(["--config", str(run_dir / "config.yaml"), "--dry-run"], {}).run
    assert predict(run, read_device_file(again)).iteration == pytest.approx(seen, rel=0.05)
    for record in records:
        assert (
            len(record["stage_compute_s"]) == 2 and 0 < sum(record["stage_compute_s"]) < 2 * record["iteration_time_s"]
        )


def record(seconds: float) -> dict:
    return {"iteration_time_s": seconds, "memory_peak_gib": 2.0}


def test_line_compares_once_enough_was_measured():
    forecast = Forecast(2.0, 1.5, "device file mine")
    assert forecast.observe(record(9.0), 1) is None, "the first window warms up"
    assert forecast.line() is None
    assert forecast.observe(record(1.6), 8) is None
    line = forecast.observe(record(1.6), 5)
    assert (
        line is not None
        and "predicted 2 s a step (device file mine), measured 1.6 s a step (median of 13): +25.0%" in line
    )
    assert "predicted 1.50 GiB, measured peak 2.00 GiB" in line
    assert forecast.observe(record(1.6), 5) is None, "said once"
    assert forecast.fields() == {"predicted_iteration_s": 2.0, "predicted_memory_gib": 1.5}


def test_nothing_is_made_up_where_nothing_is_known():
    forecast = Forecast(None, 1.5, "no device file for AMD EPYC", of_process=True)
    forecast.observe(record(9.0), 1)
    line = forecast.observe(record(1.6), 12)
    assert (
        line is not None
        and "no prediction (no device file for AMD EPYC)" in line
        and "peak of the whole process 2.00" in line
    )
    assert forecast.fields() == {"predicted_memory_gib": 1.5}
