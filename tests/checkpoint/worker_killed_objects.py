"""Saves into an object store that are killed (SIGKILL) before each request that changes it; prints what each left.

usage: worker_killed_objects.py URL SCENARIO    (SCENARIO: new, branch)
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from megatron_telechat.checkpoint import CheckpointReader, CheckpointWriter, latest_checkpoint
from megatron_telechat.checkpoint.folders import folders_aside
from megatron_telechat.checkpoint.lineage import Branch, look_at, saved_in
from megatron_telechat.checkpoint.names import MANIFEST
from megatron_telechat.checkpoint.retention import prune
from megatron_telechat.checkpoint.stores import ObjectStore, store_of
from megatron_telechat.locations import Url, location


def save(root: Url, step: int, value: float, branch: Branch) -> None:
    with CheckpointWriter(root, step=step, config="", max_file_bytes=64, branch=branch) as writer:
        for number in range(2):
            writer.add(f"model/{number}", (4, 4), (0, 0), torch.full((4, 4), value))


def requests(root: Url, stop_before: int) -> list[str]:
    """Note every request that changes the store; die before number ``stop_before`` (-1: never)."""
    store, made = store_of(root), []
    assert isinstance(store, ObjectStore)
    fs = store._fs

    def wrap(name: str):
        original = getattr(fs, name)

        def call(url, *args, **options):
            if len(made) == stop_before:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(f"{name} {url}")
            return original(url, *args, **options)

        return call

    def one_by_one(url, recursive=False):
        for name in fs.find(url):
            fs.rm_file(name)

    # A deletion of many objects may be cut off in its middle.
    fs.pipe_file, fs.open, fs.rm_file = wrap("pipe_file"), wrap("open"), wrap("rm_file")
    fs.rm = one_by_one
    return made


def first_save(root: Url, scenario: str) -> None:
    """What is killed: the next save of a line, or the first one after a roll-back, with --keep-last 1."""
    saved = saved_in(root)
    begin = saved[0] if scenario == "branch" else saved[-1]
    save(root, 20 if scenario == "branch" else 40, 2.0, Branch.opening(root, (begin.step, begin.digest)))
    prune(root, 1)


def attempt(root: Url, scenario: str, stop_before: int) -> tuple[bool, list[str]]:
    """In a child: whether it lived, and its requests if it did."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            made = requests(root, stop_before)
            first_save(root, scenario)
            os.write(writing, json.dumps(made).encode())
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(4)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False, []
    assert os.WEXITSTATUS(status) == 0, status
    return True, json.loads(text)


def values(folder) -> list[float]:
    reader = CheckpointReader(folder, verify=True)
    return sorted({float(v) for key in reader.entries for v in reader.read(key).unique()})


def trunk(root: Url, scenario: str) -> None:
    branch = Branch.opening(root)
    for step in (10, 20, 30) if scenario == "branch" else (10,):
        save(root, step, float(step), branch)


def copy(source: Url, target: Url) -> None:
    store = store_of(source)
    assert isinstance(store, ObjectStore)
    for name in store.files(source):
        store._fs.copy(str(source / name), str(target / name))


def rubbish(root: Url) -> list[str]:
    """Files of no checkpoint."""
    store = store_of(root)
    folders = [saved.path for saved in saved_in(root)] + folders_aside(root)
    known = {f"{path.name}/{name}" for path in folders for name in [MANIFEST, *CheckpointReader(path).manifest.files]}
    known |= {"latest", *(f"{path.name}.aside" for path in folders)}
    return [name for name in store.files(root) if name not in known]


def main() -> None:
    base, scenario = location(sys.argv[1]), sys.argv[2]
    assert isinstance(base, Url)
    trunk(base / "trunk", scenario)
    copy(base / "trunk", base / "whole")
    lived, made = attempt(base / "whole", scenario, -1)
    assert lived
    manifest_is = next(number for number, call in enumerate(made) if call.endswith(MANIFEST))
    for number in range(len(made) + 1):
        root = base / str(number)
        copy(base / "trunk", root)
        lived, _ = attempt(root, scenario, number)
        assert lived == (number == len(made))
        newest = latest_checkpoint(root)
        assert newest is not None
        old = values(newest)
        line = {"killed_before": None if lived else number, "manifest_is": manifest_is}
        if scenario == "branch" and number <= manifest_is and not lived:
            # Nothing was committed: the trunk is what there was, and the same command begins at its first again.
            assert old == [30.0]
            newest = saved_in(root)[0].path
            old = values(newest)
        line["newest"] = old
        on = look_at(newest)
        save(root, 60 if scenario == "new" else 25, 3.0, Branch.opening(root, (on.step, on.digest)))
        prune(root, 1)
        then = latest_checkpoint(root)
        assert then is not None
        line |= {"then": values(then), "rubbish": rubbish(root)}
        line["trunk"] = sorted(value for path in folders_aside(root) for value in values(path) if value > 15)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
