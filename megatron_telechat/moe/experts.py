"""The experts of one rank: their parameters, and the autograd node that runs the pipeline of chunks over them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_telechat.backend import traits_of
from megatron_telechat.errors import ConfigError
from megatron_telechat.moe.engine import ExpertWeights, Gradients
from megatron_telechat.moe.forward_pass import Saved
from megatron_telechat.moe.pipeline import ChunkPipeline
from megatron_telechat.moe.te_products import accumulating_product
from megatron_telechat.tensors.table import Constant, mlp_rows

_PROBABILITY_BYTES = 4


class _Weights(torch.nn.Module):
    """Holds ``weight`` and ``bias`` under the name of a linear layer.

    Whoever reads them calls the module: Megatron-Core's overlapped gather of parameters is started and awaited by the
    forward hook of the module that owns them.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias))

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, the parameters themselves."""
        return self.weight, self.bias


def _check_alignment(config: TransformerConfig, device: torch.device, ffn_local: int) -> None:
    """Raises ConfigError for widths that the exchange or the accelerator's grouped product cannot take."""
    element = torch.empty((), dtype=config.params_dtype).element_size()
    if config.hidden_size * element % _PROBABILITY_BYTES:
        raise ConfigError(
            f"hidden_size {config.hidden_size} is odd: routing probabilities travel in whole rows of "
            f"{config.params_dtype}",
            where="model",
            fix="choose an even hidden_size",
        )
    multiple = max(1, traits_of(device).grouped_alignment_bytes // element)
    bad = [
        f"{name} {size}"
        for name, size in (
            ("hidden_size", config.hidden_size),
            ("moe_ffn_hidden_size / expert_tensor_parallel_size", ffn_local),
        )
        if size % multiple
    ]
    if bad:
        raise ConfigError(
            f"grouped products on {device.type} need widths that are multiples of {multiple} "
            f"in {config.params_dtype}: {', '.join(bad)}",
            where="model",
            fix=f"choose multiples of {multiple}",
        )


class GroupedExperts(MegatronModule):
    """The local experts of a layer.

    Parameters (E experts here, f a slice of the width where ``expert_tensor_parallel_size`` > 1):
    ``linear_fc1.weight`` [E, 2, f, h] with gate before up, ``linear_fc2.weight`` [E, h, f] and, if `output_bias`,
    ``linear_fc2.bias`` [E, h]. They are zero until the model fills them.

    Args:
        num_local_experts: E.
        config: Megatron-Core's TransformerConfig; hidden size, width and type are read.
        pg_collection: process groups; the expert-tensor-parallel one is read.
        output_bias: a bias on the down projection.

    Raises:
        ConfigError: widths that the exchange or the accelerator's grouped product cannot take.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        output_bias: bool = False,
    ):
        super().__init__(config=config)
        self.etp_group = pg_collection.expt_tp
        etp_size, etp_rank = self.etp_group.size(), self.etp_group.rank()
        ffn, hidden, dtype = config.moe_ffn_hidden_size, config.hidden_size, config.params_dtype
        assert ffn is not None and ffn % etp_size == 0, "the configuration rules let this through"
        width = ffn // etp_size
        # On the device that the model is built under.
        bias = torch.zeros(num_local_experts, hidden, dtype=dtype) if output_bias else None
        self.linear_fc1 = _Weights(torch.zeros(num_local_experts, 2, width, hidden, dtype=dtype))
        self.linear_fc2 = _Weights(torch.zeros(num_local_experts, hidden, width, dtype=dtype), bias)
        _check_alignment(config, self.device, width)
        self.num_local_experts = num_local_experts
        self.adds_bias = etp_rank == 0
        self._accumulate = accumulating_product(self.device, config.params_dtype)
        self._mark_parameters(etp_rank)

    def _mark_parameters(self, etp_rank: int) -> None:
        """Tell Megatron-Core which ranks hold the same values.

        ``allreduce = False`` puts a parameter into the buffers that are reduced over the expert-data-parallel
        ranks, at one expert-parallel rank too, so that the optimizer state has the same form in every layout.
        ``tensor_model_parallel`` says "count it in the gradient norm on every tensor rank": true of the weights,
        which no two ranks of a tensor group share, and of the bias on the first rank of an expert-tensor group. Not
        marked, it counts on the first rank of the tensor group: for the experts that of their own group
        (`training.chain`).
        """
        experts, _, width, hidden = self.linear_fc1.weight.shape
        bias = self.linear_fc2.bias is not None
        rows = mlp_rows("", hidden, width, Constant(0.0), gated=True, output_bias=bias, experts=experts)
        axes = {row.key: row.tensor_axis for row in rows}
        for name, parameter in self.named_parameters():
            parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue] - Megatron-Core's mark
            first = axes[name] is not None or etp_rank == 0
            set_tensor_model_parallel_attributes(parameter, is_parallel=first, dim=axes[name] or 0, stride=1)

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return self.linear_fc1.weight.device

    @property
    def weights(self) -> ExpertWeights:
        """The local experts, gathered where the gather of parameters is overlapped."""
        (fc1, _), (fc2, bias) = self.linear_fc1(), self.linear_fc2()
        return ExpertWeights(fc1, fc2, bias, self.adds_bias, self._accumulate)

    def forward(self, tokens: Tensor, probabilities: Tensor, pipeline: ChunkPipeline) -> Tensor:
        """Tokens to their experts, wherever these are, and back.

        Args:
            tokens: [n, h] of this rank.
            probabilities: [n, k], the routing probabilities of the experts chosen for each token.
            pipeline: carries out this call.

        Returns:
            [n, h], weighted and summed.
        """
        weights, keep = self.weights, torch.is_grad_enabled()
        # The weights twice: once for autograd to see them, once by name for the node.
        return _ExpertsNode.apply(
            tokens.contiguous(), probabilities, weights.fc1, weights.fc2, weights.bias, weights, pipeline, keep
        )


class _ExpertsNode(torch.autograd.Function):
    """One node for all chunks, which owns the pipeline of the call and the weights. Its backward is scheduled by hand,
    not by autograd's order of nodes."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        probabilities: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        bias: Tensor | None,
        weights: ExpertWeights,
        pipeline: ChunkPipeline,
        keep: bool,
    ) -> Tensor:
        output, kept = pipeline.forward(tokens, probabilities, weights, keep)
        if keep:
            # The parameters themselves: their main_grad takes the gradients.
            ctx.weights, ctx.pipeline, ctx.probabilities_dtype = weights, pipeline, probabilities.dtype
            # Saved by autograd, and not kept by hand: a second backward over the overwritten buffers, or a backward
            # with weights that were changed since, is an error.
            parts = (part for saved in kept for part in (saved.rows, saved.scale, saved.gate_up))
            ctx.save_for_backward(fc1, fc2, *parts)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, *parts = ctx.saved_tensors
        kept = [Saved(*parts[start : start + 3]) for start in range(0, len(parts), 3)]
        gradients = Gradients.of(ctx.weights, len(kept), any(ctx.needs_input_grad[2:5]))
        grad_tokens, grad_probabilities = ctx.pipeline.backward(grad, ctx.weights.detached(), kept, gradients)
        return grad_tokens, grad_probabilities.to(ctx.probabilities_dtype), *gradients.results(), None, None, None
