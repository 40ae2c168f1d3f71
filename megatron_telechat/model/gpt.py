"""One virtual stage of the language model: embedding, decoder layers, output layer; on megatron-core's parts."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.model.attention import Segments
from megatron_telechat.model.context_attention import ContextPlace
from megatron_telechat.model.key_value_cache import KeyValueCache
from megatron_telechat.model.output_layer import OutputLayer
from megatron_telechat.model.rotary import RotaryEmbedding, Tables
from megatron_telechat.moe.counted import CountedTokens
from megatron_telechat.moe.pooled import ChoicePool, pools_of
from megatron_telechat.parallel.context.plan import ContextPlan
from megatron_telechat.parallel.groups import ProcessGroups


class TeleChatModel(LanguageModule):
    """The embedding if the stage is the first, its decoder layers, the output layer if it is the last.

    A model of our own in place of megatron-core's GPTModel, which is deprecated. Embedding, `TransformerBlock`, output
    layer and, where the logits are whole, the vocabulary-parallel cross entropy are megatron-core's. Embedding and
    output layer are never tied.

    The attributes are those that megatron-core reads of a model:

    * its pipeline schedules: ``config``, ``model_type``, ``vp_stage``, ``decoder.layers``, `set_input_tensor`;
    * `finalize_model_grads`: ``pre_process``, ``share_embeddings_and_output_weights``;
    * the optimizer: the mark on both matrices that `setup_embeddings_and_output_layer` sets.

    The names of the submodules are part of the file format: checkpoints store tensors by name.

    Args:
        run: for the model and the sequence length.
        config: from `transformer_config`; an object of this stage alone, the schedules hang functions on it.
        spec: the decoder layers of this stage (`block_spec`).
        pg_collection: `ParallelState.process_groups`.
        pre_process, post_process: the stage has the embedding; the output layer.
        vp_stage: number of the virtual stage on this rank; None without interleaving.
    """

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        pg_collection: ProcessGroups,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ):
        super().__init__(config=config, pg_collection=pg_collection)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=run.model.vocab_size,
                max_sequence_length=run.training.seq_length,
                position_embedding_type="none",
                tp_group=pg_collection.tp,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = OutputLayer(run, config, pg_collection.tp)
        self.rotary = RotaryEmbedding(run.model)
        self.context = ContextPlace.of(pg_collection.context) if config.context_parallel_size > 1 else None
        self.reset_position_ids = run.data.reset_position_ids
        self.new_pool = pools_of(run)
        self.setup_embeddings_and_output_layer()
        for module in self.modules():
            finish_init = getattr(module, "finish_init", None)
            if finish_init is not None:  # TransformerEngine's modules wait to be told their quantisation: none
                finish_init(None)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Keep the output of the stage before for the next `forward`.

        Args:
            input_tensor: [s (/ tp under sequence parallelism), b, hidden], or a list of it, as the schedules hand it;
                None on the first stage. `moe.pooled.carried_rows` more rows, where a run has some.
        """
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        # megatron-core's annotation leaves None out
        self.decoder.set_input_tensor(input_tensor)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        tokens: Tensor | None,
        position_ids: Tensor | None,
        *,
        labels: Tensor | None = None,
        segments: Segments | ContextPlan | KeyValueCache | None = None,
        counted: CountedTokens | None = None,
        gather_logits: bool = False,
    ) -> Tensor:
        """One micro-batch through this stage.

        Args:
            tokens: int64 [b, s] of this context-parallel rank; only the first stage reads them.
            position_ids: int64 [b, s]; read only where positions begin anew at each document, or where `segments` is a
                plan, and there by every stage.
            labels: int64 [b, s]; only the last stage reads them.
            segments: stretches that attend to themselves only, with context parallelism the plan of the micro-batch;
                None: every row is one. A cache of a generation: the tokens follow those in it, and the last stage
                returns the logits of the last token only, [b, 1, vocab (/ tp)].
            counted: which tokens count in the losses of the routers; None: all.
            gather_logits: the last stage returns logits of the whole vocabulary rather than of this rank's part.

        Returns:
            On the last stage the loss of every token in nats, [b, s], or without labels the logits,
            [b, s, vocab (/ tp)]; on the others the hidden states, [s (/ tp under sequence parallelism), b, hidden],
            with `moe.pooled.carried_rows` more rows, where a run has some.
        """
        embedded = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        if embedded is not None and not embedded.requires_grad and torch.is_grad_enabled():
            # A frozen embedding. A layer that is recomputed gives its parameters no gradient where no input wants one,
            # and a stage that is frozen as a whole must still hand gradients on to the stage before.
            embedded.requires_grad_()
        pool = None if self.new_pool is None else self.new_pool()
        entering = embedded if self.pre_process else self.decoder.input_tensor
        assert entering is not None, "a later stage needs set_input_tensor before each forward"
        if pool is not None and not self.pre_process:
            entering = pool.receive(entering)
            self.decoder.set_input_tensor(entering)
        hidden = self.decoder(
            hidden_states=embedded,  # a later stage reads its own input_tensor
            attention_mask=None,
            rotary_pos_emb=self._rotary_tables(entering, position_ids, segments),
            packed_seq_params=segments,
            padding_mask=self._for_routers(counted, pool, entering),
        )
        if isinstance(segments, KeyValueCache):
            segments.advance(hidden.shape[0])
            hidden = hidden[-1:]
        if not self.post_process:
            return hidden if pool is None else pool.hand_on(hidden)
        if pool is not None and self.training and torch.is_grad_enabled():
            pool.complete(self.pg_collection.tp_cp)
        if labels is not None and self.output_layer.chunk_rows(labels):
            losses, _ = self.output_layer(hidden, labels=labels)
            return losses
        logits, _ = self.output_layer(hidden, runtime_gather_output=gather_logits)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def _for_routers(
        self, counted: CountedTokens | None, pool: ChoicePool | None, entering: Tensor
    ) -> CountedTokens | None:
        """What the routers of this stage must know of a micro-batch, [s (/ tp under sequence parallelism), b, hidden];
        None: all of its tokens count, and each layer is balanced by itself."""
        mine = None if counted is None else counted.rows(*self._sequence_part())
        if pool is None:
            return mine
        if mine is not None:
            return replace(mine, pool=pool)
        tokens = entering.shape[0] * entering.shape[1] * self.pg_collection.tp_cp.size()
        return CountedTokens(tokens, float(tokens), pool=pool)

    def _sequence_part(self) -> tuple[int, int]:
        """Which part of the sequence this rank holds between the layers, and of how many."""
        tp = self.pg_collection.tp
        return (tp.rank(), tp.size()) if self.config.sequence_parallel else (0, 1)

    def _rotary_tables(
        self, hidden: Tensor, position_ids: Tensor | None, segments: Segments | ContextPlan | KeyValueCache | None
    ) -> Tables:
        """Of the tokens of this rank. Theta and the scaling follow from the length of the whole rows."""
        if isinstance(segments, KeyValueCache):
            assert not self.config.sequence_parallel and self.context is None, "a generation holds whole sequences"
            whole = segments.length + hidden.shape[0]
            assert segments.scaling == self.rotary.scaling(whole), "KeyValueCache.to_read says what must be read anew"
            cos, sin = self.rotary(whole, hidden.device)
            return cos[segments.length :], sin[segments.length :]
        _, parts = self._sequence_part()
        length, place = hidden.shape[0] * parts, self.context
        by_token = self.reset_position_ids or isinstance(segments, ContextPlan)
        assert position_ids is not None or not by_token, "every stage needs the position ids here"
        if place is None:
            return self.rotary(length, hidden.device, position_ids if by_token else None)
        whole = length * place.heads * place.ring
        if by_token:
            return self.rotary(whole, hidden.device, position_ids)
        return self.rotary.at(whole, hidden.device, place.positions(place.whole_rows(whole, 1))[0])
