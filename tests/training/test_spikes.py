"""Spikes by OLMo-core's rule: more than six standard deviations above the mean of the last 128 steps."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from megatron_telechat.config.trace import step_windows
from megatron_telechat.training.spikes import SpikeWindow


def curve(steps: int, seed: int = 0) -> list[float]:
    noise = random.Random(seed)
    return [3.0 + noise.gauss(0, 0.05) for _ in range(steps)]


def test_a_jump_is_a_spike_and_noise_is_none():
    window = SpikeWindow(128, 6.0)
    values = curve(200)
    values[150] += 1.0
    found = [(step, spike) for step, value in enumerate(values) for spike in window.observe(value, None)]
    assert [step for step, _ in found] == [150]
    spike, before = found[0][1], np.array(values[22:150])
    assert spike.mean == pytest.approx(before.mean()) and spike.deviation == pytest.approx(before.std(ddof=1))
    assert spike.deviations == pytest.approx((values[150] - before.mean()) / before.std(ddof=1))
    assert "step 151  spike: loss" in spike.line(151, 128) and spike.event(151)["of"] == "loss"


def test_gradient_norms_are_watched_and_falls_are_no_spikes():
    window = SpikeWindow(16, 6.0)
    for value in curve(16):
        window.observe(3.0, value)
    assert window.observe(9.0, -9.0) == [], "a loss that never moved has no deviation, and a norm may fall"
    (spike,) = window.observe(3.0, 1e3)
    assert spike.of == "grad_norm"


@pytest.mark.parametrize("threshold, filled", [(0.0, 64), (6.0, 3)])
def test_nothing_is_reported_when_off_or_before_half_a_window(threshold, filled):
    window = SpikeWindow(8, threshold)
    for value in curve(filled):
        window.observe(value, value)
    assert window.observe(1e6, 1e6) == []


def test_steps_that_were_not_taken_and_numbers_that_are_not_finite_stay_out():
    window = SpikeWindow(8, 6.0)
    window.observe(None, None)
    window.observe(float("nan"), float("inf"))
    assert window.extra == {"spike_window": {"loss": [], "grad_norm": []}}


def test_a_resume_goes_on_with_the_same_window():
    """Through JSON, as a checkpoint keeps it; another length keeps the newest values."""
    whole, values = SpikeWindow(32, 2.0), curve(100, seed=3)
    halves, found = SpikeWindow(32, 2.0), {"whole": [], "halves": []}
    for step, value in enumerate(values):
        if step == 50:
            halves = SpikeWindow.of(32, 2.0, json.loads(json.dumps(halves.extra)))
        found["whole"] += [spike.event(step) for spike in whole.observe(value, value)]
        found["halves"] += [spike.event(step) for spike in halves.observe(value, value)]
    assert found["whole"] == found["halves"] and found["whole"], "a low threshold, so that there are some"
    shorter = SpikeWindow.of(8, 2.0, whole.extra)
    assert shorter.extra["spike_window"]["loss"] == values[-8:]
    assert SpikeWindow.of(8, 2.0, {}).extra["spike_window"]["loss"] == []


@pytest.mark.parametrize("texts", [("3-4,7",), ("3-4", "7"), ("3", "4", "7"), ("3,4,", "7-7")])
def test_windows_of_steps_are_typed_as_one_likes(texts):
    """Megatron-LM's list of steps, and ranges."""
    assert [step for window in step_windows(texts) for step in window] == [3, 4, 7]
