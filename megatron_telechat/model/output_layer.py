"""The output layer: logits, or the losses of tokens whose logits are never there all at once."""

from __future__ import annotations

import importlib
from typing import Literal

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_telechat.config.loss_chunks import chunk_rows
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.model.loss_chunks import AddProduct, Layout, chunked_loss
from megatron_telechat.model.transformer_config import leave_uninitialised


class OutputLayer(ColumnParallelLinear):
    """megatron-core's layer, which can compute losses chunk by chunk, too.

    A method of the module, so that what is hooked before its forward happens: the overlapped gather of parameters.

    Args:
        run: for the vocabulary and the rows of a chunk.
        config: of the stage.
        tp_group: of the tensor-parallel ranks.
    """

    def __init__(self, run: RunConfig, config: TransformerConfig, tp_group: dist.ProcessGroup):
        super().__init__(
            config.hidden_size,
            run.model.vocab_size,
            config=config,
            init_method=leave_uninitialised,
            bias=False,
            gather_output=False,
            tp_group=tp_group,
        )
        self._group = tp_group
        self._chunk_rows: int | Literal["auto"] = run.training.loss_chunk_rows

    def chunk_rows(self, labels: Tensor) -> int:
        """Rows of the chunks that the loss of these labels, [b, s], is computed in here; 0: it is computed from the
        logits."""
        return chunk_rows(self._chunk_rows, labels.numel(), self.output_size_per_partition)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of hidden states; with labels the losses of their tokens in their place.

        Args:
            input_: [s (/ tp under sequence parallelism), b, h].
            weight: in place of the layer's own.
            runtime_gather_output: return logits of the whole vocabulary.
            labels: int64 [b, s]; only where `chunk_rows` is not 0.

        Returns:
            Logits [s, b, vocab (/ tp)], or losses in nats, [b, s]; and None, for a bias.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        assert self.weight is not None, "the layer has a weight of its own"
        group = self._group if self._group.size() > 1 else None
        layout = Layout(group, self.config.sequence_parallel, self.chunk_rows(labels), self._add_product())
        return chunked_loss(input_, self.weight, labels, layout), None

    def _add_product(self) -> AddProduct | None:
        """apex's kernel, where megatron-core's layer uses it."""
        if not self.gradient_accumulation_fusion:
            return None
        return importlib.import_module("fused_weight_gradient_mlp_cuda").wgrad_gemm_accum_fp32
