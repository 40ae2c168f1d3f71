"""The bench of the accelerator runs, goes on where it was cut off, and says what failed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


def bench(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(BENCH / "accelerator.py"), "--device", "cpu", "--quick", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.slow
def test_sections_are_run_once(tmp_path):
    report, page = tmp_path / "report.json", tmp_path / "page.md"
    files = ("--json", str(report), "--page", str(page))
    first = bench("--sections", "environment", *files)
    assert first.returncode == 0, first.stderr
    done = bench("--sections", "environment,step-39b,attention", *files)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["step-39b", "attention"]
    sections = json.loads(report.read_text())["sections"]
    assert {entry["status"] for entry in sections.values()} == {"done"}
    step = sections["step-39b"]["results"]
    assert step["speed"]["tokens/s"] > 0 and step["kernels of a step"]["launches"] > 100
    assert "## A training step, mixture of experts" in page.read_text()


@pytest.fixture
def program(monkeypatch):
    """The program as a module. Its folder of sections has its name, and that is what an import finds."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    spec = importlib.util.spec_from_file_location("accelerator_program", BENCH / "accelerator.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.heavy
def test_a_section_that_is_cut_off_says_so(program, tmp_path):
    section, options = program.SECTIONS[0], program.Options("cpu", True, tmp_path)
    entry = program.run_section(section, options, 0.05)
    assert entry["status"] == "cut off after 0 s" and entry["results"] == {}


def test_the_page_names_what_failed(program):
    results = {"a": {"ok": False, "error": "two\nlines"}, "b": {"ok": True}, "c": 1.5}
    entry = {"status": "cut off after 9 s", "seconds": 9, "results": results, "error": "the end of the log"}
    assert program.failed_checks(entry) == ["a"]
    text = program.page({"device": "X", "command": "c", "sections": {program.NAMES[0]: entry}})
    assert "**NOT OK**: a: error two lines" in text and "ok: b" in text and "the end of the log" in text


@pytest.mark.heavy
def test_an_unknown_section_is_refused():
    done = bench("--sections", "parity,speed")
    assert done.returncode == 2 and "no section speed" in done.stderr


@pytest.mark.slow
@pytest.mark.gloo
def test_all_sections(tmp_path):
    done = bench("--json", str(tmp_path / "report.json"), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
