"""Distributed cases of data/: rank 0 builds the index, the others read it, wait for it, or fail with it. Two ranks."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_telechat.data import build_datasets, datasets, sources
from megatron_telechat.data.chat import files as chat_files
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.errors import StopAtStart, UserError
from megatron_telechat.parallel import rank_zero
from tests.data.chat_material import chat_run, letters_tokenizer, numbered, write_lines
from tests.data.material import Rank, make_run, write_dataset
from tests.harness import Cases

cases = Cases()


def folder(name: str) -> Path:
    """A folder that both ranks share, with one dataset of this name in it; rank 0 makes it."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    path = Path(os.environ["SHARED_FOLDER"]) / name
    if dist.get_rank() == 0:
        path.mkdir()
        write_dataset(path / "en", 200)
        write_dataset(path / "zh", 60, 1)
    dist.barrier()
    return path


def outcome(run) -> str:
    try:
        build_datasets(run, Rank(rank=dist.get_rank()))
    except UserError as error:
        return f"{type(error).__name__}: {error.problems[0].what}"
    return "built"


@cases.case
def same_samples():
    path = folder("same")
    run = make_run(path, data_path=("0.6", str(path / "en"), "0.4", str(path / "zh")), eval_interval=5, split="80,20")
    made = build_datasets(run, Rank(rank=dist.get_rank()))
    again = build_datasets(run, Rank(rank=dist.get_rank()))
    digest = hashlib.sha256()
    for data in (made.train, made.valid, again.train):
        for i in range(len(data)):
            digest.update(data[i]["tokens"].numpy().tobytes())
    return {"digest": digest.hexdigest(), "indices": len(list((path / "cache").iterdir()))}


@cases.case
def failure_while_building():
    path = folder("fails")
    if dist.get_rank() == 0:
        content = bytearray((path / "en.idx").read_bytes())
        content[34 + 4 * 200 + 8 * 50] ^= 0xFF  # an offset in the middle: only the full check of rank 0 sees it
        (path / "en.idx").write_bytes(content)
    dist.barrier()
    return outcome(make_run(path, data_path=(str(path / "en"),)))


@cases.case
def failure_before_building():
    path = folder("missing")
    name = "nowhere" if dist.get_rank() == 0 else "en"
    return outcome(make_run(path, data_path=(str(path / name),)))


@cases.case
def cache_is_a_file():
    path = folder("file")
    if dist.get_rank() == 0:
        (path / "occupied").write_text("")
    dist.barrier()
    run = make_run(path, data_path=(str(path / "en"),))
    return outcome(replace(run, data=replace(run.data, data_cache_path=str(path / "occupied"))))


@cases.case
def other_files():
    path = folder("other")
    return outcome(make_run(path, data_path=(str(path / ("en" if dist.get_rank() == 0 else "zh")),)))


@cases.case
def cache_not_shared():
    path = folder("unshared")
    run = make_run(path, data_path=(str(path / "en"),))
    return outcome(replace(run, data=replace(run.data, data_cache_path=str(path / f"cache{dist.get_rank()}"))))


@cases.case
def time_limit():
    path = folder("slow")
    run = make_run(path, data_path=(str(path / "en"),), data_index_timeout_minutes=0.02)
    verify = IndexedDataset.verify

    def slow(self):
        time.sleep(4)
        verify(self)

    IndexedDataset.verify = slow
    try:
        return outcome(run)
    finally:
        IndexedDataset.verify = verify


def dialogs(name: str, good: bool = True):
    """A run on a file of dialogs."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    path = Path(os.environ["SHARED_FOLDER"]) / name
    if dist.get_rank() == 0:
        path.mkdir()
        letters_tokenizer(path / "tokenizer")
        write_lines(path / "d.jsonl", numbered(30) if good else [{"text": "x"}])
    dist.barrier()
    return chat_run(path, str(path / "d.jsonl"), tokenizer=str(path / "tokenizer" / "tokenizer.json"), iters=5)


@cases.case
def dialogs_are_encoded_by_one_rank():
    run = dialogs("chat")
    read = []
    digest_of_file = chat_files.file_digest

    def counted(path):
        read.append(path)
        return digest_of_file(path)

    chat_files.file_digest = counted
    try:
        made = build_datasets(run, Rank(rank=dist.get_rank()))
    finally:
        chat_files.file_digest = digest_of_file
    digest = hashlib.sha256()
    for i in range(len(made.train)):
        digest.update(made.train[i]["tokens"].numpy().tobytes())
    return {
        "digest": digest.hexdigest(),
        "read": any(path.endswith("d.jsonl") for path in read),
        "summary": made.summary,
    }


@cases.case
def waiting():
    """What the two ranks say while rank 0 is busy."""
    run = dialogs("waiting")
    said = io.StringIO()
    patience, rank_zero._WAIT_MESSAGE_S = rank_zero._WAIT_MESSAGE_S, 0.3
    prepare = sources.build_index

    def slow(*args):
        time.sleep(1.5)
        return prepare(*args)

    datasets.build_index = slow
    try:
        with contextlib.redirect_stdout(said):
            build_datasets(run, Rank(rank=dist.get_rank()))
    finally:
        rank_zero._WAIT_MESSAGE_S = patience
        datasets.build_index = prepare
    return said.getvalue()


@cases.case
def stopped():
    """Rank 0 is asked to stop while it builds: the one that waits hears of it, long before its time is up."""
    run = dialogs("stopped")
    prepare = sources.build_index

    def asked(*args):
        raise StopAtStart

    datasets.build_index = asked
    begin = time.monotonic()
    try:
        build_datasets(run, Rank(rank=dist.get_rank()))
    except StopAtStart:
        return time.monotonic() - begin
    finally:
        datasets.build_index = prepare


@cases.case
def bad_dialogs():
    return outcome(dialogs("bad-chat", good=False))


if __name__ == "__main__":
    cases.main()
