"""What the flags of local checkpoints must say together, and what the dry run tells of them."""

from __future__ import annotations

import pytest

from megatron_telechat.cli.dry_run import report
from megatron_telechat.config import load_run_config
from megatron_telechat.errors import ConfigError
from megatron_telechat.training.local_tier import mirrors_of

RUN = "--preset telechat2-tiny --mock-data --train-iters 100 --dry-run --world-size 8 --ranks-per-node 2".split()
LOCAL = (
    *("--non-persistent-save-interval", "5", "--non-persistent-ckpt-type", "local"),
    *("--non-persistent-local-ckpt-dir", "/nvme"),
)
MIRROR = (*LOCAL, "--replication", "--replication-jump", "2")


def load(*flags: str):
    return load_run_config([*RUN, *flags], {})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (LOCAL[:2], "without non_persistent_ckpt_type and non_persistent_local_ckpt_dir"),
        (LOCAL[2:], "without non_persistent_save_interval"),
        ((*LOCAL[:4], "--non-persistent-local-ckpt-dir", "s3://bucket/x"), "is a URL"),
        (("--non-persistent-save-interval", "0", *LOCAL[2:]), "non_persistent_save_interval=0"),
        ((*LOCAL[:2], "--non-persistent-ckpt-type", "global", *LOCAL[4:]), "local"),
        (("--non-persistent-global-ckpt-dir", "/x"), "--non-persistent-ckpt-type local"),
        (("--replication", "--replication-jump", "2"), "none are made"),
        ((*LOCAL, "--replication-jump", "2"), "copies nothing"),
        ((*LOCAL, "--replication"), "replication_jump is not set"),
        ((*LOCAL, "--replication", "--replication-jump", "1"), "on the same node"),
        ((*MIRROR, "--replication-factor", "1"), "holds no copy"),
        ((*MIRROR, "--replication-factor", "3"), "does not divide the 8 ranks"),
    ],
)
def test_flags_that_protect_nothing_are_refused(flags, says):
    with pytest.raises(ConfigError) as caught:
        load(*flags)
    assert says in caught.value.render()


@pytest.mark.parametrize(
    ("jump", "factor", "groups"),
    [
        (2, 2, [{0, 2}, {1, 3}, {4, 6}, {5, 7}]),
        (4, 2, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
        (2, 4, [{0, 2, 4, 6}, {1, 3, 5, 7}]),
    ],
)
def test_each_rank_is_copied_by_its_group(jump, factor, groups):
    """Each block of jump times factor ranks; as Megatron-LM says of its flags: n + J, n + 2J or n - J, n - 2J."""
    run = load(*LOCAL, "--replication", "--replication-jump", str(jump), "--replication-factor", str(factor)).run
    found = {frozenset({rank, *mirrors_of(rank, run)}) for rank in range(8)}
    assert found == {frozenset(group) for group in groups}


def test_the_dry_run_tells_what_they_take():
    line = next(line for line in report(load(*MIRROR)).splitlines() if "/nvme/" in line)
    assert "a local checkpoint every 5 steps, beside the training, with 1 copy on other nodes" in line
    assert "of host memory a rank" in line and "of a node's disk" in line
    assert "local checkpoint" not in report(load())
