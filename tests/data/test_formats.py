"""A format of training data is one class and one module; the data section is read once where the plan is handed on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_telechat.config import data_formats, data_names
from megatron_telechat.config.data_formats import FORMATS, MOCK, data_format
from megatron_telechat.config.schema import DataConfig, ModelConfig
from megatron_telechat.data import blend, build_datasets, data_fingerprint, data_plan
from megatron_telechat.data.formats import corpus_factory, data_files
from megatron_telechat.errors import DataError
from tests.data import npy_format
from tests.data.chat_material import chat_run, numbered, write_lines
from tests.data.material import VOCAB, Rank, make_run, write_dataset


@pytest.fixture
def npy(monkeypatch):
    """The trial format, registered."""
    monkeypatch.setattr(data_formats, "FORMATS", (npy_format.NpyFormat(), *FORMATS))
    monkeypatch.setitem(sys.modules, "megatron_telechat.data.npy", npy_format)


def write_npy(path: Path, tokens: int, seed: int) -> str:
    np.save(path, np.random.default_rng(seed).integers(0, VOCAB, tokens).astype(np.uint16))
    return str(path)


def test_a_new_format_is_blended_indexed_and_fingerprinted_like_any_other(tmp_path, npy):
    files = [write_npy(tmp_path / name, size, size) for name, size in (("a.npy", 9000), ("b.npy", 4000))]
    run = make_run(tmp_path, data_path=("0.6", files[0], "0.4", files[1]), split="90,10", eval_interval=5)
    made = build_datasets(run, Rank())
    assert len(made.train) == 320 and len(made.valid) == 16
    assert sorted(made.train.source.drawn()) == [128, 192]
    tokens = np.load(files[0])[: 8100 + 1]
    first = made.train[0]
    begin = int(made.train.source.origin(0).rsplit(" ", 1)[1])
    assert first["tokens"].tolist() == tokens[begin : begin + 32].tolist()
    assert "9,000 tokens" not in made.summary[0] and "8,100 tokens" in made.summary[0]
    assert data_fingerprint(run)["kind"] == "npy"
    assert [file.tokens for file in data_files(data_plan(run.data))] == [9000, 4000]
    again = build_datasets(run, Rank(rank=1))
    assert all((again.train[i]["tokens"] == made.train[i]["tokens"]).all() for i in range(len(made.train)))


def test_a_new_format_is_held_to_the_checks_of_all(tmp_path, npy):
    same = [write_npy(tmp_path / name, 4000, 1) for name in ("a.npy", "b.npy")]
    with pytest.raises(DataError, match="same data"):
        build_datasets(make_run(tmp_path, data_path=("1", same[0], "1", same[1])), Rank())
    run = make_run(tmp_path, data_path=same[:1])
    with pytest.raises(DataError, match="outside the vocabulary"):
        build_datasets(replace(run, model=ModelConfig(vocab_size=100)), Rank())
    with pytest.raises(DataError, match="ends before the run"):
        other = write_npy(tmp_path / "c.npy", 3000, 3)
        build_datasets(make_run(tmp_path, data_path=(same[0], other), iters=1000), Rank())


def test_the_format_of_a_run():
    names = {data_format(DataConfig(**data)).field for data in ({}, {"sft": True}, {"dpo": True}, {"mock_data": True})}
    assert names == {"data_path", "sft", "dpo", "mock_data"}
    for format in FORMATS:
        if format is not MOCK:
            assert corpus_factory(format).kind in ("indexed", "dialogs", "pairs")


@pytest.mark.parametrize("kind", ["indexed", "chat"])
def test_data_json_is_read_once_where_the_plan_is_handed_on(tmp_path, monkeypatch, kind):
    read = []
    entries = data_names.data_json_entries
    monkeypatch.setattr(blend, "data_json_entries", lambda *args: read.append(args) or entries(*args))
    file = tmp_path / "data.json"
    if kind == "indexed":
        file.write_text(json.dumps({write_dataset(tmp_path / "en", 200): 2, write_dataset(tmp_path / "zh", 60, 1): 1}))
        run = make_run(tmp_path, data_json=str(file))
    else:
        file.write_text(json.dumps({write_lines(tmp_path / "d.jsonl", numbered(30)): 2}))
        run = chat_run(tmp_path)
        run = replace(run, data=replace(run.data, data_path=(), data_json=str(file)))
    plan = data_plan(run.data)
    saved = data_fingerprint(run, plan)
    made = build_datasets(run, Rank(), plan=plan)
    assert len(read) == 1
    assert saved == data_fingerprint(run) and made.summary == build_datasets(run, Rank()).summary
    assert len(read) == 3
