"""What the block must compute, written the plain way: one dense loop over the experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def reference_block(tokens: Tensor, weights: Mapping[str, Tensor], topk: int) -> Tensor:
    """Every expert on every token, masked: [n, h] → [n, h].

    Args:
        tokens: [n, h].
        weights: router [E, h], fc1 [E, 2, f, h], fc2 [E, h, f], bias [E, h] (optional).
        topk: experts of a token.
    """
    logits = tokens @ weights["router"].t()
    probabilities = torch.softmax(logits, dim=-1)
    kept = torch.zeros_like(logits).scatter_(1, logits.topk(topk, dim=1).indices, 1.0)
    # TeleChat2's order: softmax over all experts, keep the best, renormalise.
    probabilities = probabilities * kept
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    output = torch.zeros_like(tokens)
    for expert in range(weights["router"].shape[0]):
        gate, up = weights["fc1"][expert]
        out = (torch.nn.functional.silu(tokens @ gate.t()) * (tokens @ up.t())) @ weights["fc2"][expert].t()
        if "bias" in weights:
            out = out + weights["bias"][expert]
        output = output + probabilities[:, expert : expert + 1] * out
    return output


def reference_aux_loss(tokens: Tensor, router: Tensor, topk: int) -> Tensor:
    """E * sum_e f_e P_e over all tokens (Switch Transformer, eq. 4, for k experts a token)."""
    logits = tokens @ router.t()
    experts = logits.shape[1]
    chosen = torch.zeros_like(logits).scatter_(1, logits.topk(topk, dim=1).indices, 1.0)
    share = chosen.sum(0) / (topk * tokens.shape[0])
    return experts * (share * torch.softmax(logits, dim=-1).mean(0)).sum()


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected value."""
    difference = (value.double() - expected.double()).norm()
    norm = expected.double().norm()
    return float(difference if norm == 0 else difference / norm)


def random_weights(experts: int, hidden: int, width: int, bias: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Global fp64 weights, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    weights = {
        "router": normal(experts, hidden),
        "fc1": normal(experts, 2, width, hidden),
        "fc2": normal(experts, hidden, width),
    }
    if bias:
        weights["bias"] = normal(experts, hidden)
    return weights
