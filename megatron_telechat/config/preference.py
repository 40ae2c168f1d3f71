"""How direct preference optimization is told to people. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_telechat.config.schema import RunConfig


def preference_lines(run: RunConfig) -> Iterator[str]:
    """The loss of a pair; nothing where no pairs are trained."""
    if not run.data.dpo:
        return
    of = run.preference
    smoothing = f", label smoothing {of.dpo_label_smoothing:g}" if of.dpo_label_smoothing else ""
    sft = f", and {of.dpo_sft_loss_weight:g} x the cross entropy of the chosen answer" if of.dpo_sft_loss_weight else ""
    kind = "DPO" if of.dpo_loss_type == "sigmoid" else "IPO"
    yield f"{kind}, beta {of.dpo_beta:g}{smoothing}{sft}; mean over the pairs of the global batch"
