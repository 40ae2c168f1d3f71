"""The learning rate as a pure function of the number of steps taken.

The formulas are those of megatron-core's ``OptimizerParamScheduler.get_lr``, so a
run that moves over from Megatron-LM keeps its curve. Being a pure function it has
no state: a resumed run cannot continue on another curve than the one it left.
"""

from __future__ import annotations

import math

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
    decay = config.lr_decay_iters or train_iters
    if warmup > 0 and step <= warmup:
        return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * step / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if step > decay:
        return config.min_lr
    if config.lr_decay_style == "inverse-square-root":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1) / max(step, 1)))
    return config.min_lr + _coefficient(config, step, warmup, decay) * (config.lr - config.min_lr)


def _coefficient(config: OptimizerConfig, step: int, warmup: int, decay: int) -> float:
    """Share of (lr - min_lr) that is left at ``step``, between 1 and 0."""
    if config.lr_decay_style == "WSD":
        wsd = config.lr_wsd_decay_iters or 0
        start = decay - wsd
        return 1.0 if step <= start else _shape(config.lr_wsd_decay_style, (step - start) / wsd)
    ratio = (step - warmup) / max(decay - warmup, 1)
    return _shape(config.lr_decay_style, ratio)


def _shape(style: str, ratio: float) -> float:
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**ratio - 1.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(ratio)
    raise AssertionError(f"the configuration let an unknown decay style through: {style}")
