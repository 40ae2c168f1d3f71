"""Pairs of answers: the shapes that are read, what is an answer, rows that never cut a pair, and what is left out."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_telechat.data import build_datasets, data_fingerprint, fingerprint_differences
from megatron_telechat.data.chat.dialogs import BadDialog
from megatron_telechat.data.chat.preferences import parse_pair
from megatron_telechat.errors import DataError
from tests.data.chat_material import PAD, SPECIAL, chat_run, write_lines
from tests.data.material import Rank

USER, BOT, END = (SPECIAL.index(name) for name in ("<_user>", "<_bot>", "<_end>"))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def bot(text: str) -> dict:
    return {"role": "assistant", "content": text}


def pair(question: str, chosen: str, rejected: str) -> dict:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def pair_run(tmp_path: Path, *lines: dict, **options):
    file = write_lines(tmp_path / "p.jsonl", lines)
    resets = {"reset_position_ids": True, "reset_attention_mask": True}
    return chat_run(tmp_path, file, sft=False, dpo=True, **resets, **options)


def build(tmp_path: Path, *lines: dict, **options):
    return build_datasets(pair_run(tmp_path, *lines, **options), Rank()).train


SAME = {
    "texts": pair("q", "a", "b"),
    "prompt of turns": {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]},
    "prompt of turns, answers as texts": {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
    "prompt as text, answers of turns": {"prompt": "q", "chosen": [bot("a")], "rejected": [bot("b")]},
    "whole dialogs": {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
    "prompt inside whole dialogs": {"prompt": "q", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
    "turns inside whole dialogs": {
        "prompt": [user("q")], "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")],
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SAME)
def test_every_shape_is_the_same_pair(shape):
    assert parse_pair(SAME[shape]) == parse_pair(SAME["texts"])


def test_a_system_text_stands_beside_or_inside():
    inside = {half: [{"role": "system", "content": "s"}, user("q"), bot(half)] for half in ("chosen", "rejected")}
    assert parse_pair(inside) == parse_pair({"system": "s", **pair("q", "chosen", "rejected")})


BAD = {
    "no pair": ({"prompt": "q", "chosen": "a"}, "needs the keys"),
    "a text alone": ({"chosen": "a", "rejected": "b"}, "text without a prompt"),
    "a number": (pair("q", 3, "b"), "neither a text nor a list"),
    "a prompt elsewhere": (
        {"prompt": "x", "chosen": [user("q"), bot("a")], "rejected": [user("x"), bot("b")]},
        "chosen does not begin with an answer, and the prompt is not in it",
    ),
    "another question": ({"chosen": [user("p"), bot("a")], "rejected": [user("q"), bot("a")]}, "differ in a question"),
    "another system": (
        {"chosen": [{"role": "system", "content": "s"}, user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        "different system texts",
    ),
    "one goes on": (
        {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("a"), user("r"), bot("b")]},
        "the beginning of the other",
    ),
    "no answer": ({"chosen": [user("q")], "rejected": [user("q"), bot("b")]}, "last turn is not the bot"),
    "a list": ([1], "needs the keys"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_pair_is_told(name):
    line, said = BAD[name]
    with pytest.raises(BadDialog, match=said):
        parse_pair(line)


def test_lines_are_named(tmp_path):
    with pytest.raises(DataError) as caught:
        build(tmp_path, pair("q", "a", "b"), *(BAD[name][0] for name in ("no pair", "another question")))
    text = caught.value.render()
    assert "p.jsonl:2" in text and "p.jsonl:3" in text and "2 of 3" in text and caught.value.exit_code == 3


def test_a_row_written_by_hand(tmp_path):
    """A pair of 7 and 8 tokens, and 5 of padding, in a row of 19 + 1."""
    train = build(tmp_path, pair("ab", "c", "de"), seq_length=19)
    batch = train.batch([0, 1])
    a, b, c, d, e, line = (int(batch["tokens"][0, at]) for at in (1, 2, 4, 11, 12, 6))
    row = [USER, a, b, BOT, c, END, line, USER, a, b, BOT, d, e, END, line, *[PAD] * 5]
    assert batch["tokens"][0].tolist() == row[:-1] and batch["labels"][0].tolist() == row[1:]
    assert len({a, b, c, d, e}) == 5
    learned = [at for at, mask in enumerate(batch["loss_mask"][0].tolist()) if mask]
    assert learned == [3, 4, 10, 11, 12]
    assert batch["segment_lengths"].tolist() == [7, 8, 4] * 2
    assert batch["position_ids"][0].tolist() == [*range(7), *range(8), *range(4)]
    lengths = batch["answer_lengths"].tolist()
    assert lengths == [2, 3, 2, 3]
    places = [row[:length] for row, length in zip(batch["answers"].tolist(), lengths, strict=True)]
    assert places == [[3, 4], [10, 11, 12], [22, 23], [29, 30, 31]]
    assert batch["pair_numbers"].tolist() == [0, 0] and np.isnan(batch["reference"].numpy()).all()


def test_answers_that_both_halves_share_are_context(tmp_path):
    shared = [user("a"), bot("b"), user("c")]
    line = {"chosen": [*shared, bot("d")], "rejected": [*shared, bot("ef"), user("g"), bot("h")]}
    train = build(tmp_path, line, sft_packing=False)
    batch = train.batch([0])
    labels = batch["labels"].reshape(-1)
    text = [
        [int(labels[place]) for place in row[:length]]
        for row, length in zip(batch["answers"].tolist(), batch["answer_lengths"].tolist(), strict=True)
    ]
    letter = {char: number for number, char in enumerate("abcdefgh")}
    first = next(token for token in batch["tokens"][0].tolist() if token >= len(SPECIAL))  # the letter a
    assert text == [
        [first + letter["d"], END],
        [first + letter["e"], first + letter["f"], END, first + letter["h"], END],
    ]


def test_the_reference_follows_its_pair_into_every_row(tmp_path):
    lines = [pair(f"q{n}", "a" * (1 + n % 5), "b" * (1 + n % 7)) for n in range(40)]
    run = pair_run(tmp_path, *lines)
    table = np.stack([-np.arange(40.0), -np.arange(40.0) - 0.5], axis=1)
    train = build_datasets(run, Rank(), references={run.data.data_path[0]: table}).train
    seen: Counter[int] = Counter()
    for sample in range(30):
        batch = train.batch([sample, sample + 1])
        numbers = batch["pair_numbers"].tolist()
        assert batch["reference"].view(-1, 2).tolist() == [[-n, -n - 0.5] for n in numbers]
        assert batch["answer_lengths"].view(-1, 2).tolist() == [[2 + n % 5, 2 + n % 7] for n in numbers]
        seen.update(numbers)
    assert len(seen) == 40


def test_no_pair_is_cut_and_none_is_lost(tmp_path):
    rng = np.random.default_rng(1)
    lines = [pair(f"{n:02d}", "x" * int(rng.integers(1, 34)), "y" * int(rng.integers(1, 34))) for n in range(60)]
    lengths = [2 * 6 + len(line["chosen"]) + len(line["rejected"]) for line in lines]
    fits = [n for n, length in enumerate(lengths) if length <= 65]
    assert 0 < len(fits) < 60
    datasets = build_datasets(pair_run(tmp_path, *lines, iters=10), Rank())
    source = datasets.train.source
    epoch = source.samples_in(1, False)  # and a few pairs of the next one
    assert {n for row in range(epoch) for n in source.packed(row)} == set(fits)
    for row in range(epoch):
        assert sum(lengths[n] for n in source.packed(row)) <= 65
    assert f"{len(fits)} pairs, {60 - len(fits)} left out as too long" in datasets.summary[0]


def test_a_pair_that_is_too_long_may_be_refused(tmp_path):
    lines = [pair("q", "a", "b"), pair("q", "a" * 40, "b" * 40)]
    with pytest.raises(DataError) as caught:
        build(tmp_path, *lines, dpo_overlong="refuse")
    text = caught.value.render()
    assert "90 tokens together, and a row has 65" in text and "p.jsonl:2" in text and "--dpo-overlong drop" in text
    train = build(tmp_path, lines[0], dpo_overlong="refuse", sft_packing=False)
    assert train.batch([0])["answers"].shape[0] == 2


def test_pairs_that_prefer_nothing_are_left_out_and_counted(tmp_path):
    lines = [pair("q", "same", "same"), pair("q", "a", "b")]
    datasets = build_datasets(pair_run(tmp_path, *lines), Rank())
    assert "1 pairs, 1 left out because both answers are the same" in datasets.summary[0]
    assert {n for row in range(8) for n in datasets.train.source.packed(row)} == {1}
    with pytest.raises(DataError, match="no pair that can be used with --seq-length 64, 1 left out because both"):
        build(tmp_path, lines[0])


def test_a_share_counts_pairs_and_files_blend(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [pair(f"a{n}", "x", "yy") for n in range(50)])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(pair(f"b{n}", "x", "yy")) + "\n" for n in range(10))
    run = pair_run(tmp_path, pair("q", "a", "b"), split="80,20", eval_interval=4)
    datasets = build_datasets(
        replace(run, data=replace(run.data, data_path=("0.5", a, "0.5", str(tmp_path / "b.jsonl.gz")))), Rank()
    )
    parts = [
        [part.usable.dialogs.tolist() for part in split.source.sources] for split in (datasets.train, datasets.valid)
    ]
    assert parts == [[[*range(40)], [*range(8)]], [[*range(40, 50)], [8, 9]]]


def test_the_rows_of_a_pass_hold_every_pair_once_in_whole_batches(tmp_path):
    from megatron_telechat.data.blend import data_plan
    from megatron_telechat.data.datasets import open_together

    lines = [pair(f"q{n}", "a" * (n % 9 + 1), "b" * 9) for n in range(23)]
    lines += [pair("q", "a" * 70, "b"), pair("q", "a", "a")]
    run = pair_run(tmp_path, *lines)
    [corpus] = open_together(run, data_plan(run.data)).values()
    rows = corpus.whole(8)
    assert len(rows) % 8 == 0 and (corpus.pairs, corpus.usable) == (25, 23)
    assert [n for row in range(len(rows)) for n in rows.packed(row)] == sorted(
        range(23), key=lambda n: rows_of(rows, n)
    )
    empty = rows.marks(len(rows) - 1)
    assert not empty.learned.any() and empty.used == 0 and empty.pairs.numbers.size == 0
    assert set(rows.tokens(len(rows) - 1).tolist()) == {PAD}


def rows_of(rows, number: int) -> tuple[int, int]:
    return next((row, rows.packed(row).index(number)) for row in range(len(rows)) if number in rows.packed(row))


def test_other_settings_are_other_data(tmp_path):
    run = pair_run(tmp_path, pair("q", "a", "b"))
    saved = data_fingerprint(run)
    assert saved["kind"] == "pairs"
    changed = data_fingerprint(replace(run, data=replace(run.data, dpo_overlong="refuse")))
    assert any("dpo_overlong" in line for line in fingerprint_differences(saved, changed))
