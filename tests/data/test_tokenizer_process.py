"""A tokenizer opened by a helper process: the same answers whatever becomes of the helper, and no helper left
behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import closing

import psutil
import pytest

from megatron_telechat.cli.preprocess_data import main
from megatron_telechat.data.text import tokenizer_process
from megatron_telechat.data.text.self_check import HARD
from megatron_telechat.data.text.tokenizer_process import TokenizerBeside
from megatron_telechat.data.tokenizers import HuggingFaceTokenizer
from megatron_telechat.errors import DataError
from tests.data.material import TEXTS, write_jsonl
from tests.data.test_engines import files  # noqa: F401
from tests.harness import ROOT

FACTS = ("vocab_size", "eod", "bos", "pad", "affixes", "added_tokens", "splitting", "digest")


def helpers(process: psutil.Process | None = None) -> list[psutil.Process]:
    children = (process or psutil.Process()).children()
    return [child for child in children if "tokenizer_process" in " ".join(child.cmdline())]


def same(tokenizer: TokenizerBeside, other: HuggingFaceTokenizer) -> None:
    for name in FACTS:
        ours, theirs = getattr(tokenizer, name), getattr(other, name)
        assert (list(ours) if name == "affixes" else ours) == (list(theirs) if name == "affixes" else theirs), name
    texts = [*HARD, *TEXTS, "x" * 100_000]
    assert tokenizer.encode_batch(texts) == other.encode_batch(texts)
    assert tokenizer.encode("a b") == other.encode("a b") and tokenizer.decode([9, 8]) == other.decode([9, 8])


@pytest.mark.heavy
@pytest.mark.parametrize(
    "fate", ["lives", "killed at the start", "killed later", "stopped", "stopped later", "closed", "cannot start"]
)
@pytest.mark.parametrize("name", ["bos", "own"])
def test_answers_are_those_of_the_tokenizer(files, name, fate, monkeypatch):  # noqa: F811
    if "stopped" in fate:
        monkeypatch.setattr(tokenizer_process, "LIMIT_S", 0.5)
    if fate == "cannot start":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with closing(TokenizerBeside(files[name])) as tokenizer:
        helper = helpers()[0] if fate != "cannot start" else None
        if "later" in fate:
            monkeypatch.undo()
            assert tokenizer.vocab_size
            tokenizer._connection.settimeout(0.5)
        if "killed" in fate:
            helper.kill()
        if "stopped" in fate:
            helper.send_signal(signal.SIGSTOP)
        if fate == "closed":
            tokenizer.close()
        same(tokenizer, HuggingFaceTokenizer(files[name]))
        assert len(helpers()) == (fate == "lives")
    assert not helpers()


@pytest.mark.heavy
def test_what_is_wrong_with_the_file_is_said_as_ever(tmp_path, capsys):
    bad = tmp_path / "tokenizer.json"
    bad.write_text('{"model": 7}')
    with pytest.raises(DataError) as plain:
        HuggingFaceTokenizer(bad)
    with closing(TokenizerBeside(bad)) as tokenizer, pytest.raises(DataError) as found:
        _ = tokenizer.vocab_size
    assert str(found.value) == str(plain.value)
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    assert (
        main(
            [
                "--input",
                str(source),
                "--output-prefix",
                str(tmp_path / "o"),
                "--tokenizer-model",
                str(bad),
                "--workers",
                "2",
            ]
        )
        == 3
    )
    assert "is not a tokenizer.json" in capsys.readouterr().err and not helpers()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "tokenizer.json"]


def start(source, prefix, model) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "tools" / "preprocess_data.py"),
        "--input",
        str(source),
        "--output-prefix",
        str(prefix),
        "--tokenizer-model",
        str(model),
        "--workers",
        "2",
        "--log-interval",
        "0",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def helper_of(run: subprocess.Popen) -> psutil.Process:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if found := helpers(psutil.Process(run.pid)):
            return found[0]
    raise AssertionError("no helper")


@pytest.mark.heavy
def test_a_helper_that_dies_changes_nothing(tmp_path, files):  # noqa: F811
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS * 2000)
    whole = start(source, tmp_path / "whole", files["bos"])
    assert "engine gigatoken" in whole.communicate(timeout=120)[0] and whole.returncode == 0
    run = start(source, tmp_path / "o", files["bos"])
    helper_of(run).kill()
    assert "engine gigatoken" in run.communicate(timeout=120)[0] and run.returncode == 0
    for suffix in ("bin", "idx", "sums"):
        assert (tmp_path / f"o_text_document.{suffix}").read_bytes() == (
            tmp_path / f"whole_text_document.{suffix}"
        ).read_bytes()


@pytest.mark.heavy
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_no_helper_outlives_the_tool(tmp_path, files, death):  # noqa: F811
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS * 100_000)
    run = start(source, tmp_path / "o", files["bos"])
    helper = helper_of(run)
    run.send_signal(death)
    run.communicate(timeout=60)
    assert run.returncode == (-signal.SIGKILL if death == signal.SIGKILL else 75)
    helper.wait(timeout=20)
    assert not list(tmp_path.glob("o_*"))
