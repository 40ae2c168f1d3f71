"""The rules of tests/conftest.py that keep ``--fast`` fast, on a small suite of their own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.heavy

SUITE = """
import os, subprocess, time
import pytest


def test_light():
    pass


def test_popen():
    try:
        subprocess.run(["true"])
    except Exception:
        pass


def test_fork():
    if os.fork() == 0:
        os._exit(0)


@pytest.mark.heavy
def test_marked():
    subprocess.run(["true"], check=True)


@pytest.mark.slow
def test_slow():
    pass


def test_computes():
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "pytest.ini", folder)
    rules = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    assert "LIGHT_SECONDS = 3.0" in rules
    shorter = rules.replace("LIGHT_SECONDS = 3.0", "LIGHT_SECONDS = 0.3")
    (folder / "tests" / "conftest.py").write_text(shorter, encoding="utf-8")
    (folder / "tests" / "test_some.py").write_text(SUITE)
    (folder / "tests" / "test_a_light_file.py").write_text("def test_first():\n    pass\n")
    return folder


def outcomes(suite: Path, *args: str) -> tuple[dict[str, str], str]:
    """Test → passed, failed or both (a teardown that failed); the output."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rN", *args]
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True, timeout=120)
    found: dict[str, str] = {}
    here, of_a_worker = r"::test_(\w+) (PASSED|FAILED|ERROR)", r"(PASSED|FAILED|ERROR) \S+::test_(\w+)"
    pairs = re.findall(here, done.stdout) or [(name, how) for how, name in re.findall(of_a_worker, done.stdout)]
    for name, outcome in pairs:
        found[name] = (found.get(name, "") + " " + outcome.lower()).strip()
    return found, done.stdout


def test_a_light_test_may_start_no_process_in_any_run(suite):
    found, output = outcomes(suite, "-k", "not computes")
    assert found == {"first": "passed", "light": "passed", "popen": "failed", "fork": "failed", "marked": "passed"}
    assert "starts a process (subprocess.Popen ('true',)): mark it @pytest.mark.heavy" in output


FAST = {"first": "passed", "light": "passed", "popen": "failed", "fork": "failed", "computes": "passed error"}


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "loadfile")], ids=["alone", "workers"])
def test_fast_leaves_out_what_is_marked_and_fails_what_computes_long(suite, workers):
    found, output = outcomes(suite, "--fast", *workers)
    assert found == FAST
    assert "a light test may 0.3 s: make it shorter, or mark it @pytest.mark.heavy" in output


def test_a_part_of_the_tests_may_import_what_it_needs(suite):
    found, _ = outcomes(suite, "--fast", "tests/test_some.py::test_computes")
    assert found == {"computes": "passed"}


def test_workers_begin_with_the_files_that_start_processes(suite):
    one = ("-n", "1", "--dist", "loadfile", "--no-loadscope-reorder")
    found, output = outcomes(suite, "-k", "not computes", *one)
    assert list(found) == ["light", "popen", "fork", "marked", "first"]
    assert "starts a process" in output
