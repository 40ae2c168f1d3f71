"""data_path, data.json and split."""

from __future__ import annotations

import json

import pytest

from megatron_telechat.config.schema import DataConfig
from megatron_telechat.data.blend import Blend, data_plan, parse_blend, read_data_json, split_shares
from megatron_telechat.errors import ConfigError, DataError


@pytest.mark.parametrize(
    "items,expected",
    [
        (("a",), Blend(("a",))),
        (("a.bin", "b.idx"), Blend(("a", "b"))),
        (("0.7", "a", "0.3", "b"), Blend(("a", "b"), (0.7, 0.3))),
        (("1", "a"), Blend(("a",), (1.0,))),
    ],
)
def test_blends(items, expected):
    assert parse_blend(items, "data_path") == expected


@pytest.mark.parametrize(
    "items",
    [
        ("0.7", "a", "b"),
        ("0.7", "a", "b", "c"),
        ("0", "a", "1", "b"),
        ("-1", "a"),
        ("nan", "a"),
        ("inf", "a", "1", "b"),
    ],
)
def test_bad_blends(items):
    with pytest.raises(ConfigError):
        parse_blend(items, "data_path")


def test_data_json_counts_copies_and_looks_beside_itself(tmp_path):
    (tmp_path / "en.idx").touch()
    file = tmp_path / "data.json"
    file.write_text(json.dumps({"en": 2, "/far/zh": 0.5}))
    assert read_data_json(str(file)) == Blend((str(tmp_path / "en"), "/far/zh"), (2.0, 0.5), per_token=True)


@pytest.mark.parametrize(
    "content,message",
    [
        ("[1]", "form"),
        ("{}", "form"),
        ('{"a": "x"}', "form"),
        ('{"a": true}', "form"),
        ("{", "not JSON"),
        ('{"a.jsonl": 1}', "raw text"),
    ],
)
def test_bad_data_json(tmp_path, content, message):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_data_json(str(tmp_path / "data.json"))


def test_missing_data_json():
    with pytest.raises(DataError, match="cannot read"):
        read_data_json("/nowhere/data.json")


def test_shares():
    assert split_shares("80,20") == ((0.0, 0.8), (0.8, 1.0), None)
    assert split_shares("1,0,1") == ((0.0, 0.5), None, (0.5, 1.0))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan"])
def test_bad_split(split):
    with pytest.raises(ConfigError):
        split_shares(split)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"data_path": ("a",), "data_json": "b.json"},
        {"data_path": ("a",), "train_data_path": ("b",)},
        {"data_path": ("a",), "valid_data_path": ("b",)},
    ],
)
def test_contradictions(data):
    with pytest.raises(ConfigError):
        data_plan(DataConfig(**data))


def test_own_validation_data():
    plan = data_plan(DataConfig(train_data_path=("1", "a", "2", "b"), valid_data_path=("v",)))
    assert plan.blends == (Blend(("a", "b"), (1.0, 2.0)), Blend(("v",)), None)
    assert plan.shares == ((0.0, 1.0), (0.0, 1.0), None)
