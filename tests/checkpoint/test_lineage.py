"""Which checkpoint is the newest: the head of a lineage. Roll-backs, retention, beginnings that a command names, and
kills between."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_telechat.checkpoint import CheckpointReader, CheckpointWriter, latest_checkpoint
from megatron_telechat.checkpoint.find import find_checkpoint
from megatron_telechat.checkpoint.folders import committed_folders, folders_aside
from megatron_telechat.checkpoint.lineage import Began, Branch, look_at, saved_in
from megatron_telechat.checkpoint.opening import open_verified
from megatron_telechat.checkpoint.retention import prune
from megatron_telechat.checkpoint.start import find_start
from megatron_telechat.config.schema import CheckpointConfig, RunConfig
from megatron_telechat.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def save(root: Path, step: int, branch: Branch | None = None, value: float = 0.0) -> Path:
    with CheckpointWriter(root, step=step, config="", branch=branch) as writer:
        writer.add("model/a", (4,), (0,), torch.full((4,), value))
    assert writer.path is not None
    return writer.path


def line(root: Path, *steps: int, branch: Branch | None = None) -> Branch:
    branch = branch or Branch.opening(root)
    for step in steps:
        save(root, step, branch)
    return branch


def on(root: Path, step: int, folder: Path | None = None) -> Branch:
    """A branch that begins at a step of this folder, or of another one, as a command with --load-step or --load opens
    it."""
    parent = look_at((folder or root) / f"iter_{step:07d}")
    began = Began(str((folder or root).resolve()), step, parent.digest)
    return Branch.opening(root, (step, parent.digest), (began,))


def steps(root: Path) -> list[int]:
    return [saved.step for saved in saved_in(root)]


def begin(save_: Path, load: Path | None = None, step: int | None = None):
    settings = CheckpointConfig(save=str(save_), load=str(load or save_), load_step=step)
    return find_start(replace(RunConfig(), checkpoint=settings))


@pytest.mark.parametrize("again", [20, 15, 35])
def test_a_roll_back_sets_the_trunk_aside_and_its_branch_is_the_newest(tmp_path, again):
    line(tmp_path, 10, 20, 30)
    line(tmp_path, again, branch=on(tmp_path, 10))
    assert steps(tmp_path) == [10, again] and latest_checkpoint(tmp_path) == tmp_path / f"iter_{again:07d}"
    assert (tmp_path / "latest").read_text() == f"iter_{again:07d}\n"
    aside = folders_aside(tmp_path)
    assert [path.name.split(".")[0] for path in aside] == ["iter_0000020", "iter_0000030"]
    assert all(CheckpointReader(path, verify=True) for path in aside)
    assert prune(tmp_path, 1, protected=tmp_path / "iter_0000010") == [] and folders_aside(tmp_path) == aside
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of step 30.*set aside by a roll-back: iter_0000020.*iter_0000030.aside-"
    ):
        find_checkpoint(tmp_path, 30)


@pytest.mark.heavy
def test_the_first_save_of_a_branch_killed_anywhere(tmp_path):
    """Before the commit the trunk is whole and newest, behind it the branch is; of the trunk nothing is ever
    deleted."""
    worker = Path(__file__).with_name("worker_killed_save.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), "branch"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    assert sum(one["killed_before"] is None for one in lines) == 2 and len(lines) > 20
    for step in (20, 25):
        newest = [one["newest"] for one in lines if one["step"] == step]
        commit = newest.index([2.0])
        assert newest == [[40.0]] * commit + [[2.0]] * (len(newest) - commit) and 0 < commit < len(newest) - 1
    for one in lines:
        branch = one["newest"] == [2.0]
        assert one["trunk"] == [10.0, 20.0, 30.0, 40.0], one
        assert one["then"] == [3.0] and one["live"][-1] == 60, one
        if branch:
            assert one["trunk_then"][-3:] == [20.0, 30.0, 40.0], one


@pytest.mark.heavy
def test_whatever_is_saved_from_wherever_the_last_save_is_the_newest_and_no_trunk_is_lost(tmp_path):
    """Random saves, roll-backs and restarts against a plain model of them."""
    for seed in range(12):
        random_, root = random.Random(seed), tmp_path / str(seed)
        path, values, number = [], set(), 0.0
        branch = Branch.opening(root)
        for _ in range(25):
            act = random_.random()
            if act < 0.2 and path:
                step = random_.choice([one for one, _ in path])
                path = [one for one in path if one[0] <= step]
                branch = on(root, step)
            elif act < 0.4 and path:
                branch = Branch.opening(root, (path[-1][0], look_at(root / f"iter_{path[-1][0]:07d}").digest))
            number += 1
            step = (path[-1][0] if path else 0) + random_.randint(1, 3)
            save(root, step, branch, number)
            path.append((step, number))
            values.add(number)
            newest = latest_checkpoint(root)
            assert newest == root / f"iter_{step:07d}" and float(CheckpointReader(newest).read("model/a")[0]) == number
            assert steps(root) == [one for one, _ in path]
        everything = [*(folder for _, folder in committed_folders(root)), *folders_aside(root)]
        assert {float(CheckpointReader(folder).read("model/a")[0]) for folder in everything} == values


def test_retention_follows_the_lineage(tmp_path):
    trunk = line(tmp_path, 100, 200, 300)
    assert [path.name for path in prune(tmp_path, 2)] == ["iter_0000100"]
    branch = on(tmp_path, 200)
    for step in (210, 220, 230):
        path = save(tmp_path, step, branch)
        prune(tmp_path, 1, protected=tmp_path / "iter_0000200")
        assert path.is_dir() and (tmp_path / "latest").read_text().strip() == path.name
    assert steps(tmp_path) == [200, 230] and len(folders_aside(tmp_path)) == 1
    assert trunk.next().number == 4 and look_at(tmp_path / "iter_0000230").lineage.number == 6


def test_checkpoints_of_older_releases_stay_readable_and_are_rolled_back_like_others(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)  # no lineage in the manifest
        file = tmp_path / f"iter_{step:07d}" / "manifest.json"
        body = json.loads(file.read_text())
        assert body.pop("lineage") is None
        from megatron_telechat.checkpoint.manifest import _digest

        for field in ("digest", "head_digest", "save"):
            body.pop(field)
        file.write_text(json.dumps({"digest": _digest(body), **body}, indent=1))
    assert latest_checkpoint(tmp_path).name == "iter_0000030" and steps(tmp_path) == [10, 20, 30]
    assert begin(tmp_path).root == tmp_path and begin(tmp_path, step=20).opens == str(tmp_path)
    line(tmp_path, 25, branch=on(tmp_path, 20))
    assert steps(tmp_path) == [10, 20, 25] and latest_checkpoint(tmp_path).name == "iter_0000025"


def test_a_damaged_head_falls_back_along_the_lineage(tmp_path):
    line(tmp_path, 10, 20, 30)
    line(tmp_path, 40, branch=on(tmp_path, 20))
    (tmp_path / "iter_0000040" / "rank_00000.safetensors").unlink()
    assert find_checkpoint(tmp_path)[0] == tmp_path / "iter_0000020"
    (tmp_path / "iter_0000040" / "manifest.json").write_text("{")
    found, notes = find_checkpoint(tmp_path)
    assert found == tmp_path / "iter_0000020" and "iter_0000040" in notes[0]


def test_what_a_load_went_back_to_stays_and_what_it_passed_over_is_set_aside(tmp_path):
    line(tmp_path, 10, 20, 30)
    shard = tmp_path / "iter_0000030" / "rank_00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 4
    shard.write_bytes(data)
    reader, notes = open_verified(tmp_path)
    assert reader.path.name == "iter_0000020" and "content has changed" in notes[0] and str(shard) in notes[0]
    branch = on(tmp_path, 20)
    for again in (25, 35):
        line(tmp_path, again, branch=branch)
        prune(tmp_path, 1, protected=reader.path)
    assert [step for step, _ in committed_folders(tmp_path)] == [20, 35]
    assert [path.name.split(".")[0] for path in folders_aside(tmp_path)] == ["iter_0000030"]
    assert open_verified(tmp_path)[0].path.name == "iter_0000035"


def test_a_manifest_of_another_step_is_no_checkpoint(tmp_path):
    line(tmp_path, 10, 20)
    (tmp_path / "iter_0000020").rename(tmp_path / "iter_0000025")
    found, notes = find_checkpoint(tmp_path)
    assert found == tmp_path / "iter_0000010" and "manifest is of step 20" in notes[0]


def test_load_step_is_obeyed_once(tmp_path):
    line(tmp_path, 10, 20, 30)
    first = begin(tmp_path, step=10)
    assert (first.root, first.step, first.opens) == (
        tmp_path,
        10,
        str(tmp_path),
    ) and "20, 30 are set aside" in first.notes[0]
    assert begin(tmp_path, step=10) == first, "nothing was saved: the command begins there again"
    branch = on(tmp_path, 10)
    line(tmp_path, 15, 25, branch=branch)
    again = begin(tmp_path, step=10)
    assert (again.root, again.step, again.opens) == (tmp_path, None, None) and "applied" in again.notes[0]
    assert begin(tmp_path).began == again.began != ()
    other = begin(tmp_path, step=15)
    assert (other.step, other.opens) == (15, str(tmp_path))
    parent = look_at(tmp_path / "iter_0000015")
    line(
        tmp_path,
        17,
        branch=Branch.opening(tmp_path, (15, parent.digest), (*other.began, Began(other.opens, 15, parent.digest))),
    )
    assert begin(tmp_path, step=15).opens is None and begin(tmp_path, step=10).opens is not None
    with pytest.raises(CheckpointError, match="no checkpoint of step 25"):
        begin(tmp_path, step=25)


def test_load_of_another_folder_is_obeyed_once(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    line(a, 10, 20)
    assert begin(b, a).opens == str(a) and begin(b, a, 10).step == 10
    line(b, 25, branch=on(b, 20, a))
    line(a, 30)
    for load, step in ((a, None), (a, 20)):
        assert (begin(b, load, step).root, begin(b, load, step).opens) == (b, None)
    a.rename(tmp_path / "moved")
    assert begin(b, tmp_path / "moved").root == b, "its checkpoint tells a folder that was moved"
    for load, step in ((tmp_path / "moved", 10), (tmp_path / "none", None)):
        with pytest.raises(CheckpointError, match="began at step 20 of .*names another starting point"):
            begin(b, load, step)
    assert begin(b).root == b
    shutil.rmtree(tmp_path / "moved")
    assert begin(b, a).root == b, "what the run began with is needed no longer"
    line(b, 27, branch=on(b, 25))  # a roll-back in b


def test_a_folder_that_holds_another_run_is_not_joined(tmp_path):
    line(tmp_path / "a", 10)
    line(tmp_path / "scratch", 40)
    save(tmp_path / "old", 40)
    with pytest.raises(CheckpointError, match="began with initial or pretrained weights"):
        begin(tmp_path / "scratch", tmp_path / "a")
    with pytest.raises(CheckpointError, match="does not record where it began"):
        begin(tmp_path / "old", tmp_path / "a")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        begin(tmp_path / "new", tmp_path / "empty")


def test_load_of_one_checkpoint_of_the_own_folder_is_a_roll_back(tmp_path):
    line(tmp_path, 10, 20, 30)
    start = begin(tmp_path, tmp_path / "iter_0000010")
    assert (start.root, start.step, start.opens) == (tmp_path, 10, str(tmp_path))
    with pytest.raises(CheckpointError, match="is the checkpoint of step 10, not of --load-step 20"):
        begin(tmp_path, tmp_path / "iter_0000010", 20)
    line(tmp_path, 20, branch=on(tmp_path, 10))
    (aside,) = [path for path in folders_aside(tmp_path) if "0030" in path.name]
    with pytest.raises(CheckpointError, match="was set aside by a roll-back"):
        begin(tmp_path, aside)
    elsewhere = begin(tmp_path / "new", aside)
    assert (elsewhere.root, elsewhere.opens) == (aside, str(aside))


@pytest.mark.parametrize("damage", ["", "{", '{"digest": "x", "step": 30, "config": 1', "[]"])
def test_a_head_that_cannot_be_read_is_named(tmp_path, damage):
    save(tmp_path, 30, Branch.opening(tmp_path))
    (tmp_path / "iter_0000030" / "manifest.json").write_text(damage)
    with pytest.raises(CheckpointError, match="manifest"):
        look_at(tmp_path / "iter_0000030")
    with pytest.raises(CheckpointError, match="manifest"):
        begin(tmp_path / "b", tmp_path)


def test_a_head_longer_than_the_first_read_is_read(tmp_path, monkeypatch):
    from megatron_telechat.checkpoint import lineage

    save(tmp_path, 30, Branch.opening(tmp_path))
    monkeypatch.setattr(lineage, "_HEAD_BYTES", 64)
    assert look_at(tmp_path / "iter_0000030").lineage.number == 1
