"""The memory of a merge at the shapes of the 39B model: the bench exits with 1 where a peak is above its bound."""

from __future__ import annotations

import json

import pytest

from tests.bench.doors import bench


@pytest.mark.heavy
@pytest.mark.slow
def test_a_merge_at_39b_shapes_stays_within_its_bound(tmp_path):
    path = tmp_path / "memory.json"
    done = bench("merge_memory.py", "--inputs", "2", "--folder", str(tmp_path), "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["format"] for row in rows] == ["checkpoint", "hf"]
    assert all(row["gb"] > 4 and 0 < row["peak_mb"] < row["bound_mb"] for row in rows)
