"""A run whose length, batch, layout and learning rate change on its way is one run: one line of checkpoints, one curve,
resumed on either side of a switch bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_telechat.checkpoint import contents
from megatron_telechat.checkpoint.format import CheckpointReader
from tests.data.material import write_dataset
from tests.harness import launch, run_cases
from tests.training.test_resume import PRETRAIN

pytestmark = pytest.mark.gloo

STAGES = """
stages:
  - from_tokens: 0
  - from_tokens: 1000
    seq_length: 64
    rotary_base: 1e5
    rotary_training_seqlen: 64
    global_batch_size: 4
    tensor_model_parallel_size: 2
  - from_samples: 48
    seq_length: 128
    rotary_base: 1e6
    rotary_training_seqlen: 128
    global_batch_size: 2
    micro_batch_size: 1
    tensor_model_parallel_size: 1
    context_parallel_size: 2
    cp_pieces: 1
    cp_keep_received: false
    lr: 5e-4
    min_lr: 1e-5
    lr_warmup_tokens: 256
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def report(folder):
    write_dataset(folder / "a", 28, 1)
    write_dataset(folder / "b", 9, 2)
    (folder / "stages.yaml").write_text(STAGES)
    return run_cases(Path(__file__).with_name("worker_stages.py"), 2, timeout=400, env={"STAGES_DIR": str(folder)})


def test_three_stages_are_one_run(report):
    for found in report.check("whole"):
        assert found["code"] == 0
        assert found["folders"] == ["iter_0000004", "iter_0000008", "iter_0000010"]
        consumed = {step: record[3:] for step, record in found["records"].items()}
        assert consumed["4"] == [32, 1024] and consumed["8"] == [48, 2048] and consumed["10"] == [52, 2560]
        rates = [found["records"][str(step)][2] for step in range(1, 11)]
        assert rates[0] == 1e-3 and rates[:8] == sorted(rates[:8], reverse=True) and rates[7] > rates[8] == 0.0
        assert rates[9] == 5e-4, "the warm-up of the last stage ends with its first step"
        stages = [event for event in found["events"] if event["event"] == "stage"]
        assert [(event["step"], event["stage"]) for event in stages] == [(4, 2), (8, 3)]
        assert stages[0]["changes"]["seq_length"] == {"before": 32, "now": 64}
        assert len(found["events"]) == 2, "a switch is no resume"


def test_a_resume_around_each_switch_is_bitwise(report):
    whole = report.check("whole")[0]["records"]
    for found in report.check("stopped"):
        assert found["codes"] == [0] * 5
        assert found["records"] == whole


def test_a_switch_carries_the_averages_of_the_weights(report, folder):
    for name in ("whole", "stopped"):
        report.check(name)
    for step in (4, 8, 10):
        one, other = (CheckpointReader(folder / run / f"checkpoints/iter_{step:07d}") for run in ("whole", "stopped"))
        assert not list(contents.differences(one, other, sorted({*one.entries, *other.entries})))
        told = one.manifest.extra["averages"]
        assert told == other.manifest.extra["averages"]
        assert told["ema"] == {"decay": 0.8, "since": 0, "updates": step}
        assert told["window_under_way"]["averaged"] == step % 3


def test_a_run_killed_after_a_switch_goes_on_in_the_new_stage(report):
    whole = report.check("whole")[0]["records"]
    for found in report.check("killed"):
        for step, records in found.items():
            assert records == {key: record for key, record in whole.items() if int(key) > int(step)}


def test_a_damaged_checkpoint_of_the_next_stage_leads_back_to_the_one_before(report):
    whole = report.check("whole")[0]["records"]
    for found in report.check("damaged"):
        assert found == {key: whole[key] for key in ("5", "6")}


def test_what_no_stage_declares_is_refused(report):
    for found in report.check("undeclared"):
        assert "rotary_base is 100000 in the checkpoint and 200000 in the run" in found["theta"]
        assert "a stage of the run that sets rotary_base" in found["theta"]
        assert "sequence_length: the checkpoint was trained with 64, the run has 48" in found["length"]
        assert "stages:" in found["length"]
        assert "rotary_base is 100000 in the checkpoint and 10000 in the run" in found["none"]


@pytest.fixture(scope="module")
def exports(report, folder):
    report.check("whole")
    worker = Path(__file__).with_name("worker_stage_exports.py")
    return run_cases(worker, 1, timeout=240, env={"STAGES_DIR": str(folder)})


def test_the_export_of_each_stage_is_the_model_of_that_stage(exports):
    (found,) = exports.check("each_stage")
    for step, theta, length in (("4", 1e4, 32), ("8", 1e5, 64), ("10", 1e6, 128)):
        trained = 256 if step == "4" else length  # the preset's, until a stage says another
        assert found[step] == {
            "code": 0, "rope_theta": theta, "training_seqlen": trained, "base_seqlen": trained, "seq_length": length,
        }  # fmt: skip


def test_the_loss_of_short_samples_moves_at_a_switch_by_what_the_formula_gives(exports):
    (found,) = exports.check("short_samples")
    (before, plain_before), (behind, plain_behind) = found["before"], found["behind"]
    assert abs((behind - before) - (plain_behind - plain_before)) < 1e-6
    assert abs(behind - before) > 1e-5, "another theta is another angle of every token"
    assert found["formula"] == found["before"], "with the formula a short sample does not see that others are longer"


@pytest.mark.slow
def test_the_tiny_model_trains_512_2048_8192_in_one_run_on_four_ranks(tmp_path):
    (tmp_path / "stages.yaml").write_text(
        """
        stages:
          - {from_tokens: 0, seq_length: 512, global_batch_size: 16, rotary_base: 1e4, rotary_training_seqlen: 512}
          - {from_tokens: 65536, seq_length: 2048, global_batch_size: 4, rotary_base: 1e6,
             rotary_training_seqlen: 2048, context_parallel_size: 2}
          - {from_tokens: 98304, seq_length: 8192, global_batch_size: 1, rotary_base: 4e7,
             rotary_training_seqlen: 8192, context_parallel_size: 4}
        """
    )
    flags = "--preset telechat2-tiny --vocab-size 1024 --mock-data --device cpu --micro-batch-size 1 --train-iters 16"
    more = ("--no-progress", "--config", str(tmp_path / "stages.yaml"), "--run-dir", str(tmp_path / "run"))
    result = launch(PRETRAIN, 4, *flags.split(), *more, timeout=1200).ok()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert [line["step"] for line in lines if line.get("event") == "stage"] == [8, 12]
    assert steps[16]["consumed_tokens"] == 16 * 8192 and steps[16]["consumed_samples"] == 8 * 16 + 4 * 4 + 4
    assert steps[12]["loss"] < steps[8]["loss"] < steps[1]["loss"] and steps[16]["loss"] < steps[8]["loss"]
    assert "context_parallel_size 2 -> 4" in result.stdout
