"""--calibrate --from: one known throughput fits the factor of a program."""

from __future__ import annotations

import json

import pytest

from megatron_telechat.cli.plan_pipeline import main
from megatron_telechat.config import load_run_config
from megatron_telechat.costs.devices import read_device_file
from megatron_telechat.planner.predict import predict

RUN = ["--preset", "telechat2-7b", "--world-size", "8"]
DEVICE = ["--device", "ascend-910b-64g"]


def calibrated(tmp_path, source: str, *words: str):
    path = tmp_path / "mine.yaml"
    assert main(["--calibrate", "--from", source, *DEVICE, "--output", str(path), *words]) == 0
    return read_device_file(path)


def test_the_prediction_is_the_throughput_that_was_seen(tmp_path, capsys):
    device = calibrated(tmp_path, "2,950", *RUN)
    run = load_run_config([*RUN, "--dry-run"], {}).run
    assert predict(run, device).tokens_per_s_per_device == pytest.approx(2950, rel=1e-3)
    assert predict(run, device).error == 0.1
    assert "efficiency.stack" in capsys.readouterr().out
    again = calibrated(tmp_path, "2950", *RUN)
    assert again.efficiency["stack"] == device.efficiency["stack"]


def test_a_command_of_megatron_lm(tmp_path):
    words = "torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 "
    words += "--num-attention-heads 32 --seq-length 4096 --micro-batch-size 1 --global-batch-size 64 --bf16 --swiglu "
    words += "--vocab-size 32000 --tensor-model-parallel-size 2 --position-embedding-type rope"
    device = calibrated(tmp_path, "3000", "--", *words.split())
    assert 0.2 < device.efficiency["stack"] < 5


def test_a_run_folder_says_both_the_run_and_its_throughput(tmp_path):
    from megatron_telechat.config.yaml_io import dump_run_config

    folder = tmp_path / "run"
    folder.mkdir()
    loaded = load_run_config([*RUN, "--train-iters", "10", "--dry-run"], {})
    (folder / "config.yaml").write_text(dump_run_config(loaded.run), encoding="utf-8")
    rates = [100.0, 200.0, 300.0, 8 * 2900.0, 8 * 2950.0, 8 * 3000.0]
    lines = [json.dumps({"step": step, "tokens_per_s": rate}) for step, rate in enumerate(rates, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    device = calibrated(tmp_path, str(folder))
    assert predict(loaded.run, device).tokens_per_s_per_device == pytest.approx(2950, rel=1e-3)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--calibrate", "--from", "23600000", *RUN, *DEVICE, "--output", "OUT"], "not of the whole machine"),
        (["--calibrate", "--from", "fast", *RUN, *DEVICE, "--output", "OUT"], "neither a run folder nor a throughput"),
        (["--calibrate", "--from", "0", *RUN, *DEVICE, "--output", "OUT"], "neither a run folder nor a throughput"),
        (["--calibrate", "--from", "2950", *RUN, *DEVICE], "--calibrate needs --output"),
        (["--calibrate", "--from", "2950", *RUN, "--output", "OUT"], "no device is given"),
        (["--from", "2950", *RUN, *DEVICE], "--from belongs to --calibrate"),
        (["--calibrate", "--from", "EMPTY", *RUN, *DEVICE, "--output", "OUT"], "metrics.jsonl"),
    ],
)
def test_mistakes_are_named(words, said, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    code = main([str(tmp_path / word) if word in ("OUT", "EMPTY") else word for word in words])
    assert code in (2, 3, 4)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "OUT").exists()
