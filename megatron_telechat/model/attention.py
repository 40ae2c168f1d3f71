"""Self-attention: fused projection, rotary embedding, core attention, output projection."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_telechat.backend import cpu_types, traits_of, varlen
from megatron_telechat.backend.kernels import kernels
from megatron_telechat.model.key_value_cache import KeyValueCache, attend
from megatron_telechat.model.norm import RMSNorm
from megatron_telechat.model.rotary import SplitAndRotate, Tables
from megatron_telechat.parallel.context.plan import ContextPlan


@dataclass
class SelfAttentionSubmodules:
    """The exchangeable parts: torch's or TransformerEngine's."""

    linear_qkv: ModuleSpec | type
    core_attention: ModuleSpec | type
    linear_proj: ModuleSpec | type


@dataclass(frozen=True)
class Segments:
    """Stretches of a micro-batch that attend to themselves only.

    Attributes:
        rows: for each sample the lengths of its stretches, in order; they sum to the sequence length. Numbers of the
            host, so that cutting needs no word from the device.
    """

    rows: tuple[tuple[int, ...], ...]
    _bounds: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest stretch."""
        return max(map(max, self.rows))

    def bounds(self, device: torch.device) -> Tensor:
        """int32 [stretches + 1] on the device: 0, and where each stretch ends, counted over all rows. Made once, with
        no wait of the host."""
        if device not in self._bounds:
            ends = torch.tensor([0, *accumulate(length for row in self.rows for length in row)], dtype=torch.int32)
            if traits_of(device).pins_uploads:
                ends = ends.pin_memory()
            self._bounds[device] = ends.to(device, non_blocking=True)
        return self._bounds[device]

    @classmethod
    def of(cls, lengths: Tensor, batch: int) -> Segments:
        """From the lengths of all stretches of a micro-batch, row after row (``segment_lengths`` of the loader)."""
        ends = torch.cumsum(lengths, 0)
        length, rest = divmod(int(ends[-1]), batch)
        assert rest == 0, "the rows of a batch are equally long"
        rows: list[list[int]] = [[] for _ in range(batch)]
        for end, size in zip(ends.tolist(), lengths.tolist(), strict=True):
            rows[(end - 1) // length].append(size)
        assert all(sum(row) == length for row in rows), "a stretch crosses the border of two rows"
        return cls(tuple(map(tuple, rows)))


def model_parallel_generator() -> AbstractContextManager[None]:
    """Inside, dropout differs over the ranks of a tensor-parallel group."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    assert tracker is not None, "parallel.state seeds it"
    return tracker.fork()


class TorchCoreAttention(torch.nn.Module):
    """Causal attention by torch's scaled_dot_product_attention, or by the fused kernel of the device where it has one;
    query groups included."""

    heads_first = True

    def __init__(self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection):
        super().__init__()
        self.dropout = config.attention_dropout
        # under sequence parallelism the decoder has already entered the tensor-parallel random stream
        self.fork_rng = not config.sequence_parallel

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments | None = None) -> Tensor:
        """query [b, heads, s, head_dim], key and value [b, groups, s, head_dim] -> [s, b, heads*head_dim].

        FlashAttention's output lies in memory as the query does: where the heads of a token lie side by side, the
        result is a view of it. A fused kernel of the device takes its heads as [s, b, heads or groups, head_dim]
        (:func:`heads_first`).

        Args:
            segments: attend within these stretches only (block-diagonal causal). All in one call where the device has
                one for that, else each is a call of its own: the blocks off the diagonal are not computed, and no mask
                of s x s is held.
        """
        dropout = self.dropout if self.training else 0.0
        fork = dropout > 0.0 and self.fork_rng
        apart = None if segments is None or all(len(row) == 1 for row in segments.rows) else segments
        fused = kernels("attention", query)
        if fused is not None:
            with model_parallel_generator() if fork else nullcontext():
                if apart is None:
                    return fused.causal(query, key, value, dropout)
                return fused.causal_within(query, key, value, dropout, apart.rows)
        attend: Callable[..., Tensor] = partial(
            torch.nn.functional.scaled_dot_product_attention,
            dropout_p=dropout,
            is_causal=True,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        if not dropout and traits_of(query.device).widens_attention and cpu_types.widened(query.dtype) != query.dtype:
            attend = cpu_types.attend
        with model_parallel_generator() if fork else nullcontext():
            if apart is None:
                out = attend(query, key, value)
            elif not dropout and varlen.takes(query):
                out = within_segments_at_once(varlen.attend, (query, key, value), apart)
            else:
                out = _within_segments(attend, (query, key, value), apart)
        return out.permute(2, 0, 1, 3).flatten(2)


def heads_first(core_attention: Any, like: Tensor) -> bool:
    """Whether the core attention takes [b, heads, s, head_dim] for such a tensor, else [s, b, heads, head_dim]: torch's
    does, and the fused kernel of a device does not."""
    return core_attention.heads_first and kernels("attention", like) is None


def _within_segments(attend: Callable[..., Tensor], heads: tuple[Tensor, ...], segments: Segments) -> Tensor:
    """[b, heads, s, head_dim] of each stretch by itself. ``split`` and not slices: its backward is one
    concatenation."""
    rows = zip(*(tensor.split(1) for tensor in heads), strict=True)
    out = [
        torch.cat(
            [attend(*parts) for parts in zip(*(tensor.split(list(lengths), dim=2) for tensor in row), strict=True)],
            dim=2,
        )
        for row, lengths in zip(rows, segments.rows, strict=True)
    ]
    return torch.cat(out)


def within_segments_at_once(attend: Callable[..., Tensor], heads: tuple[Tensor, ...], segments: Segments) -> Tensor:
    """The same, [b, heads, s, head_dim], by one call over the tokens of all rows.

    Args:
        attend: as `backend.varlen.attend`.
    """
    batch, length = heads[0].shape[0], heads[0].shape[2]
    # With one row, as in the large models, these are views.
    tokens = (part.transpose(1, 2).flatten(0, 1) for part in heads)
    out = attend(*tokens, segments.bounds(heads[0].device), segments.longest)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


class TransformerEngineCoreAttention(torch.nn.Module):
    """Causal attention by TransformerEngine's DotProductAttention (FlashAttention or cuDNN).

    Over the ranks of a context-parallel group it is a ring of zigzag shards, which is the order of our rows.
    """

    heads_first = False

    def __init__(self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection):
        super().__init__()
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.inner = TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            pg_collection=pg_collection,
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments | ContextPlan | None = None
    ) -> Tensor:
        """query [s, b, heads, head_dim], key and value [s, b, groups, head_dim] -> [s, b, heads*head_dim].

        Args:
            segments: None, or a plan of rows of one document each.
        """
        assert not isinstance(segments, Segments), "model.spec takes torch's attention where documents are kept apart"
        return self.inner(query, key, value, None, attn_mask_type=AttnMaskType.causal)


def normalise_heads(mixed: Tensor, query_norm: torch.nn.Module, key_norm: torch.nn.Module) -> Tensor:
    """[s, b, groups, rep + 2, head_dim] (of each group its query heads, its key, its value) with every query head and
    every key normalised over head_dim; the values as they are."""
    query, key, value = mixed.split((mixed.shape[3] - 2, 1, 1), dim=3)
    return torch.cat((query_norm(query), key_norm(key), value), dim=3)


class SelfAttention(MegatronModule):
    """Grouped-query self-attention over the heads of this tensor-parallel rank.

    Parameters carry megatron-core's names: linear_qkv [(heads + 2*groups)*head_dim / tp, hidden] in
    the fused order of Megatron (each group: its query heads, its key, its value) without bias, and
    linear_proj [hidden, heads*head_dim / tp], with a bias if `output_bias`. With ``config.qk_layernorm``, q_layernorm
    and k_layernorm [head_dim] act on each head, before the rotary embedding. Every tensor-parallel rank holds them
    whole and sees its own heads: megatron-core's ``finalize_model_grads`` sums their gradients over the
    tensor-parallel group by their names, under sequence parallelism or not.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        output_bias: bool,
        recompute_core: bool = False,
    ):
        super().__init__(config=config)
        tp_size, groups, head_dim = pg_collection.tp.size(), config.num_query_groups, config.kv_channels
        assert groups is not None and head_dim is not None, "model.transformer_config says both"
        assert groups % tp_size == 0, "the configuration rules keep whole groups on a rank"
        self.groups = groups // tp_size
        self.head_dim = head_dim
        self.recompute_core = recompute_core
        self.layer_number = layer_number
        projection = config.num_attention_heads * head_dim
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            projection + 2 * groups * head_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=pg_collection.tp,
        )
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            self.q_layernorm = RMSNorm(config, head_dim, config.layernorm_epsilon)
            self.k_layernorm = RMSNorm(config, head_dim, config.layernorm_epsilon)
        self.core_attention = build_module(
            submodules.core_attention, config=config, layer_number=layer_number, pg_collection=pg_collection
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            projection,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=output_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=pg_collection.tp,
        )

    def forward(
        self,
        hidden_states: Tensor,
        rotary_tables: Tables,
        segments: Segments | ContextPlan | KeyValueCache | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[s (/ tp under sequence parallelism), b, hidden] -> the same, without the bias, and the bias.

        Args:
            rotary_tables: of these tokens.
            segments: stretches that attend to themselves only; a cache: the tokens attend to those in it, too, and are
                added to it.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        mixed = mixed.unflatten(-1, (self.groups, -1, self.head_dim))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            mixed = normalise_heads(mixed, self.q_layernorm, self.k_layernorm)
        if isinstance(segments, KeyValueCache):
            return self.linear_proj(self._attend_with_cache(mixed, rotary_tables, segments))
        heads = self._heads(mixed, rotary_tables)
        if self.recompute_core and self.training and torch.is_grad_enabled():
            context = tensor_parallel.checkpoint(partial(self.core_attention, segments=segments), False, *heads)
        else:
            context = self.core_attention(*heads, segments=segments)
        return self.linear_proj(context)

    def _heads(self, mixed: Tensor, rotary_tables: Tables) -> tuple[Tensor, ...]:
        """Query, key and value, rotated, in the shape that the core attention takes and the order in memory that the
        device likes."""
        first = heads_first(self.core_attention, mixed)
        if not first or traits_of(mixed.device).heads_first_attention:
            return SplitAndRotate.apply(mixed, *rotary_tables, first)
        return tuple(part.permute(1, 2, 0, 3) for part in SplitAndRotate.apply(mixed, *rotary_tables, False))

    def _attend_with_cache(self, mixed: Tensor, rotary_tables: Tables, cache: KeyValueCache) -> Tensor:
        """The context of new tokens, [s, b, heads * head_dim]. A text that is read from its beginning goes through the
        core attention like any sequence."""
        query, key, value = SplitAndRotate.apply(mixed, *rotary_tables, True)
        keys, values = cache.layer(self.layer_number).append(key, value, cache.length)
        if cache.length == 0:
            return self.core_attention(*self._heads(mixed, rotary_tables), segments=None)
        return attend(query, keys, values)
