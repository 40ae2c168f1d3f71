"""When a run saves beside its training: one decision of all ranks, and the dry run's words for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_telechat.cli import dry_run
from megatron_telechat.config import load_run_config
from megatron_telechat.config.schema import CheckpointConfig, RunConfig
from megatron_telechat.errors import ResourceError
from megatron_telechat.training import save_mode
from megatron_telechat.training.save_mode import decide_save_mode

GIB = 1 << 30


def decide(monkeypatch, mode: Any, ranks: list[tuple[str, int, int]], interval: int | None = 10, linux: bool = True):
    """Of ranks with a node, bytes and free bytes each."""
    everyone = [(node, linux, needed, free) for node, needed, free in ranks]
    monkeypatch.setattr(save_mode, "gather_objects", lambda value: everyone)
    checkpoint = CheckpointConfig(save_interval=interval, checkpoint_mode=mode)
    return decide_save_mode(replace(RunConfig(), checkpoint=checkpoint), 1)


ROOMY = [("a", GIB, 8 * GIB), ("a", GIB, 9 * GIB), ("b", GIB, 8 * GIB)]


@pytest.mark.parametrize(
    "mode, ranks, options, asynchronous, said",
    [
        ("auto", ROOMY, {}, True, "1.00 GiB of host memory a rank, 2.00 GiB of 8.00 GiB free on a node"),
        ("sync", ROOMY, {}, False, "training waits"),
        ("auto", ROOMY, {"interval": None}, False, "no --save-interval"),
        ("async", ROOMY, {"interval": None}, True, "beside the training"),
        ("auto", ROOMY, {"linux": False}, False, "copies need Linux"),
        ("auto", [("a", GIB >> 10, GIB)], {}, False, "1.0 MiB a rank; --checkpoint-mode async"),
        ("async", [("a", GIB >> 10, GIB)], {}, True, "beside the training"),
        ("auto", [("b", GIB, 9 * GIB), ("a", GIB, 3 * GIB), ("a", GIB, 3 * GIB)], {}, False, "more than 50%"),
        ("async", [("a", GIB, 3 * GIB), ("a", GIB, 3 * GIB)], {}, True, "2.00 GiB of 3.00 GiB"),
    ],
)
def test_the_decision(monkeypatch, mode, ranks, options, asynchronous, said):
    found = decide(monkeypatch, mode, ranks, **options)
    assert found.asynchronous is asynchronous and said in found.about


@pytest.mark.parametrize(
    "ranks, linux, said",
    [
        ([("n1", GIB, GIB), ("n1", GIB, GIB)], True, r"2.00 GiB of 1.00 GiB free on a node \(n1\)"),
        (ROOMY, False, "Linux"),
    ],
)
def test_what_was_asked_for_and_cannot_be(monkeypatch, ranks, linux, said):
    with pytest.raises(ResourceError, match=said) as caught:
        decide(monkeypatch, "async", ranks, linux=linux)
    assert caught.value.agreed and "--checkpoint-mode sync" in str(caught.value)


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            "--save-interval 100",
            "saved beside the training, from copies in host memory: about 12.4 GiB a rank, 99.3 GiB a node",
        ),
        ("--save-interval 100 --checkpoint-mode sync", "training waits while a checkpoint is written"),
        ("", "training waits while a checkpoint is written"),
        ("--checkpoint-mode async", "GiB a node; no device memory"),
        ("--save-interval 100", "GiB a node, if that is at most 50% of its free memory; no device memory"),
    ],
)
def test_the_dry_run_tells(flags, said):
    argv = f"--preset telechat2-7b --mock-data --train-iters 10 --tensor-model-parallel-size 2 {flags}".split()
    run = load_run_config(argv, {"WORLD_SIZE": "8"}).run
    assert said in dry_run._save_mode(run)
