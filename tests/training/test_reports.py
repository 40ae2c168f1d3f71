"""What a person and a program read of a run: the console line, metrics.jsonl, stop requests."""

import io
import json
import os
import signal

import pytest

from megatron_telechat.config.schema import LoggingConfig, RunConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.training.console import Console, format_count, format_duration, format_step
from megatron_telechat.training.signals import StopRequests
from megatron_telechat.training.writers import MetricsWriter

RECORD = {
    "step": 120,
    "loss": 7.4123,
    "grad_norm": 1.83,
    "lr": 1.2e-4,
    "tokens_per_s": 412_345.0,
    "iteration_time_s": 0.25,
    "mfu": 0.413,
    "memory_peak_gib": 61.2,
    "expert_load_max_over_mean": 1.31,
    "a2a_exposed": 0.0214,
}


def test_step_line():
    line = format_step(RECORD, 5000, eta_s=11_520, memory_total_gib=80)
    assert line == (
        "step 120/5000  loss 7.4123  gnorm 1.830  lr 1.20e-04  412k tok/s  MFU 41.3%  "
        "mem 61.2/80 GiB  experts max/mean 1.31  a2a exposed 2.1%  eta 3:12:00"
    )


def test_step_line_leaves_out_what_is_not_known():
    record = {**RECORD, "mfu": None, "expert_load_max_over_mean": None, "grad_norm": None, "loss_scale": 512.0,
              "skipped_steps": 2, "skipped_reasons": {"fp16 overflow": 2}}  # fmt: skip
    del record["a2a_exposed"]  # experts on one rank
    line = format_step(record, 5000, eta_s=5, memory_total_gib=None)
    assert "MFU" not in line and "experts" not in line and "exposed" not in line
    assert "gnorm none" in line and "loss scale 512  not taken 2 (fp16 overflow)" in line and "mem 61.2 GiB" in line
    nothing = format_step({**record, "loss": None}, 100, 1.0, None)
    assert "loss none" in nothing and "gnorm none" in nothing


@pytest.mark.parametrize("value,text", [(412, "412"), (12_300, "12.3k"), (4_194_304, "4.19M"), (113_282_916_352, "113B")])
def test_counts(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize("seconds,text", [(5, "00:05"), (725, "12:05"), (7265, "2:01:05"), (200_000, "2d 07:33")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_console_draws_a_bar_only_when_asked_and_only_on_one_rank():
    def output(enabled, progress):
        stream = io.StringIO()
        Console(enabled, 240, progress, stream).step(RECORD, None)
        return stream.getvalue()

    assert output(False, True) == ""
    assert "[" not in output(True, False)
    assert "[###############...............]  50%" in output(True, True)


def test_metrics_are_whole_lines_of_strict_json_after_each_write(tmp_path):
    writer = MetricsWriter(RunConfig(), tmp_path, enabled=True)
    writer.write({"step": 1, "loss": float("nan"), "mfu": None})
    writer.write({"event": "resume", "step": 1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close: a killed run keeps them
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "loss": "nan", "mfu": None},
        {"event": "resume", "step": 1},
    ]
    writer.close()
    assert not MetricsWriter(RunConfig(), tmp_path / "other", enabled=False).write({"step": 1})
    assert not (tmp_path / "other").exists()


def test_missing_wandb_names_the_line_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install \"megatron_telechat\[wandb\]\""):
        MetricsWriter(RunConfig(logging=LoggingConfig(wandb_project="p")), tmp_path, enabled=True)


def test_stop_requests_by_signal_and_by_file(tmp_path):
    requests = StopRequests(tmp_path, watch_files=True)
    try:
        assert requests.poll() == (False, False)
        (tmp_path / "save-now").touch()
        assert requests.poll() == (False, True)
        (tmp_path / "stop-now").touch()
        assert requests.poll() == (True, True)
        requests.clear_files()
        assert requests.poll() == (False, False) and not list(tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.poll() == (True, False)
    finally:
        requests.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
