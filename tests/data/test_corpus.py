"""The corpus every machine can build, and the sample written for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_telechat.data.text.sample_corpus import SAMPLE, build_corpus, sample_texts
from tests.harness import ROOT


def test_the_sample_is_bilingual_and_well_formed():
    entries = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    texts = [entry["text"] for entry in entries]
    assert len(texts) == len(set(texts)) >= 150
    for entry in entries:
        han = sum("\u4e00" <= letter <= "\u9fff" for letter in entry["text"])
        assert (han > 60) if entry["lang"] == "zh" else (han == 0 and len(entry["text"].split()) > 40)


@pytest.mark.heavy
def test_corpus_and_tokenizer_from_the_command_line(tmp_path):
    def tool(name, *arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / name), *arguments],
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        ).stdout

    printed = tool("build_corpus.py", "--output", str(tmp_path), "--max-mb", "0.6")
    sizes = {name: (tmp_path / f"{name}.jsonl").stat().st_size for name in ("en", "zh", "code")}
    assert all(f"{name}.jsonl" in printed for name in sizes) and sum(sizes.values()) < 0.8e6
    for name in sizes:
        texts = [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").open(encoding="utf-8")]
        assert len(texts) > 3 and len(set(texts)) == len(texts)
    han = sum("\u4e00" <= letter <= "\u9fff" for letter in (tmp_path / "zh.jsonl").read_text(encoding="utf-8"))
    assert han > 8000
    printed = tool(
        "train_tokenizer.py",
        "--input",
        str(tmp_path / "*.jsonl"),
        "--vocab-size",
        "1000",
        "--output",
        str(tmp_path / "tokenizer.json"),
    )
    assert "1,000 ids" in printed


@pytest.mark.heavy
def test_the_same_machine_gives_the_same_corpus(tmp_path):
    for name in ("a", "b"):
        build_corpus(tmp_path / name, 0.2)
    for part in ("en", "zh", "code"):
        assert (tmp_path / "a" / f"{part}.jsonl").read_bytes() == (tmp_path / "b" / f"{part}.jsonl").read_bytes()


def test_the_sample_starts_both_languages(tmp_path):
    build_corpus(tmp_path, 0.2)
    first = json.loads((tmp_path / "zh.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    assert first == next(sample_texts("zh"))
