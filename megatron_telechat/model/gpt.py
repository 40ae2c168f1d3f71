"""megatron-core's GPTModel with TeleChat2's rotary embedding."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.model.rotary import RotaryEmbedding
from megatron_telechat.moe.counted import CountedTokens

_PADDING_MASK = 5
"""Place of what the layers get as ``padding_mask`` among the results of megatron-core's ``_preprocess``."""


class TeleChatModel(GPTModel):
    """One chunk of the model: the embedding if it is the first, its decoder layers, the loss if it is the last.

    Embedding, output layer and vocabulary-parallel cross entropy are megatron-core's; embedding and
    output layer are not tied. ``forward(tokens, position_ids, None, labels=labels)`` gives the loss of
    every token [b, s] on the last stage; without labels the logits [b, s, vocab / tp], whole with
    ``runtime_gather_output=True``; on other stages the hidden states [s, b, hidden]. ``packed_seq_params`` takes
    `model.attention.Segments` where documents or dialogs are kept apart, ``padding_mask`` `moe.CountedTokens` where
    tokens are padding or are not learned.
    """

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        pg_collection: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ):
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=run.model.vocab_size,
            max_sequence_length=run.training.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.rotary = RotaryEmbedding(run.model)
        self.reset_position_ids = run.data.reset_position_ids

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *args: Any,
        padding_mask: CountedTokens | None = None,
        **kwargs: Any,
    ):
        prepared = list(super()._preprocess(input_ids, position_ids, *args, **kwargs))
        hidden = prepared[0] if prepared[0] is not None else self.decoder.input_tensor
        length = hidden.shape[0] * (self.pg_collection.tp.size() if self.config.sequence_parallel else 1)
        positions = position_ids if self.reset_position_ids else None
        assert positions is not None or not self.reset_position_ids, "every stage needs the position ids here"
        if padding_mask is not None:
            tp = self.pg_collection.tp
            part, parts = (tp.rank(), tp.size()) if self.config.sequence_parallel else (0, 1)
            prepared[_PADDING_MASK] = padding_mask.rows(part, parts)
        prepared[1] = self.rotary(length, hidden.device, positions)
        return tuple(prepared)
