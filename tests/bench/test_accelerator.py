"""The bench of the accelerator runs, goes on where it was cut off, and says what failed."""

from __future__ import annotations

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


def test_a_section_that_is_cut_off_keeps_what_it_found(tmp_path):
    sys.path.insert(0, str(BENCH))
    try:
        import accelerator as package  # the folder: the program of this name is run, never imported
        from accelerator.page import failed_checks, page
        from accelerator.section import SECTIONS
    finally:
        sys.path.remove(str(BENCH))
    assert Path(package.__file__).name == "__init__.py"
    done = bench("--sections", "parity", "--limit", "11", "--work", str(tmp_path), "--json", str(tmp_path / "r.json"))
    entry = json.loads((tmp_path / "r.json").read_text())["sections"]["parity"]
    assert done.returncode == int(entry["status"] != "done")
    results = {"a": {"ok": False, "error": "two\nlines"}, "b": {"ok": True}, "c": 1.5}
    entry = {"status": "cut off after 9 s", "seconds": 9, "results": results, "error": "the end of the log"}
    assert failed_checks(entry) == ["a"]
    text = page({"device": "X", "command": "c", "sections": {SECTIONS[0].name: entry}})
    assert "**NOT OK**: a: error two lines" in text and "ok: b" in text and "the end of the log" in text


def test_an_unknown_section_is_refused():
    done = bench("--sections", "parity,speed")
    assert done.returncode == 2 and "no section speed" in done.stderr


@pytest.mark.slow
@pytest.mark.gloo
def test_all_sections(tmp_path):
    done = bench("--json", str(tmp_path / "report.json"), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
