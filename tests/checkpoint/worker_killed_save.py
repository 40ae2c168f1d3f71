"""Saves that are killed (SIGKILL) before each call that touches the disk; prints what each left, as JSON lines.

usage: worker_killed_save.py FOLDER SCENARIO    (SCENARIO: new, replace, branch)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_telechat.checkpoint import CheckpointReader, CheckpointWriter, latest_checkpoint
from megatron_telechat.checkpoint.folders import committed_folders
from megatron_telechat.checkpoint.lineage import Branch, look_at
from megatron_telechat.checkpoint.retention import prune

CALLS = ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"))


def save(root: Path, step: int, value: float, branch: Branch | None = None) -> None:
    with CheckpointWriter(root, step=step, config="", max_file_bytes=64, branch=branch) as writer:
        for number in range(3):
            writer.add(f"model/{number}", (4, 4), (0, 0), torch.full((4, 4), value))


def count_calls(stop_before: int) -> list[int]:
    """Wrap every call that touches the disk; die before call number ``stop_before`` (-1: never)."""
    made = [0]

    def wrap(original):
        def call(*args, **kwargs):
            if made[0] == stop_before:
                os.kill(os.getpid(), signal.SIGKILL)
            made[0] += 1
            return original(*args, **kwargs)

        return call

    for module, name in CALLS:
        setattr(module, name, wrap(getattr(module, name)))
    return made


def attempt(work: Callable[[], None], stop_before: int) -> bool:
    """In a child: whether the save lived."""
    child = os.fork()
    if child == 0:
        try:
            made = count_calls(stop_before)
            work()
            os._exit(0 if stop_before < 0 or made[0] <= stop_before else 3)
        except BaseException:
            os._exit(4)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, status
    return True


def values(folder: Path) -> list[float]:
    reader = CheckpointReader(folder, verify=True)
    return sorted({float(v) for key in reader.entries for v in reader.read(key).unique()})


def trunk(root: Path) -> None:
    """Steps 10, 20, 30, 40 of one line; each holds its step as value."""
    branch = Branch.opening(root)
    for step in (10, 20, 30, 40):
        save(root, step, float(step), branch)


def first_save_of_a_branch(root: Path, step: int) -> None:
    """Rolled back to step 10, the run saves ``step``, and keeps its newest checkpoint only."""
    begin = look_at(root / "iter_0000010")
    save(root, step, 2.0, Branch.opening(root, (10, begin.digest)))
    prune(root, 1, protected=begin.path)


def branches(folder: Path) -> None:
    """Killed at each call of the branch's first save, at a step of the trunk and at one between."""
    for step in (20, 25):
        for number in range(200):
            root = folder / f"branch_{step}_{number}"
            trunk(root)
            lived = attempt(lambda: first_save_of_a_branch(root, step), number)
            newest = latest_checkpoint(root)
            line = {
                "killed_before": None if lived else number,
                "step": step,
                "newest": values(newest),
                "trunk": kept_of_trunk(root),
            }
            on = look_at(newest)
            save(root, 60, 3.0, Branch.opening(root, (on.step, on.digest)))
            prune(root, 1, protected=newest)
            line |= {"then": values(latest_checkpoint(root)), "live": [found for found, _ in committed_folders(root)]}
            line["trunk_then"] = kept_of_trunk(root)
            print(json.dumps(line), flush=True)
            if lived:
                break


def kept_of_trunk(root: Path) -> list[float]:
    """Values of the trunk's checkpoints that are whole, under whatever name."""
    folders = [path for path in root.iterdir() if path.is_dir() and ".tmp-" not in path.name]
    return sorted(value for path in folders for value in values(path) if value >= 10)


def main() -> None:
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    if scenario == "branch":
        branches(folder)
        return
    step = 20 if scenario == "new" else 10
    for number in range(100):
        root = folder / f"{scenario}_{number}"
        save(root, 10, 1.0)
        lived = attempt(lambda: save(root, step, 2.0), number)
        newest = latest_checkpoint(root)
        line = {
            "killed_before": None if lived else number,
            "committed": [found for found, _ in committed_folders(root)],
            "newest": values(newest),
            "leftovers": len([path for path in root.iterdir() if ".tmp-" in path.name]),
        }
        save(root, 30, 3.0)
        line["after_the_next_save"] = sorted(path.name for path in root.iterdir())
        print(json.dumps(line), flush=True)
        if lived:
            return


if __name__ == "__main__":
    main()
