"""What watches a run: hangs, spikes, skipped steps, trackers."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.trace import step_windows
from megatron_telechat.errors import Problem

HANG, COLLECTIVE = "hang_timeout_minutes", "distributed_timeout_minutes"
SMALLEST_WINDOW = 8
TRACKER_OPTIONS = (
    ("wandb_exp_name", "wandb_project"),
    ("mlflow_run_name", "mlflow_experiment"),
    ("mlflow_tracking_uri", "mlflow_experiment"),
    ("swanlab_exp_name", "swanlab_project"),
    ("swanlab_mode", "swanlab_project"),
)
"""Options of a tracker, and what switches it on."""


def hang_is_seen_before_collectives_end(check: Check) -> Iterator[Problem]:
    """A collective that runs out of time first ends the ranks with an error that names nobody."""
    hang, collective = check.take(HANG, COLLECTIVE)
    if hang is not None and hang >= collective:
        yield check.problem(
            f"{HANG}={hang:g} is not below {COLLECTIVE}={collective:g}: the collectives would run out of time first, "
            "and their error names no rank",
            HANG,
            COLLECTIVE,
            fix=f"{flag(HANG, f'{0.8 * collective:g}')}, or 0 for no limit of its own",
        )


def skipped_steps_are_steps(check: Check) -> Iterator[Problem]:
    """iterations_to_skip names steps and ranges of steps."""
    texts = check.take("iterations_to_skip")
    try:
        step_windows(texts)
    except ValueError as error:
        shown = " ".join(map(str, texts))
        yield check.one(f"iterations_to_skip={shown} names no steps", "iterations_to_skip", fix=str(error))


def spikes_have_a_window(check: Check) -> Iterator[Problem]:
    """A standard deviation of a few steps says nothing."""
    window = check.take("spike_window")
    if window < SMALLEST_WINDOW:
        yield check.one(
            f"spike_window={window} is too short", "spike_window", fix=f"at least {SMALLEST_WINDOW}; off: {_NO_SPIKES}"
        )


def straggler_factor_is_above_one(check: Check) -> Iterator[Problem]:
    """Half of all ranks are above the median."""
    factor = check.take("straggler_factor")
    if 0 < factor <= 1:
        yield check.one(
            f"straggler_factor={factor:g} is not above 1", "straggler_factor", fix="such as 1.5; 0: nobody is named"
        )


def tracker_options_need_their_tracker(check: Check) -> Iterator[Problem]:
    """An option of a tracker that is not switched on logs nowhere."""
    for option, switch in TRACKER_OPTIONS:
        value, project = check.take(option, switch)
        if value is not None and project is None:
            yield check.problem(f"{option} without {switch} logs nowhere", option, fix=flag(switch, "NAME"))


_NO_SPIKES = flag("spike_threshold", 0)

RULES: tuple[Rule, ...] = (
    hang_is_seen_before_collectives_end,
    skipped_steps_are_steps,
    spikes_have_a_window,
    straggler_factor_is_above_one,
    tracker_options_need_their_tracker,
)
