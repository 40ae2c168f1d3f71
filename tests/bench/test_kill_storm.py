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
def test_three_kills_of_a_dense_run_under_the_supervisor(tmp_path):
    found = storm(tmp_path, "--count", "3", "--through-supervisor")
    assert found["equal"] and len(found["kills"]) == 3
    told = [json.loads(line) for line in (tmp_path / "runs" / "killed" / "goodput.jsonl").read_text().splitlines()]
    assert [one["event"] for one in told if one["event"] == "death"] == ["death"] * 3
    assert told[-1]["event"] == "end" and told[-1]["restarts"] == 3 and told[-1]["steps_kept"] == 24


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_kills_with_the_same_command_given_again(tmp_path, model):
    found = storm(tmp_path, "--count", "5", "--model", model)
    assert found["equal"] and len(found["kills"]) == 5
