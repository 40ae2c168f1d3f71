"""The experts of one rank: parameters of their own, one grouped product."""

from __future__ import annotations

from typing import Optional

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_telechat.errors import ConfigError
from megatron_telechat.moe.grouped import grouped_swiglu

# Row strides of torch.nn.functional.grouped_mm on accelerators.
_GROUPED_MM_ALIGNMENT_BYTES = 16


class _Weights(torch.nn.Module):
    """Holds ``weight`` and ``bias`` under the name of a linear layer."""

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias))


def _check_alignment(config, device: torch.device, ffn_local: int) -> None:
    element = torch.empty((), dtype=config.params_dtype).element_size()
    multiple = _GROUPED_MM_ALIGNMENT_BYTES // element
    bad = [f"{name} {size}" for name, size in (("hidden_size", config.hidden_size),
                                               ("moe_ffn_hidden_size / expert_tensor_parallel_size", ffn_local))
           if size % multiple]
    if device.type != "cpu" and bad:
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

    Raises:
        ConfigError: widths that the accelerator's grouped product cannot take.
    """

    def __init__(self, num_local_experts: int, config, pg_collection, output_bias: bool = False):
        super().__init__(config=config)
        self.etp_group = pg_collection.expt_tp
        etp_size, etp_rank = self.etp_group.size(), self.etp_group.rank()
        assert config.moe_ffn_hidden_size % etp_size == 0, "the configuration rules let this through"
        width, hidden = config.moe_ffn_hidden_size // etp_size, config.hidden_size
        options = {"dtype": config.params_dtype}  # on the device that the model is built under
        bias = None
        if output_bias:
            bias = torch.zeros(num_local_experts, hidden, **options)
        self.linear_fc1 = _Weights(torch.zeros(num_local_experts, 2, width, hidden, **options))
        self.linear_fc2 = _Weights(torch.zeros(num_local_experts, hidden, width, **options), bias)
        _check_alignment(config, self.linear_fc1.weight.device, width)
        self.num_local_experts = num_local_experts
        self.adds_bias = etp_rank == 0
        self._mark_parameters(etp_rank)

    def _mark_parameters(self, etp_rank: int) -> None:
        """Tell Megatron-Core which ranks hold the same values.

        ``allreduce = False`` puts a parameter into the buffers that are reduced over the expert-data-parallel
        ranks, at one expert-parallel rank too, so that the optimizer state has the same form in every layout.
        ``tensor_model_parallel`` says "count it in the gradient norm on every tensor rank": true of the weights,
        which no two ranks of a tensor group share, and of the bias on the first rank of an expert-tensor group.
        """
        for parameter in self.parameters():
            parameter.allreduce = False
        for linear, axis in ((self.linear_fc1, 2), (self.linear_fc2, 2)):
            set_tensor_model_parallel_attributes(linear.weight, is_parallel=True, dim=axis, stride=1)
        if self.linear_fc2.bias is not None:
            set_tensor_model_parallel_attributes(self.linear_fc2.bias, is_parallel=etp_rank == 0, dim=0, stride=1)

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, probabilities: Tensor) -> Tensor:
        """[rows, h] sorted by expert → [rows, h]; with expert tensor parallelism a partial sum."""
        return grouped_swiglu(
            rows,
            probabilities,
            self.linear_fc1.weight,
            self.linear_fc2.weight,
            self.linear_fc2.bias,
            tokens_per_expert,
            adds_bias=self.adds_bias,
        )
