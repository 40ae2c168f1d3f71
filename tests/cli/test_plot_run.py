"""Curves are read as they stand after resumes, and drawn."""

from __future__ import annotations

import builtins
import json
import math
import random
from pathlib import Path

import pytest

from megatron_telechat.cli.plot_run import main, running_mean
from megatron_telechat.errors import DataError
from megatron_telechat.training.metrics_file import read_metrics


def record(step: int, loss: float, **more) -> dict:
    return {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 1e4, **more}


def write_run(folder: Path, lines: list, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def training_run(folder: Path, steps: int = 200, seed: int = 0, experts: bool = True) -> Path:
    noise = random.Random(seed)
    lines: list[dict] = []
    for step in range(1, steps + 1):
        if step == steps // 2 + 1:
            lines.append({"event": "resume", "step": steps // 2})
        loss = 3.5 + 5.5 * math.exp(-step / 50) + noise.gauss(0, 0.06)
        more = {"expert_load_max_over_mean": 1.2 + math.exp(-step / 30) + noise.gauss(0, 0.03)} if experts else {}
        norm = 0.8 + 3 * math.exp(-step / 25) + abs(noise.gauss(0, 0.15))
        lines.append(
            record(step, loss, **{"grad_norm": norm, "tokens_per_s": noise.gauss(41000, 900), "mfu": 0.41, **more})
        )
        if step % 25 == 0:
            lines.append({"step": step, "valid_loss": 3.56 + 5.5 * math.exp(-step / 50)})
    return write_run(folder, lines)


@pytest.mark.heavy
def test_waiting_for_the_exchange_gets_a_panel(tmp_path):
    waits = write_run(
        tmp_path / "waits", [record(step, 3.0, a2a_exposed=0.2, expert_load_max_over_mean=1.1) for step in range(1, 9)]
    )
    sizes = []
    for run in (waits, training_run(tmp_path / "alone", 20)):
        assert main([str(run)]) == 0
        header = (run / "metrics.png").read_bytes()[16:24]
        sizes.append(int.from_bytes(header[:4], "big") / int.from_bytes(header[4:], "big"))
    assert sizes[0] == pytest.approx(1.5 * sizes[1], rel=0.02), "three columns in place of two"


def test_a_resume_takes_back_what_lay_beyond_it(tmp_path):
    run = write_run(
        tmp_path / "run",
        [record(step, 10.0 + step) for step in range(1, 8)]
        + [{"step": 4, "valid_loss": 1.0}, {"step": 6, "valid_loss": 2.0}, {"event": "resume", "step": 5}]
        + [record(6, 1.5)],
    )
    metrics = read_metrics(run)
    assert metrics.series("loss") == ([1, 2, 3, 4, 5, 6], [11.0, 12.0, 13.0, 14.0, 15.0, 1.5])
    assert metrics.series("valid_loss", "valid") == ([4], [1.0])
    assert metrics.resumes == [5]


def test_unfinished_last_line_and_values_that_are_no_numbers(tmp_path):
    run = write_run(tmp_path / "run", [record(1, 2.0, mfu=None), record(2, "nan")], tail='{"step": 3, "lo')
    metrics = read_metrics(run)
    steps, values = metrics.series("loss")
    assert steps == [1, 2] and values[0] == 2.0 and math.isnan(values[1])
    assert metrics.series("mfu") == ([], [])


@pytest.mark.parametrize("text", ['{"step": 1\n', "[1, 2]\n", '{"loss": 1.0}\n', "", "\n"])
def test_a_file_that_is_no_record_of_a_run(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match="metrics.jsonl"):
        read_metrics(tmp_path)


def test_cut_off_lines_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n{"ste')
    metrics = read_metrics(tmp_path)
    assert list(metrics.train) == [2] and metrics.torn == [1, 3]


def test_running_mean_leaves_out_what_is_not_finite():
    assert running_mean([1.0, 3.0, math.nan, 5.0], 1) == [2.0, 2.0, 4.0, 5.0]


@pytest.mark.heavy
def test_pictures_of_one_and_of_several_runs(tmp_path, capsys):
    moe, dense = training_run(tmp_path / "moe"), training_run(tmp_path / "dense", seed=1, experts=False)
    assert main([str(moe)]) == 0
    assert capsys.readouterr().out.strip() == str(moe / "metrics.png")
    assert (moe / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(moe), str(dense / "metrics.jsonl"), "--output", str(tmp_path / "new" / "both.svg")]) == 0
    assert "<svg" in (tmp_path / "new" / "both.svg").read_text()


def test_errors_are_readable(tmp_path, capsys, monkeypatch):
    assert main([]) == 2
    assert "config error" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 3
    assert "data error: cannot read" in capsys.readouterr().err
    run = training_run(tmp_path / "run", steps=3)
    assert main([str(run), "--output", str(tmp_path / "picture.xyz")]) == 2
    assert "--output" in capsys.readouterr().err
    assert main([str(run), "--output", "/proc/none/picture.png"]) == 6

    real_import = builtins.__import__

    def without_matplotlib(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    capsys.readouterr()
    assert main([str(run)]) == 2
    assert 'pip install -e ".[plot]"' in capsys.readouterr().err
