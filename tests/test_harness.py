"""The harness itself: nothing is left behind, and a failed case is told apart from the others."""

from __future__ import annotations

import os
import time

import pytest

from tests.harness import TIMEOUT_CODE, launch, run_cases

HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
print(os.environ["RANK"], child.pid, flush=True)
time.sleep(600)
"""

CASES = """
import os
from tests.harness import Cases
cases = Cases()

@cases.case
def before():
    return int(os.environ["RANK"])

@cases.case
def fails_on_one():
    if os.environ["RANK"] == "1":
        raise ValueError("only here")

@cases.case
def after():
    return "still running"

if __name__ == "__main__":
    cases.main()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.gloo
def test_timeout_kills_the_ranks_and_their_children(tmp_path):
    worker = tmp_path / "hangs.py"
    worker.write_text(HANGS)
    result = launch(worker, 2, timeout=5)
    assert result.returncode == TIMEOUT_CODE
    children = [int(line.split()[1]) for line in result.stdout.splitlines()]
    assert len(children) == 2
    deadline = time.monotonic() + 5
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(child) for child in children)


@pytest.mark.gloo
def test_the_first_failing_rank_gives_the_code_and_the_tail(tmp_path):
    worker = tmp_path / "fails.py"
    worker.write_text("import os, sys\nprint('said by', os.environ['RANK'])\nsys.exit(int(os.environ['RANK']) * 7)\n")
    result = launch(worker, 2, timeout=30)
    assert result.returncode == 7 and result.stdout == "said by 0\nsaid by 1\n"
    with pytest.raises(AssertionError, match=r"rank 1 \(exit 7\)"):
        result.ok()


@pytest.mark.gloo
def test_a_failed_case_does_not_stop_the_next(tmp_path):
    worker = tmp_path / "cases.py"
    worker.write_text(CASES)
    report = run_cases(worker, 2)
    assert report.check("before") == [0, 1]
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*only here") as caught:
        report.check("fails_on_one")
    assert "rank 0" not in str(caught.value)
    assert report.check("after") == ["still running"] * 2
    with pytest.raises(AssertionError, match="did not end on ranks"):
        report.check("never_written")
