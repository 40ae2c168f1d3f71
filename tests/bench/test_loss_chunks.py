"""The bench of the loss in chunks runs, compares equal losses, and says what it saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench" / "loss_chunks.py"


@pytest.mark.slow
def test_two_tensor_ranks(tmp_path):
    path = tmp_path / "loss.json"
    command = [sys.executable, "-W", "ignore", str(BENCH), "--quick", "--tp", "2", "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["tp"] == 2 and row["errors"]["loss"] <= 2e-6 and max(row["errors"].values()) < 1e-5
    assert row["memory_ratio"] > 4.5 and row["time_ratio"] > 0
    assert row["arms"]["in chunks"]["kept_mb"] < row["arms"]["all rows at once"]["kept_mb"] / 10
