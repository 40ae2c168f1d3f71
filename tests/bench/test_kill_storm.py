"""Kill -9 of random ranks at random moments: the run goes on by itself and is the run that was not killed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.harness import ROOT


def storm(tmp_path, *options: str) -> dict:
    found = tmp_path / "storm.json"
    command = [sys.executable, str(ROOT / "tools" / "bench" / "kill_storm.py"), *options]
    done = subprocess.run(
        [*command, "--json", str(found), "--keep", str(tmp_path / "runs")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(found.read_text())


@pytest.mark.gloo
def test_two_kills_of_a_moe_run_under_the_supervisor(tmp_path):
    """With averages of the weights, which are compared with the other tensors of the last checkpoint."""
    found = storm(tmp_path, "--count", "2", "--model", "moe", "--through-supervisor", "--average")
    last = max((tmp_path / "runs" / "killed" / "checkpoints").glob("iter_*/manifest.json"))
    kinds = {key.split("/")[1] for key in json.loads(last.read_text())["tensors"] if key.startswith("average/")}
    assert kinds == {"ema", "window", "window_under_way"}
    assert found["equal"] and len(found["kills"]) == 2
    told = [json.loads(line) for line in (tmp_path / "runs" / "killed" / "goodput.jsonl").read_text().splitlines()]
    assert sum(one["event"] == "death" for one in told) == 2
    assert told[-1]["event"] == "end" and told[-1]["restarts"] == 2 and told[-1]["steps_kept"] == 18


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("options", ["--model dense --through-supervisor", "--model dense", "--model moe"])
def test_five_kills(tmp_path, options):
    found = storm(tmp_path, "--count", "5", *options.split())
    assert found["equal"] and len(found["kills"]) == 5
