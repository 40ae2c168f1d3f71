"""A run killed anywhere, started again with the same command, gives the bytes of an uninterrupted one."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_telechat.data.text import readers
from megatron_telechat.data.text.preprocess import Interrupted, preprocess
from megatron_telechat.data.text.workspace import Workspace
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.errors import ResourceError
from tests.data.material import TEXTS, huggingface_tokenizer
from tests.harness import ROOT

KEYS = ("text", "title")
OUTPUTS = sorted(f"{key}_document.{suffix}" for key in KEYS for suffix in ("bin", "idx", "sums"))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tokenizer, an input of two files (plain and gzip) with bad lines, and the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume")
    model = huggingface_tokenizer(folder)
    lines = [
        json.dumps({"text": f"{i} {TEXTS[i % 5]} " * 9, "title": f"{i}"}) if i % 97 else "{broken" for i in range(2700)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines[:1800]) + "\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[1800:]).encode(), 1))
    source = f"{folder / 'a.jsonl'},{folder / 'b.jsonl.gz'}"
    begin = time.monotonic()
    assert _start(source, folder / "whole", model).wait(timeout=60) == 0
    return source, model, _bytes(folder, "whole"), time.monotonic() - begin


def _start(source, prefix, model, die_at=0):
    command = [sys.executable, "-m", "tests.data.worker_preprocess", source, str(prefix), str(model), str(die_at)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def _bytes(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name.removeprefix(f"{name}_"): path.read_bytes() for path in sorted(folder.glob(f"{name}_*"))}


def _clear(folder):
    for path in folder.iterdir():
        path.unlink()


def _written(tmp_path) -> int:
    try:
        return (tmp_path / "o.partial" / "text.bin").stat().st_size
    except OSError:
        return 0


def _storm(tmp_path, material, count, seed):
    """Kills at random points of the output, some of them while a run starts; every fourth of the helper alone, which
    must change nothing. No helper outlives its tool."""
    source, model, whole, seconds = material
    rng, killed, journalled = random.Random(seed), 0, 0
    for _ in range(20 * count):
        had = _written(tmp_path)
        until = had + rng.random() * (len(whole["text_document.bin"]) - had)
        run = _start(source, tmp_path / "o", model)
        latest = time.monotonic() + (seconds * rng.random() if rng.random() < 0.2 else 60)
        while run.poll() is None and _written(tmp_path) <= until and time.monotonic() < latest:
            time.sleep(0.001)
        helpers = psutil.Process(run.pid).children() if run.poll() is None else []
        if helpers and killed % 4 == 3:
            helpers[0].kill()
            run.wait(timeout=60)
            killed += 1
        if run.poll() is not None:
            assert run.returncode == 0 and _bytes(tmp_path, "o") == whole
            _clear(tmp_path)
            if killed == count:
                break
            continue
        run.send_signal(signal.SIGKILL)
        run.wait()
        psutil.wait_procs(helpers, timeout=20)
        assert not any(helper.is_running() for helper in helpers)
        killed += 1
        journalled += (tmp_path / "o.partial" / "state.json").exists()
        for path in tmp_path.glob("o_*.idx"):  # whole or not there
            assert path.read_bytes() == whole[path.name.removeprefix("o_")]
        if killed == count:
            break
    assert killed == count
    assert _start(source, tmp_path / "o", model).wait(timeout=60) == 0
    assert _bytes(tmp_path, "o") == whole and journalled
    assert not (tmp_path / "o.partial").exists()


@pytest.mark.heavy
def test_kill_at_random_moments(tmp_path, material):
    _storm(tmp_path, material, 4, seed=1)


@pytest.mark.slow
def test_kill_at_twenty_random_moments(tmp_path, material):
    """pytest tests/data/test_resume.py -m slow"""
    _storm(tmp_path, material, 20, seed=2)


@pytest.mark.heavy
def test_death_at_each_rename(tmp_path, material):
    """Journals, then the final names: at whichever rename a run ends, the next one brings the rest."""
    source, model, whole, _ = material
    died = 0
    for _ in range(40):
        run = _start(source, tmp_path / "o", model, die_at=3)
        if run.wait(timeout=60) == 0:
            break
        died += 1
        there = _bytes(tmp_path, "o")
        assert all(whole[name] == content for name, content in there.items())
    assert died >= 4 and _bytes(tmp_path, "o") == whole


@pytest.mark.heavy
def test_outputs_of_the_material(material):
    assert sorted(material[2]) == sorted([*OUTPUTS, "skipped.txt"])
    assert len(material[2]["skipped.txt"].splitlines()) == 28


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100_000)


def _run(tmp_path, material, **changes):
    source, model, *_ = material
    options = dict(json_keys=KEYS, append_eod=True, workers=2, on_error="skip", log_interval=0, journal_seconds=0.0)
    return preprocess(
        source.split(","), str(tmp_path / "o"), build_tokenizer(None, str(model)), **{**options, **changes}
    )


def _stopped(tmp_path, material, blocks=2):
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        _run(tmp_path, material, stop=lambda: next(calls) >= blocks)
    assert [path.name for path in tmp_path.iterdir()] == ["o.partial"]


@pytest.mark.heavy
def test_a_stop_is_taken_up_and_says_so(tmp_path, material):
    _stopped(tmp_path, material)
    said = []
    report = _run(tmp_path, material, log=said.append)
    assert any("continuing from there" in line for line in said) and report.resumed_bytes > 0
    assert report.documents_in == 2700 == report.documents_out + report.skipped and report.skipped == 28
    assert _bytes(tmp_path, "o") == material[2]


@pytest.mark.heavy
def test_another_command_starts_over(tmp_path, material):
    _stopped(tmp_path, material)
    report = _run(tmp_path, material, append_eod=False)
    assert report.resumed_bytes == 0 and report.documents_in == 2700
    assert _bytes(tmp_path, "o")["text_document.bin"] != material[2]["text_document.bin"]


@pytest.mark.heavy
def test_a_journal_that_does_not_fit_the_files_is_not_believed(tmp_path, material):
    for damage in (
        lambda folder: os.truncate(folder / "text.bin", 10),
        lambda folder: (folder / "state.json").write_text("{"),
    ):
        _stopped(tmp_path, material)
        damage(tmp_path / "o.partial")
        assert _run(tmp_path, material).resumed_bytes == 0
        assert _bytes(tmp_path, "o") == material[2]
        _clear(tmp_path)


@pytest.mark.heavy
def test_two_runs_of_one_output(tmp_path, material):
    holder = Workspace(str(tmp_path / "o"), KEYS, "u2", None)
    with pytest.raises(ResourceError, match=f"another run writes .*{os.getpid()}"):
        _run(tmp_path, material)
    holder.remove()
    assert _run(tmp_path, material).documents_in == 2700


@pytest.mark.heavy
def test_sigterm_ends_with_75_and_goes_on(tmp_path, material):
    source, model, *_ = material
    command = [
        sys.executable,
        str(ROOT / "tools" / "preprocess_data.py"),
        "--input",
        *source.split(","),
        "--output-prefix",
        str(tmp_path / "o"),
        "--json-keys",
        *KEYS,
        "--append-eod",
        "--tokenizer-model",
        str(model),
        "--on-error",
        "skip",
        "--workers",
        "1",
        "--engine",
        "reference",
        "--log-interval",
        "1",
    ]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    run.stderr.readline()  # it works
    run.send_signal(signal.SIGTERM)
    error = run.stderr.read()
    assert run.wait(timeout=60) == 75 and "run the same command again" in error
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    assert _bytes(tmp_path, "o") == material[2]
