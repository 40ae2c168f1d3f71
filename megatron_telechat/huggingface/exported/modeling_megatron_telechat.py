# SPDX-License-Identifier: Apache-2.0
"""TeleChat2 in transformers, dense or with experts: reads what megatron_telechat trains and exports.

This file stands alone: it is copied into the exported folder and needs torch and transformers only.

The rotary tables depend on the length of the whole sequence: NTK-aware scaling changes the base, attention scaling
multiplies the tables. When they change, the attention of every earlier token changes, and with it the hidden states
that keys and values of deeper layers are made of. So the cache holds the embeddings of its tokens too, and the scaling
that each was read with; where the sequence has another one by now, all tokens are read anew. What is generated with the
cache is what is generated without it. Up to training_seqlen the scaling never changes; beyond it attention scaling
grows with every token, and each costs as much as without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .configuration_megatron_telechat import MegatronTelechatConfig

Tables = tuple[Tensor, Tensor]
"""cos and sin, fp32 [1 or batch, 1, length, head_dim / 2]."""


class Rows(NamedTuple):
    """The tokens of a call and those before them.

    Attributes:
        positions: int64 [1 or batch, total].
        lengths: tokens of each row without its padding; one number: of all rows.
        real: bool [batch, total], false for padding; None: there is none.
        packed: positions begin at 0 again, and tokens attend within their sequence.
    """

    positions: Tensor
    lengths: list[int]
    real: Tensor | None
    packed: bool


class Layout(NamedTuple):
    """How the new tokens of a call attend.

    Attributes:
        mask: bool [1 or batch, 1, new, total], true where attended; None: `causal` says all.
        causal: without a mask: each token attends to those before it; else to all.
        tables: rotary tables of the new tokens.
    """

    mask: Tensor | None
    causal: bool
    tables: Tables


def rows_of(x: Tensor, past: int, attention_mask: Tensor | None, position_ids: Tensor | None) -> Rows:
    """Positions and lengths of the rows of a call.

    Args:
        x: embeddings of the new tokens, [batch, new, hidden]; past: tokens in the cache.
        attention_mask: [batch, past + new]; 0 is padding. Each row counts its own tokens only, in positions and in its
            length, so that padding on either side changes nothing.
        position_ids: [1 or batch, new]. Without cache and mask they say that rows are packed: position 0 begins a
            sequence. Elsewhere positions follow from the mask and the cache.

    Raises:
        ValueError: a mask of another shape, or positions that contradict mask and cache.
    """
    batch, total, device = len(x), past + x.shape[1], x.device
    positions, lengths, real, packed = torch.arange(total, device=device)[None], [total], None, False
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch, total):
            raise ValueError(f"attention_mask is {list(attention_mask.shape)}; [batch, length] is [{batch}, {total}]")
        mask = attention_mask.to(device).bool()
        if not bool(mask.all()):
            real = mask
            positions = (real.long().cumsum(-1) - 1).clamp_(min=0)
            lengths = [max(count, 1) for count in real.sum(-1).tolist()]
    if position_ids is not None:
        given = position_ids.to(device).long()
        if attention_mask is None and not past:
            positions, packed = given, int((given == 0).sum(-1).max()) > 1
        else:
            wrong = given != positions[:, past:]
            if bool((wrong if real is None else wrong & real[:, past:]).any()):
                raise ValueError("position_ids contradict the attention mask and the cache; leave them out")
    return Rows(positions, lengths, real, packed)


def layout_of(config: MegatronTelechatConfig, rows: Rows, past: int) -> Layout:
    """Tables and mask of the tokens after the first `past`."""
    total, device = rows.positions.shape[1], rows.positions.device
    places = torch.arange(total, device=device)
    causal = places[None, :] <= places[past:, None]
    mask = None
    if rows.real is not None:
        # padding attends to itself: its softmax must have something to sum
        mask = (causal & (rows.real[:, None, :] | (places[None, :] == places[past:, None])))[:, None]
    elif rows.packed:
        sequence = (rows.positions == 0).cumsum(-1)
        mask = (causal & (sequence[:, past:, None] == sequence[:, None, :]))[:, None]
    elif past and total - past > 1:
        mask = causal[None, None]
    scalings = [scaling_of(config, length) for length in rows.lengths]
    return Layout(mask, total - past > 1, rotary_tables(config, rows.positions[:, past:], scalings))


def scaling_of(config: MegatronTelechatConfig, length: int) -> tuple[float, float]:
    """Theta and the factor on cos and sin for a sequence of this length.

    With s the length, floored at training_seqlen: theta grows by alpha^(d / (d - 2)), alpha =
    max(2^ceil(log2(s / base_seqlen) + 1) - 1, 1). The factor is 1 + 0.1 ln(s / training_seqlen) beyond training_seqlen.
    """
    trained, dim = config.training_seqlen, config.head_dim
    if trained is None:
        return config.rope_theta, 1.0
    ratio = max(length, trained) / (config.base_seqlen or trained)
    alpha = max(2.0 ** math.ceil(math.log2(ratio) + 1) - 1, 1.0)
    factor = 1.0 if length <= trained else 1.0 + 0.1 * math.log(length / trained)
    return config.rope_theta * alpha ** (dim / (dim - 2)), factor


def rotary_tables(config: MegatronTelechatConfig, positions: Tensor, scalings: Sequence[tuple[float, float]]) -> Tables:
    """Tables of tokens at these positions, int64 [1 or batch, length], with the scaling of each row or of all."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = torch.stack([1.0 / theta**exponents for theta, _ in scalings])
    angles = positions[..., None].float() * frequencies[:, None, :]
    dtype = torch.float16 if config.rotary_table_dtype == "fp16" else torch.float32
    factors = torch.tensor([factor for _, factor in scalings], dtype=torch.float32, device=positions.device)
    cos, sin = (
        (factors[:, None, None] * table.to(dtype)).to(dtype).float()[:, None] for table in (angles.cos(), angles.sin())
    )
    return cos, sin


def read_anew(cache: Any, layers: int, x: Tensor, scalings: Sequence[tuple[float, float]]) -> Tensor:
    """What must be read so that the cache holds these tokens, too: them, or, where an earlier token was read with
    another scaling, all; the keys and values are then taken out of the cache.

    A layer behind those of the model holds the embeddings in the place of keys, [batch, 1, tokens, hidden], and the
    scalings in the place of values, so that whatever reorders or crops a cache treats them alike.

    Args:
        layers: of the model.
        x: embeddings of the new tokens, [batch, new, hidden].
        scalings: of each row, or of all.

    Raises:
        ValueError: a cache of another kind than transformers' DynamicCache.
    """
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        raise ValueError("the cache must be a DynamicCache: its tokens may have to be read anew")
    while len(cache.layers) <= layers:
        cache.layers.append(DynamicLayer())
    now = torch.tensor(scalings, dtype=torch.float64, device=x.device)[:, None, None, :]
    now = now.expand(len(x), 1, x.shape[1], 2)
    memory = cache.layers[layers]
    embeddings, used = memory.update(x[:, None], now)
    if bool((used == now[:, :, :1]).all()):
        return x
    for layer in cache.layers[:layers]:
        layer.keys = layer.values = None
        layer.is_initialized = False
    memory.values = now[:, :, :1].expand_as(used).clone()
    return embeddings[:, 0]


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Rotate the halves of each head, [batch, heads, length, head_dim], in fp32; in the type of x."""
    cos, sin = tables
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class MegatronTelechatRMSNorm(nn.Module):
    """Normalises in fp32, rounds to the type of its input, then scales."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class MegatronTelechatAttention(nn.Module):
    """Grouped-query attention by torch's scaled_dot_product_attention.

    ``key_value`` holds the key and the value of each group side by side: K0 V0 K1 V1 ...
    """

    def __init__(self, config: MegatronTelechatConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.attention_dropout
        self.heads, self.groups = config.n_head, config.num_key_value_heads
        width = self.heads * self.head_dim
        self.query = nn.Linear(config.hidden_size, width, bias=False)
        self.key_value = nn.Linear(config.hidden_size, 2 * self.groups * self.head_dim, bias=False)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)

    def forward(self, x: Tensor, layout: Layout, cache: Any = None) -> Tensor:
        """[batch, new, hidden] -> the same."""
        query = self.query(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        key_value = self.key_value(x).unflatten(-1, (self.groups, 2 * self.head_dim)).transpose(1, 2)
        key, value = key_value.split(self.head_dim, dim=-1)
        key = rotate(key, layout.tables)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        out = F.scaled_dot_product_attention(
            rotate(query, layout.tables),
            key,
            value,
            attn_mask=layout.mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=layout.mask is None and layout.causal,
            enable_gqa=self.heads != self.groups,
        )
        return self.dense(out.transpose(1, 2).flatten(2))


class MegatronTelechatMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``; a bias, if any, on the output only."""

    def __init__(self, hidden: int, width: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MegatronTelechatExperts(nn.Module):
    """A mixture of experts that drops no token: the weights of a token are the softmax over its chosen logits."""

    def __init__(self, config: MegatronTelechatConfig):
        super().__init__()
        hidden, width, bias = config.hidden_size, config.moe_intermediate_size, config.mlp_output_bias
        self.topk = config.num_experts_per_tok
        experts = range(config.num_experts or 0)
        self.router = nn.Linear(hidden, len(experts), bias=False)
        self.local_experts = nn.ModuleList(MegatronTelechatMLP(hidden, width, bias) for _ in experts)
        self.shared_experts = None
        if config.shared_expert_intermediate_size:
            self.shared_experts = MegatronTelechatMLP(hidden, config.shared_expert_intermediate_size, False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., hidden] -> the same, and the logits of the router, fp32 [tokens, experts]."""
        tokens = x.flatten(0, -2)
        logits = F.linear(tokens.float(), self.router.weight.float())
        chosen, experts = logits.topk(self.topk, dim=-1)
        weights = chosen.softmax(dim=-1)
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for number, expert in enumerate(self.local_experts):
            rows, rank = (experts == number).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(tokens[rows]).float() * weights[rows, rank, None])
        out = out.to(x.dtype).view_as(x)
        return (out if self.shared_experts is None else out + self.shared_experts(x)), logits


class MegatronTelechatLayer(GradientCheckpointingLayer):
    """``a = x + drop(attention(norm(x)))``, ``out = a + drop(mlp(norm(a)))``; the MLP dense or of experts."""

    def __init__(self, config: MegatronTelechatConfig, layer: int):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = MegatronTelechatRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.self_attention = MegatronTelechatAttention(config, layer)
        self.post_attention_layernorm = MegatronTelechatRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.routes = config.layer_is_moe(layer)
        if self.routes:
            self.mlp = MegatronTelechatExperts(config)
        else:
            self.mlp = MegatronTelechatMLP(config.hidden_size, config.ffn_hidden_size, config.mlp_output_bias)

    def forward(self, x: Tensor, layout: Layout, past_key_values: Any = None) -> tuple[Tensor, Tensor | None]:
        """[batch, new, hidden] -> the same, and the logits of the router of a MoE layer."""
        out = self.self_attention(self.input_layernorm(x), layout, past_key_values)
        x = x + F.dropout(out, self.dropout, self.training)
        out = self.mlp(self.post_attention_layernorm(x))
        out, logits = out if self.routes else (out, None)
        return x + F.dropout(out, self.dropout, self.training), logits


class MegatronTelechatPreTrainedModel(PreTrainedModel):
    """What transformers asks of a family of models."""

    config_class = MegatronTelechatConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegatronTelechatLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # An export leaves out expert biases that the first weights did not have: they are zeros.
    _keys_to_ignore_on_load_missing = [r"local_experts\.\d+\.down_proj\.bias"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, MegatronTelechatRMSNorm):
            nn.init.ones_(module.weight)


class MegatronTelechatModel(MegatronTelechatPreTrainedModel):
    """Embedding, layers, final norm."""

    def __init__(self, config: MegatronTelechatConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(MegatronTelechatLayer(config, layer) for layer in range(config.n_layer))
        self.ln_f = MegatronTelechatRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another table in its place."""
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Hidden states of token ids [batch, new], or of their embeddings; see `rows_of` for masks and positions.

        Raises:
            ValueError: both inputs or none; attention weights are asked for, which no fused attention has; as
                `rows_of` and `read_anew`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if output_attentions:
            raise ValueError("attention weights are never computed; leave output_attentions out")
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        batch, new = x.shape[:2]
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        rows = rows_of(x, past, attention_mask, position_ids)
        config: MegatronTelechatConfig = self.config  # pyright: ignore[reportAssignmentType]
        if past_key_values is not None:
            scalings = [scaling_of(config, length) for length in rows.lengths]
            x = read_anew(past_key_values, self.config.n_layer, x, scalings)
        layout = layout_of(config, rows, past + new - x.shape[1])
        wants_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states, routers = [], []
        for layer in self.h:
            if wants_states:
                states.append(x[:, -new:])
            x, logits = layer(x, layout, past_key_values=past_key_values)
            if wants_routers and logits is not None:
                routers.append(logits.unflatten(0, (batch, -1))[:, -new:].flatten(0, 1))
        x = self.ln_f(x[:, -new:])
        output = MoeModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states, x) if wants_states else None,
            router_logits=tuple(routers) or None,
        )
        return output if return_dict is None or return_dict else output.to_tuple()


def balancing_loss(router_logits: Sequence[Tensor], topk: int, attention_mask: Tensor | None) -> Tensor:
    """The loss that the training adds, before its coefficient: of each layer E * sum_e f_e P_e, summed over the layers.

    f_e is the share of the tokens' choices that fall on expert e, P_e the mean of its probability (Switch Transformer,
    eq. 4). Padding does not count.

    Args:
        router_logits: of each MoE layer, [tokens, experts].
        attention_mask: [batch, length] of the same tokens.
    """
    total = router_logits[0].new_zeros(())
    for logits in router_logits:
        if attention_mask is not None:
            logits = logits[attention_mask.to(logits.device).flatten().bool()]
        picks = torch.zeros_like(logits).scatter_(1, logits.topk(topk, dim=-1).indices, 1.0)
        shares, probabilities = picks.mean(0) / topk, logits.softmax(dim=-1).mean(0)
        total = total + logits.shape[1] * (shares * probabilities).sum()
    return total


class MegatronTelechatForCausalLM(MegatronTelechatPreTrainedModel, GenerationMixin):
    """The model with its output layer."""

    def __init__(self, config: MegatronTelechatConfig):
        super().__init__(config)
        self.transformer = MegatronTelechatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.transformer.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another table in its place."""
        self.transformer.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another output layer in its place."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss_arguments: Any,
    ) -> Any:
        """Logits [batch, new, vocab], and with labels the mean loss in nats.

        Args:
            labels: [batch, new]; the label of a token is the next one, as transformers shifts them; -100 does not
                count.
            logits_to_keep: of the last so many tokens, or of these places; 0: of all.
            loss_arguments: for transformers' loss function (num_items_in_batch).

        Raises:
            ValueError: as `MegatronTelechatModel.forward`.
        """
        wants_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        inner = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_router_logits=wants_routers,
            output_attentions=output_attentions,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = inner.last_hidden_state
        logits = self.lm_head(hidden if isinstance(kept, int) else hidden[:, kept])
        loss, balance = None, None
        if inner.router_logits is not None:
            mask = None if attention_mask is None else attention_mask[:, -hidden.shape[1] :]
            balance = balancing_loss(inner.router_logits, self.config.num_experts_per_tok, mask)
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_arguments)
            if balance is not None:
                loss = loss + self.config.router_aux_loss_coef * balance.to(loss.device)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            past_key_values=inner.past_key_values,
            hidden_states=inner.hidden_states,
            router_logits=inner.router_logits,
        )
        return output if return_dict is None or return_dict else output.to_tuple()
