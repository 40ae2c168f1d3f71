"""Rules of the learning-rate schedule and of the loss scale."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.errors import Problem


def rates_in_order(check: Check) -> Iterator[Problem]:
    """min_lr is at most lr."""
    lr, low = check.take("lr", "min_lr")
    if lr < low:
        yield check.problem(
            f"lr={lr:g} is less than min_lr={low:g}", "lr", "min_lr", fix=flag("min_lr", f"{lr / 10:g}")
        )


def warmup_starts_below(check: Check) -> Iterator[Problem]:
    """lr_warmup_init is at most lr."""
    lr, start = check.take("lr", "lr_warmup_init")
    if start > lr:
        yield check.problem(
            f"lr_warmup_init={start:g} is more than lr={lr:g}", "lr_warmup_init", "lr", fix=flag("lr_warmup_init", 0)
        )


def one_warmup(check: Check) -> Iterator[Problem]:
    """The warm-up is given in steps or as a fraction, not both."""
    steps, share = check.take("lr_warmup_iters", "lr_warmup_fraction")
    if steps and share is not None:
        yield check.problem(
            f"lr_warmup_iters={steps} and lr_warmup_fraction={share:g} both give the warm-up",
            "lr_warmup_iters",
            "lr_warmup_fraction",
            fix="keep one of them",
        )


def warmup_before_decay(check: Check) -> Iterator[Problem]:
    """The warm-up ends before lr_decay_iters."""
    steps, decay = check.take("lr_warmup_iters", "lr_decay_iters")
    if decay and steps >= decay:
        own = check.said("lr_decay_iters")
        yield check.problem(
            f"lr_warmup_iters={steps} leaves nothing of lr_decay_iters={decay}" + ("" if own else " (= train_iters)"),
            "lr_warmup_iters",
            "lr_decay_iters" if own else "train_iters",
            fix=f"{flag('lr_warmup_iters', decay // 10)}, or more steps",
        )


def wsd_is_complete(check: Check) -> Iterator[Problem]:
    """WSD has a final decay that fits into the schedule; other schedules have none."""
    style, tail, decay = check.take("lr_decay_style", "lr_wsd_decay_iters", "lr_decay_iters")
    if style == "WSD" and tail is None:
        yield check.problem(
            "lr_decay_style WSD needs lr_wsd_decay_iters, the steps of its final decay",
            "lr_decay_style",
            fix=flag("lr_wsd_decay_iters", max(decay // 10, 1) if decay else "N"),
        )
    if style != "WSD" and tail is not None:
        yield check.problem(
            f"lr_wsd_decay_iters={tail} belongs to lr_decay_style WSD, which is {style}",
            "lr_wsd_decay_iters",
            "lr_decay_style",
            fix="--lr-decay-style WSD, or drop --lr-wsd-decay-iters",
        )
    if style == "WSD" and tail is not None and decay and tail > decay:
        yield check.problem(
            f"lr_wsd_decay_iters={tail} is more than lr_decay_iters={decay}",
            "lr_wsd_decay_iters",
            "lr_decay_iters",
            fix=flag("lr_wsd_decay_iters", max(decay // 10, 1)),
        )


def loss_scales_in_order(check: Check) -> Iterator[Problem]:
    """min_loss_scale is at most initial_loss_scale."""
    first, low = check.take("initial_loss_scale", "min_loss_scale")
    if first < low:
        yield check.problem(
            f"initial_loss_scale={first:g} is less than min_loss_scale={low:g}",
            "initial_loss_scale",
            "min_loss_scale",
            fix=flag("initial_loss_scale", f"{low:g}"),
        )


def loss_scale_may_fall(check: Check) -> Iterator[Problem]:
    """With fp16 the loss scale can halve before max_skipped_steps ends the run."""
    precision, limit, tolerated = check.take("precision", "max_skipped_steps", "hysteresis")
    if precision == "fp16" and 0 < limit <= tolerated:
        yield check.problem(
            f"max_skipped_steps={limit} would end the run before the loss scale halves: hysteresis={tolerated} "
            f"overflows come first",
            "max_skipped_steps",
            "hysteresis",
            fix=flag("max_skipped_steps", 50 + tolerated),
        )


RULES: tuple[Rule, ...] = (
    rates_in_order,
    warmup_starts_below,
    one_warmup,
    warmup_before_decay,
    wsd_is_complete,
    loss_scales_in_order,
    loss_scale_may_fall,
)
