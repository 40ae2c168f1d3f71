"""Counts that travel behind hidden states, and come back as totals behind gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_telechat.config import load_run_config
from megatron_telechat.moe.pooled import ChoicePool, carried_rows, pools_of

ALONE: Any = SimpleNamespace(size=lambda: 1)
"""A group of one rank."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_count_arrives_as_it_was(dtype):
    counts = torch.tensor([0, 1, 255, 256, 65_537, 2**31 + 129, 2**47 + 12_345, 2**48 - 9])
    first, last = ChoicePool(3, 8, 2), ChoicePool(3, 8, 2)
    first.note(1, counts)
    first.note(1, counts + 1)  # the second pass of a recomputed layer
    hidden = torch.randn(5, 2, 16, dtype=dtype, requires_grad=True)
    sent = first.hand_on(hidden)
    assert sent.shape == (7, 2, 16) and sent.dtype == dtype and sent[:5].equal(hidden)
    arrived = sent.detach().requires_grad_()
    inside = last.receive(arrived)
    assert inside.equal(hidden)
    last.note(2, torch.arange(8))
    last.note(3, torch.ones(8, dtype=torch.long))
    last.complete(ALONE)
    right = counts + torch.arange(8) + 1
    assert last.totals is not None and last.totals.equal(right)
    inside.backward(torch.full_like(inside, 3.0))
    sent.backward(arrived.grad)
    assert first.totals is not None and hidden.grad is not None
    assert first.totals.equal(right) and hidden.grad.equal(torch.full_like(hidden, 3.0))


def test_rows_are_sent_where_stages_must_know_of_each_other():
    def run(*flags: str):
        return load_run_config(["--preset", "telechat2-tiny-moe", "--mock-data", "--dry-run", *flags], {}).run

    stages, hf = ("--pipeline-model-parallel-size", "2", "--world-size", "2"), ("--moe-aux-loss-formula", "hf")
    # 16 experts of 6 digits; a row holds micro-batch x hidden
    narrow = ("--hidden-size", "32", "--kv-channels", "4", "--micro-batch-size", "1", "--global-batch-size", "2")
    assert carried_rows(run(*hf, *stages, *narrow)) == 3
    for others in (hf, stages, (*hf, *stages, "--moe-aux-loss-coeff", "0")):
        assert carried_rows(run(*others)) == 0
    assert pools_of(run(*stages)) is None
    pool = pools_of(run(*hf, "--moe-layer-freq", "2"))
    assert pool is not None and pool().layers == 2
