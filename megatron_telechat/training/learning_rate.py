"""The learning rate as a pure function of the number of steps taken.

Being a pure function it has no state: a resumed run cannot continue on another curve than the one it left. The
warm-up is here, the schedules after it are in ``config/lr_schedules.py``.
"""

from __future__ import annotations

from megatron_telechat.config.lr_schedules import SCHEDULES, Moment
from megatron_telechat.config.schema import OptimizerConfig


def warmup_steps(config: OptimizerConfig, train_iters: int) -> int:
    """Steps of linear warm-up, from lr_warmup_iters or lr_warmup_fraction."""
    if config.lr_warmup_fraction is not None:
        return int(config.lr_warmup_fraction * (config.lr_decay_iters or train_iters))
    return config.lr_warmup_iters


def learning_rate(config: OptimizerConfig, train_iters: int, step: int) -> float:
    """Learning rate of the optimizer step that comes after ``step`` others.

    Args:
        config: the optimizer section.
        train_iters: steps of the whole run; the decay ends there unless lr_decay_iters says otherwise.
        step: optimizer steps taken before; 0 for the first step of a run. One that was skipped is none: Megatron's
            scheduler does not move then either.
    """
    warmup = warmup_steps(config, train_iters)
    if warmup > 0 and step <= warmup:
        return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * step / warmup
    moment = Moment(
        step=step,
        warmup_steps=warmup,
        decay_steps=config.lr_decay_iters or train_iters,
        lr=config.lr,
        min_lr=config.min_lr,
        wsd_decay_steps=config.lr_wsd_decay_iters or 0,
        wsd_decay_style=config.lr_wsd_decay_style,
    )
    return SCHEDULES[config.lr_decay_style](moment)
