"""One dataset under two names: whatever the spelling, the links and the copies, it is refused before anything
starts."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.data_names import same_data
from megatron_telechat.errors import DataError
from tests.config.test_bad_configurations import refusal

TINY = ["--preset", "telechat2-tiny"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch) -> Path:
    """Datasets a and b, jsonl files a and b, and for each the same data under other names."""
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.bin").write_bytes(bytes([number]) * 300_000)
        (tmp_path / f"{name}.idx").write_bytes(bytes([7 + number]) * 1000)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}) + "\n")
    (tmp_path / "far").mkdir()
    for suffix in (".bin", ".idx", ".jsonl"):
        (tmp_path / f"symbolic{suffix}").symlink_to(tmp_path / f"a{suffix}")
        os.link(tmp_path / f"a{suffix}", tmp_path / f"hard{suffix}")
        shutil.copy(tmp_path / f"a{suffix}", tmp_path / "far" / f"copy{suffix}")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OTHERS = ["a", "./a", "far/../a", "folder/a", "symbolic", "hard", "far/copy"]


@pytest.mark.parametrize("other", [*OTHERS, "a.bin", "a.idx", "{absolute}/a"])
def test_a_dataset_named_twice_is_refused(data, other):
    other = other.format(absolute=data)
    for command in (["--data-path", "0.5", "a", "0.2", "b", "0.3", other], ["--data-path", "a", "b", other]):
        for dry in ([], ["--dry-run"]):
            text = refusal([*TINY, *command, *dry]).render()
            assert f"data_path names the same data more than once: a, {other}" in text and "name it once" in text
    (data / "data.json").write_text(json.dumps({"a": 1, "b": 2, "a.bin" if other == "a" else other: 1}))
    assert "data_json names the same data more than once" in refusal([*TINY, "--data-json", "data.json"]).render()


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_dialogs_named_twice_is_refused(data, other):
    (data / "tokenizer.json").write_text("{}")
    flags = [
        *TINY,
        "--sft",
        "--tokenizer-model",
        "tokenizer.json",
        "--data-path",
        "a.jsonl",
        "b.jsonl",
        f"{other}.jsonl",
    ]
    assert f"names the same data more than once: a.jsonl, {other}.jsonl" in refusal(flags).render()


@pytest.mark.parametrize("other", [*OTHERS, "a.bin"])
def test_validation_data_that_is_trained_on_is_refused(data, other):
    for valid in ([other], ["1", "b2", "2", other]):
        for suffix in (".bin", ".idx"):
            (data / f"b2{suffix}").write_bytes(b"x" * 10)
        flags = [*TINY, "--train-data-path", "1", "a", "1", "b", "--valid-data-path", *valid]
        text = refusal(flags).render()
        assert f"{other} is used for both training and validation" in text and "--split 99,1" in text


def test_a_name_twice_in_data_json_is_refused_and_not_the_last_one_taken(data):
    (data / "data.json").write_text('{"a": 1.0, "b": 1.0, "a": 3.0}')
    assert "names a more than once" in refusal([*TINY, "--data-json", "data.json"]).render()
    (data / "data.json").write_text('{"a": 1.0, ')
    assert "is not JSON" in refusal([*TINY, "--data-json", "data.json"]).render()


def test_other_data_is_left_in_peace(data):
    """Also where sizes agree: a and b do; and c, whose tokens are those of a and whose documents are others."""
    shutil.copy("a.bin", "c.bin")
    (data / "c.idx").write_bytes(b"z" * 1000)
    load_run_config([*TINY, "--data-path", "a", "b", "c"], {})
    load_run_config([*TINY, "--train-data-path", "a", "--valid-data-path", "b", "--eval-interval", "5"], {})
    assert same_data(["a", "b", "nowhere", "elsewhere"]) == []


def test_all_names_of_one_dataset_are_one_complaint(data):
    (found,) = same_data(["b", "a", "symbolic", "far/copy"])
    assert found.names == ("a", "symbolic", "far/copy") and found.how == "copies of the same bytes"
    (found,) = same_data(["a", "b", "hard"])
    assert found == (("a", "hard"), "one file")


def test_a_packed_copy_of_dialogs_is_found_when_it_is_encoded(tmp_path):
    from megatron_telechat.data.datasets import prepare_index
    from tests.data.chat_material import chat_run, numbered, write_lines

    plain = write_lines(tmp_path / "d.jsonl", numbered(20))
    with gzip.open(tmp_path / "d.jsonl.gz", "wb") as file:
        file.write(Path(plain).read_bytes())
    with pytest.raises(DataError, match="same data, and would be read twice: .*d.jsonl, .*d.jsonl.gz"):
        prepare_index(chat_run(tmp_path, plain, f"{plain}.gz"))


def test_merging_a_dataset_with_itself_is_refused(tmp_path):
    from megatron_telechat.data.indexed.merge import plan_merge
    from tests.data.material import write_dataset

    write_dataset(tmp_path / "a", 5)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match="one dataset under several names"):
        plan_merge([str(tmp_path / "a"), str(tmp_path / "link")], str(tmp_path / "out"))
