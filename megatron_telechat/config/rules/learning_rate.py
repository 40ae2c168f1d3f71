"""Rules of the learning-rate schedule and of the loss scale."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.derive import SAMPLES
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.run_stages import counts_tokens
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


ITERS = {
    "lr_warmup_iters": "lr_warmup_tokens",
    "lr_decay_iters": "lr_decay_tokens",
    "lr_wsd_decay_iters": "lr_wsd_decay_tokens",
}
"""Lengths of a schedule in steps → the same in tokens."""


def _by_tokens(check: Check) -> bool:
    return check.staged or counts_tokens(check.run.optimizer)


def one_unit(check: Check) -> Iterator[Problem]:
    """A schedule is given in steps or in tokens; in a run with stages, whose steps differ, in tokens."""
    if not _by_tokens(check):
        return
    tokens = [name for name in ITERS.values() if check.take(name) is not None]
    for steps, name in ITERS.items():
        value = check.take(steps)
        if not value or not check.said_by_person(steps):
            continue
        why = "the steps of this run's stages differ" if check.staged else f"{tokens[0]} counts tokens"
        training = check.run.training
        yield check.problem(
            f"{steps}={value} counts steps, but {why}",
            steps,
            fix=f"{flag(name, value * training.global_batch_size * training.seq_length)} in its place, if steps of "
            "this batch and length are meant",
        )


def samples_or_tokens(check: Check) -> Iterator[Problem]:
    """A length is given in samples or in tokens; stages count tokens."""
    for samples, tokens in SAMPLES.items():
        number = check.take(samples)
        if number is None:
            continue
        if check.staged or check.said_by_person(tokens):
            why = "the stages of a run count tokens" if check.staged else f"{tokens} gives the same length"
            yield check.problem(f"{samples}={number}, but {why}", samples, fix=f"keep {fields_by_name()[tokens].flag}")


def one_warmup(check: Check) -> Iterator[Problem]:
    """The warm-up is given in steps or tokens or as a fraction, not both."""
    share = check.take("lr_warmup_fraction")
    for name in ("lr_warmup_iters", "lr_warmup_tokens"):
        length = check.take(name)
        if length and share is not None:
            yield check.problem(
                f"{name}={length} and lr_warmup_fraction={share:g} both give the warm-up",
                name,
                "lr_warmup_fraction",
                fix="keep one of them",
            )


def warmup_before_decay(check: Check) -> Iterator[Problem]:
    """The warm-up ends before the decay does."""
    steps, decay = check.take("lr_warmup_iters", "lr_decay_iters")
    if decay and steps >= decay:
        own = check.said("lr_decay_iters")
        yield check.problem(
            f"lr_warmup_iters={steps} leaves nothing of lr_decay_iters={decay}" + ("" if own else " (= train_iters)"),
            "lr_warmup_iters",
            "lr_decay_iters" if own else "train_iters",
            fix=f"{flag('lr_warmup_iters', decay // 10)}, or more steps",
        )
    tokens, decay = check.take("lr_warmup_tokens", "lr_decay_tokens")
    if tokens and decay and tokens >= decay:
        yield check.problem(
            f"lr_warmup_tokens={tokens} leaves nothing of lr_decay_tokens={decay}",
            "lr_warmup_tokens",
            "lr_decay_tokens",
            fix=f"{flag('lr_warmup_tokens', decay // 10)}, or a longer decay",
        )


def root_has_a_warmup(check: Check) -> Iterator[Problem]:
    """lr x sqrt(warm-up / tokens) needs a warm-up; without one the first token would end the rate."""
    style, tokens, share = check.take("lr_decay_style", "lr_warmup_tokens", "lr_warmup_fraction")
    if style == "inverse-square-root" and _by_tokens(check) and not tokens and not share:
        yield check.problem(
            "lr_decay_style inverse-square-root by tokens needs a warm-up: the rate is lr x sqrt(warm-up / tokens)",
            "lr_decay_style",
            fix=flag("lr_warmup_tokens", "N"),
        )


def wsd_is_complete(check: Check) -> Iterator[Problem]:
    """WSD has a final decay that fits into the schedule; other schedules have none."""
    unit = "tokens" if _by_tokens(check) else "iters"
    tail_name, decay_name = f"lr_wsd_decay_{unit}", f"lr_decay_{unit}"
    style, tail, decay = check.take("lr_decay_style", tail_name, decay_name)
    if style == "WSD" and tail is None:
        yield check.problem(
            f"lr_decay_style WSD needs {tail_name}, the {'steps' if unit == 'iters' else unit} of its final decay",
            "lr_decay_style",
            fix=flag(tail_name, max(decay // 10, 1) if decay else "N"),
        )
    if style != "WSD" and tail is not None:
        yield check.problem(
            f"{tail_name}={tail} belongs to lr_decay_style WSD, which is {style}",
            tail_name,
            "lr_decay_style",
            fix=f"--lr-decay-style WSD, or drop {flag(tail_name, '').strip()}",
        )
    if style == "WSD" and tail is not None and decay and tail > decay:
        yield check.problem(
            f"{tail_name}={tail} is more than {decay_name}={decay}",
            tail_name,
            decay_name,
            fix=flag(tail_name, max(decay // 10, 1)),
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
    one_unit,
    samples_or_tokens,
    one_warmup,
    warmup_before_decay,
    root_has_a_warmup,
    wsd_is_complete,
    loss_scales_in_order,
    loss_scale_may_fall,
)
