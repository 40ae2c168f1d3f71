"""Local checkpoints: jobs of two nodes that are killed, lose a disk, or meet damage; the same command goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

WORKER = Path(__file__).with_name("worker_local_tier.py")
SHORT = (
    *("a_node_is_lost", "one_flipped_bit", "a_roll_back_is_not_undone", "a_disk_is_full"),
    *("the_step_waits_for_the_copy", "a_node_is_lost_and_its_mirror_damaged"),
    "a_local_one_between_two_shared_ones",
)
LONG = (
    *("every_copy_damaged", "the_shared_one_is_newer", "a_run_from_other_weights_goes_on", "two_runs_share_a_disk"),
    *("a_writer_is_killed", "without_copies_a_lost_node_is_lost", "another_number_of_ranks"),
    *("one_folder_for_two_nodes", "a_disk_that_cannot_be_written", "beside_asynchronous_saves"),
    *("over_the_switch_of_a_stage", "damage_in_two_places", "a_fall_back_over_both_tiers"),
)
KILLED, DONE = [-9, -9], [0, 0]


def run_worker(folder: Path, *names: str, timeout: float = 900) -> list[dict]:
    command = [sys.executable, "-W", "ignore", str(WORKER), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


class Report(dict):
    """What each case found."""

    def of(self, name: str) -> dict:
        assert "error" not in self[name], self[name]["error"]
        return self[name]["found"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return Report({line["case"]: line for line in run_worker(tmp_path_factory.mktemp("local"), *SHORT)})


@pytest.fixture(scope="module")
def long_report(tmp_path_factory):
    return Report({line["case"]: line for line in run_worker(tmp_path_factory.mktemp("local"), *LONG)})


@pytest.mark.gloo
def test_a_node_that_is_lost_loses_nothing(report):
    """kill -9 of all ranks behind step 18, one node gets a new disk: on from the local checkpoint of step 16, bitwise
    the run that was neither killed nor had any."""
    found = report.of("a_node_is_lost")
    both = ["0@12", "0@16", "1@12", "1@16"]
    assert found["before"] == [both, both], "the last two of each rank, on both nodes"
    code, same, tensors, different = found["tools"]
    assert (code, same, different) == (0, 0, []) and tensors > 50 and found["whole"] == {"16": True, "12": True}
    assert found["codes"] == DONE and found["resumed"] == [16] and found["different"] == {}
    assert "the parts of rank 1 come from other nodes" in found["log"]
    assert found["local_steps"] == [4, 8, 12, 16], "the lines of the steps tell it"
    assert found["after"] == [[], []], "a run that is complete gives the disks back"


@pytest.mark.gloo
def test_one_flipped_bit(report):
    """In one copy: the other one is read. In both: the older local checkpoint."""
    own, both = report.of("one_flipped_bit")["own"], report.of("one_flipped_bit")["both"]
    for found, resumed, copies in ((own, 16, [0]), (both, 12, [0, 1])):
        assert found["codes"] == DONE and found["resumed"] == [resumed] and found["different"] == {}
        named = [f"(node{node}/part_00000/iter_0000016" in line for node in copies for line in found["passed"]]
        assert len(found["passed"]) == len(copies) and sum(named) == len(copies), found["passed"]
        assert all("checksum differs" in line for line in found["passed"])


@pytest.mark.gloo
def test_a_node_that_is_lost_and_its_mirror_damaged(report):
    """Nothing whole is left on the nodes: all ranks begin with the shared checkpoint."""
    found = report.of("a_node_is_lost_and_its_mirror_damaged")
    assert found["codes"] == DONE and found["resumed"] == [10] and found["different"] == {}
    assert len(found["passed"]) == 2 and all("node0/part_00001/iter_00000" in line for line in found["passed"])


@pytest.mark.gloo
def test_a_local_one_between_two_shared_ones(report):
    """Of two shared checkpoints the newer one is damaged: no step is done again that a local one between them has.
    The run's next save replaces the damaged one, and the same command goes on from that."""
    found = report.of("a_local_one_between_two_shared_ones")
    assert found["codes"] == [KILLED, DONE] and found["resumed"] == [16, 18] and found["different"] == {}
    (line,) = found["passed"]
    assert "iter_0000018/rank_00001.safetensors" in line and "checksum differs" in line
    assert found["shared"] == ["iter_0000009", "iter_0000018", "iter_0000018.aside-"] and found["again"] == []


@pytest.mark.gloo
def test_a_roll_back_is_not_undone(report):
    found = report.of("a_roll_back_is_not_undone")
    assert found["codes"] == [KILLED, DONE, KILLED, DONE]
    assert "0@12" in found["branch"] and found["resumed"] == [[10, 12], [10, 16]]
    assert found["different"] == {}, "the branch is that of a run without a kill"


@pytest.mark.gloo
def test_a_full_disk_costs_local_checkpoints_and_nothing_else(report):
    found = report.of("a_disk_is_full")
    assert found["codes"] == DONE and found["different"] == {}
    assert found["parts"] == [[], []] and found["leftovers"] == []
    first, second = found["warnings"]
    assert len(first) == 1 and "a copy could not be written to another node: 127.0.0.1: File too large" in first[0]
    assert len(second) == 1 and "the part of this rank could not be written: File too large" in second[0]


@pytest.mark.gloo
def test_the_step_waits_for_the_copy(report):
    found = report.of("the_step_waits_for_the_copy")
    assert found == {"codes": [KILLED, DONE], "resumed": [12], "different": {}}


@pytest.mark.slow
def test_damage_everywhere(long_report):
    """In manifests, and in every local checkpoint: then the shared one is gone back to."""
    found = long_report.of("every_copy_damaged")
    for name, resumed in (("manifest", 12), ("all", 10)):
        assert found[name]["codes"] == DONE and found[name]["resumed"] == [resumed]
        assert found[name]["different"] == {} and len(found[name]["passed"]) == (2 if name == "manifest" else 4)


@pytest.mark.slow
def test_damage_in_two_places(long_report):
    """Mirrors alone cost nothing; a lost node and the mirror of its newest part, the older local checkpoint; a damaged
    shared one nothing, as long as a local one goes on from it; with nothing sound left the run stops and begins none.
    """
    found = long_report.of("damage_in_two_places")
    for name, resumed, passed in (("mirrors", 16, 0), ("lost", 12, 1), ("shared", 16, 0)):
        assert found[name]["codes"] == DONE and found[name]["resumed"] == [resumed], (name, found[name])
        assert found[name]["different"] == {} and len(found[name]["passed"]) == passed, (name, found[name])
    last = found["all"]
    assert last["codes"] == [4, 4] and last["resumed"] == [] and len(last["passed"]) == 4
    assert all("iter_0000010/rank_00001.safetensors" in log and "checksum differs" in log for log in last["logs"])


@pytest.mark.slow
def test_a_fall_back_over_both_tiers(long_report):
    """Newest first, whichever tier it is of; with nothing sound left the run stops, and every fault is named."""
    found = long_report.of("a_fall_back_over_both_tiers")
    for name, resumed, passed in (("newest", 12, 3), ("both", 9, 5), ("manifest", 16, 1), ("lost", 12, 2)):
        assert found[name]["codes"] == DONE and found[name]["resumed"] == [resumed], (name, found[name])
        assert found[name]["different"] == {} and len(found[name]["passed"]) == passed, (name, found[name])
    last = found["all"]
    assert last["codes"] == [4, 4] and last["resumed"] == []
    faults = ["iter_0000018/rank_00001", "iter_0000016.save-", "iter_0000012.save-", "iter_0000009/rank_00000"]
    assert all(fault in log for log in last["logs"] for fault in faults)
    assert found["twice"] == {"codes": [KILLED, DONE], "resumed": [12, 16], "different": {}}


@pytest.mark.slow
def test_the_newer_of_both_is_taken(long_report):
    found = long_report.of("the_shared_one_is_newer")
    assert "0@8" in found["parts"] and found["codes"] == DONE
    assert found["resumed"] == [10] and found["different"] == {}


@pytest.mark.slow
def test_a_beginning_in_another_folder_goes_on(long_report):
    found = long_report.of("a_run_from_other_weights_goes_on")
    assert found == {"codes": [KILLED, DONE], "resumed": [10, 12], "different": {}}


@pytest.mark.slow
def test_two_runs_share_a_disk(long_report):
    found = long_report.of("two_runs_share_a_disk")
    assert found["codes"] == [KILLED, KILLED] and found["resumed"] == [10]
    assert set(found["before"]) < set(found["mixed"]), "the other run has removed nothing"
    assert found["after"].count("0@16") == 3, "nor what lies in its own folder by mistake"
    assert len(found["passed"]) == 4 and all("it is of another run" in line for line in found["passed"])


@pytest.mark.slow
def test_a_writer_that_is_killed_ends_local_checkpoints_only(long_report):
    found = long_report.of("a_writer_is_killed")
    assert found["codes"] == DONE and found["different"] == {}
    assert any("a process that writes them has ended" in line for line in found["warnings"][0])
    assert any("was killed by signal 9" in line for line in found["warnings"][1])


@pytest.mark.slow
def test_without_copies_a_lost_node_is_lost(long_report):
    found = long_report.of("without_copies_a_lost_node_is_lost")
    assert found["before"] == [["0@12", "0@16"], ["1@12", "1@16"]]
    assert found["codes"] == DONE and found["resumed"] == [10] and found["different"] == {}
    assert [line for line in found["passed"] if "step 16: no node holds the part of rank 1" in line]


@pytest.mark.slow
def test_another_number_of_ranks_reads_them(long_report):
    found = long_report.of("another_number_of_ranks")
    assert found == {"codes": [0], "resumed": [16], "steps": list(range(1, 21))}


@pytest.mark.slow
def test_nodes_with_one_folder_are_no_copies_of_each_other(long_report):
    found = long_report.of("one_folder_for_two_nodes")
    assert found["codes"] == [2, 2] and "have one folder for local checkpoints" in found["log"]


@pytest.mark.slow
def test_a_node_that_cannot_write_still_reads(long_report):
    found = long_report.of("a_disk_that_cannot_be_written")
    assert found["codes"] == DONE and found["resumed"] == [16] and found["different"] == {}
    assert len(found["warnings"]) == 1 and "rank 1 cannot write: Not a directory" in found["warnings"][0]


@pytest.mark.slow
def test_beside_asynchronous_saves_into_the_shared_folder(long_report):
    """A local checkpoint that was made while a save into the shared folder was under way continues that one, once it is
    committed, and the one before, if it never is."""
    found = long_report.of("beside_asynchronous_saves")
    assert found["codes"] == [KILLED, DONE, KILLED, DONE]
    assert found["shared"] == [["iter_0000010"], []]
    assert found["resumed"] == [[12], [12]] and found["different"] == [{}, {}]


@pytest.mark.slow
def test_over_the_switch_of_a_stage(long_report):
    """Where a run goes on decides its layout: local checkpoints are asked before there is a model."""
    found = long_report.of("over_the_switch_of_a_stage")
    assert found["codes"] == [DONE, KILLED, DONE, KILLED, DONE]
    assert found["15"] == {"resumed": [12], "different": []}
    assert found["8"] == {"resumed": [4], "different": []}


POINTS = (
    *(f"fsync:{number}" for number in (*range(1, 13), 15)),
    *("rename:1", "rename:2", "rename:3", "rename:4", "rename:5"),
)
"""Calls of the writer of rank 1 before which all ranks are killed. A local save there has eight fsync and two rename:
file, manifest and folder of its own part and of the copy that it keeps; then of each the rename, and the folder above.
"""


def whole_before(point: str) -> int:
    """Step of the newest local checkpoint that is whole on the node of rank 1 before a point."""
    kind, number = point.split(":")
    return 4 * (int(number) // 8 if kind == "fsync" else (int(number) - 1) // 2)


@pytest.mark.slow
def test_a_kill_at_any_point_of_a_local_save(tmp_path):
    """Then node 0 gets a new disk. What the run begins with is whole, and the joined run is bitwise the whole one."""
    lines = run_worker(tmp_path, "kills", *POINTS)
    assert [line["point"] for line in lines] == list(POINTS)
    for line in lines:
        assert line["codes"] == [KILLED, DONE] and line["different"] == {}, line
        newest = whole_before(line["point"])
        assert line["resumed"] == [10 if newest == 8 else newest], line  # by then there is a shared one of step 10
