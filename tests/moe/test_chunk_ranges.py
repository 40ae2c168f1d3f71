"""How the input is cut, and the model of events that says what that is worth."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.errors import ConfigError
from megatron_telechat.moe import autotune
from megatron_telechat.moe.autotune import max_chunks
from megatron_telechat.moe.chunks import chunk_ranges
from megatron_telechat.moe.overlap_model import PassCosts, backward_ms, fillings, forward_ms, ideal_ms, predicted_ms


@pytest.mark.parametrize("tokens", (0, 1, 2, 5, 37, 1000, 1024))
@pytest.mark.parametrize("chunks", (1, 2, 3, 4, 7, 50))
def test_ranges_tile_the_tokens(tokens, chunks):
    ranges = chunk_ranges(tokens, chunks)
    assert len(ranges) == chunks and ranges[0].start == 0 and ranges[-1].stop == tokens
    assert all(before.stop == after.start for before, after in zip(ranges, ranges[1:], strict=False))
    sizes = [stop - start for start, stop in ranges]
    assert min(sizes) >= 0
    inner = sizes[1:-1] if chunks > 2 else sizes
    if inner and tokens:
        assert max(inner) - min(inner) <= 1
        assert all(abs(2 * sizes[end] - max(inner)) <= 2 for end in (0, -1)) or chunks < 3


def test_no_chunk_is_refused():
    with pytest.raises(ConfigError, match="0 pieces"):
        chunk_ranges(8, 0)


def test_model_of_one_chunk_is_a_plain_sum():
    costs = PassCosts(compute=10.0, per_chunk=1.0, link=6.0, per_transfer=0.5)
    assert forward_ms(costs, 1) == pytest.approx(10 + 1 + 6 + 2 * 0.5)
    # the way back of the gradients hides behind those of the weights, 5.5 of the 11
    assert backward_ms(costs, 1) == pytest.approx(3.5 + 11)


def test_model_comes_to_the_ideal_without_fixed_costs():
    for link in (2.0, 10.0, 35.0):
        forward = PassCosts(10.0, 0.0, link, 0.0)
        backward = PassCosts(20.0, 0.0, link, 0.0)
        ideal = ideal_ms(forward, backward)
        assert predicted_ms(forward, backward, 400) == pytest.approx(ideal, rel=0.01)
        times = [predicted_ms(forward, backward, k) for k in (1, 2, 4, 8, 16)]
        assert times[0] == max(times) and all(ideal * (1 - 1e-9) <= time for time in times)


@pytest.mark.parametrize(
    "compute, link, filled",
    (
        (12.0, 1.0, (0, 0, 0, 0)),  # no chunk has to be waited for but the first, before which there is nothing
        (12.0, 8.0, (0, 0, 0, 0)),  # a chunk is a little late: the gradients of weights would make it later
        (12.0, 24.0, (0, 1, 1, 0)),
        (12.0, 400.0, (0, 1, 1, 1)),
    ),
)
def test_weight_gradients_fill_waits_that_are_long_enough(compute, link, filled):
    assert fillings(PassCosts(compute, 0.0, link, 0.0), 4) == filled


def test_fixed_costs_end_the_gain():
    slow_start = PassCosts(10.0, 2.0, 4.0, 0.3)
    times = {k: predicted_ms(slow_start, slow_start, k) for k in (1, 2, 4, 8, 16)}
    assert min(times, key=times.get) in (1, 2)


def test_fit_finds_the_costs_it_was_made_from():
    known = PassCosts(compute=30.0, per_chunk=0.7, link=12.0, per_transfer=0.2)
    ks = (1, 8)
    compute = {k: sum(known.chunks_ms(k)) for k in ks}
    link = {k: 2 * sum(known.transfers_ms(k)) for k in ks}
    fitted = PassCosts.fit(compute, link)
    assert (fitted.compute, fitted.per_chunk, fitted.link, fitted.per_transfer) == pytest.approx((30.0, 0.7, 12.0, 0.2))


def test_fit_of_noise_keeps_costs_above_zero():
    fitted = PassCosts.fit({1: 10.0, 8: 9.0}, {1: 0.1, 8: 8.0})
    assert min(fitted.compute, fitted.per_chunk, fitted.link, fitted.per_transfer) >= 0.0


@pytest.mark.parametrize("tokens,expected", ((8, 1), (32, 1), (64, 2), (128, 3), (192, 4), (960, 16)))
def test_auto_leaves_the_smallest_chunk_enough_rows(tokens, expected):
    """One rank of two, 16 experts, top-4: an expert gets half as many rows as a rank has tokens, and wants 16 in each
    chunk."""
    router = SimpleNamespace(weight=torch.empty(0), topk=4, num_experts=16)
    block = SimpleNamespace(groups=SimpleNamespace(all=SimpleNamespace(size=lambda: 2)), router=router)
    assert max_chunks(block, tokens) == expected
    if expected > 1:
        sizes = [stop - start for start, stop in chunk_ranges(tokens, expected)]
        assert min(sizes) * 4 * 2 / 16 >= 16


@pytest.mark.parametrize("kind, dtype", [("npu", torch.float32), ("cuda", torch.float64), ("cpu", torch.float64)])
def test_times_are_compared_in_a_type_that_the_device_reduces(monkeypatch, kind, dtype):
    reduced = []
    monkeypatch.setattr(autotune, "traits_of", lambda device: DEVICE_KINDS[kind])
    monkeypatch.setattr(autotune, "_reduce", reduced.append)
    autotune._measure(None, [("block", 1), ("block", 2)], torch.device("cpu"))
    assert reduced and {values.dtype for values in reduced} == {dtype}
