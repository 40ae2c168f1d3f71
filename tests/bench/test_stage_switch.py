"""The bench of a run's switches: with the formula short samples do not move, with another theta they do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.data.material import write_dataset
from tests.harness import ROOT


@pytest.mark.slow
def test_both_sides_of_a_switch(tmp_path):
    data = write_dataset(tmp_path / "d", 400, longest=200)
    found = tmp_path / "switch.json"
    options = "--vocab-size 512 --lengths 32,128 --steps 2,1 --arms theta,formula"
    command = [sys.executable, str(ROOT / "tools" / "bench" / "stage_switch.py"), "--data", data, *options.split()]
    done = subprocess.run([*command, "--json", str(found)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    theta, formula = json.loads(found.read_text())["arms"]
    (moved,), (stayed,) = theta["switches"], formula["switches"]
    assert moved["step"] == stayed["step"] == 2 and moved["before"] == stayed["before"]
    assert moved["behind"] != moved["before"] and stayed["behind"] == stayed["before"]
    assert [step for step, _ in theta["curve"]] == [0, 1, 2, 2, 3]
    assert "moves by" in done.stdout
