"""File systems that are slow, or that show a host an old view of what another one has written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_telechat.checkpoint import CheckpointWriter, disk, latest_checkpoint
from megatron_telechat.checkpoint.stores import posix
from megatron_telechat.errors import ConfigError
from megatron_telechat.training.metrics_file import read_metrics
from tests.harness import ROOT, launch, run_cases
from tests.training.runs import DENSE

HERE = Path(__file__).parent
PRETRAIN = ROOT / "pretrain" / "pretrain_telechat2.py"


@pytest.fixture(scope="module")
def faulty_files(tmp_path_factory) -> str:
    """The file layer with faults, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("faulty") / "faulty_files.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faulty_files.c"), "-ldl"]
    subprocess.run(command, check=True)
    return str(library)


@pytest.mark.gloo
def test_a_file_that_this_host_does_not_see_yet_is_looked_for(faulty_files, tmp_path):
    environment = {
        "LD_PRELOAD": faulty_files,
        "CHECKPOINT_TEST_FOLDER": str(tmp_path),
        "FAULTY_FOLDER": str(tmp_path),
        "FAULTY_STALE_NAME": "iter_0000002/",
        "FAULTY_WRITER_RANK": "0",
        "FAULTY_STALE_S": "4",
    }
    report = run_cases(HERE / "worker_file_systems.py", 2, env=environment)
    for step, notes in report.check("not_looked_for"):
        assert step == 1 and "the file is missing" in notes, "that is what the wait is for"
    for step, notes in report.check("looked_for"):
        assert step == 2 and "passed over" not in notes


def test_the_newest_is_found_in_an_old_listing(tmp_path, monkeypatch):
    for step in (1, 2):
        with CheckpointWriter(tmp_path, step=step, config=""):
            pass
    listed = posix._listed
    monkeypatch.setattr(posix, "_listed", lambda root: [path for path in listed(root) if path.name != "iter_0000002"])
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000002"
    for text in ("iter_0000003", "../iter_0000001", "iter_0000002/../iter_0000001", "\0", "", "x" * 9999):
        (tmp_path / "latest").write_text(text)
        assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000001", text
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000001"


def test_which_file_systems_are_waited_for(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"23 22 0:40 / {tmp_path}/with\\040blank rw shared:1 - nfs4 server:/export rw\n"
        f"24 23 0:41 / {tmp_path}/with\\040blank/memory rw - tmpfs tmpfs rw\n"
    )
    monkeypatch.setattr(disk, "_MOUNTS", mounts)
    monkeypatch.delenv(disk.STALE_SECONDS, raising=False)
    assert disk.stale_seconds(tmp_path) == disk.stale_seconds(tmp_path / "with") == 0
    assert disk.stale_seconds(tmp_path / "with blank" / "run") == 30
    assert disk.stale_seconds(tmp_path / "with blank" / "memory" / "run") == 0
    monkeypatch.setenv(disk.STALE_SECONDS, "2.5")
    assert disk.stale_seconds(tmp_path) == 2.5
    for told in ("soon", "-1", "nan"):
        monkeypatch.setenv(disk.STALE_SECONDS, told)
        with pytest.raises(ConfigError, match=disk.STALE_SECONDS):
            disk.stale_seconds(tmp_path)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_slow_disk_ends_no_run_and_changes_no_number(faulty_files, tmp_path, mode):
    """A save takes several times the limit of the monitor; its bytes are a move."""
    flags = [*DENSE, "--train-iters", "6", "--save-interval", "3", "--log-interval", "1"]
    usual = launch(PRETRAIN, 2, *flags, "--run-dir", tmp_path / "usual")
    assert usual.returncode == 0, usual
    nbytes = sum(path.stat().st_size for path in (tmp_path / "usual/checkpoints/iter_0000003").glob("rank_*"))
    environment = {
        "LD_PRELOAD": faulty_files,
        "FAULTY_FOLDER": str(tmp_path / "slow" / "checkpoints"),
        "FAULTY_SLOW_BYTES_S": str(nbytes / 2 / 15),
    }
    flags += ["--checkpoint-mode", mode, "--hang-timeout-minutes", "0.1", "--distributed-timeout-minutes", "2"]
    slow = launch(PRETRAIN, 2, *flags, "--run-dir", tmp_path / "slow", env=environment, timeout=300)
    assert slow.returncode == 0, slow
    assert slow.seconds > usual.seconds + 15, "the disk was slow"
    assert not (tmp_path / "slow" / "hang.json").exists()
    keys = ("loss", "grad_norm", "consumed_samples")
    found, wanted = (
        {step: [one[key] for key in keys] for step, one in read_metrics(tmp_path / name).train.items()}
        for name in ("slow", "usual")
    )
    assert found == wanted and len(found) == 6
    last = "checkpoints/iter_0000006/manifest.json"
    saved = [json.loads((tmp_path / name / last).read_text())["tensors"] for name in ("slow", "usual")]
    assert saved[0] == saved[1]
