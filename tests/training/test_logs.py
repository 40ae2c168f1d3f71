"""Files that a run writes beside its checkpoints end no run: a full disk, a read-only or vanished folder is one
warning a file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_telechat.checkpoint import CheckpointWriter
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.training import tolerance
from megatron_telechat.training.metrics_file import read_metrics
from megatron_telechat.training.writers import LineFile, MetricsWriter
from tests.harness import ROOT, launch
from tests.training.runs import MOE

PRETRAIN = ROOT / "pretrain" / "pretrain_telechat2.py"
NOT_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root")


@pytest.fixture(autouse=True)
def nothing_was_warned_of(monkeypatch):
    monkeypatch.setattr(tolerance, "_warned", set())


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_line_that_did_not_fit_swallows_no_other(tmp_path, capsys):
    """Any byte may be the last one that the disk takes."""
    path, kept = tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}'
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(len(kept) + 2):
        path.unlink(missing_ok=True)
        lines = LineFile(path)
        lines.append(kept)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
        try:
            lines.append(kept.replace("1", "2"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        lines.append(kept.replace("1", "3"))
        metrics = read_metrics(tmp_path)
        assert list(metrics.train) == ([1, 3] if room < len(kept) else [1, 2, 3]), room
        assert len(metrics.torn) == (0 < room < len(kept)), "and says so"
    said = capsys.readouterr().err
    assert said.count("warning") == 2, "one for the file, one that it is written again"
    assert "metrics.jsonl cannot be written (File too large)" in said and "is written again; 1 lines are lost" in said


def test_a_folder_that_vanishes_and_comes_back(tmp_path, capfd):
    writer = MetricsWriter(RunConfig(), tmp_path / "run", enabled=False)
    (tmp_path / "run").mkdir()
    writer = MetricsWriter(RunConfig(), tmp_path / "run", enabled=True)
    writer.write({"step": 1, "loss": 1.0})
    shutil.rmtree(tmp_path / "run")
    for step in (2, 3):
        writer.write({"step": step, "loss": 1.0})
    (tmp_path / "run").mkdir()
    writer.write({"step": 4, "loss": 1.0})
    writer.close()
    assert list(read_metrics(tmp_path / "run").train) == [4]
    said = capfd.readouterr().err
    assert said.count("cannot be written (No such file or directory)") == 1 and "2 lines are lost" in said


@NOT_ROOT
@pytest.mark.heavy
def test_a_full_disk_costs_lines_and_no_more(small_disk, capfd):
    writer = MetricsWriter(RunConfig(), small_disk, enabled=True)
    for step in range(1, 300):
        writer.write({"step": step, "loss": 1.0, "text": "x" * 100})
    (small_disk / "metrics.jsonl").write_bytes((small_disk / "metrics.jsonl").read_bytes()[:4000])
    writer.write({"step": 300, "loss": 1.0})
    metrics = read_metrics(small_disk)
    assert list(metrics.train)[-1] == 300 and len(metrics.torn) == 1 and len(metrics.train) > 20
    assert capfd.readouterr().err.count("cannot be written (No space left on device)") == 1


def test_what_follows_a_commit_ends_no_run(tmp_path, caplog):
    """The hint cannot be replaced: the save is whole all the same, and the next one, too."""
    (tmp_path / "latest" / "not a file").mkdir(parents=True)
    for step in (1, 2):
        with CheckpointWriter(tmp_path, step=step, config="model: {}\n", max_file_bytes=100) as writer:
            writer.add("model/a", (2,), (0,), torch.ones(2))
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000001", "iter_0000002"}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "iter_0000001 is saved, but" in said[0], said


@pytest.mark.gloo
@NOT_ROOT
def test_a_run_whose_folder_takes_no_byte_trains_to_its_end(small_disk, tmp_path):
    """Configuration, metrics and traces of two ranks; the checkpoints lie elsewhere. The lease takes the last room."""
    (small_disk / "filler").write_bytes(b"x" * 12288)
    flags = [*MOE, "--expert-model-parallel-size", "2", "--no-fold-tensor-into-experts", "--moe-trace", "2-3"]
    places = ["--run-dir", str(small_disk), "--save", str(tmp_path / "saved"), "--data-cache-path", str(tmp_path)]
    result = launch(PRETRAIN, 2, *flags, *places, "--train-iters", "4", timeout=110).ok()
    assert (tmp_path / "saved" / "iter_0000004" / "manifest.json").exists()
    first, second = (rank.stderr for rank in result.ranks)
    for name in ("config.yaml", "metrics.jsonl", "rank_0.json"):
        assert first.count(f"{name} c") == 1, first
    assert second.count("warning: rank 1: ") == 1 and "rank_1.json" in second
    assert "Traceback" not in result.stderr
    assert json.loads((tmp_path / "saved" / "iter_0000004" / "manifest.json").read_text())["step"] == 4
