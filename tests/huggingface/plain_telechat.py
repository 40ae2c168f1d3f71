"""TeleChat2's forward in plain torch, dense or with experts, written from its published rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def forward(config: Mapping[str, Any], weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """fp64 arithmetic; fp32 logits [batch, length, vocab]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, groups = config["n_head"], config["num_key_value_heads"] or config["n_head"]
    width = config["hidden_size"] // heads
    eps, topk = config["layer_norm_epsilon"], config.get("num_experts_per_tok")
    batch, length = ids.shape
    trained, base = config["training_seqlen"], config["base_seqlen"]
    alpha = max(2.0 ** math.ceil(math.log2(max(length, trained) / base) + 1) - 1, 1.0)
    theta = config.get("rope_theta", 10000.0) * alpha ** (width / (width - 2))
    scaling = 1.0 if length <= trained else 1.0 + 0.1 * math.log(length / trained)
    frequencies = theta ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(length).double(), frequencies).repeat(1, 2)
    cos, sin = scaling * angles.cos()[None, :, None], scaling * angles.sin()[None, :, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def attention(x: Tensor, p: str) -> Tensor:
        q = rotate((x @ w[p + "query.weight"].T).view(batch, length, heads, width))
        packed = (x @ w[p + "key_value.weight"].T).view(batch, length, groups, 2 * width)
        k, v = rotate(packed[..., :width]), packed[..., width:]
        k, v = (t.repeat_interleave(heads // groups, dim=2) for t in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / width**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(batch, length, -1)
        return out @ w[p + "dense.weight"].T + w[p + "dense.bias"]

    def experts(x: Tensor, p: str) -> Tensor:
        probabilities, chosen = (x @ w[p + "router.weight"].T).softmax(-1).topk(topk)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in range(config["num_experts"]):
            y = mlp(x, p + f"local_experts.{e}.")
            out = out + y * (probabilities * (chosen == e)).sum(-1, keepdim=True)
        return out

    def mlp(x: Tensor, p: str) -> Tensor:
        y = torch.nn.functional.silu(x @ w[p + "gate_proj.weight"].T) * (x @ w[p + "up_proj.weight"].T)
        return y @ w[p + "down_proj.weight"].T + w[p + "down_proj.bias"]

    x = w["transformer.word_embeddings.weight"][ids]
    for i in range(config["n_layer"]):
        p = f"transformer.h.{i}."
        x = x + attention(norm(x, w[p + "input_layernorm.weight"]), p + "self_attention.")
        feed_forward = mlp if topk is None else experts
        x = x + feed_forward(norm(x, w[p + "post_attention_layernorm.weight"]), p + "mlp.")
    return (norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T).float()
