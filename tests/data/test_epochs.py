"""A length in epochs: which samples they are, of every kind of data; validation files without a usable dialog."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_telechat.config.run_stages import Position
from megatron_telechat.data import build_datasets, data_plan
from megatron_telechat.data.length import EpochLength, known_length, samples_of_epochs
from megatron_telechat.data.sources import open_sources
from megatron_telechat.errors import ConfigError, DataError
from tests.data.chat_material import chat_run, numbered, single, write_lines
from tests.data.material import Rank, make_run, with_training, write_dataset


def length_of(run, epochs: float) -> EpochLength:
    run = with_training(run, train_epochs=epochs, train_iters=0)
    plan = data_plan(run.data)
    return samples_of_epochs(run, plan, open_sources(run, plan))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("count,longest", [(7, 30), (61, 12), (150, 55)])
def test_the_rows_of_whole_epochs_hold_every_dialog_so_often_and_no_row_too_many(tmp_path, seed, count, longest):
    run = chat_run(tmp_path, write_lines(tmp_path / "d.jsonl", numbered(count, longest)), seed=seed, gbs=1)
    for epochs in (1, 2, 3):
        samples = length_of(run, epochs).samples
        source = build_datasets(with_training(run, train_iters=samples), Rank()).train.source
        rows = [Counter(source.dialogs(row)) for row in range(samples)]
        read = sum(rows, Counter())
        assert min(read[dialog] for dialog in range(count)) == epochs, "a dialog was read less often"
        assert sum(read.values()) < (epochs + 1) * count, "more than a row of the next epoch"


def test_part_of_an_epoch_is_that_part_of_its_rows(tmp_path):
    run = chat_run(tmp_path, write_lines(tmp_path / "d.jsonl", numbered(120)))
    one, two = (length_of(run, epochs).samples for epochs in (1, 2))
    assert length_of(run, 0.5).samples == -(-one // 2)
    assert length_of(run, 1.25).samples == one + -(-(two - one) // 4)
    assert length_of(run, 1e-9).samples == 1


def test_an_epoch_of_text_is_its_tokens(tmp_path):
    prefix = write_dataset(tmp_path / "a", 40)
    run = make_run(tmp_path, data_path=(prefix,), split="1")
    tokens = open_sources(run, data_plan(run.data))[prefix].tokens_in((0.0, 1.0))
    assert length_of(run, 1).samples == (tokens - 1) // 32
    assert length_of(run, 2.5).samples == (int(2.5 * tokens) - 1) // 32


def test_a_weight_of_a_data_json_says_how_often_an_epoch_reads_a_file(tmp_path):
    files = [write_lines(tmp_path / f"{name}.jsonl", numbered(count)) for name, count in (("a", 50), ("b", 30))]
    alone = [length_of(chat_run(tmp_path, file), 1).samples for file in files]
    (tmp_path / "data.json").write_text(json.dumps({files[0]: 2.0, files[1]: 0.5}))
    run = replace(run := chat_run(tmp_path), data=replace(run.data, data_json=str(tmp_path / "data.json")))
    assert length_of(run, 1).samples == int(np.ceil(2 * alone[0] + alone[1] / 2))
    shares = chat_run(tmp_path, "0.7", files[0], "0.3", files[1])
    assert length_of(shares, 1).samples == sum(alone)


def test_files_without_weights_are_read_once(tmp_path):
    files = [write_lines(tmp_path / f"{name}.jsonl", numbered(count)) for name, count in (("a", 50), ("b", 30))]
    run = chat_run(tmp_path, *files, gbs=4)
    length = length_of(run, 1)
    steps = length.steps(run, Position())
    assert length.ends and steps == length.samples // 4
    build_datasets(with_training(run, train_iters=steps), Rank())
    with pytest.raises(DataError, match="several datasets without weights are read once"):
        length_of(run, 1.5)
    with pytest.raises(DataError, match="do not fill a batch of 4,000"):
        length.steps(with_training(run, global_batch_size=4000), Position())


def test_the_last_batch_is_filled_up_and_a_resume_counts_what_was_read(tmp_path):
    run = make_run(tmp_path, gbs=8)
    length = EpochLength(50)
    assert length.steps(run, Position()) == 7
    assert length.steps(run, Position(3, 24, 24 * 32)) == 7
    assert length.steps(with_training(run, global_batch_size=4), Position(3, 24, 24 * 32)) == 3 + 7
    assert length.steps(run, Position(9, 72, 72 * 32)) == 9, "a run that is over stays so"
    with pytest.raises(ConfigError, match="samples of another length"):
        length.steps(run, Position(3, 24, 24 * 16))


def test_the_length_is_known_beforehand_where_nothing_must_be_encoded(tmp_path):
    run = chat_run(tmp_path, write_lines(tmp_path / "d.jsonl", numbered(60)))
    run = with_training(run, train_epochs=1.0, train_iters=0)
    assert known_length(run) is None and not any(tmp_path.glob("cache/*"))
    open_sources(run, data_plan(run.data))
    found = known_length(run)
    assert found is not None and found == length_of(run, 1)
    assert known_length(replace(run, data=replace(run.data, tokenizer_model=None))) is None


LONG = [single("q" * 100, "a"), single("q" * 90, "b")]


def with_valid(tmp_path: Path, *valid: str):
    train = write_lines(tmp_path / "train.jsonl", numbered(40))
    run = chat_run(tmp_path, eval_interval=2)
    return replace(run, data=replace(run.data, data_path=(), train_data_path=(train,), valid_data_path=valid))


def test_validation_without_a_usable_dialog_is_said_and_gives_none(tmp_path):
    found = build_datasets(with_valid(tmp_path, write_lines(tmp_path / "long.jsonl", LONG)), Rank())
    assert found.valid is None and len(found.train)
    [note] = [line for line in found.summary if line.startswith("valid")]
    assert "long.jsonl holds no dialog that can be used: 2 are too long" in note and "no evaluation on it" in note


def test_one_validation_file_of_two_without_a_usable_dialog_is_left_out(tmp_path):
    long = write_lines(tmp_path / "long.jsonl", LONG)
    short = write_lines(tmp_path / "short.jsonl", numbered(30, first=100))
    found = build_datasets(with_valid(tmp_path, "0.5", long, "0.5", short), Rank())
    assert found.valid is not None and "short.jsonl" in found.valid.source.origin(0)
    assert any("long.jsonl holds no dialog" in line and "no evaluation" not in line for line in found.summary)


def test_a_split_of_dialogs_too_small_for_one_gives_none(tmp_path):
    run = chat_run(tmp_path, write_lines(tmp_path / "d.jsonl", numbered(10)), split="98,2", eval_interval=2)
    found = build_datasets(run, Rank())
    assert found.valid is None and any("valid: " in line and "no evaluation" in line for line in found.summary)


def test_training_data_without_a_usable_dialog_is_an_error(tmp_path):
    run = chat_run(tmp_path, write_lines(tmp_path / "long.jsonl", LONG))
    with pytest.raises(DataError, match="the train split of .* holds no dialog that can be used"):
        build_datasets(run, Rank())
    with pytest.raises(DataError, match="holds no dialog that can be used"):
        length_of(run, 1)
