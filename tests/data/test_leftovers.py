"""What killed builds leave in the cache of indices is removed; what is in progress is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_telechat import host
from megatron_telechat.data import build_datasets
from megatron_telechat.data.pieces import LEFT_AFTER_S, IndexFolder, partial_name, remove_leftovers
from megatron_telechat.host import has_ended, process_mark
from tests.data.material import Rank, make_run, write_dataset
from tests.harness import ROOT

BUILDER = """
import sys, time
from pathlib import Path
from megatron_telechat.data.pieces import IndexFolder

def build(partial):
    (partial / "order.npy").write_bytes(b"half")
    print("building", flush=True)
    time.sleep(60)

IndexFolder(Path(sys.argv[1]), builds=True).piece("train-blend", build)
"""


def builder(index: Path) -> subprocess.Popen:
    """A process in the middle of a piece."""
    command = [sys.executable, "-c", BUILDER, str(index)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    return process


@pytest.mark.heavy
def test_a_start_removes_what_a_killed_build_left_and_nothing_in_progress(tmp_path):
    run = make_run(tmp_path, data_path=(write_dataset(tmp_path / "en", 60),))
    cache = run.cache_dir
    killed, living = builder(cache / "index-a"), builder(cache / "index-b")
    try:
        killed.kill()
        killed.wait()
        assert len(list(cache.glob("*/*.partial-*"))) == 2
        build_datasets(run, Rank())
        assert [path.parent.name for path in cache.glob("*/*.partial-*")] == ["index-b"], "its process is at it"
        assert (next((cache / "index-b").iterdir()) / "order.npy").read_bytes() == b"half"
    finally:
        living.kill()
        living.wait()
    assert [path.parent.name for path in remove_leftovers(cache)] == ["index-b"]
    assert list(cache.glob("**/.clock-*")) == []


def aged(path: Path, seconds: float, content: str = "content") -> Path:
    path.mkdir(parents=True)
    (path / content).write_text("x")
    for each in (path / content, path):
        os.utime(each, (time.time() - seconds,) * 2)
    return path


def test_where_the_process_cannot_be_looked_for_age_decides(tmp_path):
    """Another host that shares the cache, an earlier boot, an older release; the youngest thing in it counts."""
    elsewhere, before = "0123456789ab-1-5-89abcdef", "4711-89abcdef"
    old = [
        aged(tmp_path / "index" / f"order.partial-{elsewhere}", LEFT_AFTER_S + 60),
        aged(tmp_path / "index" / f"order.partial-{before}", LEFT_AFTER_S + 60),
        aged(tmp_path / f"chat-0123456789abcdef0123.partial-{before[:4]}", LEFT_AFTER_S + 60),
    ]
    young = aged(tmp_path / "index" / f"other.partial-{elsewhere}", LEFT_AFTER_S - 60)
    growing = aged(tmp_path / "index" / f"third.partial-{elsewhere}", LEFT_AFTER_S + 60)
    (growing / "more").write_text("just now")
    os.utime(growing, (0, 0))
    kept = [
        aged(tmp_path / "index" / "order", LEFT_AFTER_S + 60),
        aged(tmp_path / "en.bin.partial-4711", LEFT_AFTER_S + 60),  # not of a cache: what a preparation of data left
        aged(tmp_path / "index" / "deep" / f"order.partial-{elsewhere}", LEFT_AFTER_S + 60),
    ]
    mine = tmp_path / "index" / partial_name("order")
    aged(mine, LEFT_AFTER_S * 100)
    outside = aged(tmp_path.parent / f"{tmp_path.name}-outside", LEFT_AFTER_S + 60)
    link = tmp_path / "index" / f"link.partial-{elsewhere}"
    link.symlink_to(outside)
    assert sorted(remove_leftovers(tmp_path)) == sorted(old)
    assert all(path.exists() for path in (young, growing, mine, link, outside, *kept))
    os.utime(link, (0, 0), follow_symlinks=False)
    assert remove_leftovers(tmp_path) == [link] and (outside / "content").exists()


def test_a_mark_says_whose_it_is(monkeypatch):
    mark = process_mark()
    space, pid, start = mark.split("-")
    assert has_ended(mark) is False
    assert has_ended(f"{space}-{pid}-{int(start) + 1}") is True, "a later process got its number"
    assert has_ended(f"{'f' * 12}-{pid}-{start}") is None and has_ended("what") is None

    def hidden(*_):
        raise PermissionError

    def gone(*_):
        raise ProcessLookupError

    monkeypatch.setattr(host, "_seen", lambda pid: ("Z", int(start)))
    assert has_ended(mark) is True, "only its parent has not asked about it yet"
    monkeypatch.setattr(host, "_seen", lambda pid: None)
    assert has_ended(mark) is None, "a process of this user, which /proc does not show"
    monkeypatch.setattr(os, "kill", hidden)
    assert has_ended(mark) is None, "a process of another user, which /proc does not show"
    monkeypatch.setattr(os, "kill", gone)
    assert has_ended(mark) is True
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename="another"))
    assert process_mark()[:12] != space, "a copy of a virtual machine"


def test_an_index_is_built_and_leaves_nothing(tmp_path):
    index = IndexFolder(tmp_path / "index", builds=True)
    index.piece("order", lambda partial: (partial / "a").write_text("x") and None)
    with pytest.raises(ValueError):
        index.piece("other", lambda partial: int("x") and None)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["order"]
