"""A run that is stopped and started again with the same command is the run that was not: bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness import ROOT, launch
from tests.training.runs import DENSE, MOE

PRETRAIN = ROOT / "pretrain" / "pretrain_telechat2.py"
STEPS = 8
LAYOUTS = {
    "moe_tp2_pp2_ep2_interleaved_distributed": (
        4,
        MOE,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--num-virtual-stages-per-pipeline-rank 2 --use-distributed-optimizer",
    ),
    "dense_bf16_dp2_distributed_overlap_dropout": (
        2,
        DENSE,
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --hidden-dropout 0.1 "
        "--attention-dropout 0.1 --loss-chunk-rows 24",
    ),
    # Steps 1 to 4 overflow (2^15 down to 2^12), and some later ones; the run is stopped after step 3.
    "moe_fp16_ep2_skipped_steps": (
        2,
        MOE,
        "--fp16 --expert-model-parallel-size 2 --no-fold-tensor-into-experts --initial-loss-scale 32768 "
        "--loss-scale-window 2 --hysteresis 1 --lr-warmup-iters 4 --loss-chunk-rows 24",
    ),
}

pytestmark = pytest.mark.gloo


def train(nproc: int, flags: list[str], run_dir: Path, *more: str):
    return launch(PRETRAIN, nproc, *flags, "--train-iters", str(STEPS), "--run-dir", str(run_dir), *more, timeout=240)


def records(run_dir: Path) -> dict[int, tuple[float, float, float, int]]:
    """What must repeat, by step; later lines of a step replace earlier ones."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            found[record["step"]] = tuple(
                record.get(key)
                for key in ("loss", "grad_norm", "lr", "consumed_samples", "loss_scale", "skipped_steps")
            )
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_is_bitwise(name, tmp_path):
    nproc, base, flags = LAYOUTS[name]
    flags = [
        *(flag for flag in base if flag != "--fp32" or "16 " not in flags),
        *flags.split(),
        "--lr-decay-style",
        "cosine",
    ]
    train(nproc, flags, tmp_path / "whole").ok()
    stopped = train(nproc, flags, tmp_path / "parts", "--exit-interval", "3").ok()
    assert "stopped after step 3" in stopped.stdout
    assert sorted(records(tmp_path / "parts")) == [1, 2, 3]
    resumed = train(nproc, flags, tmp_path / "parts").ok()
    assert "step 3" in resumed.stdout and "step 4/8" in resumed.stdout and "step 3/8" not in resumed.stdout
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    whole = records(tmp_path / "whole")
    not_taken = [step for step, record in whole.items() if record[-1]]
    if "--fp16" not in flags:
        assert not not_taken
        return
    first_taken = min(set(whole) - set(not_taken))  # fails where none was
    assert not_taken[:4] == [1, 2, 3, 4], not_taken
    rates = {whole[step][2] for step in range(1, first_taken + 1)}
    assert len(rates) == 1, "a step that is not taken does not move the learning rate"


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    metrics = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached; exit {process.poll()}")


def test_sigterm_saves_and_exits_75_then_the_run_goes_on(tmp_path):
    """One process, the real command: a checkpoint at the step it was in, code 75, and the same curve after it."""
    flags = [*DENSE, "--train-iters", "300", "--run-dir", str(tmp_path / "run")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(PRETRAIN), *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_step(tmp_path / "run", 5, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert "stop request: stopped after step" in output
    last = max(records(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"iter_{last:07d}" / "manifest.json").exists()
    again = subprocess.run(
        [sys.executable, str(PRETRAIN), *flags, "--exit-interval", str(last + 2)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert max(records(tmp_path / "run")) == last + 2


def test_stop_file_stops_every_rank(tmp_path):
    """The file is seen by rank 0 alone; all ranks save and leave with code 75."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "stop-now").touch()
    result = train(2, [*DENSE, "--pipeline-model-parallel-size", "2"], run_dir)
    assert [rank.returncode for rank in result.ranks] == [75, 75], result.tails()
    assert sorted(records(run_dir)) == [1]
    assert not (run_dir / "stop-now").exists(), "an obeyed request must not stop the next start"


def test_other_data_is_refused_on_resume_until_it_is_allowed(tmp_path):
    """One rank, the real command, twice; the seed is part of what the sample numbers mean."""
    first = train(1, [*DENSE, "--exit-interval", "2"], tmp_path / "run").ok()
    assert "stopped after step 2" in first.stdout
    refused = train(1, [*DENSE, "--seed", "7", "--exit-interval", "4"], tmp_path / "run")
    assert refused.returncode == 3
    assert "seed: the checkpoint was trained with 1234, the run has 7" in refused.stderr
    assert "--allow-data-change" in refused.stderr and "Traceback" not in refused.stderr
    allowed = train(1, [*DENSE, "--seed", "7", "--exit-interval", "4", "--allow-data-change"], tmp_path / "run").ok()
    assert "stopped after step 4" in allowed.stdout


def test_a_dashboard_that_cannot_be_opened_stops_all_ranks(tmp_path):
    """Only rank 0 opens it: the others must not wait for a rank that has left."""
    environment = {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "wandb.py").write_text("raise ImportError('not here')\n")
    flags = [*DENSE, "--wandb-project", "p", "--train-iters", "2", "--run-dir", str(tmp_path / "run")]
    result = launch(PRETRAIN, 2, *flags, timeout=120, env=environment)
    assert [rank.returncode for rank in result.ranks] == [2, 2], result.tails()
    assert result.stderr.count("the package wandb is missing") == 1
