"""preprocess_data: what Megatron's slow tool writes on good input, a reason on bad input, never a hang."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_telechat.cli.preprocess_data import main
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.text.preprocess import preprocess
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.errors import ConfigError, DataError
from tests.data.material import TEXTS, huggingface_tokenizer, sentencepiece_tokenizer, write_jsonl
from tests.harness import ROOT

DOCUMENTS = [*TEXTS, "", " ", ["one", "", "two sentences"], [], "a<_end>b", "🙂\u2028x\u0085", "x" * 3000]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"hf": huggingface_tokenizer(folder), "sp": sentencepiece_tokenizer(folder / "tokenizer.model")}


def megatrons_slow_way(documents, tokenizer, append_eod, prefix):
    """The encoder and builder loop of Megatron's tools/preprocess_data.py (encode, add_document, finalize)."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in documents:
        ids, lengths = [], []
        for sentence in text if isinstance(text, list) else [text]:
            sentence_ids = tokenizer.encode(sentence)
            if sentence_ids:
                ids.extend(sentence_ids)
                lengths.append(len(sentence_ids))
        if ids and append_eod:
            ids.append(tokenizer.eod)
            lengths[-1] += 1
        builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("kind", ["hf", "sp"])
@pytest.mark.parametrize("append_eod", [False, True])
def test_bytes_are_those_of_the_slow_tool(tmp_path, tokenizers, kind, append_eod):
    documents = DOCUMENTS * 130  # several groups of lines
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    tokenizer = build_tokenizer(None, str(tokenizers[kind]))
    report = preprocess(
        [str(source)], str(tmp_path / "ours"), tokenizer, append_eod=append_eod, workers=3, log_interval=0
    )
    megatrons_slow_way(documents, tokenizer, append_eod, tmp_path / "theirs")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours_text_document{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert report.documents_in == report.documents_out == len(documents)
    assert report.input_bytes == source.stat().st_size


def test_several_files_gzip_globs_and_keys(tmp_path, tokenizers):
    rows = [{"text": text, "title": f"title {i}", "n": float("nan")} for i, text in enumerate(TEXTS)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "b.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines[2:]).rstrip("\n").encode()))
    tokenizer = build_tokenizer(None, str(tokenizers["hf"]))
    preprocess(
        [str(tmp_path / "b.jsonl"), str(tmp_path / "*.gz")], str(tmp_path / "o"), tokenizer, json_keys=("text", "title")
    )
    texts, titles = (IndexedDataset(str(tmp_path / f"o_{key}_document")) for key in ("text", "title"))
    assert [tokenizer.decode(texts[i]) for i in range(5)] == TEXTS
    assert tokenizer.decode(titles[4]) == "title 4"
    preprocess([str(tmp_path)], str(tmp_path / "all"), tokenizer)
    assert IndexedDataset(str(tmp_path / "all_text_document")).documents == 5


BAD = {
    "not JSON": (b'{"text": "a"\n', "not JSON"),
    "missing key": (b'{"txt": "a"}\n', "key 'text' is missing"),
    "null": (b'{"text": null}\n', "'text' is null"),
    "number": (b'{"text": 3}\n', "'text' is a number"),
    "nested list": (b'{"text": [["a"]]}\n', "'text' is a list"),
    "a list": (b'["text"]\n', "a JSON object is expected"),
    "blank": (b"\n", "blank"),
    "spaces": (b"   \r\n", "blank"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}\n', "not UTF-8"),
    "byte-order mark": (b'\xef\xbb\xbf{"text": "a"}\n', "byte-order mark"),
    "half a surrogate": (b'{"text": "\\ud800"}\n', "surrogate"),
    "two objects": (b'{"text": "a"}{"text": "b"}\n', "not JSON"),
    "cut": (b'{"text": "a', "not JSON"),
    "binary": (bytes(range(128, 256)) + b"\n", "not UTF-8"),
    "deep": (b"[" * 100_000 + b"\n", "not JSON"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, tokenizers, name, capsys):
    content, message = BAD[name]
    good = b'{"text": "fine"}\n'
    (tmp_path / "in.jsonl").write_bytes(good * 3 + content + (b"" if name == "cut" else good * 700))
    arguments = [
        "--input",
        str(tmp_path / "in.jsonl"),
        "--output-prefix",
        str(tmp_path / "out"),
        "--tokenizer-model",
        str(tokenizers["hf"]),
        "--workers",
        "2",
        "--log-interval",
        "0",
    ]
    assert main(arguments) == 3
    output = capsys.readouterr()
    assert message in output.err and "in.jsonl:4" in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert main([*arguments, "--on-error", "skip"]) == 0
    output = capsys.readouterr()
    count = 3 if name == "cut" else 703
    assert f"documents: {count + 1:,} in = {count:,} out + 1 skipped" in output.out and "in.jsonl:4: " in output.err
    assert IndexedDataset(str(tmp_path / "out_text_document")).documents == count


@pytest.mark.heavy
def test_bad_lines_of_many_groups_are_counted_and_the_first_is_reported(tmp_path, tokenizers, capsys):
    lines = [b'{"text": "fine"}\n' if i % 10 else b"bad\n" for i in range(1, 3001)]
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    tokenizer = build_tokenizer(None, str(tokenizers["hf"]))
    report = preprocess(
        [str(tmp_path / "in.jsonl")], str(tmp_path / "o"), tokenizer, workers=3, on_error="skip", log_interval=0
    )
    assert (report.documents_in, report.documents_out, report.skipped, len(report.bad)) == (3000, 2700, 300, 20)
    with pytest.raises(DataError, match="in.jsonl:10"):
        preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "p"), tokenizer, workers=3, log_interval=0)


@pytest.mark.parametrize("content,message", [(b"", "holds no document"), (b"bad\nbad\n", "all 2 documents are bad")])
def test_input_without_documents(tmp_path, tokenizers, content, message):
    (tmp_path / "in.jsonl").write_bytes(content)
    tokenizer = build_tokenizer(None, str(tokenizers["hf"]))
    with pytest.raises(DataError, match=message):
        preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "o"), tokenizer, on_error="skip", log_interval=0)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_cut_gzip_file(tmp_path, tokenizers):
    rng = np.random.default_rng(0)
    rows = "".join(json.dumps({"text": str(rng.integers(0, 10**9))}) + "\n" for _ in range(5000))
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(rows.encode())[:-2000])
    with pytest.raises(DataError, match=r"in.jsonl.gz:\d+"):
        preprocess(
            [str(tmp_path / "in.jsonl.gz")],
            str(tmp_path / "o"),
            build_tokenizer(None, str(tokenizers["hf"])),
            log_interval=0,
        )


def test_a_text_the_tokenizer_refuses_is_a_bad_line(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "1 2"}\n{"text": "x"}\n{"text": "3"}\n')
    tokenizer = build_tokenizer("NullTokenizer", None, vocab_size=100)
    report = preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "o"), tokenizer, on_error="skip", append_eod=True)
    assert (report.documents_out, report.skipped) == (2, 1)
    data = IndexedDataset(str(tmp_path / "o_text_document"))
    assert [data[i].tolist() for i in range(2)] == [[1, 2, 99], [3, 99]]
    with pytest.raises(DataError, match="in.jsonl:2|numbers only"):
        preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "p"), tokenizer)


@pytest.mark.heavy
def test_blocks_in_flight_are_limited(tmp_path, tokenizers, monkeypatch):
    """The reader never runs far ahead of the writer: memory does not grow with the input."""
    from megatron_telechat.data.text import preprocess as module
    from megatron_telechat.data.text import readers

    source = write_jsonl(tmp_path / "in.jsonl", ["word"] * 20_000)
    read, ahead = [0], []

    def counting(parts, keys):
        for block in readers.read_blocks(parts, keys, size=4096):
            read[0] += 1
            yield block

    written = module.Workspace.add

    def watching(self, *arguments):
        ahead.append(read[0] - len(ahead))
        return written(self, *arguments)

    monkeypatch.setattr(module, "read_blocks", counting)
    monkeypatch.setattr(module.Workspace, "add", watching)
    preprocess(
        [str(source)], str(tmp_path / "o"), build_tokenizer(None, str(tokenizers["hf"])), workers=2, log_interval=0
    )
    assert len(ahead) > 50 and max(ahead) <= 8


def test_end_of_document_that_the_tokenizer_lacks(tmp_path, tokenizers):
    tokenizer = build_tokenizer(None, str(tokenizers["hf"]))
    tokenizer.eod = None
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(ConfigError, match="end-of-document"):
        preprocess([str(source)], str(tmp_path / "o"), tokenizer, append_eod=True)


@pytest.mark.heavy
def test_the_command(tmp_path, tokenizers):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS * 50)

    def run(*arguments):
        command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run(
        "--input",
        str(source),
        "--output_prefix",
        str(tmp_path / "o"),
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(tokenizers["hf"]),
        "--append-eod",
        "--workers",
        "2",
        "--log-interval",
        "100",
    )
    assert done.returncode == 0, done.stderr
    assert "documents: 250 in = 250 out + 0 skipped" in done.stdout and "documents/s" in done.stderr
    assert IndexedDataset(str(tmp_path / "o_text_document")).tokens[-1] == 2
    refused = run("--input", str(source), "--output-prefix", "x", "--split-sentences")
    assert (
        refused.returncode == 2
        and "--split-sentences is refused" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    missing = run("--input", str(tmp_path / "no"), "--output-prefix", "x", "--tokenizer-model", str(tokenizers["hf"]))
    assert missing.returncode == 3 and "no input file matches" in missing.stderr
    unknown = run("--input", str(source), "--output-prefix", "x", "--wrokers", "2")
    assert unknown.returncode == 2 and "--wrokers" in unknown.stderr
