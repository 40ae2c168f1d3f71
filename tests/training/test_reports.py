"""What a person and a program read of a run: the console line, metrics.jsonl, stop requests."""

import io
import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest

from megatron_telechat.config.schema import CheckpointConfig, LoggingConfig, RunConfig, TrainingConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.training.console import Console, format_count, format_duration, format_step
from megatron_telechat.training.metrics_file import read_metrics
from megatron_telechat.training.signals import StopRequests
from megatron_telechat.training.unsaved import unsaved_note
from megatron_telechat.training.writers import MetricsWriter, recorded_at

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
    assert "gnorm none" in line and "loss scale 512  skipped 2 (fp16 overflow)" in line and "mem 61.2 GiB" in line
    nothing = format_step({**record, "loss": None}, 100, 1.0, None)
    assert "loss none" in nothing and "gnorm none" in nothing


@pytest.mark.parametrize(
    "value,text", [(412, "412"), (12_300, "12.3k"), (4_194_304, "4.19M"), (113_282_916_352, "113B")]
)
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


def test_a_line_that_a_kill_cut_off_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for torn in ('{"step": 3, "lo', "x" * 200_000):
        path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 2.0}\n' + torn)
        MetricsWriter(RunConfig(), tmp_path, enabled=True, step=1).close()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines[2:] == [{"event": "resume", "step": 1}]
    path.write_text("torn")
    MetricsWriter(RunConfig(), tmp_path, enabled=True).close()
    assert path.read_text() == ""


def test_a_run_that_begins_anew_takes_back_what_a_killed_one_wrote(tmp_path):
    """Killed before its first checkpoint, it starts at step 0 again: no step counts twice, no later one stays."""
    for steps in (9, 4):
        writer = MetricsWriter(RunConfig(), tmp_path, enabled=True)
        for step in range(1, steps + 1):
            writer.write({"step": step, "loss": float(steps)})
        writer.write({"step": steps, "valid_loss": 1.0})
        writer.write({"step": steps, "test_loss": 2.0})
        writer.close()
    metrics = read_metrics(tmp_path)
    assert metrics.series("loss") == ([1, 2, 3, 4], [4.0] * 4)
    assert list(metrics.valid) == list(metrics.test) == [4]
    assert recorded_at(tmp_path, 4) == {"step", "loss", "valid_loss", "test_loss"} and recorded_at(tmp_path, 9) == set()


def crash_and_resume(tmp_path, **logging):
    """Steps 1 to 6, killed; resumed from step 3; to step 5."""
    run = RunConfig(logging=LoggingConfig(**logging))
    for first, step, last in ((True, 0, 6), (False, 3, 5)):
        writer = MetricsWriter(run, tmp_path, True, step)
        for number in range(step + 1, last + 1):
            writer.write({"step": number, "loss": number + (0.0 if first else 0.5)})
        writer.close()


def test_tensorboard_shows_each_step_once_after_a_crash(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    crash_and_resume(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5)]


def test_tensorboard_is_told_what_to_take_back(tmp_path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            made.append(purge_step)
            os.makedirs(folder, exist_ok=True)
            (tmp_path / "tensorboard" / f"events.{len(made)}").touch()

        add_scalar = close = lambda *a: None

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    crash_and_resume(tmp_path, tensorboard=True)
    MetricsWriter(RunConfig(logging=LoggingConfig(tensorboard=True)), tmp_path, True).close()
    assert made == [None, 4, 1], "a first start, a resume from step 3, a start anew in a folder that was used"


def test_wandb_gets_every_step_of_a_resumed_run(tmp_path, monkeypatch):
    """Its own counter drops what is logged below it; a step that is a metric is never below."""
    calls = []

    class Session:
        id = "run-1"

        def define_metric(self, *args, **keywords):
            calls.append(("define", *args, *keywords.items()))

        def log(self, values, step=None):
            assert step is None
            calls.append(("log", values["step"], values["loss"]))

        def finish(self):
            calls.append(("finish",))

    def init(**keywords):
        calls.append(("init", keywords["id"], keywords["resume"]))
        return Session()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    crash_and_resume(tmp_path, wandb_project="p")
    define = [("define", "step"), ("define", "*", ("step_metric", "step"))]
    assert calls == [
        ("init", None, "allow"), *define, *(("log", step, float(step)) for step in range(1, 7)), ("finish",),
        ("init", "run-1", "allow"), *define, ("log", 4, 4.5), ("log", 5, 5.5), ("finish",),
    ]  # fmt: skip


def test_an_output_that_nobody_reads_any_more_ends_no_run():
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    console = Console(True, 240, True, Closed())
    console.say("one")
    console.step(RECORD, None)


@pytest.mark.parametrize(
    "seconds, interval, noted", [(0.5, None, False), (10.0, 100, False), (None, None, False), (1.0, None, True)]
)
def test_a_long_run_without_a_save_interval_is_told(seconds, interval, noted):
    run = RunConfig(training=TrainingConfig(train_iters=5000), checkpoint=CheckpointConfig(save_interval=interval))
    note = unsaved_note(run, 0, seconds, "measured")
    assert (note is not None) == noted
    if note:
        assert "1:23:20 (measured)" in note and "--save-interval 1800" in note
        assert unsaved_note(run, 1400, seconds, "measured") is None, "what is left counts"
