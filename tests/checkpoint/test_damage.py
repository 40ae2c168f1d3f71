"""Nothing is loaded that is not what was saved: flipped bits, other saves' files, deletions, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases

WORKER = Path(__file__).with_name("worker_damage.py")

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_cases(WORKER, 2, env={"CHECKPOINT_TEST_FOLDER": str(tmp_path_factory.mktemp("damage"))})


def require_all_found(found: dict, flips: int) -> None:
    counts = found["counts"]
    assert sum(counts.values()) == flips, counts
    assert set(found["files"]) == {
        *(
            "manifest.json",
            "rank_00000.safetensors",
            "rank_00001.safetensors",
            "config.json",
            "tokenizer.json",
            "latest",
        )
    }
    # One file in six is the hint; of the manifest's bits few are blanks.
    assert counts["the hint, which decides nothing"] <= flips / 6 + 1 and counts["blanks of the manifest"] <= flips / 20


def test_a_flipped_bit_of_any_file_is_named_and_the_older_checkpoint_loads(report):
    for found in report.check("flipped_bits"):
        require_all_found(found, 60)


@pytest.mark.slow
def test_two_thousand_flipped_bits(tmp_path):
    environment = {"CHECKPOINT_TEST_FOLDER": str(tmp_path), "CHECKPOINT_TEST_FLIPS": "2000"}
    for found in run_cases(WORKER, 2, ["flipped_bits"], timeout=900, env=environment).check("flipped_bits"):
        require_all_found(found, 2000)


def test_what_is_no_part_of_the_save_is_named_and_the_older_checkpoint_loads(report):
    first, second = report.check("damaged_files")
    assert len(first) == 24
    for name, said in first.items():
        assert said["step"] == second[name]["step"] == 1, (name, said)
        for text in (said["notes"], said["named"][1], said["alone"][1]):
            assert said["file"] in text and said["reason"] in text, (name, text)
        assert said["named"][0] == said["alone"][0] == 0, (name, said)
        assert said["named"][1].startswith("checkpoint error"), name
        assert said["named"] == second[name]["named"], "all ranks say the same"


def test_each_file_is_read_by_one_rank_and_by_none_again(report):
    (first, again), (other, other_again) = report.check("the_work_is_shared")
    assert not set(first) & set(other) and again == other_again == []
    assert {"rank_00000.safetensors", "rank_00001.safetensors"} <= {*first, *other}
    assert "rank_00000.safetensors" in first and "rank_00001.safetensors" in other
