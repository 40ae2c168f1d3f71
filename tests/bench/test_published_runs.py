"""The bench that holds the cost model to published runs: what it reads, its tables, its bars."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from megatron_telechat.costs.devices import device_spec
from megatron_telechat.planner.estimate import estimate
from tools.bench.published_runs import main
from tools.bench.yardsticks.published_rows import Row

# Narayanan et al., arXiv 2104.04473, table 1: 18.4B, 135 TFLOP/s a GPU with recompute counted
ROW = {
    "id": "sc21-18.4B", "source": "SC21", "grade": "A", "split": "dev", "gpus": 256, "hardware": "A100 80GB SXM",
    "device": "a100-80g", "device_overrides": {}, "precision": "fp16", "framework": "Megatron-LM 2021",
    "model": {
        "layers": 40, "hidden": 6144, "ffn": 24576, "heads": 48, "groups": 48, "head_dim": None, "vocab": 51200,
        "seq": 2048, "gated_mlp": False, "positions": "learned", "experts": None, "topk": None, "expert_ffn": None,
        "shared_expert_ffn": None,
    },
    "layout": {
        "mbs": 8, "gbs": 1024, "tp": 8, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "sp": False,
        "stage_layers": None,
    },
    "recompute": {"granularity": "full", "method": "uniform", "num_layers": 1}, "flash_attention": False,
    "distributed_optimizer": False, "fsdp": False, "overlap": [], "imbalance": 1.0,
    "measured": {"tokens_per_s_per_gpu": 872}, "peak_memory_gb": None, "ran": True,
}  # fmt: skip


def changed(name: str, tokens: float | None = None, **layout) -> dict:
    row = copy.deepcopy(ROW)
    row["id"] = name
    row["layout"] |= layout
    row["measured"] = {"oom": True} if tokens is None else {"tokens_per_s_per_gpu": tokens}
    row["ran"] = tokens is not None
    return row


@pytest.fixture
def runs(tmp_path):
    """Four layouts of one model: the fastest, two slower ones, and one that ran out of memory."""
    unknown = changed("unknown", 900.0) | {"device": None, "hardware": "an abacus"}
    rows = [
        changed("as published", 872.0), changed("narrow", 700.0, tp=4, mbs=4, pp=2), changed("slow", 500.0, mbs=1),
        changed("too much", None, tp=1, mbs=4), unknown,
    ]  # fmt: skip
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return path


def test_a_row_goes_through_the_public_function(runs, tmp_path, capsys):
    assert main(["--json", str(runs), "--output", str(tmp_path / "out.json"), "--rows"]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    model, parallel, training, device, software = Row(ROW).question()
    answer = estimate(model, parallel, training, device, software)
    assert software.attention == "unfused" and software.gradient_bytes == 2
    assert found["rows"][0]["predicted"] == pytest.approx(answer.tokens_per_s)
    assert found["rows"][0]["ratio"] == pytest.approx(1.0, abs=answer.error)
    assert found["tables"]["all"][0]["rows"] == 3
    assert found["ordering"]["pairs"] == 3
    assert [loss["rows"] for loss in found["losses"]] == [3]
    assert found["memory"] == {
        "ran": 3, "false_alarms": [], "not_ran": 1, "missed": [], "peaks": {"rows": 0, "median_ratio": None},
    }  # fmt: skip
    assert list(found["refused"]) == ["unknown"]
    assert "no prediction: unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bars, code",
    [
        (["--max-median-error", "40"], 0),
        (["--max-median-error", "0.001"], 1),
        (["--min-within-15", "101"], 1),
        (["--min-ordered", "101"], 1),
        (["--max-missed", "0", "--max-false-alarms", "0"], 0),
        (["--split", "held"], 2),
        (["--only", "("], 2),
    ],
)
def test_bars_decide_the_exit_code(runs, bars, code, capsys):
    assert main(["--json", str(runs), *bars]) == code
    if code == 1:
        assert f"missed {bars[0]}" in capsys.readouterr().out


def test_one_known_run_calibrates_the_others_of_its_program(runs, tmp_path):
    assert main(["--json", str(runs), "--calibrated", "--output", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["tables"]["all"][0]["rows"] == 2


def test_a_file_that_is_none_is_an_error_without_a_traceback(tmp_path, capsys):
    assert main(["--json", str(tmp_path / "none.json")]) == 2
    (tmp_path / "bad.json").write_text("[]", encoding="utf-8")
    assert main(["--json", str(tmp_path / "bad.json")]) == 2
    assert "a list of rows" in capsys.readouterr().err


def test_known_hardware_needs_no_device_file_name():
    row = Row(ROW | {"device": None, "hardware": "8x GB200 NVL72"})
    assert row.device_name == "gb200"
    device = row.question()[3]
    assert device == device_spec("gb200")
    slower = Row(ROW | {"device_overrides": {"inter_node_bandwidth_gb_s": 6.25}}).question()[3]
    assert slower == replace(device_spec("a100-80g"), inter_node_bandwidth_gb_s=6.25)
