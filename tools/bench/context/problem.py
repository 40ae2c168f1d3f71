"""What is computed: one row of tokens over the ranks, and what one rank would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_telechat.backend.block_attention import BlockAttention, Grads, Running, Saved
from megatron_telechat.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.parallel.context.layout import Layout, zigzag

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEED = 77


class Result(NamedTuple):
    """Output and gradients, [tokens, heads, d] and [tokens, groups, d]."""

    out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor

    def of_rows(self, rows: np.ndarray) -> Result:
        """Those of some tokens."""
        return Result(*(each[torch.from_numpy(rows)] for each in self))

    def errors(self, expected: Result) -> dict[str, float]:
        """Norm of the difference over the norm, by name; the norm itself where nothing is expected."""
        found = {}
        for name, ours, theirs in zip(self._fields, self, expected, strict=True):
            norm = float(theirs.double().norm())
            found[name] = float((ours.double() - theirs.double()).norm()) / (norm or 1.0)
        return found


class Inputs(NamedTuple):
    """Queries, keys, values, and the gradient of the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor

    def of_rows(self, rows: np.ndarray) -> Inputs:
        """Those of some tokens, contiguous."""
        return Inputs(*(each[torch.from_numpy(rows)] for each in self))

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(each.to(dtype) for each in self))


@dataclass(frozen=True)
class Problem:
    """One row of tokens, whose documents attend to themselves.

    Attributes:
        length: tokens of the row, S.
        heads, groups, width: of the attention; queries have heads, keys and values groups.
        ranks: over which the row is spread.
        ends: 0, and where each document ends; empty: the row is one document.
        dtype: of the inputs, and so of what travels.
    """

    length: int
    heads: int
    groups: int
    width: int
    ranks: int
    ends: tuple[int, ...] = ()
    dtype: Literal["fp32", "bf16"] = "fp32"

    @cached_property
    def documents(self) -> np.ndarray:
        """int64 [documents + 1]: 0, and where each ends."""
        return np.asarray(self.ends or (0, self.length), np.int64)

    @cached_property
    def packed(self) -> bool:
        return self.documents.size > 2

    @cached_property
    def inputs(self) -> Inputs:
        """The whole row's, the same on every rank."""
        generator = torch.Generator().manual_seed(SEED)
        sizes = (self.heads, self.groups, self.groups, self.heads)
        drawn = (torch.randn(self.length, heads, self.width, generator=generator) for heads in sizes)
        return Inputs(*drawn).to(DTYPES[self.dtype])

    def zigzag(self) -> Layout:
        return zigzag(self.length, self.ranks)

    def row_bytes(self) -> int:
        """Of the key and the value of one token."""
        return 2 * self.groups * self.width * DTYPES[self.dtype].itemsize

    def run(self) -> RunConfig:
        """The configuration that such a row would come from."""
        precision: Any = self.dtype
        return RunConfig(
            model=ModelConfig(
                num_layers=1,
                hidden_size=self.heads * self.width,
                num_attention_heads=self.heads,
                num_query_groups=self.groups,
                kv_channels=self.width,
                ffn_hidden_size=self.heads * self.width,
                vocab_size=1024,
            ),
            parallel=ParallelConfig(world_size=self.ranks, context_parallel_size=self.ranks, cp_comm_type="p2p"),
            training=TrainingConfig(seq_length=self.length, micro_batch_size=1, precision=precision),
            data=DataConfig(reset_attention_mask=self.packed),
        )


def on_one_rank(inputs: Inputs, documents: np.ndarray, kernel: BlockAttention) -> Result:
    """Attention of the whole row by one call of the kernel a document."""
    blocks = [
        (int(start), int(stop), int(start), int(stop)) for start, stop in zip(documents, documents[1:], strict=False)
    ]
    query, key, value = (kernel.prepared(each) for each in inputs[:3])
    total = Running(query)
    kernel.forward(query, key, value, blocks, True, total)
    out = total.out.to(inputs.query.dtype)
    saved = Saved(kernel, inputs.grad, query, out, total.lse)
    grads = Grads(*(torch.zeros(each.shape, device=each.device) for each in inputs[:3]))
    kernel.backward(saved, key, value, blocks, True, grads)
    return Result(out, *(each.to(inputs.query.dtype) for each in (grads.query, grads.key, grads.value)))


def in_fp64(inputs: Inputs, documents: np.ndarray) -> Result:
    """Attention written out in fp64, by autograd: an independent reference."""
    query, key, value = (each.double().requires_grad_() for each in inputs[:3])
    group = query.shape[1] // key.shape[1]
    numbers = torch.from_numpy(np.repeat(np.arange(documents.size - 1), np.diff(documents))).to(query.device)
    place = torch.arange(len(query), device=query.device)
    hidden = (numbers[:, None] != numbers[None, :]) | (place[:, None] < place[None, :])
    outs = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // group].t() / query.shape[2] ** 0.5
        outs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, head // group])
    out = torch.stack(outs, dim=1)
    out.backward(inputs.grad.double())
    grads = [each.grad for each in (query, key, value)]
    assert all(each is not None for each in grads)
    return Result(out.detach(), *(each for each in grads if each is not None))


def largest(errors: Mapping[str, float]) -> float:
    return max(errors.values())
