"""The chunks of the experts' input in a training: chosen, kept over a resume, agreed on, measured, traced."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.harness import ROOT, launch, run_cases
from tests.training.runs import MOE

PRETRAIN = ROOT / "pretrain" / "pretrain_telechat2.py"
WORKER = Path(__file__).with_name("worker_chunks.py")
STEPS, CHUNKS, LAYERS = 3, 3, 4

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_cases(WORKER, 2, timeout=400, env={"CHUNKS_DIR": str(tmp_path_factory.mktemp("chunks"))})


def test_resume_takes_the_number_of_the_checkpoint_and_is_bitwise(report):
    for found in report.check("resume_takes_the_number_of_the_checkpoint"):
        assert found["whole"]["numbers"] == [3]
        again = found["again"]
        assert again["numbers"] == [3] and again["step"] == 2 and "measured before" in again["message"]
        assert again["rest"] == found["whole"]["rest"]


def test_another_batch_shape_is_measured_anew_and_a_number_is_a_number(report):
    found = report.check("resume_takes_the_number_of_the_checkpoint")[0]
    assert found["other_batch"]["numbers"] == [2] and found["other_batch"]["step"] == 2
    assert "measured again because tokens differs from before" in found["other_batch"]["message"]
    assert found["fixed"] == [[4], None]


def test_nothing_is_measured_twice_before_the_first_checkpoint(report):
    for found in report.check("nothing_is_measured_twice_before_the_first_checkpoint"):
        assert found == [[3], [3], [2], [2]]


def test_measuring_leaves_no_trace(report):
    by_rank = report.check("measuring_leaves_no_trace")
    for found in by_rank:
        assert found["measured"] == found["fixed"]
        assert found["measured"]["left"] == [0, 0]
        assert found["measured"]["numbers"] == by_rank[0]["measured"]["numbers"]
    (event,) = by_rank[0]["events"]
    assert event["event"] == "moe_input_chunks" and [event["num_chunks"]] == by_rank[0]["measured"]["numbers"]
    assert {"1", "2"} <= set(event["measured_ms"]) and set(event["measured_ms"]) <= set(event["predicted_ms"])


@pytest.mark.parametrize("case", ["ranks_that_disagree_are_refused", "choices_that_differ_are_refused"])
def test_ranks_with_different_numbers_stop_at_the_start(report, case):
    for kind, text in report.check(case):
        assert kind == "ConfigError"
        assert "moe_input_chunks is" in text or "number of input chunks of the experts is" in text
        assert "2" in text and "3" in text and "rank" in text


def test_only_training_counts_as_exposed(report):
    for found in report.check("evaluation_does_not_count_as_exposed"):
        assert found["clocks"] == LAYERS and found["after"] == 0 and 0 < found["share"] < 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The real command: two ranks, EP2, three chunks, the second and third step traced."""
    folder = tmp_path_factory.mktemp("traced")
    flags = [
        *MOE,
        "--train-iters",
        str(STEPS),
        "--run-dir",
        str(folder),
        "--moe-input-chunks",
        str(CHUNKS),
        "--moe-trace",
        "2-3",
        "--expert-model-parallel-size",
        "2",
        "--no-fold-tensor-into-experts",
        "--recompute-granularity",
        "selective",
        "--recompute-modules",
        "moe",
    ]
    return folder, launch(PRETRAIN, 2, *flags, timeout=240).ok()


def test_what_stayed_exposed_is_on_every_line(run):
    folder, result = run
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ") and "loss" in line]
    assert len(lines) == STEPS and all("a2a exposed " in line for line in lines)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [record["a2a_exposed"] for record in records if "loss" in record]
    assert len(shares) == STEPS and all(0 < share < 1 for share in shares)


@pytest.mark.parametrize("rank", [0, 1])
def test_trace_is_valid_and_complete(run, rank):
    """Every transfer and every computation of every layer, chunk and micro-batch of the two steps, once."""
    trace = json.loads((run[0] / "moe_trace" / f"rank_{rank}.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert set(names.values()) == {"steps", "compute", "link"}
    assert all(event["pid"] == rank and event["dur"] >= 0 and event["ts"] >= 0 for event in events)
    micro_batches = 8 // 2 // 2
    passes = 2 * micro_batches  # of two steps
    by_name = Counter(
        (names[event["tid"]], event["name"].rstrip("0123456789 "), event["args"]["step"]) for event in events
    )
    for step in (2, 3):
        assert by_name["steps", "step", step] == 1
        for row, kinds in {"link": ("D", "C", "C'", "D'"), "compute": ("F", "R", "B", "W")}.items():
            for kind in kinds:
                assert by_name[row, kind, step] == LAYERS * CHUNKS * micro_batches, (row, kind)
        for kind in ("wait D", "wait C", "wait C'", "wait D'"):
            assert by_name["compute", kind, step] == LAYERS * CHUNKS * micro_batches, kind
    places = Counter(
        (event["args"]["layer"], event["args"]["chunk"]) for event in events if event["name"].startswith("F ")
    )
    assert places == {(layer, chunk): passes for layer in range(LAYERS) for chunk in range(CHUNKS)}
    for row in ("compute", "link"):
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if names[event["tid"]] == row)
        overlaps = [
            after[0] - before[1] for before, after in zip(spans, spans[1:], strict=False) if after[0] < before[1] - 1
        ]
        assert not overlaps, f"{row} does one thing at a time"
