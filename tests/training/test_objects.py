"""Training with its checkpoints in an S3-compatible object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_telechat.checkpoint.lineage import saved_in
from megatron_telechat.checkpoint.opening import open_verified
from megatron_telechat.locations import location
from tests.checkpoint.object_server import BUCKET, object_server
from tests.harness import ROOT, launch, run_cases
from tests.training.runs import DENSE

WORKER = Path(__file__).with_name("worker_objects.py")
CASES = ("the_same_as_on_a_file_system", "go_on_from_the_middle")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("objects")
    with object_server() as server:
        yield {**server, "OBJECTS_DIR": str(folder), "OBJECTS_URL": f"s3://{BUCKET}/training"}


@pytest.fixture(scope="module")
def report(environment):
    return run_cases(WORKER, 2, CASES, env=environment)


@pytest.fixture(scope="module")
def whole(environment) -> dict[int, tuple]:
    """Losses of the run that nobody kills."""
    launch(WORKER, 2, "--killed", "whole", "sync", "-1", "1", env=environment).ok()
    return losses(Path(environment["OBJECTS_DIR"], "whole"))


@pytest.mark.gloo
def test_what_is_saved_is_bitwise_that_of_a_file_system(report):
    """Both modes, with --keep-last 2."""
    for rank in report.check("the_same_as_on_a_file_system"):
        assert rank["steps"] == [4, 6] and rank["different"] == [] and rank["losses"] == [True, True]


@pytest.mark.gloo
def test_a_run_goes_on_from_a_store_bitwise(report):
    for rank in report.check("go_on_from_the_middle"):
        assert rank["bitwise"] == [True, True] and rank["tensor"] == ["5", "6"]


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_killed_run_goes_on_bitwise(environment, whole, mode):
    run = f"killed_{mode}"
    command = (WORKER, 2, "--killed", run, mode)
    killed = launch(*command, "3", "1", env=environment, grace=2.0)
    assert killed.returncode != 0
    root = location(f"{environment['OBJECTS_URL']}/{run}")
    there = [saved.step for saved in saved_in(root)]
    assert there in ([2], []), "an asynchronous save may not have been committed yet"
    assert not there or open_verified(root)[0].manifest.step == 2
    launch(*command, "-1", "1", env=environment).ok()
    assert [saved.step for saved in saved_in(root)] == [4, 6]
    assert losses(Path(environment["OBJECTS_DIR"], run)) == whole


def losses(run: Path) -> dict[int, tuple]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {one["step"]: (one["loss"], one["grad_norm"]) for one in records if "loss" in one}


def command(environment: dict[str, str], *flags: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """A training of one rank, or its dry run, as a person starts it."""
    line = [sys.executable, "pretrain/pretrain_telechat2.py", *DENSE, "--train-iters", "2", *flags]
    variables = {**os.environ, **environment, **changed, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": "1"}
    return subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.heavy
def test_the_dry_run_says_where_a_run_goes_on_and_what_is_wrong(environment, tmp_path):
    run = ("--run-dir", str(tmp_path / "run"), "--world-size", "1", "--dry-run")
    done = command(environment, *run, "--save", f"s3://{BUCKET}/new")
    assert done.returncode == 0 and f"s3://{BUCKET}/new/  a checkpoint of" in done.stdout, done.stderr
    for url, code, words in (
        (f"s3://{BUCKET}-none/new", 6, "there is no bucket"),
        ("gs://bucket/new", 2, "pip install gcsfs"),
        ("s3://", 2, "names no bucket"),
        ("memory://new", 2, "memory of one process"),
    ):
        done = command(environment, *run, "--save", url)
        assert (done.returncode, words in done.stderr) == (code, True), (url, done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.heavy
@pytest.mark.slow
def test_a_second_run_folder_is_refused(environment, tmp_path):
    save = ("--save", f"s3://{BUCKET}/owned")
    first, second = (("--run-dir", str(tmp_path / name)) for name in ("first", "second"))
    done = command(environment, *first, *save)
    assert done.returncode == 0, done.stderr
    done = command(environment, *second, *save)
    assert done.returncode == 4 and f"belongs to the run folder {tmp_path}/first" in done.stderr, done.stderr
