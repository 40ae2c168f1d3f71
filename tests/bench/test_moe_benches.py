"""The benches of the expert block run, compare what they say they compare, and can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench.doors import BENCH, bench


@pytest.mark.slow
@pytest.mark.gloo
def test_overlap(tmp_path):
    path = tmp_path / "overlap.json"
    done = bench("moe_overlap.py", "--quick", "--stand-in", "5", "--chunks", "1,4", "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert "STAND-IN" in report["mode"] and "STAND-IN" in done.stdout
    (row,) = report["rows"]
    assert {"k=1", "k=4", "auto", "serial", "negative control", "megatron-core"} <= set(row["arms"])
    assert all(arm["total_ms"] > 0 for arm in row["arms"].values())
    assert max(report["errors_against_k1"]["real products"].values()) < 1e-5
    # A token goes once to a rank; megatron-core sends it once for each of its experts.
    assert report["wire_bytes"]["k=1"] < report["wire_bytes"]["megatron-core"]


@pytest.mark.gloo
@pytest.mark.slow
def test_training_over_links(tmp_path):
    path = tmp_path / "training.json"
    done = bench("moe_train_throttled.py", "--quick", "--json", str(path))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["loss_spread"] < 1e-5 and set(row["arms"]) == {"auto", "k=1", "megatron-core"}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_one_device(tmp_path, device):
    path = tmp_path / "device.json"
    done = bench("moe_gpu.py", "--device", device, "--quick", "--json", str(path), "--trace", str(tmp_path / "trace"))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert len(report["schedule"]) == 12 and all(line["over_ideal"] > 0 for line in report["schedule"])
    assert set(report["layer_ms"]) == {"ours", "megatron-core"}
    assert all(Path(file).stat().st_size for file in report["trace"])
    if device == "cuda":
        assert all(tuple(syncs) == (1, 0) for syncs in report["host_syncs"].values())


def test_summary_counts_what_is_saved():
    sys.path.insert(0, str(BENCH))
    try:
        from overlap.report import checks
        from overlap.rows import summary
    finally:
        sys.path.remove(str(BENCH))

    def runs(forward: float, backward: float) -> list[tuple[float, ...]]:
        return [(forward, backward, forward + backward, 0.0, 0)] * 3

    times = {
        "k=1": runs(2.0, 2.5),
        "k=4": runs(1.25, 2.25),
        "auto": runs(1.25, 2.25),
        "serial": runs(2.0, 3.0),
        "negative control": runs(2.0, 3.0),
        "megatron-core": runs(3.0, 4.0),
        "only-compute k=1": runs(1.0, 2.0),
        "only-link k=1": runs(1.0, 1.0),
    }
    row = summary(times)
    assert row["ratio"] == 1.0 and row["ideal_ms"] == 3000.0
    assert row["ideal_gain"] == pytest.approx(5 / 3) and row["ideal_gain_of_k1"] == pytest.approx(1.5)
    assert row["arms"]["k=4"]["share_of_ideal"] == pytest.approx(0.75)
    assert row["arms"]["negative control"]["share_of_ideal"] == 0.0
    row |= {"label": "row", "target_ratio": 1.0, "mbit": 100.0}
    verdicts = {check.what: check.ok for check in checks([row], {"k=1": 100, "k=4": 102})}
    assert verdicts["row: k=4 against k=1 (limit 1.50)"] is False
    assert verdicts["row: the negative control misses that"] is True
    assert verdicts["row: k=4 against megatron-core"] is True
    assert verdicts["wire bytes of k=4 over k=1"] is False
