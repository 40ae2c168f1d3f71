"""The scripts of examples/ run as they stand, and end at the first error with the code of the tool that failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.gloo

EXAMPLES = ROOT / "examples"
FAST = {"NPROC": "1", "STEPS": "10", "VENV": sys.prefix}


def example(name: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A script of examples/ with its output."""
    command = ["bash", str(EXAMPLES / f"{name}.sh"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **FAST, **env})


def losses(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"^step \d+/\d+ +loss ([\d.]+)", output, re.MULTILINE)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run folder and output of examples/pretrain.sh."""
    run_dir = tmp_path_factory.mktemp("examples") / "pretrain"
    done = example("pretrain", run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir, done.stdout


def test_pretrain_learns_and_saves(pretrained):
    run_dir, output = pretrained
    assert losses(output)[-1] < losses(output)[0]
    assert output.splitlines()[-1] == f"weights: {run_dir}/checkpoints/iter_0000010"


def test_finetune_goes_on_from_it_and_answers(pretrained, tmp_path):
    done = example("finetune", tmp_path, pretrained[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(done.stdout)[-1] < losses(done.stdout)[0]
    assert "iter_0000010; step 0, fresh optimizer" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("<_user>What is 12 times 12?<_bot>")


@pytest.mark.slow
def test_one_run_trains_at_three_lengths_and_exports_each(pretrained, tmp_path):
    done = example("lengths", tmp_path, pretrained[0] / "data", STEPS="14")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "telechat2-tiny: a run in 3 stages" in done.stdout and "2  from 4,096 tokens" in done.stdout
    assert "seq_length 64 -> 128" in done.stdout and "seq_length 128 -> 256" in done.stdout
    exported = re.findall(r'"(rope_theta|seq_length)": ([\d.]+)', done.stdout)
    assert [float(value) for name, value in exported if name == "rope_theta"] == [1e4, 1e5, 1e6]
    assert [int(value) for name, value in exported if name == "seq_length"] == [64, 128, 256]


def test_convert_proves_the_round_trip(tmp_path):
    done = example("convert", tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("PASS"), done.stdout + done.stderr


def test_plan_is_taken_by_the_dry_run(tmp_path):
    plan = tmp_path / "new folder" / "plan.json"
    done = example("plan", plan)
    assert done.returncode == 0 and plan.exists(), done.stdout + done.stderr
    assert "proof: optimal" in done.stdout and "dry run: nothing was started" in done.stdout


def test_a_script_ends_where_a_tool_fails(tmp_path):
    done = example("pretrain", tmp_path / "a", TEXT=str(tmp_path / "missing.jsonl"))
    assert done.returncode == 3 and "data error" in done.stderr and "step 1" not in done.stdout, done.stderr
    done = example("finetune", tmp_path / "b", tmp_path / "a")
    assert done.returncode == 2 and "run first: bash examples/pretrain.sh" in done.stderr


def test_the_readme_names_every_script():
    named = re.findall(r"`bash examples/(\w+)\.sh`", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(path.stem for path in EXAMPLES.glob("*.sh"))
