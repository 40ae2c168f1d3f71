"""launch/slurm.sh with stand-ins for srun (two nodes, on this machine) and scontrol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_telechat.supervisor.nodes import free_port
from tests.harness import ROOT
from tests.training.runs import DENSE

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_LOCALID=0
export SLURM_STEP_TASKS_PER_NODE="1(x2)" SLURM_STEP_NODELIST="gpu[1-2]"
SLURM_PROCID=1 SLURM_NODEID=1 "$@" & other=$!
SLURM_PROCID=0 SLURM_NODEID=0 "$@" & first=$!
code=0
wait $first || code=$?
wait $other || code=$?
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$@" >> "$(dirname "$0")/told"; fi
"""


@pytest.mark.slow
@pytest.mark.gloo
def test_a_job_stops_in_time_is_requeued_and_goes_on(tmp_path):
    folder, run = tmp_path / "bin", tmp_path / "run"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "VENV": sys.prefix,
        "RANKS_PER_NODE": "1",
        "MASTER_PORT": str(free_port()),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    steps = ["--train-iters", "40", "--eval-iters", "0"]
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), *DENSE, *steps, "--run-dir", str(run)]

    def start(out: Path) -> subprocess.Popen[bytes]:
        with open(out, "wb") as stream:
            return subprocess.Popen(command, env=environ, stdout=stream, stderr=stream)

    job = start(tmp_path / "first")
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not metrics.exists() or metrics.read_text().count('"loss"') < 3:
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "first").read_text()
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == 75, (tmp_path / "first").read_text()
    assert (folder / "told").read_text() == "requeue 7\n"
    (saved,) = (run / "checkpoints").glob("iter_*/manifest.json")
    job = start(tmp_path / "second")
    assert job.wait(timeout=240) == 0, (tmp_path / "second").read_text()
    assert f"step {int(saved.parent.name[5:])}," in (tmp_path / "second").read_text()
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in found if "loss" in record] == list(range(1, 41))
    assert (folder / "told").read_text() == "requeue 7\n"
