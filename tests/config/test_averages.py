"""When averages of the weights begin and end, and what a person is told of them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_telechat.checkpoint.averages import require_average, resume_notes, saved_kinds
from megatron_telechat.config.averages import average_lines, first_window_end, window_begin
from megatron_telechat.config.schema import AverageConfig
from megatron_telechat.errors import CheckpointError

EMA = {"decay": 0.9, "since": 0, "updates": 12}
UNDER_WAY = {"steps": 5, "interval": 1, "first": 11, "averaged": 2}
BOTH: dict[str, Any] = {
    "averages": {"ema": EMA, "window": {"first": 6, "last": 10, "averaged": 5}, "window_under_way": UNDER_WAY}
}


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("start", range(12))
def test_the_first_window_is_the_first_that_lies_whole_behind_the_start(length, start):
    begins = [step for step in range(1, 40) if window_begin(step, length) == step]
    assert begins == list(range(1, 40, length))
    assert first_window_end(length, start) == next(step for step in begins if step > start) + length - 1


def test_what_is_averaged_in_words():
    assert list(average_lines(AverageConfig())) == []
    ema, window = average_lines(AverageConfig(0.999, 500, average_interval=10, average_start_step=100))
    assert ema == "ema: decay 0.999 every 10 steps from step 100 (a memory of 10,000 steps)"
    assert window == "window: the mean over each 500 steps, of the weights every 10 steps from step 100"


@pytest.mark.parametrize(
    ("average", "extra", "step", "told"),
    [
        (AverageConfig(), {}, 12, []),
        (AverageConfig(0.9, 5), BOTH, 12, []),
        (AverageConfig(0.99, 5), BOTH, 12, []),
        (AverageConfig(0.9, 5, average_start_step=20), {}, 12, []),
        (AverageConfig(), BOTH, 12, ["moving average of 12 updates is dropped; --ema-decay", "mean over a window is"]),
        (AverageConfig(0.9, 4), BOTH, 12, ["window under way has other steps and is dropped"]),
        (AverageConfig(0.9, 10, average_interval=5), BOTH, 12, ["window under way has other steps and is dropped"]),
        (AverageConfig(0.9), {}, 12, ["the moving average (ema) begins here"]),
        (AverageConfig(None, 5), {}, 12, ["holds no mean over a window; the next whole window"]),
        (AverageConfig(None, 5), {}, 0, []),
    ],
)
def test_what_a_resume_tells(average, extra, step, told):
    notes = list(resume_notes(average, extra, step))
    assert len(notes) == len(told)
    assert all(part in note for part, note in zip(told, notes, strict=True))


def test_an_average_that_is_not_there_is_named():
    assert saved_kinds(BOTH) == ("ema", "window", "window_under_way")
    require_average(BOTH, "window", "here")
    first = {"averages": {"ema": EMA, "window_under_way": {**UNDER_WAY, "averaged": 0}}}
    assert saved_kinds(first) == ("ema",)
    with pytest.raises(CheckpointError, match="no average window, but ema; its first window is not over"):
        require_average(first, "window", "here")
    with pytest.raises(CheckpointError, match="no average ema, but no average of the weights"):
        require_average({}, "ema", "here")
