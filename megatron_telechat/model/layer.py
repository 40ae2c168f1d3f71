"""One decoder layer, with its own choice of what is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_telechat.model.attention import Segments
from megatron_telechat.model.key_value_cache import KeyValueCache
from megatron_telechat.model.norm import build_norm
from megatron_telechat.model.rotary import Tables
from megatron_telechat.moe.choices import FirstPass
from megatron_telechat.moe.counted import CountedTokens
from megatron_telechat.parallel.context.plan import ContextPlan


@dataclass
class DecoderLayerSubmodules:
    """The exchangeable parts of a layer."""

    norm: ModuleSpec | type
    self_attention: ModuleSpec
    mlp: ModuleSpec


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, dropout: float, training: bool) -> Tensor:
    """``residual + dropout(x + bias)``; the bias is inside of the dropout, as in the published model."""
    if bias is not None:
        x = x + bias
    if dropout > 0.0:
        x = torch.nn.functional.dropout(x, dropout, training)
    return residual + x


class DecoderLayer(MegatronModule):
    """``a = x + drop(attention(norm(x)))``, ``out = a + drop(mlp(norm(a)))``; the MLP dense or of experts.

    Args:
        layer_number: position in the virtual stage, counted from 1; megatron-core's block passes it.
        global_layer: zero-based number in the whole model.
        recompute: ``("full",)``, or modules of `megatron_telechat.config.recompute.MODULES`; ``moe`` is the block's own
            matter.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DecoderLayerSubmodules,
        global_layer: int,
        recompute: tuple[str, ...],
        pg_collection: ProcessGroupCollection,
        layer_number: int = 1,
        vp_stage: int | None = None,
    ):
        super().__init__(config=config)
        self.layer_number = global_layer + 1
        self.tp_group = pg_collection.tp
        self.dropout = config.hidden_dropout
        self.recompute_layer = "full" in recompute
        self.recompute_norms = "layernorm" in recompute
        self.recompute_mlp = "mlp" in recompute
        self.input_layernorm = build_norm(submodules.norm, config, config.hidden_size)
        self.self_attention = build_module(
            submodules.self_attention,
            config=config,
            layer_number=self.layer_number,
            pg_collection=pg_collection,
            recompute_core="core_attn" in recompute,
        )
        self.pre_mlp_layernorm = build_norm(submodules.norm, config, config.hidden_size)
        self.mlp = build_module(submodules.mlp, config=config, pg_collection=pg_collection)
        self.routes = hasattr(self.mlp, "router")
        if hasattr(self.mlp, "set_layer_number"):
            self.mlp.set_layer_number(self.layer_number)

    def forward(
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Tables,
        packed_seq_params: Segments | ContextPlan | KeyValueCache | None = None,
        padding_mask: CountedTokens | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[s (/ tp under sequence parallelism), b, hidden] -> the same; the second value is megatron-core's context.

        Args:
            rotary_pos_emb: the tables of `model.rotary.RotaryEmbedding`.
            packed_seq_params: stretches that attend to themselves only, or the cache of a generation; megatron-core's
                block hands it on under this name.
            padding_mask: which tokens count in the losses of the routers; None: all. The name is megatron-core's, too.
        """
        run = partial(self._forward, rotary_tables=rotary_pos_emb, segments=packed_seq_params, counted=padding_mask)
        if self.recompute_layer and self._recomputes():
            if self.routes:  # both passes of this call, and of no other, share it
                run = partial(run, first_pass=FirstPass())
            return self._checkpoint(run, hidden_states), None
        # pipeline schedules free a stage's output, which must not be a view for that
        return make_viewless_tensor(run(hidden_states), requires_grad=True, keep_graph=True), None

    def _recomputes(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _forward(
        self,
        hidden_states: Tensor,
        rotary_tables: Tables,
        segments: Segments | ContextPlan | KeyValueCache | None,
        counted: CountedTokens | None,
        first_pass: FirstPass | None = None,
    ) -> Tensor:
        normed, release = self._norm(self.input_layernorm, hidden_states)
        out, bias = self.self_attention(normed, rotary_tables=rotary_tables, segments=segments)
        release(out)
        hidden_states = bias_dropout_add(out, bias, hidden_states, self.dropout, self.training)

        normed, release = self._norm(self.pre_mlp_layernorm, hidden_states)
        if self.recompute_mlp and self._recomputes():
            # the bias is added inside: a checkpoint must not hand a parameter out
            out, bias = self._checkpoint(partial(self._mlp_with_bias, counted=counted), normed), None
        else:
            out, bias = self.mlp(normed, counted=counted, first_pass=first_pass)
        release(out)
        return bias_dropout_add(out, bias, hidden_states, self.dropout, self.training)

    def _checkpoint(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``run(x)``, computed again in the backward. FP8 needs Transformer Engine's own way: the backward is outside
        of the recipe that megatron-core's block entered, and delayed scales have moved on since."""
        if self.config.fp8 is None:
            return tensor_parallel.checkpoint(run, False, x)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        return te_checkpoint(run, False, tensor_parallel.get_cuda_rng_tracker, self.tp_group, x)

    def _mlp_with_bias(self, normed: Tensor, counted: CountedTokens | None) -> Tensor:
        out, bias = self.mlp(normed, counted=counted)
        return out if bias is None else out + bias

    def _norm(self, norm: torch.nn.Module, x: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
        """Norm of x, and what to call with the output of the module that read it: frees the norm's output until the
        backward, if norms are recomputed."""
        if not (self.recompute_norms and self._recomputes()):
            return norm(x), lambda out: None
        # fp8=None: megatron-core takes False for "fp8 may be on" and then asks for TransformerEngine
        checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=None)  # pyright: ignore[reportArgumentType]
        return checkpoint.checkpoint(norm, x), checkpoint.discard_output_and_register_recompute
