"""Groups, coordinates, seeds and agreement over four real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_telechat.config.schema import ParallelConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.parallel.state import rank_seed
from megatron_telechat.parallel.topology import Topology
from tests.harness import ROOT, launch, run_cases
from tests.parallel.worker_state import LAYOUTS

HERE = Path(__file__).parent
AXES = ("tp", "cp", "dp", "pp", "ep", "etp", "edp")
GROUPS = {
    "tp": "tp",
    "pp": "pp",
    "dp": "dp",
    "cp": "cp",
    "ep": "ep",
    "etp": "etp",
    "edp": "edp",
    "dp_cp": "dp-cp",
    "mp": "tp-pp",
}


@pytest.fixture(scope="module")
def report():
    return run_cases(HERE / "worker_state.py", nproc=4)


@pytest.mark.gloo
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_coordinates_and_groups_are_those_of_the_topology(report, name):
    topology = Topology.from_config(ParallelConfig(world_size=4, **LAYOUTS[name]))
    for rank, found in enumerate(report.check(f"layout_{name}")):
        place = topology.coordinates(rank)
        assert found["coordinates"] == {axis: getattr(place, axis) for axis in AXES}
        assert found["sizes"] == {axis: topology.size(axis) for axis in AXES}
        for group, kind in GROUPS.items():
            expected = next(ranks for ranks in topology.groups(kind) if rank in ranks)
            assert found["groups"][group] == sorted(expected), group


@pytest.mark.gloo
def test_known_groups_of_two_by_two(report):
    found = report.check("layout_tp2_pp2_folded_into_ep2")
    assert [rank["groups"]["tp"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["groups"]["pp"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["groups"]["ep"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["groups"]["etp"] for rank in found] == [[0], [1], [2], [3]]


@pytest.mark.gloo
def test_stages_know_their_ends(report):
    assert [rank["ends"] for rank in report.check("layout_pp2")] == [[True, False, False]] * 2 + [
        [False, True, True]
    ] * 2
    # Two virtual stages a rank: the output layer is on the last virtual stage of the last rank only.
    interleaved = [rank["ends"] for rank in report.check("layout_pp2_interleaved")]
    assert interleaved == [[True, False, False]] * 2 + [[False, False, True]] * 2


@pytest.mark.gloo
def test_dropout_is_shared_over_tensor_ranks_only(report):
    drawn = [rank["draws"] for rank in report.check("layout_tp2_pp2")]
    default = [tuple(rank["default"]) for rank in drawn]
    assert default[0] == default[1] and default[2] == default[3] and default[0] != default[2]
    assert len({tuple(rank["model-parallel-rng"]) for rank in drawn}) == 4
    for name in ("default", "model-parallel-rng"):
        assert len({tuple(rank["draws"][name]) for rank in report.check("layout_dp4")}) == 4
    assert len({tuple(rank["draws"]["expert-parallel-rng"]) for rank in report.check("layout_ep2")}) == 4


@pytest.mark.gloo
def test_same_seed_gives_same_draws(report):
    for first, second in report.check("same_seed_same_draws"):
        assert first == second


@pytest.mark.gloo
def test_layout_that_does_not_fit_is_refused(report):
    for text in report.check("layout_that_does_not_fit"):
        assert text.startswith("ConfigError: config error: the layout does not fit the ranks")


@pytest.mark.gloo
def test_wrong_world_size_is_refused(report):
    for text in report.check("wrong_world_size"):
        assert "world_size is 8, but 4 rank(s) were started" in text


@pytest.mark.gloo
def test_a_rank_with_another_configuration_is_named_on_all(report):
    texts = report.check("another_configuration_on_one_rank")
    assert "configuration optimizer.lr is 0.5 on rank 2 and 0.0003 elsewhere" in texts[0]
    assert len(set(texts)) == 1


@pytest.mark.gloo
def test_agreement_names_what_differs(report):
    found = report.check("agreement")
    assert all(rank == found[0] for rank in found)
    values, keys, scalar = found[0]
    assert "weights a.1 is 9 on rank 3 (tp 1, pp 1, etp 1) and 2 elsewhere" in values and "a.0" not in values
    assert "keys b is 2 on rank 1 (tp 1, pp 0, etp 1) and nothing elsewhere" in keys
    assert "digest is 'y' on rank 0 (tp 0, pp 0, etp 0) and 'x' elsewhere" in scalar


@pytest.mark.gloo
def test_one_rank_fails_and_all_raise(report):
    found = report.check("one_rank_fails_and_all_raise")
    assert all(rank == found[0] for rank in found)
    user, ours = found[0]
    assert user.startswith("DataError") and "rank 1 (tp 1, pp 0, etp 1): cannot read the file    (data.bin)" in user
    assert "copy it again" in user
    assert ours == "RuntimeError: ranks 2, 3: KeyError: 'lost'"


@pytest.mark.gloo
@pytest.mark.parametrize("what", ["killed", "silent"])
def test_a_lost_rank_ends_the_others_with_a_message(what):
    # The time limit of a collective is 3 s; a silent rank sleeps 7 s.
    result = launch(HERE / "worker_killed.py", 3, what, timeout=90, grace=60)
    survivors = [rank for rank in result.ranks if rank.rank != 1]
    assert [rank.returncode for rank in survivors] == [6, 6], result.tails()
    for rank in survivors:
        assert "resource error: lost contact with another rank" in rank.stderr, result.tails()
        assert "distributed-timeout-minutes" in rank.stderr


@pytest.mark.heavy
def test_one_process_needs_no_launcher():
    code = (
        "from megatron_telechat import parallel\nfrom megatron_telechat.backend import get_backend\nfrom "
        "megatron_telechat.config.schema import RunConfig\nstate = parallel.initialize(RunConfig(), "
        "get_backend('cpu'))\nprint(state.world_size, state.is_first_stage(), "
        "state.is_last_stage())\nparallel.destroy()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 True True\n", "")


def test_half_an_environment_is_refused(monkeypatch):
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import RunConfig

    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"):
        parallel.initialize(RunConfig(), get_backend("cpu"))


def test_rank_seeds_do_not_collide():
    seeds = {rank_seed(1234, pp, dp, cp) for pp in range(8) for dp in range(64) for cp in range(2)}
    assert len(seeds) == 8 * 64 * 2
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert rank_seed(1, 0, 0, 0) != rank_seed(2, 0, 0, 0)
