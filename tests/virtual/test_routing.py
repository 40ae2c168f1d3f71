"""The routing of virtual ranks is that of the models they are held to: balanced, and every set of experts as likely."""

from __future__ import annotations

import math

import pytest

from megatron_telechat.virtual.routing import balanced_choices


@pytest.mark.parametrize("ranks, tokens, experts, topk", [(8, 4096, 8, 2), (2, 2048, 16, 4), (3, 1000, 16, 4)])
def test_choices_are_balanced_and_any_set_is_as_likely(ranks, tokens, experts, topk):
    chosen = balanced_choices(ranks, tokens, experts, topk)
    assert chosen.shape == (ranks, tokens, topk)
    assert (chosen.sort(dim=-1).values.diff(dim=-1) > 0).all(), "the experts of a token differ"
    counts = chosen.flatten().bincount(minlength=experts)
    assert counts.max() - counts.min() <= ranks * topk * (tokens % experts > 0)
    here = experts // 4
    reached = (chosen < here).any(dim=-1).float().mean().item()
    assert reached == pytest.approx(1 - math.comb(experts - here, topk) / math.comb(experts, topk), rel=0.02)
