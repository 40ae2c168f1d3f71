"""What each kind of bad input does: a reason, a place, an exit code; never a hang, never lost lines with exit 0."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_telechat.cli.preprocess_data import main
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.text import documents, readers
from tests.data.material import huggingface_tokenizer

GOOD = b'{"text": "fine"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(huggingface_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def run(tmp_path: Path, model: str, *more: str, source: str = "in.jsonl") -> int:
    return main(
        [
            "--input",
            str(tmp_path / source),
            "--output-prefix",
            str(tmp_path / "out" / "o"),
            "--tokenizer-model",
            model,
            "--workers",
            "2",
            "--log-interval",
            "0",
            "--engine",
            "reference",
            *more,
        ]
    )


def texts(tmp_path: Path, key: str = "text") -> IndexedDataset:
    return IndexedDataset(str(tmp_path / "out" / f"o_{key}_document"))


def left_behind(tmp_path: Path) -> list[str]:
    folder = tmp_path / "out"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


ACCEPTED = {
    "CRLF": (b'{"text": "a"}\r\n{"text": "b"}\r\n', 2),
    "CR alone between lines": (b'{"text": "a"}\r{"text": "b"}\n', 2),
    "no newline at the end": (b'{"text": "a"}\n{"text": "b"}', 2),
    "U+2028 in a text": ('{"text": "a\u2028b\u2029c\u0085d"}\n'.encode(), 1),
    "NUL escaped": (b'{"text": "a\\u0000b"}\n', 1),
    "a pair of surrogates": (b'{"text": "\\ud83d\\ude42"}\n', 1),
    "duplicate keys": (b'{"text": "first", "text": "last"}\n', 1),
    "nested values beside the text": (b'{"meta": {"text": 1, "deep": [[{}]]}, "text": "a"}\n', 1),
    "NaN and huge numbers": (b'{"n": NaN, "i": -Infinity, "big": 123456789012345678901234567890, "text": "a"}\n', 1),
    "spaces around": (b'  {"text": "a"}\t \n', 1),
    "empty text": (b'{"text": ""}\n{"text": "a"}\n', 2),
    "list of sentences": (b'{"text": ["a", "", "b"]}\n', 1),
    "empty list": (b'{"text": []}\n{"text": "a"}\n', 2),
    "a long line": (b'{"text": "' + b"word " * 300_000 + b'"}\n{"text": "b"}\n', 2),
    "escaped newlines": (b'{"text": "a\\n\\r\\nb"}\n', 1),
    "byte-order mark inside a text": ('{"text": "\ufeffa"}\n'.encode(), 1),
    "unassigned and private characters": ('{"text": "\U0010ffff\ue000\ufffe"}\n'.encode(), 1),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", ACCEPTED)
def test_unusual_but_good(tmp_path, model, name, monkeypatch):
    content, documents = ACCEPTED[name]
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    (tmp_path / "in.jsonl").write_bytes(content)
    assert run(tmp_path, model) == 0
    assert texts(tmp_path).documents == documents


def test_the_last_of_duplicate_keys_counts(tmp_path, model):
    (tmp_path / "in.jsonl").write_bytes(ACCEPTED["duplicate keys"][0] + b'{"text": "last"}\n')
    assert run(tmp_path, model) == 0
    assert texts(tmp_path)[0].tolist() == texts(tmp_path)[1].tolist()


BAD_LINES = {
    "NUL byte": (b'{"text": "a\x00b"}\n', "not JSON"),
    "tab in a text": (b'{"text": "a\tb"}\n', "not JSON"),
    "low half of a surrogate": (b'{"text": "\\udc00"}\n', "surrogate"),
    "null": (b'{"text": null}\n', "is null"),
    "true": (b'{"text": true}\n', "true or false"),
    "an object": (b'{"text": {"a": 1}}\n', "an object"),
    "a list with a number": (b'{"text": ["a", 1]}\n', "a number"),
    "a list with null": (b'{"text": [null]}\n', "is null"),
    "a string": (b'"text"\n', "expected, not a text"),
    "a number": (b"17\n", "expected, not a number"),
    "the literal null": (b"null\n", "expected, not null"),
    "single quotes": (b"{'text': 'a'}\n", "not JSON"),
    "trailing comma": (b'{"text": "a",}\n', "not JSON"),
    "a comment": (b'// {"text": "a"}\n', "not JSON"),
    "another key": (b'{"Text": "a"}\n', "key 'text' is missing"),
    "an empty object": (b"{}\n", "there: none"),
    "UTF-16": ('\ufeff{"text": "a"}'.encode("utf-16-le") + b"\n", "UTF-16"),
    "latin-1": ('{"text": "é"}\n'.encode("latin-1"), "not UTF-8"),
    "half a character": ('{"text": "天'.encode()[:-1] + b'"}\n', "not UTF-8"),
    "a markdown fence": (b"```json\n", "not JSON"),
    "form feed alone": (b"\x0c\n", "blank"),
    "an array of documents": (b'[{"text": "a"}, {"text": "b"}]\n', "expected, not a list"),
    "CR and rubbish": (b'{"text": "a"}\rrubbish\n', "not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_by_each_rule(tmp_path, model, name, capsys):
    content, message = BAD_LINES[name]
    (tmp_path / "in.jsonl").write_bytes(GOOD * 2 + content + GOOD * 3)
    assert run(tmp_path, model) == 3
    error = capsys.readouterr().err
    assert message in error and "in.jsonl:3" in error and "fix:" in error
    assert left_behind(tmp_path) == []
    assert run(tmp_path, model, "--on-error", "quarantine") == 0
    assert "6 in = 5 out + 1 skipped" in capsys.readouterr().out
    assert texts(tmp_path).documents == 5
    assert (tmp_path / "out" / "o_quarantine.jsonl").read_bytes() == content
    assert (tmp_path / "out" / "o_skipped.txt").read_text().startswith(str(tmp_path / "in.jsonl:3: "))


def test_lists_of_an_earlier_run_do_not_stay(tmp_path, model):
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"bad\n")
    assert run(tmp_path, model, "--on-error", "quarantine") == 0
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    assert run(tmp_path, model, "--on-error", "quarantine") == 0
    assert left_behind(tmp_path) == [f"o_text_document.{suffix}" for suffix in ("bin", "idx", "sums")]


def test_a_document_bad_in_one_key_is_left_out_of_all(tmp_path, model):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a", "title": "b"}\n{"text": "a", "title": 1}\n{"text": "c"}\n')
    assert run(tmp_path, model, "--json-keys", "text", "title", "--on-error", "skip") == 0
    assert texts(tmp_path).documents == texts(tmp_path, "title").documents == 1


def test_a_line_beyond_the_limit_is_passed_over_by_name(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(readers, "LARGEST_LINE", 5000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    (tmp_path / "in.jsonl").write_bytes(GOOD + b'{"text": "' + b"x" * 20_000 + b'"}\n' + GOOD * 300)
    assert run(tmp_path, model) == 3 and "in.jsonl:2" in capsys.readouterr().err
    assert run(tmp_path, model, "--on-error", "skip") == 0
    assert "longer than" in capsys.readouterr().err and texts(tmp_path).documents == 301


def _zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def _parquet(data: bytes) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    rows = [json.loads(line)["text"] for line in data.splitlines()]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": rows, "n": list(range(len(rows)))}), sink, row_group_size=500)
    return sink.getvalue().to_pybytes()


PACKED = {"gz": gzip.compress, "zst": _zstd, "parquet": _parquet}
ROWS = b"".join(json.dumps({"text": f"row {i} {i * i % 9973} {os.path}"}).encode() + b"\n" for i in range(2000))


@pytest.mark.heavy
@pytest.mark.parametrize("suffix", PACKED)
def test_packed_input_gives_the_bytes_of_plain_input(tmp_path, model, suffix):
    (tmp_path / "in.jsonl").write_bytes(ROWS)
    assert run(tmp_path, model) == 0
    plain = {s: texts(tmp_path).bin_path.with_suffix(s).read_bytes() for s in (".bin", ".idx")}
    name = "p.parquet" if suffix == "parquet" else f"in.jsonl.{suffix}"
    (tmp_path / name).write_bytes(PACKED[suffix](ROWS))
    assert run(tmp_path, model, source=name) == 0
    assert plain == {s: texts(tmp_path).bin_path.with_suffix(s).read_bytes() for s in (".bin", ".idx")}
    if suffix != "parquet":  # two frames, one after the other
        (tmp_path / name).write_bytes(PACKED[suffix](ROWS[:9000]) + PACKED[suffix](ROWS[9000:]))
        assert run(tmp_path, model, source=name) == 0
        assert plain[".bin"] == texts(tmp_path).bin_path.read_bytes()


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("damage", ["cut", "cut short", "flipped", "empty", "renamed text"])
def test_damaged_packed_files(tmp_path, model, suffix, damage, capsys):
    data = bytearray(PACKED[suffix](ROWS))
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
        data[len(data) // 2 + 1] ^= 0x55
    name = f"in.{suffix}"
    (tmp_path / name).write_bytes(
        {"cut": data[: len(data) // 2], "cut short": data[:-3], "empty": b"", "renamed text": GOOD}.get(damage, data)
    )
    assert run(tmp_path, model, "--on-error", "skip", source=name) == 3
    error = capsys.readouterr().err
    assert name in error and "fix:" in error and "Traceback" not in error
    assert left_behind(tmp_path) == []


def test_bad_rows_of_parquet(tmp_path, model, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    raw = pyarrow.array([b"fine", b"\xff", None, b"good"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": raw, "list": [["a", "b"], [], ["c"], ["d"]]}), tmp_path / "in.parquet")
    assert run(tmp_path, model, source="in.parquet") == 3
    assert "in.parquet:2" in capsys.readouterr().err
    assert run(tmp_path, model, "--on-error", "quarantine", source="in.parquet") == 0
    assert "4 in = 2 out + 2 skipped" in capsys.readouterr().out
    assert run(tmp_path, model, "--json-keys", "list", source="in.parquet") == 0
    assert len(texts(tmp_path, "list")) == 4
    assert run(tmp_path, model, "--json-keys", "absent", source="in.parquet") == 3
    assert "column 'absent' is missing (there: text, list)" in capsys.readouterr().err


@pytest.mark.heavy
def test_files_and_folders(tmp_path, model, capsys):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice").mkdir()
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / "twice" / name).write_bytes(GOOD if name == "a.jsonl" else gzip.compress(GOOD))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    (tmp_path / "none.jsonl").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for source, message in [
        ("empty", "holds no"),
        ("twice", "plain and packed"),
        ("absent.jsonl", "no input file"),
        ("*.txt", "no input file"),
        ("none.jsonl", "no document"),
        ("pipe.jsonl", "no input file"),
    ]:
        assert run(tmp_path, model, source=source) == 3, source
        assert message in capsys.readouterr().err
    assert (
        main(
            [
                "--input",
                str(tmp_path / "in.jsonl"),
                str(tmp_path / "link.jsonl"),
                "--output-prefix",
                str(tmp_path / "o"),
                "--tokenizer-model",
                model,
            ]
        )
        == 3
    )
    assert "named 2 times" in capsys.readouterr().err
    assert run(tmp_path, model, "--json-keys", "a/b") == 2
    assert left_behind(tmp_path) == []


def test_existing_output_stays_until_the_new_one_is_whole(tmp_path, model):
    (tmp_path / "in.jsonl").write_bytes(GOOD * 3)
    assert run(tmp_path, model) == 0
    (tmp_path / "in.jsonl").write_bytes(GOOD * 5 + b"bad\n")
    assert run(tmp_path, model) == 3 and texts(tmp_path).documents == 3
    (tmp_path / "in.jsonl").write_bytes(GOOD * 5)
    assert run(tmp_path, model) == 0 and texts(tmp_path).documents == 5


def test_output_that_cannot_be_written(tmp_path, model, capsys):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "out").write_bytes(b"a file where a folder should be")
    assert run(tmp_path, model) == 6
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_full_disk(tmp_path, model, monkeypatch, capsys):
    """A real one, where this machine lets us mount one."""
    (tmp_path / "out").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "out")], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        monkeypatch.setattr(readers, "BLOCK_BYTES", 5000)
        (tmp_path / "in.jsonl").write_bytes(GOOD * 40_000)
        assert run(tmp_path, model) == 6
        error = capsys.readouterr().err
        assert "no space left: the output needs about" in error and "are free" in error
        assert left_behind(tmp_path) in ([], ["o.partial"])
    finally:
        subprocess.run(["umount", str(tmp_path / "out")], check=True)


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_bad_shards(tmp_path, model, shard, capsys):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    assert run(tmp_path, model, f"--shard={shard}") == 2
    assert "not a part I/N" in capsys.readouterr().err
    assert documents.count_lines(str(tmp_path / "in.jsonl")) == 1
