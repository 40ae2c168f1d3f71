"""The benches of checkpoints: small ones run as large ones do, and the manifest of a thousand ranks takes seconds."""

from __future__ import annotations

import json

import pytest

from tests.bench.doors import bench

pytestmark = pytest.mark.heavy


@pytest.mark.slow
def test_saving_and_loading_beside_a_copy_and_a_read(tmp_path):
    found = tmp_path / "found.json"
    done = bench("checkpoint.py", "--megabytes", "20", "--rounds", "1", "--folder", str(tmp_path), "--json", str(found))
    assert done.returncode == 0, done.stderr
    body = json.loads(found.read_text())
    assert 10e6 < body["bytes"] < 40e6 and len(body["checks"]) == 4
    assert {len(values) for values in body["seconds"].values()} == {1}
    assert body["checks"][-1]["ok"], "bytes of a rank under DP4"


@pytest.mark.slow
def test_local_saves_beside_shared_ones(tmp_path):
    found = tmp_path / "found.json"
    done = bench(
        "checkpoint_local.py", "--megabytes", "60", "--rounds", "1", "--folder", str(tmp_path), "--json", str(found)
    )
    assert done.returncode == 0, done.stderr
    body = json.loads(found.read_text())
    sizes = body["bytes"]
    assert sizes["sent"] == sizes["written"] and 2 * sizes["written"] == pytest.approx(sizes["shared"], rel=0.02)
    assert body["local_blocked_s"] < body["sync_blocked_s"] and body["local_mirrored_s"] <= body["local_save_s"]
    assert body["recovery_s"].keys() == {"shared", "own disk", "mirror"} and len(body["checks"]) == 6


@pytest.mark.parametrize("ranks", [128, pytest.param(1024, marks=pytest.mark.slow)])
def test_the_manifest_of_many_ranks_takes_seconds(ranks, tmp_path):
    found = tmp_path / "found.json"
    done = bench("manifest.py", "--ranks", str(ranks), "--json", str(found))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(found.read_text())
    cpu = row["cpu_seconds"]  # a busy machine fails nothing
    slow = {name: value for name, value in cpu.items() if value > 10}
    assert row["ranks"] == ranks and row["boxes"] > 5 * ranks and not slow
    # What each rank does, and what each save does, does not grow with the manifest.
    assert cpu["find what one rank reads"] < 1 and cpu["retention, after a save"] < 0.5 and cpu["unpack it"] < 0.5
