"""DPO in plain torch: TeleChat2's forward, one half of a pair at a time, AdamW. Written from the formulas of the
papers, apart from the code under test."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.data.chat_material import SPECIAL
from tests.huggingface.plain_telechat import forward

USER, BOT, END = (SPECIAL.index(name) for name in ("<_user>", "<_bot>", "<_end>"))


def pairs(count: int) -> list[dict[str, str]]:
    """Questions that tell their number, and answers of random letters, of lengths that vary."""
    generator = random.Random(5)

    def answer() -> str:
        return "".join(generator.choices("abcdefgh", k=generator.randint(4, 20)))

    return [{"prompt": f"q{n}", "chosen": answer(), "rejected": answer()} for n in range(count)]


def half(pair: Mapping[str, str], which: str, ids: Callable[[str], list[int]]) -> tuple[list[int], list[bool]]:
    """Token ids of one half, and which of them are its answer."""
    question, answer = [USER, *ids(pair["prompt"]), BOT], [*ids(pair[which]), END]
    return [*question, *answer, *ids("\n")], [False] * len(question) + [True] * len(answer) + [False]


@dataclass
class Plain:
    """What the loop found.

    Attributes:
        reference: of each pair, log-probabilities of its answers under the initial weights.
        loss, grad_norm: of each step.
        margin, accuracy: of each step.
        gradients: of the first step, before clipping, by Hugging Face name.
        weights: after the last step.
        valid: mean loss, mean margin and share of positive margins of other pairs, after each step.
    """

    reference: list[tuple[float, float]]
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    valid: list[tuple[float, float, float]] = field(default_factory=list)


def plain_dpo(
    hf: Path,
    lines: Sequence[Mapping[str, str]],
    ids: Callable[[str], list[int]],
    batches: Sequence[Sequence[int]],
    lr: float,
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    valid: Sequence[int] = (),
) -> Plain:
    """Train.

    Args:
        batches: numbers of the pairs of each global batch.
        loss_of: of one pair, from log-probabilities under the weights [2], under the reference [2], and the numbers of
            tokens of the answers [2].
        valid: numbers of the pairs that are evaluated after each step.
    """
    config = json.loads((hf / "config.json").read_text())
    weights = {name: tensor.float().requires_grad_() for name, tensor in load_file(hf / "model.safetensors").items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def log_probs(number: int) -> tuple[Tensor, Tensor]:
        found, tokens = [], []
        for which in ("chosen", "rejected"):
            text, is_answer = half(lines[number], which, ids)
            logits = forward(config, weights, torch.tensor([text[:-1]]))[0].double()
            picked = logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]
            found.append(picked[torch.tensor(is_answer[1:])].sum())
            tokens.append(sum(is_answer))
        return torch.stack(found), torch.tensor(tokens)

    with torch.no_grad():
        reference = [log_probs(number)[0] for number in range(len(lines))]
    out = Plain([(float(chosen), float(rejected)) for chosen, rejected in reference])
    for batch in batches:
        optimizer.zero_grad()
        total, gains = 0.0, []
        for number in batch:
            found, tokens = log_probs(number)
            loss = loss_of(found, reference[number], tokens) / len(batch)
            loss.backward()
            total += float(loss.detach())
            gains.append((found - reference[number]).detach())
        out.gradients = out.gradients or {name: tensor.grad.clone() for name, tensor in weights.items()}
        out.loss.append(total)
        out.grad_norm.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)))
        margins = torch.stack(gains)[:, 0] - torch.stack(gains)[:, 1]
        out.margin.append(float(margins.mean()))
        out.accuracy.append(float((margins > 0).double().mean()))
        optimizer.step()
        if valid:
            with torch.no_grad():
                rows = [(loss_of(*_with(log_probs(n), reference[n])), log_probs(n)[0] - reference[n]) for n in valid]
            margins = torch.stack([gain[0] - gain[1] for _, gain in rows])
            mean = float(torch.stack([loss for loss, _ in rows]).mean())
            out.valid.append((mean, float(margins.mean()), float((margins > 0).double().mean())))
    out.weights = {name: tensor.detach() for name, tensor in weights.items()}
    return out


def _with(found: tuple[Tensor, Tensor], reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return found[0], reference, found[1]
