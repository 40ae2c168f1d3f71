"""A training under the supervisor: stops in every phase, and kills of the supervisor; the joined run is one that nobody
stopped. Kills of ranks: tests/bench/test_kill_storm.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.training.runs import DENSE

FLAGS = [*DENSE, "--train-iters", "20", "--save-interval", "4", "--eval-interval", "5", "--eval-iters", "40"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1"
}


def start(run_dir: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "pretrain" / "pretrain_telechat2.py"), *FLAGS, "--run-dir", str(run_dir)]
    with open(out, "ab") as stream:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=stream, stderr=stream)


def records(run_dir: Path) -> dict[int, tuple]:
    found = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line) if line.endswith("}") else {}
        if "loss" in record:
            found[record["step"]] = tuple(record[key] for key in ("loss", "grad_norm", "lr", "consumed_samples"))
    return found


def saved(run_dir: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in (run_dir / "checkpoints").glob("iter_*/manifest.json"))


def wait_for(there: Callable[[], bool], process: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + 180
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, out.read_text()
        time.sleep(0.002)


def rank_pids(run_dir: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run_dir).encode() in words and not any(word.endswith(b"launch.py") for word in words):
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.gloo
def test_stops_in_every_phase_and_a_killed_supervisor(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    whole = start(tmp_path / "whole", tmp_path / "whole.out")
    assert whole.wait(timeout=240) == 0, (tmp_path / "whole.out").read_text()

    def stopped(there: Callable[[], bool]) -> None:
        process = start(run, out)
        try:
            wait_for(there, process, out)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 75, out.read_text()
        finally:
            process.kill()
        assert "; restart" not in out.read_text() and "Traceback" not in out.read_text()

    stopped(lambda: len(rank_pids(run)) == 2)
    assert saved(run) == [], "before the first step there is nothing to save"
    stopped(lambda: 5 in records(run))  # in the evaluation
    assert saved(run) in ([4, 5], [4, 6])
    stopped(lambda: any((run / "checkpoints").glob("iter_*8.tmp-*")))
    assert saved(run)[-1] in (8, 9)
    (run / "stop-now").touch()
    process = start(run, out)
    assert process.wait(timeout=120) == 75 and not (run / "stop-now").exists()
    process = start(run, out)
    wait_for(lambda: 13 in records(run), process, out)
    pids = rank_pids(run)
    assert len(pids) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while rank_pids(run):
        assert time.monotonic() < deadline, "ranks go on without their supervisor"
        time.sleep(0.02)
    process = start(run, out)
    assert process.wait(timeout=240) == 0, out.read_text()
    assert records(run) == records(tmp_path / "whole")
    told = [json.loads(line) for line in (run / "goodput.jsonl").read_text().splitlines()]
    assert [one["exit_code"] for one in told] == [75, 75, 75, 0]
    assert told[-1]["steps_kept"] == 20 - 12 and told[-1]["goodput"] > 0
