"""The published fine-tuning loop in plain torch: TeleChat2's forward, the masks of its collator, AdamW and the schedule
of transformers' Trainer, a dynamic loss scale. Written from the published rules, apart from the code under test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.data.chat_material import SPECIAL
from tests.huggingface.plain_telechat import forward

USER, BOT, END = (SPECIAL.index(name) for name in ("<_user>", "<_bot>", "<_end>"))


def published_mask(row: Sequence[int], with_frame: bool) -> list[int]:
    """1 for each token of a row that is learned: from each <_bot> to its <_end>, and the <_user> tokens.

    Args:
        with_frame: False: the answers and <_end> alone (the mask of MindFormers' preprocessing).
    """
    mask, answering = [0] * len(row), False
    for at, token in enumerate(row):
        if token == BOT:
            answering = True
            mask[at] = int(with_frame)
        elif token == USER:
            mask[at] = int(with_frame)
        elif answering:
            mask[at] = 1
        if token == END:
            answering = False
    return mask


@dataclass
class LossScale:
    """Halves after two overflows in a row of good steps between them, doubles after a window of good steps."""

    value: float
    window: int
    hysteresis: int = 2
    good: int = 0
    left: int = field(default=2)

    def move(self, overflow: bool) -> None:
        if overflow:
            self.good, self.left = 0, self.left - 1
            if self.left <= 0:
                self.value = max(1.0, self.value / 2)
            return
        self.good += 1
        if self.good == self.window:
            self.good, self.left, self.value = 0, self.hysteresis, self.value * 2


def rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """transformers' cosine schedule with warm-up: of the step after ``step`` others."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def published_losses(
    hf: Path,
    rows: Sequence[Sequence[int]],
    batch: int,
    steps: int,
    peak: float,
    with_frame: bool,
    scale: LossScale | None,
) -> list[tuple[float, float | None]]:
    """Loss of each step, the mean over the learned tokens of the whole batch; and the loss scale of a run in fp16.

    Args:
        rows: token ids of the samples in order, one more than inputs.
        scale: of a run in fp16; None: fp32.
    """
    config = json.loads((hf / "config.json").read_text())
    master = {name: tensor.float().requires_grad_() for name, tensor in load_file(hf / "model.safetensors").items()}
    optimizer = torch.optim.AdamW(master.values(), lr=peak, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    found: list[tuple[float, float | None]] = []
    taken = 0
    for step in range(steps):
        text = torch.tensor(rows[step * batch : (step + 1) * batch])
        mask = torch.tensor([published_mask(row, with_frame) for row in rows[step * batch : (step + 1) * batch]])
        loss, gradients = _gradients(config, master, text, mask[:, 1:], scale)
        found.append((loss, None if scale is None else scale.value))
        overflow = not all(torch.isfinite(gradient).all() for gradient in gradients)
        if scale is not None:
            scale.move(overflow)
        if overflow:
            continue
        for tensor, gradient in zip(master.values(), gradients, strict=True):
            tensor.grad = gradient
        torch.nn.utils.clip_grad_norm_(master.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(taken, steps, peak, int(0.05 * steps))
        optimizer.step()
        taken += 1
    return found


def _gradients(
    config: Mapping, master: Mapping[str, Tensor], text: Tensor, mask: Tensor, scale: LossScale | None
) -> tuple[float, list[Tensor]]:
    """Loss, and the gradients of the mean; one micro-batch of a row after another, as published."""
    weights = master if scale is None else {name: t.detach().half().requires_grad_() for name, t in master.items()}
    sums = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in weights.items()}
    total, tokens = 0.0, int(mask.sum())
    factor = 1.0 if scale is None else scale.value
    for row, learned in zip(text, mask, strict=True):
        logits = forward(config, weights, row[None, :-1])[0]
        nll = torch.nn.functional.cross_entropy(logits.float(), row[1:], reduction="none")
        loss = (nll * learned).sum()
        total += loss.item()
        for name, gradient in zip(weights, torch.autograd.grad(loss * factor, list(weights.values())), strict=True):
            sums[name] += gradient.float()
    return total / tokens, [gradient / (tokens * factor) for gradient in sums.values()]
