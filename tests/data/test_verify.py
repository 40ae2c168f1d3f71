"""verify_data finds every damage; merge_data gives the bytes of one run; inspect_data shows a document."""

from __future__ import annotations

import json
import struct
import time

import numpy as np
import pytest

from megatron_telechat.cli import inspect_data, merge_data, preprocess_data, verify_data
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.indexed.header import HEADER_BYTES
from megatron_telechat.data.indexed.merge import merge_datasets
from megatron_telechat.data.indexed.verify import add_checksums
from tests.data.material import TEXTS, huggingface_tokenizer, write_dataset


@pytest.fixture()
def dataset(tmp_path):
    prefix = write_dataset(tmp_path / "d", 40)
    add_checksums(prefix)
    return tmp_path


def _check(folder, capsys, suffix):
    """The file is named with its fix, quickly, with exit code 3."""
    begin = time.perf_counter()
    assert verify_data.main([str(folder / "d")]) == 3
    error = capsys.readouterr().err
    assert str(folder / f"d{suffix}") in error and "fix:" in error, error
    return time.perf_counter() - begin


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_truncation_at_every_64_bytes(dataset, capsys, suffix):
    file = dataset / f"d{suffix}"
    whole = file.read_bytes()
    assert verify_data.main([str(dataset / "d")]) == 0
    for size in range(0, len(whole), 64):
        file.write_bytes(whole[:size])
        assert _check(dataset, capsys, suffix) < 1.0


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_garbage_appended_and_empty_and_absent(dataset, capsys, suffix):
    file = dataset / f"d{suffix}"
    whole = file.read_bytes()
    for content in (whole + b"\0", whole + whole[:2], whole + b"x" * 4096, b""):
        file.write_bytes(content)
        _check(dataset, capsys, suffix)
    file.unlink()
    _check(dataset, capsys, suffix)


def test_each_byte_of_the_index_flipped(dataset, capsys):
    file = dataset / "d.idx"
    whole = file.read_bytes()
    for at in [*range(HEADER_BYTES), *range(HEADER_BYTES, len(whole), 7)]:
        content = bytearray(whole)
        content[at] ^= 0x11
        file.write_bytes(content)
        _check(dataset, capsys, ".idx")


def test_a_flipped_token_needs_the_checksums(dataset, capsys):
    content = bytearray((dataset / "d.bin").read_bytes())
    content[100] ^= 1
    (dataset / "d.bin").write_bytes(content)
    _check(dataset, capsys, ".bin")
    (dataset / "d.sums").unlink()
    assert verify_data.main([str(dataset / "d")]) == 0
    assert "no checksums: tokens not checked" in capsys.readouterr().out


def test_files_of_two_datasets_swapped(dataset, capsys):
    write_dataset(dataset / "e", 40, seed=0)
    other = IndexedDataset(write_dataset(dataset / "f", 40, seed=3))
    (dataset / "d.bin").write_bytes(other.bin_path.read_bytes())
    _check(dataset, capsys, ".bin")
    (dataset / "d.bin").write_bytes((dataset / "e.bin").read_bytes())
    (dataset / "d.idx").write_bytes(other.idx_path.read_bytes())
    _check(dataset, capsys, ".idx")


def test_idx_and_bin_swapped(dataset, capsys):
    one, two = (dataset / "d.idx").read_bytes(), (dataset / "d.bin").read_bytes()
    (dataset / "d.idx").write_bytes(two)
    (dataset / "d.bin").write_bytes(one)
    _check(dataset, capsys, ".idx")


def test_entries_swapped_without_checksums(dataset, capsys):
    (dataset / "d.sums").unlink()
    whole = bytearray((dataset / "d.idx").read_bytes())
    lengths = np.frombuffer(whole, "<i4", 40, HEADER_BYTES).copy()
    lengths[[3, 4]] = lengths[[4, 3]]
    whole[HEADER_BYTES : HEADER_BYTES + 160] = lengths.tobytes()
    (dataset / "d.idx").write_bytes(whole)
    _check(dataset, capsys, ".idx")
    whole[HEADER_BYTES : HEADER_BYTES + 4] = struct.pack("<i", -1)
    (dataset / "d.idx").write_bytes(whole)
    _check(dataset, capsys, ".idx")


def test_damaged_checksums(dataset, capsys):
    for content in ("", "{}", json.dumps({"format": 1, "chunk_bytes": 1 << 24, "bin": [], "idx": {}})):
        (dataset / "d.sums").write_text(content)
        _check(dataset, capsys, ".sums")


def test_token_ids_and_folders(dataset, capsys):
    write_dataset(dataset / "e", 5, seed=5)
    assert verify_data.main([str(dataset), "--vocab-size", "512"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert verify_data.main([str(dataset / "*.idx"), "--vocab-size", "300"]) == 3
    assert "is not in a vocabulary of 300" in capsys.readouterr().err
    (dataset / "none").mkdir()
    for name in ("absent", "none", "d.partial"):
        assert verify_data.main([str(dataset / name)]) == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(huggingface_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def _preprocess(tmp_path, model, prefix, *more):
    return preprocess_data.main(
        [
            "--input",
            str(tmp_path / "in"),
            "--output-prefix",
            str(tmp_path / prefix),
            "--tokenizer-model",
            model,
            "--engine",
            "reference",
            "--append-eod",
            "--json-keys",
            "text",
            "n",
            "--log-interval",
            "0",
            *more,
        ]
    )


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_merged_shards_are_one_run(tmp_path, model, count):
    import gzip

    (tmp_path / "in").mkdir()
    lines = [
        json.dumps({"text": [text, ""] if i % 3 else text, "n": str(i)}) + "\n"
        for i, text in enumerate(["", *TEXTS] * 3)
    ]
    (tmp_path / "in" / "a.jsonl").write_text("".join(lines[:11]).rstrip("\n"))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[11:13]).encode()))
    (tmp_path / "in" / "c.jsonl").write_text("".join(lines[13:]))
    assert _preprocess(tmp_path, model, "one") == 0
    for index in range(count):
        assert _preprocess(tmp_path, model, "s", "--shard", f"{index}/{count}") == 0
    assert merge_data.main(["--input", str(tmp_path / "s.shard-*"), "--output-prefix", str(tmp_path / "m")]) == 0
    for key in ("text", "n"):
        for suffix in ("bin", "idx", "sums"):
            assert (tmp_path / f"m_{key}_document.{suffix}").read_bytes() == (
                tmp_path / f"one_{key}_document.{suffix}"
            ).read_bytes()


def test_a_bad_line_of_a_shard_has_its_number_in_the_file(tmp_path, model, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        '{"text": "a", "n": "1"}\n' * 90 + "bad\n" + '{"text": "a", "n": "1"}\n' * 9
    )
    assert _preprocess(tmp_path, model, "s", "--shard", "1/2") == 3
    assert "a.jsonl:91" in capsys.readouterr().err


def test_missing_and_damaged_shards(tmp_path, model, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "a", "n": "1"}\n' * 90)
    for index in (0, 2):
        assert _preprocess(tmp_path, model, "s", "--shard", f"{index}/3") == 0
    assert merge_data.main(["--input", str(tmp_path / "s.shard-*"), "--output-prefix", str(tmp_path / "m")]) == 3
    assert "shards 1 of 3 of 'text' are missing" in capsys.readouterr().err
    assert _preprocess(tmp_path, model, "s", "--shard", "1/3") == 0
    content = bytearray((tmp_path / "s.shard-1-of-3_text_document.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "s.shard-1-of-3_text_document.bin").write_bytes(content)
    assert merge_data.main(["--input", str(tmp_path / "s.shard-*"), "--output-prefix", str(tmp_path / "m")]) == 3
    assert "s.shard-1-of-3_text_document.bin" in capsys.readouterr().err and not list(tmp_path.glob("m_text*"))


def test_merging_any_datasets_as_megatron_does(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefixes = [write_dataset(tmp_path / name, 30, seed) for seed, name in enumerate("abc")]
    reference = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for prefix in prefixes:
        reference.add_index(prefix)
    reference.finalize(str(tmp_path / "theirs.idx"))
    merge_datasets(prefixes, str(tmp_path / "ours"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    write_dataset(tmp_path / "wide", 3, dtype=np.int32)
    arguments = ["--input", prefixes[0], str(tmp_path / "wide"), "--output-prefix", str(tmp_path / "x")]
    assert merge_data.main(arguments) == 3
    assert merge_data.main([*arguments[:-1], prefixes[0]]) == 3


def test_ten_million_sequences_take_little(tmp_path):
    """A tenth of it here: memory does not depend on the number, the time is proportional."""
    from megatron_telechat.data.indexed.format import write_index

    lengths = np.full(1_000_000, 3, np.int32)
    begin = time.process_time()
    with open(tmp_path / "x.idx", "wb") as file:
        write_index(file, np.uint16, lengths.size, lengths.size, lambda: [lengths], lambda: [np.ones_like(lengths)])
    assert time.process_time() - begin < 0.3
    assert (tmp_path / "x.idx").stat().st_size == HEADER_BYTES + 20 * lengths.size + 8


def test_inspect_shows_documents(tmp_path, model, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        json.dumps({"text": TEXTS[1], "n": "1"}) + "\n" + json.dumps({"text": ["x", "y"], "n": "2"}) + "\n"
    )
    assert _preprocess(tmp_path, model, "o") == 0
    capsys.readouterr()
    dataset = str(tmp_path / "o_text_document")
    assert inspect_data.main([dataset, "--document", "0", "1", "--tokenizer-model", model]) == 0
    output = capsys.readouterr().out
    assert TEXTS[1] in output and "document 1: 2 sequences" in output and "<_end>" in output
    assert inspect_data.main([dataset, "--document", "2"]) == 2
    assert "0 to 1" in capsys.readouterr().err
    assert inspect_data.main([str(tmp_path / "absent")]) == 3
