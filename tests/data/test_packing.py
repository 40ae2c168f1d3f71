"""Packing loses nothing; rows, masks and borders as the training reads them; order, resume and caches of
fine-tuning."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_telechat.data import batches, build_datasets, data_fingerprint, fingerprint_differences
from megatron_telechat.data.chat.packing import OPEN_ROWS, epochs, pack
from megatron_telechat.errors import ConfigError, DataError, ResourceError
from tests.data.chat_material import PAD, SPECIAL, chat_run, numbered, single, write_lines
from tests.data.material import Rank, with_training

USER, BOT, END = (SPECIAL.index(name) for name in ("<_user>", "<_bot>", "<_end>"))


@pytest.mark.parametrize("seed", range(6))
def test_one_epoch_of_packing_holds_every_dialog_once_and_no_row_overflows(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, rng.integers(1, 400))
    rows = pack(lengths, 64, epochs(lengths.size, seed, "train"), None, True)
    assert Counter(dialog for row in rows for dialog in row) == Counter(range(lengths.size))
    assert all(0 < lengths[row].sum() <= 64 for row in rows)


def test_the_dialog_that_overflows_begins_the_next_row():
    orders = iter([np.arange(3)])
    assert pack(np.array([40, 30, 64]), 64, orders, None, True) == [[2], [0], [1]]


def test_a_row_is_not_closed_while_a_dialog_may_still_fit():
    lengths = np.array([60, 10, 4, 54])
    assert sorted(pack(lengths, 64, iter([np.arange(4)]), None, True)) == [[0, 2], [1, 3]]
    many = np.array([33] * (OPEN_ROWS + 1) + [31] * (OPEN_ROWS + 1))
    rows = pack(many, 64, iter([np.arange(many.size)]), None, True)
    assert rows[0] == [0] and sorted(map(len, rows)) == [1] * 2 + [2] * OPEN_ROWS


def test_packing_goes_on_over_the_border_of_epochs_and_its_first_rows_stay():
    lengths = np.random.default_rng(3).integers(1, 30, 50)
    short = pack(lengths, 64, epochs(50, 7, "train"), 20, True)
    long = pack(lengths, 64, epochs(50, 7, "train"), 90, True)
    assert long[:20] == short and len(long) == 90
    read = Counter(dialog for row in long for dialog in row)
    assert max(read.values()) - min(read.values()) <= 1
    assert pack(lengths, 64, epochs(50, 8, "train"), 20, True) != short
    assert pack(lengths, 64, epochs(50, 7, "valid"), 20, True) != short


def test_without_packing_each_row_holds_one_dialog():
    assert pack(np.array([3, 64, 9]), 64, iter([np.array([2, 0, 1])]), None, False) == [[2], [0], [1]]


def build(run):
    return build_datasets(run, Rank()).train


def test_a_row_written_by_hand(tmp_path):
    """Two dialogs of 8 tokens and 3 of padding in a row of 18 + 1, learned in the published way."""
    file = write_lines(tmp_path / "d.jsonl", [single("ab", "c"), single("ab", "c")])
    sample = build(chat_run(tmp_path, file, seq_length=18))[0]
    # <_user> a b <_bot> c <_end> \n
    dialog = [
        USER,
        *(int(x) for x in sample["tokens"][1:3]),
        BOT,
        int(sample["tokens"][4]),
        END,
        int(sample["tokens"][6]),
    ]
    row = dialog + dialog + [PAD] * 5
    assert sample["tokens"].tolist() == row[:-1] and sample["labels"].tolist() == row[1:]
    learned = [1, 0, 0, 1, 1, 1, 0]
    assert sample["loss_mask"].tolist() == (learned + learned + [0] * 5)[1:]
    assert sample["position_ids"].tolist() == list(range(18))
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}


def test_borders_written_by_hand(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", [single("ab", "c"), single("ab", "c")])
    run = chat_run(tmp_path, file, seq_length=18, reset_position_ids=True, reset_attention_mask=True)
    sample = build(run)[0]
    assert sample["segment_lengths"].tolist() == [7, 7, 4]
    assert sample["position_ids"].tolist() == [*range(7), *range(7), *range(4)]
    # The <_user> that begins the second dialog cannot be learned from the end of the first.
    assert sample["loss_mask"].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    answers = build(chat_run(tmp_path, file, seq_length=18, sft_loss_mask="answer"))[0]
    assert answers["loss_mask"].tolist() == [0, 0, 0, 1, 1, 0, 0] * 2 + [0] * 4


def test_a_full_row_has_no_stretch_of_padding(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", [single("ab", "c"), single("abc", "c")])
    for seq_length, stretches in ((14, 2), (15, 2), (16, 3)):
        sample = build(chat_run(tmp_path, file, seq_length=seq_length, reset_attention_mask=True))[0]
        lengths = sample["segment_lengths"].tolist()
        assert len(lengths) == stretches and sum(lengths) == seq_length


def test_truncation_written_by_hand(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", [single("ab", "cdef")])
    train = build(chat_run(tmp_path, file, seq_length=6))
    assert train[0]["labels"].tolist()[2] == BOT and END not in train[0]["labels"].tolist()
    assert train[0]["loss_mask"].tolist() == [0, 0, 1, 1, 1, 1]  # <_bot> c d e: to the end of the row
    assert build(chat_run(tmp_path, file, seq_length=6, sft_loss_mask="answer"))[0]["loss_mask"].tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]


def test_what_truncation_leaves_nothing_of_is_left_out_and_told(tmp_path):
    lines = [single("q" * 20, "lost"), single("ab", "cdefghij"), single("a", "b")]
    file = write_lines(tmp_path / "d.jsonl", lines)
    datasets = build_datasets(chat_run(tmp_path, file, seq_length=8), Rank())
    assert "2 dialogs, 1 cut to the row, 1 left out because their answer lies beyond the row" in datasets.summary[0]
    dropped = build_datasets(chat_run(tmp_path, file, seq_length=8, sft_overlong="drop"), Rank())
    assert "1 dialogs, 2 left out as too long" in dropped.summary[0]
    with pytest.raises(DataError, match="no dialog that can be used: 3 are too long for --seq-length 2"):
        build_datasets(chat_run(tmp_path, file, seq_length=2), Rank())


def texts(train, tmp_path) -> Counter:
    from megatron_telechat.data.tokenizers import build_tokenizer

    tokenizer = build_tokenizer(None, str(tmp_path / "tokenizer" / "tokenizer.json"))
    rows = (
        tokenizer.decode([t for t in train.source.tokens(i).tolist() if t != PAD]) for i in range(len(train.source))
    )
    return Counter(dialog for row in rows for dialog in row.split("\n") if dialog)


@pytest.mark.parametrize("packing", [True, False])
def test_every_dialog_of_the_file_is_read_once_an_epoch_word_for_word(tmp_path, packing):
    lines = numbered(90)
    half = [write_lines(tmp_path / f"{name}.jsonl", part) for name, part in (("a", lines[:50]), ("b", lines[50:]))]
    run = chat_run(tmp_path, *half, gbs=1, mbs=1, iters=2, sft_packing=packing)
    parts = build(run).source.sources
    said = sum((texts(type("T", (), {"source": part}), tmp_path) for part in parts), Counter())
    turns = [line["dialog"] for line in lines]
    assert said == Counter(f"<_user>{q['content']}<_bot>{a['content']}<_end>" for q, a in turns)


def digest(batches_of_run) -> list:
    return [{name: value.tolist() for name, value in batch.items()} for batch in batches_of_run]


@pytest.mark.parametrize("options", [{}, {"reset_position_ids": True, "reset_attention_mask": True}])
def test_samples_of_a_step_do_not_depend_on_the_layout_and_a_resume_goes_on(tmp_path, options):
    files = [write_lines(tmp_path / f"{n}.jsonl", numbered(40, first=100 * n)) for n in range(3)]
    weighted = tuple(str(x) for pair in zip((0.5, 0.2, 0.3), files, strict=True) for x in pair)
    run = chat_run(tmp_path, *weighted, gbs=8, mbs=8, iters=6, **options)
    whole = {}
    for number, batch in enumerate(batches(build(run), run, Rank(), 0)):
        whole[number] = batch["tokens"].tolist()
    for dp, mbs, consumed in ((1, 1, 0), (2, 2, 0), (4, 1, 0), (4, 2, 24), (2, 1, 40)):
        other = with_training(run, micro_batch_size=mbs)
        by_rank = [list(batches(build(other), other, Rank(dp_rank=r, dp_size=dp), consumed)) for r in range(dp)]
        count = 8 // (mbs * dp)
        for step in range(len(by_rank[0]) // count):
            rows = [
                row
                for micro in range(step * count, (step + 1) * count)
                for mine in by_rank
                for row in mine[micro]["tokens"].tolist()
            ]
            assert rows == whole[consumed // 8 + step]


def test_weights_and_copies_decide_the_shares(tmp_path):
    files = [write_lines(tmp_path / f"{n}.jsonl", numbered(60, first=100 * n)) for n in range(2)]
    run = chat_run(tmp_path, "3", files[0], "1", files[1], iters=10)
    assert build(run).source.drawn() == [60, 20]
    (tmp_path / "data.json").write_text(json.dumps({"0.jsonl": 1, "1.jsonl": 2.0}))
    copies = replace(
        run, data=replace(run.data, data_path=(), data_json=str(tmp_path / "data.json"), sft_packing=False)
    )
    drawn = build(copies).source.drawn()
    assert sum(drawn) == 80 and abs(drawn[1] - 2 * drawn[0]) <= 2


def test_splits_share_no_dialog(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", numbered(100))
    datasets = build_datasets(chat_run(tmp_path, file, split="80,20", eval_interval=2, iters=20), Rank())
    train, valid = (texts(data, tmp_path) for data in (datasets.train, datasets.valid))
    number = [{int(text[len("<_user>q") :].split("<")[0]) for text in said} for said in (train, valid)]
    assert number[0] == set(range(80)) and number[1] and number[1] <= set(range(80, 100))


def test_a_file_of_its_own_for_the_validation(tmp_path):
    files = [write_lines(tmp_path / f"{n}.jsonl", numbered(20, first=100 * n)) for n in range(2)]
    run = chat_run(tmp_path, eval_interval=2, data_path=(), train_data_path=files[:1], valid_data_path=files[1:])
    datasets = build_datasets(run, Rank())
    assert all(
        text.startswith("<_user>q1") and len(text.split("<")[1]) >= 10 for text in texts(datasets.valid, tmp_path)
    )
    assert len(datasets.valid) == 16 and "valid: " in datasets.summary[1]


def test_the_encoding_is_made_once_and_anew_when_anything_of_it_changes(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", numbered(30))
    run = chat_run(tmp_path, file)

    def folders():
        return {path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith("chat-")}

    build(run)
    first = folders()
    build(with_training(run, seq_length=128))
    build(replace(run, data=replace(run.data, sft_loss_mask="answer")))
    assert folders() == first and len(first) == 1
    build(replace(run, data=replace(run.data, sft_system="Be kind.")))
    assert len(folders()) == 2
    text = Path(file).read_text().replace("q17", "q71")
    Path(file).write_text(text)
    assert "q71" in str(texts(build(run), tmp_path)) and len(folders()) == 3


def test_fingerprint_names_what_differs(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", numbered(30))
    run = chat_run(tmp_path, file)
    saved = json.loads(json.dumps(data_fingerprint(run)))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(file).read_bytes())
    same = replace(run, data=replace(run.data, data_path=(str(moved),)))
    assert fingerprint_differences(saved, json.loads(json.dumps(data_fingerprint(same)))) == []
    other = replace(run, data=replace(run.data, sft_loss_mask="answer", sft_system="x"))
    lines = "\n".join(fingerprint_differences(saved, data_fingerprint(other)))
    assert "settings.sft_loss_mask" in lines and "encoding.system" in lines
    moved.write_text(moved.read_text().replace("q17", "q71"))
    assert any("sha256" in line for line in fingerprint_differences(saved, data_fingerprint(same)))


def test_a_compressed_file_and_a_mark_at_its_start_read_the_same(tmp_path):
    lines = numbered(20)
    plain = build(chat_run(tmp_path, write_lines(tmp_path / "d.jsonl", lines)))
    raw = b"\xef\xbb\xbf" + Path(tmp_path / "d.jsonl").read_bytes()
    with gzip.open(tmp_path / "d.jsonl.gz", "wb") as file:
        file.write(raw)
    other = build(chat_run(tmp_path, str(tmp_path / "d.jsonl.gz")))
    assert all(torch.equal(plain[i]["tokens"], other[i]["tokens"]) for i in range(len(plain)))


BAD_FILES = {
    "no JSON": (b'{"input": "a", "output": "b"}\n{"input": \n', r"not JSON.*d.jsonl:2"),
    "blank": (b'{"input": "a", "output": "b"}\n\n', r"a blank line.*d.jsonl:2"),
    "not UTF-8": (b'{"input": "\xff", "output": "b"}\n', r"not UTF-8 at byte 11.*d.jsonl:1"),
    "no dialog": (b'{"text": "b"}\n', r"none of the keys.*d.jsonl:1"),
    "nested without end": (b"[" * 100_000, "not JSON"),
    "empty": (b"", "holds no dialog"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_lines_are_named_and_nothing_is_kept(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        build(chat_run(tmp_path, str(tmp_path / "d.jsonl")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_many_bad_lines_are_counted(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", [*numbered(10), *([{"text": "x"}] * 50)])
    with pytest.raises(DataError) as caught:
        build(chat_run(tmp_path, file))
    assert len(caught.value.problems) == 20 and "50 of 60; 30 more like these" in caught.value.render()


def test_a_broken_archive_and_a_missing_file(tmp_path):
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"input": "a", "output": "b"}\n' * 1000)[:60])
    with pytest.raises(DataError, match="cannot read"):
        build(chat_run(tmp_path, str(tmp_path / "d.jsonl.gz")))
    whole = bytearray(gzip.compress(b"".join(b'{"input": "%d", "output": "b"}\n' % n for n in range(1000))))
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / "d.jsonl.gz").write_bytes(whole)
    with pytest.raises(DataError, match="cannot read|not JSON|not UTF-8"):
        build(chat_run(tmp_path, str(tmp_path / "d.jsonl.gz")))
    with pytest.raises(DataError, match="cannot read.*nowhere"):
        build(chat_run(tmp_path, str(tmp_path / "nowhere.jsonl")))


def test_a_cache_that_cannot_be_written_is_a_resource_error(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", numbered(3))
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ResourceError, match="encoded dialogs"):
        build(chat_run(tmp_path, file))


def test_a_tokenizer_that_does_not_fit_the_model_or_the_template(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", numbered(3))
    run = chat_run(tmp_path, file)
    with pytest.raises(ConfigError, match="269 ids, the model 200 rows"):
        build(replace(run, model=replace(run.model, vocab_size=200)))


def test_a_dialog_that_begins_at_the_last_label_is_not_learned(tmp_path):
    """Its only token in the row would be guessed from the end of another dialog."""
    from megatron_telechat.data.corpus import Marks
    from megatron_telechat.data.samples import TokenDataset

    class Row:
        def __len__(self) -> int:
            return 1

        def tokens(self, sample: int):
            return np.arange(9)

        def cuts(self, sample: int):
            return np.empty(0, np.int64)

        def marks(self, sample: int) -> Marks:
            return Marks(np.ones(9, bool), np.array([0, 3, 8]), 9)

    learned = [
        TokenDataset(Row(), 1, 16, reset_attention_mask=reset)[0]["loss_mask"].tolist() for reset in (False, True)
    ]
    assert learned == [[1] * 8, [1, 1, 0, 1, 1, 1, 1, 0]]


def test_attention_borders_of_documents_in_pretraining(tmp_path):
    """The same option on indexed text: a document is a stretch, and the token after an end of document begins one."""
    from tests.data.material import make_run, write_dataset

    prefix = write_dataset(tmp_path / "d", 60)
    tokenizer = chat_run(tmp_path, "x").data.tokenizer_model
    run = make_run(tmp_path, data_path=(prefix,), tokenizer_model=tokenizer, reset_attention_mask=True, split="1")
    train = build(run)
    at_the_border = 0
    for i in range(40):
        sample = train[i]
        tokens = sample["tokens"].tolist()
        ends = [at + 1 for at, token in enumerate(tokens[:-1]) if token == 2]
        assert sample["segment_lengths"].tolist() == np.diff([0, *ends, 32]).tolist()
        # The end itself is learned from its document; what is asked for behind it begins another one, also at the last
        # place.
        assert sample["loss_mask"].tolist() == [0.0 if token == 2 else 1.0 for token in tokens]
        at_the_border += tokens[-1] == 2
    assert at_the_border
    batch = train.batch([0, 1, 2])
    assert int(batch["segment_lengths"].sum()) == 3 * 32
