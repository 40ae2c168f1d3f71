"""What a step minimises, and what it reports: cross entropy of tokens, or a loss of pairs of answers.

The schedules sum what an objective returns over the micro-batches of the global batch, and divide by the sum of what it
counts. So a loss is the mean over all that counts in the global batch, however it was spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_telechat.backend import Backend
from megatron_telechat.config.schema import PreferenceConfig, RunConfig

Parts = tuple[Tensor, Tensor, Tensor]
"""A loss to be summed, what it is divided by, and a report."""


class Objective(Protocol):
    """From the losses of the tokens of a micro-batch to what is minimised."""

    @property
    def width(self) -> int:
        """Numbers of a report. The first two are the sum of losses and what it is divided by."""
        ...

    def count(self, batch: Mapping[str, Any]) -> float:
        """What a micro-batch, on the host, adds to the divisor."""
        ...

    def __call__(self, batch: Mapping[str, Tensor], per_token_loss: Tensor) -> Parts:
        """Of one micro-batch, on the device.

        Args:
            per_token_loss: [micro_batch, seq], cross entropy in nats.
        """
        ...

    def details(self, sums: Sequence[float]) -> dict[str, float]:
        """What else a report says, for the record of a step.

        Args:
            sums: reports of the whole global batch, added up.
        """
        ...


class TokenLoss:
    """The cross entropy of every token whose loss mask is 1."""

    width = 2

    def count(self, batch: Mapping[str, Any]) -> float:
        """Its learned tokens."""
        return float(batch["loss_mask"].sum())

    def __call__(self, batch: Mapping[str, Tensor], per_token_loss: Tensor) -> Parts:
        """The sum over learned tokens, and their number."""
        loss_mask = batch["loss_mask"]
        total = torch.sum(per_token_loss.float() * loss_mask)
        tokens = loss_mask.sum()
        # The schedules change the loss tensor in place: the report keeps its own copy.
        report = torch.stack((total.detach().clone(), tokens))
        return total, tokens.to(torch.int), report

    def details(self, sums: Sequence[float]) -> dict[str, float]:
        """Nothing else."""
        return {}


TOKENS = TokenLoss()


def answer_log_probs(batch: Mapping[str, Tensor], per_token_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """log pi(answer | question) of each half, [halves]: the sum over the tokens of its answers.

    Added up in the widest type of the device: a loss of pairs is a small difference of such sums, which may be
    thousands. Each token is picked once, so the gradient has the same bits in any order of its additions.

    Args:
        batch: with ``answers`` and ``answer_lengths`` (`TokenDataset`).
        per_token_loss: [micro_batch, seq], in nats.
    """
    answers, lengths = batch["answers"], batch["answer_lengths"]
    losses = per_token_loss.reshape(-1).to(dtype)
    picked = losses.gather(0, answers.reshape(-1)).view(answers.shape)
    meant = torch.arange(answers.shape[1], device=answers.device)[None] < lengths[:, None]
    return -torch.where(meant, picked, 0.0).sum(dim=1)


@dataclass(frozen=True)
class PreferenceLoss:
    """Losses of pairs of answers against a reference.

    With h = (log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected)), the loss of a pair is

    * sigmoid: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h); Rafailov et al. 2023, "Direct Preference
      Optimization", equation 7; the label smoothing e is Mitchell's conservative DPO (2023).
    * ipo: (h - 1 / (2 beta))^2; Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human
      Preferences". The log-probabilities are divided by the tokens of their answer, as TRL does.

    To both may be added w times the cross entropy of the chosen answer, the mean over its tokens; Pang et al. 2024,
    "Iterative Reasoning Preference Optimization".

    Attributes:
        settings: of the run.
        dtype: the widest float of the device.
    """

    settings: PreferenceConfig
    dtype: torch.dtype
    width = 7
    _NAMES = ("rewards_chosen", "rewards_rejected", "reward_accuracy", "logps_chosen", "logps_rejected")

    def count(self, batch: Mapping[str, Any]) -> float:
        """Its pairs."""
        return float(batch["pair_numbers"].shape[0])

    def __call__(self, batch: Mapping[str, Tensor], per_token_loss: Tensor) -> Parts:
        """The sum over pairs, and their number."""
        of, pairs = self.settings, batch["pair_numbers"].shape[0]
        log_probs = answer_log_probs(batch, per_token_loss, self.dtype)
        tokens = batch["answer_lengths"].to(self.dtype)
        gains = log_probs - batch["reference"].to(self.dtype)
        if of.dpo_loss_type == "ipo":
            gains = gains / tokens
        chosen, rejected = gains.view(pairs, 2).unbind(dim=1)
        losses = self._of_margins(chosen - rejected)
        if of.dpo_sft_loss_weight:
            losses = losses - of.dpo_sft_loss_weight * (log_probs / tokens).view(pairs, 2)[:, 0]
        total = losses.sum()
        with torch.no_grad():
            rewards = of.dpo_beta * torch.stack((chosen, rejected))
            report = torch.stack(
                (
                    total.detach().clone(),
                    total.new_tensor(float(pairs)),
                    *rewards.sum(dim=1),
                    (rewards[0] > rewards[1]).sum().to(self.dtype),
                    *log_probs.view(pairs, 2).sum(dim=0),
                )
            )
        return total.float(), torch.full((), pairs, dtype=torch.int, device=total.device), report

    def _of_margins(self, margins: Tensor) -> Tensor:
        """[pairs]: losses of these h."""
        of = self.settings
        if of.dpo_loss_type == "ipo":
            return (margins - 1 / (2 * of.dpo_beta)) ** 2
        right = torch.nn.functional.logsigmoid(of.dpo_beta * margins)
        if not of.dpo_label_smoothing:
            return -right
        wrong = torch.nn.functional.logsigmoid(-of.dpo_beta * margins)
        return -(1 - of.dpo_label_smoothing) * right - of.dpo_label_smoothing * wrong

    def details(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over pairs: rewards (beta times what an answer gained over the reference) and their difference, the
        share of pairs whose chosen answer gained more, log-probabilities of the answers."""
        pairs = sums[1]
        if not pairs:
            return {}
        found = {name: value / pairs for name, value in zip(self._NAMES, sums[2:], strict=True)}
        return {**found, "reward_margin": found["rewards_chosen"] - found["rewards_rejected"]}


class AnswerLogProbs:
    """Minimises nothing: keeps the log-probabilities of the answers of every pair that it sees.

    Attributes:
        found: of each micro-batch, numbers of its pairs [pairs] and log-probabilities [pairs, 2].
    """

    width = 2

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self.found: list[tuple[Tensor, Tensor]] = []

    def count(self, batch: Mapping[str, Any]) -> float:
        """Its pairs."""
        return float(batch["pair_numbers"].shape[0])

    def __call__(self, batch: Mapping[str, Tensor], per_token_loss: Tensor) -> Parts:
        """Zeros; for a forward without a backward."""
        numbers = batch["pair_numbers"]
        self.found.append((numbers, answer_log_probs(batch, per_token_loss, self._dtype).view(numbers.shape[0], 2)))
        zero = torch.zeros((), device=per_token_loss.device)
        return zero, zero.to(torch.int), torch.zeros(self.width, device=per_token_loss.device)

    def details(self, sums: Sequence[float]) -> dict[str, float]:
        """Nothing."""
        return {}


def objective_of(run: RunConfig, backend: Backend) -> Objective:
    """What a run minimises."""
    return PreferenceLoss(run.preference, backend.widest_float) if run.data.dpo else TOKENS
