"""Rules of direct preference optimization (DPO)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import fields

from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.config.schema import PreferenceConfig
from megatron_telechat.errors import Problem
from megatron_telechat.locations import is_url

BETA, SMOOTHING, TYPE, WEIGHT, REFERENCE = (
    *("dpo_beta", "dpo_label_smoothing", "dpo_loss_type"),
    *("dpo_sft_loss_weight", "dpo_reference"),
)


def settings_go_with_dpo(check: Check) -> Iterator[Problem]:
    """Settings of DPO where there is none, and the other kind of fine-tuning beside it."""
    dpo, sft = check.take("dpo", "sft")
    if dpo and sft:
        yield check.problem(
            "dpo and sft contradict each other: a file holds pairs or dialogs", "dpo", "sft", fix="drop one of them"
        )
    for name in () if dpo else ("dpo_overlong", *(field.name for field in fields(PreferenceConfig))):
        if check.said_by_person(name) and check.take(name) != fields_by_name()[name].default:
            yield check.problem(f"{name} is given without dpo and has no effect", name, fix="--dpo")


def strengths_are_numbers(check: Check) -> Iterator[Problem]:
    """beta is positive, a weight is not negative, and fewer than half of the labels are wrong."""
    beta, smoothing, weight, kind = check.take(BETA, SMOOTHING, WEIGHT, TYPE)
    if not 0 < beta < math.inf:
        yield check.one(f"dpo_beta={beta:g} is not a positive number", BETA, fix=flag(BETA, 0.1))
    if not 0 <= weight < math.inf:
        yield check.one(f"dpo_sft_loss_weight={weight:g} is negative or not finite", WEIGHT, fix=flag(WEIGHT, 1.0))
    if not 0 <= smoothing < 0.5:
        yield check.one(
            f"dpo_label_smoothing={smoothing:g} is not at least 0 and below 0.5: with half of the labels wrong there "
            "is nothing to learn",
            SMOOTHING,
            fix=flag(SMOOTHING, 0.1),
        )
    elif smoothing and kind == "ipo":
        yield check.problem(
            "dpo_label_smoothing is of dpo_loss_type=sigmoid, and has no effect with ipo", SMOOTHING, TYPE,
            fix="drop one of them",
        )  # fmt: skip


def halves_stand_alone(check: Check) -> Iterator[Problem]:
    """The halves of a pair do not see each other, and lie on one rank whole."""
    dpo, context = check.take("dpo", "context_parallel_size")
    if not dpo:
        return
    for name in ("reset_attention_mask", "reset_position_ids"):
        if not check.take(name):
            yield check.problem(
                f"{name} is off, but the two halves of a pair stand in one row and must not see each other",
                name,
                "dpo",
                fix=f"drop the flag: {name} is on with --dpo",
            )
    if context > 1:
        yield check.problem(
            f"context_parallel_size={context} is not supported with dpo: the log-probability of an answer is a sum "
            "over tokens that must lie on one rank",
            "context_parallel_size",
            "dpo",
            fix="--context-parallel-size 1; tensor parallelism with --sequence-parallel, recompute and "
            "--loss-chunk-rows lower the memory of long rows",
        )


def reference_is_there(check: Check) -> Iterator[Problem]:
    """dpo_reference is an existing folder. Whether there is a reference at all, `checkpoint/reference.py` asks: a run
    that goes on knows its own."""
    reference = check.take(REFERENCE)
    if reference is not None and not is_url(reference) and not os.path.isdir(reference):
        fix = "a checkpoint made by a run or by tools/convert_checkpoint.py import"
        yield check.absent(f"dpo_reference {reference} is not a folder", reference, REFERENCE, fix)


RULES: tuple[Rule, ...] = (
    settings_go_with_dpo,
    strengths_are_numbers,
    halves_stand_alone,
    reference_is_there,
)
