"""Saves that are killed (SIGKILL) before each call that touches the disk; prints what each left, as JSON lines.

usage: worker_killed_save.py FOLDER SCENARIO    (SCENARIO: new, replace)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from megatron_telechat.checkpoint import CheckpointReader, CheckpointWriter, latest_checkpoint
from megatron_telechat.checkpoint.names import committed_folders

CALLS = ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"))


def save(root: Path, step: int, value: float) -> None:
    with CheckpointWriter(root, step=step, config="", max_file_bytes=64) as writer:
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


def attempt(root: Path, step: int, stop_before: int) -> bool:
    """In a child: whether the save lived."""
    child = os.fork()
    if child == 0:
        try:
            made = count_calls(stop_before)
            save(root, step, 2.0)
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


def main() -> None:
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    step = 20 if scenario == "new" else 10
    for number in range(100):
        root = folder / f"{scenario}_{number}"
        save(root, 10, 1.0)
        lived = attempt(root, step, number)
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
