"""Reading balance problems: what is no problem gets an error that names the key."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from megatron_telechat.errors import EXIT_CONFIG, ConfigError
from megatron_telechat.planner.problem import BalanceProblem

EXAMPLES = json.loads((Path(__file__).parent / "solved_problems.json").read_text())
GOOD = EXAMPLES[3]["problem"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: one["name"])
def test_round_trip(example):
    problem = BalanceProblem.from_json(example["problem"])
    assert BalanceProblem.from_json(json.dumps(problem.to_json())) == problem


def changed(path: str, value: object) -> dict:
    data = copy.deepcopy(GOOD)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at = data
    for part in parents:
        at = at[part]
    if value is KeyError:
        del at[last]
    else:
        at[last] = value
    return data


@pytest.mark.parametrize(
    "path, value, named",
    [
        ("P", KeyError, "P"),
        ("P", 0, "P = 0"),
        ("V", 1.5, "V = 1.5"),
        ("m", "8", "m = '8'"),
        ("m", True, "m = True"),
        ("m", 10**9, "operations"),
        ("mem_limit", -1, "mem_limit = -1"),
        ("mem_limit", float("nan"), "mem_limit = nan"),
        ("p2p", None, "p2p = None"),
        ("groups", [], "groups"),
        ("groups", {}, "groups"),
        ("groups.0.count", 0, r"groups\[0\].count"),
        ("groups.0.f", -5, r"groups\[0\].f = -5"),
        ("groups.0.modes", [], r"groups\[0\].modes"),
        ("groups.0.modes.1.ws", KeyError, r"groups\[0\].modes\[1\] lacks ws"),
        ("groups.0.modes.1.act", float("inf"), r"modes\[1\].act"),
        ("groups.0.modes.0.name", 3, r"modes\[0\].name"),
        ("embed", KeyError, "embed"),
        ("embed", None, "embed"),
        ("head.b", KeyError, "head lacks b"),
        ("mtp.f", "x", "mtp.f"),
        ("mtp", 3, "mtp is int"),
        ("min_layers", -1, "min_layers = -1"),
        ("colour", 1, "colour"),
        ("group_size", 1.5, "group_size = 1.5"),
        ("group_size", GOOD["P"] - 1, f"group_size = {GOOD['P'] - 1}"),
        ("group_size", GOOD["m"] + 1, f"group_size = {GOOD['m'] + 1}"),
        ("head.colour", 1, "head has unknown keys: colour"),
    ],
)
def test_bad_problems_name_the_key(path, value, named):
    with pytest.raises(ConfigError, match=named) as caught:
        BalanceProblem.from_json(changed(path, value), where="problem.json")
    assert caught.value.exit_code == EXIT_CONFIG
    assert "problem.json" in str(caught.value)
    assert all(problem.fix for problem in caught.value.problems)


@pytest.mark.parametrize("data", ["{", "[]", "3", "null"])
def test_what_is_no_object(data):
    with pytest.raises(ConfigError):
        BalanceProblem.from_json(data)


def test_virtual_stages_need_a_pipeline():
    with pytest.raises(ConfigError, match="P = 1"):
        BalanceProblem.from_json({**GOOD, "P": 1})


def test_groups_of_microbatches():
    good = {**GOOD, "P": 2, "V": 2, "m": 8}
    assert BalanceProblem.from_json(good).schedule == (2, 2, 8, 2)
    problem = BalanceProblem.from_json({**good, "group_size": 3})
    assert problem.schedule == (2, 2, 8, 3) and BalanceProblem.from_json(problem.to_json()) == problem
    with pytest.raises(ConfigError, match="group_size = 3 with V = 1"):
        BalanceProblem.from_json({**good, "V": 1, "group_size": 3})


def test_mtp_is_optional_and_may_be_null():
    without = {key: value for key, value in GOOD.items() if key != "mtp"}
    assert BalanceProblem.from_json({**without, "mtp": None}) == BalanceProblem.from_json(without)
