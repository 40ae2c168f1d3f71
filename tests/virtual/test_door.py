"""--dry-run --execute as a person types it: the report, the JSON file, what is refused and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_telechat.cli.pretrain import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--preset", "telechat2-tiny", "--num-layers", "2", "--world-size", "2", "--tensor-model-parallel-size", "2"]


@pytest.mark.heavy
def test_the_report_and_its_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Installed or not: its kernels would be started on tensors without memory.
    engine = tmp_path / "installed" / "transformer_engine"
    engine.mkdir(parents=True)
    (engine / "__init__.py").write_text("raise AssertionError('Transformer Engine was imported')")
    monkeypatch.setenv("PYTHONPATH", f"{engine.parent}:{ROOT}")
    file = tmp_path / "executed.json"
    assert main([*TINY, "--dry-run", "--execute-all", "--execute-json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "dry run: nothing was started" in out and "executed  (2 virtual ranks" in out
    assert "the host waits at" in out and "all meet" in out and "dense layer, backward" in out
    assert "virtual rank 0:" in err and "virtual rank 1:" in err
    document = json.loads(file.read_text())
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1] and document["match"]["problems"] == []
    for rank in document["ranks"]:
        assert 0.5 < rank["peak_bytes"] / rank["modelled_bytes"] < 1.5
        gathered = [entry for entry in rank["exchanges"] if (entry["group"], entry["kind"]) == ("tp", "all-gather")]
        assert gathered and gathered[0]["bytes"] == gathered[0]["modelled"]
    assert not (tmp_path / "runs").exists(), "a dry run makes no run folder"


@pytest.mark.parametrize(
    "flags, code, said",
    [
        ("--execute", 2, "add --dry-run"),
        ("--dry-run --execute-ranks 2", 2, "ranks from 0 to 1"),
        ("--dry-run --execute-ranks one", 2, "such as 0,512"),
        ("--dry-run --execute --device cpu", 2, "start it"),
        ("--dry-run --execute --device npu", 2, "add --device cuda"),
        ("--dry-run --execute-all --world-size 128", 2, "64 at most"),
        ("--dry-run --execute-json /nowhere/at/all.json", 6, "a folder that exists"),
    ],
)
def test_what_is_refused(flags, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *flags.split()]) == code
    assert said in capsys.readouterr().err
