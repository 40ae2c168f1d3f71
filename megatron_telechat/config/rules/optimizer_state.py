"""Rules of where the optimizer's state is kept, and in which types."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.fields import fields_by_name, values_of
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.errors import Problem

OFFLOAD = "optimizer_cpu_offload"
OF_OFFLOAD = ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d")
BETA_OF = {"exp_avg_dtype": "adam_beta1", "exp_avg_sq_dtype": "adam_beta2"}
"""Type of a moment → the share of it that a step keeps."""

FINEST_STEP = 2.0**-8
"""Half of the distance between neighbours in bf16, over the number, at its largest. A moment that a step lowers by a
smaller share may be rounded back to what it was."""


def settings_go_with_offload(check: Check) -> Iterator[Problem]:
    """How the state travels is asked only where it does."""
    values = values_of(check.run)
    if check.take(OFFLOAD):
        return
    for name in OF_OFFLOAD:
        field = fields_by_name()[name]
        if name not in check.bad and check.said_by_person(name) and values[name] != field.default:
            yield check.problem(
                f"{name}={values[name]} without {OFFLOAD}: the optimizer state stays on the device",
                name,
                fix=f"--optimizer-cpu-offload, or drop {field.flag}",
            )


def moments_can_fall(check: Check) -> Iterator[Problem]:
    """A moment that is kept in bf16 must lose enough in a step for the rounding to notice.

    With gradients of 0 a step multiplies it by beta. bf16 has 8 significant bits: a factor nearer to 1 than 2^-8 rounds
    back to the same number, and the moment would never fall again.
    """
    for kept, beta in BETA_OF.items():
        kind, value = check.take(kept, beta)
        if kind == "bf16" and 1 - value < FINEST_STEP:
            yield check.problem(
                f"{kept}=bf16 with {beta}={value:g}: a step lowers the moment by {1 - value:.2g} of itself at most, "
                f"less than bf16 can tell ({FINEST_STEP:.2g}), so that it would grow and never fall",
                kept,
                beta,
                fix=f"{flag(kept, 'fp32')}, or {flag(beta, 0.95)}",
            )


RULES: tuple[Rule, ...] = (settings_go_with_offload, moments_can_fall)
