"""Asynchronous saves hold what synchronous ones hold: bytes, lineage, kills, full disks, stop requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, run_cases

FOLDERS = {f"iter_{step:07d}" for step in range(1, 7)}


WORKER = Path(__file__).with_name("worker_async.py")
CASES = (
    *("dense_bf16_distributed_overlap", "disk_full_on_one_rank", "writer_is_killed", "numerics_error_beside_a_save"),
    *("requests", "stop_beside_a_save"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_cases(WORKER, 2, CASES, env={"ASYNC_DIR": str(tmp_path_factory.mktemp("async"))})


@pytest.mark.gloo
def test_the_same_bytes_as_a_save_that_training_waits_for(report):
    """Every step is saved, sooner than the save before is written; then a resume from the middle."""
    same_bytes(report.check("dense_bf16_distributed_overlap"))


@pytest.mark.gloo
@pytest.mark.slow
def test_the_same_bytes_with_experts_in_fp16(tmp_path):
    """Some steps overflow; the loss scale and its counts are those of the step that was saved."""
    same_bytes(run_cases(WORKER, 2, ["moe_fp16_ep2"], env={"ASYNC_DIR": str(tmp_path)}).check("moe_fp16_ep2"))


def same_bytes(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["steps"] == [sorted(FOLDERS)] * 2
        assert rank["different"] == [] and rank["joined"] == {} and rank["on"] == ["4", "5", "6"]
        assert rank["numbers"] == [1, 2, 3, 4, 5, 6] and rank["chained"]
        assert rank["leftovers"] == []


@pytest.mark.gloo
def test_a_disk_that_is_full_on_one_rank_ends_all_at_one_step(report):
    first, second = report.check("disk_full_on_one_rank")
    assert first == second and first["code"] == 6
    assert "rank 1" in first["error"] and "cannot write: File too large" in first["error"]
    assert first["there"] == ["iter_0000020", "latest"], "the save before, and no folder of this one"
    assert 40 < first["step"] < 60, "the ranks hear of it in a step, not at the next save"


@pytest.mark.gloo
def test_a_writer_that_is_killed_ends_all(report):
    first, second = report.check("writer_is_killed")
    assert first == second and first["code"] == 6 and first["there"] == []
    assert "rank 1" in first["error"] and "was killed by signal 9" in first["error"]


@pytest.mark.gloo
def test_a_numerics_error_leaves_the_save_under_way(report):
    for rank in report.check("numerics_error_beside_a_save"):
        assert rank["code"] == 5 and "step 3: loss nan" in rank["error"]
        assert rank["there"] == ["iter_0000002"]


@pytest.mark.gloo
def test_trigger_files(report):
    for rank in report.check("requests"):
        assert rank["code"] == 75, rank["error"]
        assert rank["there"] == ["iter_0000001", f"iter_{rank['last']:07d}"]
        assert rank["files"] == [] and not rank["gone_early"] and rank["beside"] > 1


@pytest.mark.gloo
def test_a_stop_waits_for_the_save_under_way(report):
    for rank in report.check("stop_beside_a_save"):
        assert rank["code"] == 75, rank["error"]
        assert rank["there"] == ["iter_0000002", f"iter_{rank['last']:07d}"]


SHORT = ("fsync:7",)
"""Calls of the writer before which the rank is killed. A save has six fsync (its file, manifest, folder, root, hint,
root), one rename and one replace: this is the file of the second save."""
LONG = (
    *(f"fsync:{number}" for number in range(1, 13)),
    *("rename:1", "rename:2", "replace:1", "replace:2"),
    *("begin:2", "begun:2", "staged:2", "step:2"),
)


def committed_before(point: str) -> int:
    """Saves whose rename came before a point."""
    kind, number = point.split(":")
    if kind == "fsync":
        return (int(number) + 2) // 6  # three of the six come before the rename
    return int(number) if kind == "replace" else int(number) - 1


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(SHORT, marks=pytest.mark.heavy, id="while_it_writes"),
        pytest.param(LONG, marks=pytest.mark.slow, id="everywhere"),
    ],
)
def test_a_rank_killed_at_any_point_of_a_save(points, tmp_path):
    """The newest checkpoint is a committed one, and the joined run is bitwise the one that was not killed."""
    worker = Path(__file__).with_name("worker_async_kills.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), *points], capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["point"] for line in lines] == list(points)
    for line in lines:
        assert line["newest"] == (2 * committed_before(line["point"]) or None), line
        assert line["processes"] == [], "the writer ends with its rank"
        assert line["joined"] == line["whole"], line
