"""Memory of a stage against sums worked out by hand, and its behaviour under each lever."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.config.schema import AverageConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs import count_parameters
from megatron_telechat.costs.memory import averages_bytes, checkpoint_bytes, stage_memory, staging_bytes
from tests.costs.test_parameters import M39B, M115B

TINY = ModelConfig(
    num_layers=4, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, vocab_size=32
)


def make(model=TINY, training=None, **parallel) -> RunConfig:
    return RunConfig(
        model=model,
        parallel=ParallelConfig(**parallel),
        training=replace(TrainingConfig(seq_length=16, global_batch_size=8), **(training or {})),
    )


def test_one_rank_by_hand():
    (stage,) = stage_memory(make())
    count = count_parameters(TINY).total
    assert stage.parameters.total == count
    assert (stage.parameters_bytes, stage.gradients_bytes, stage.optimizer_bytes) == (2 * count, 4 * count, 12 * count)
    # a token of a layer, bf16: input 8, norm outputs 16, residual 8, q 8, k and v 8, output 8, gate up product 36; lse
    # 4 x 4 bytes
    layer = 16 * (2 * (8 + 16 + 8 + 8 + 8 + 8 + 36) + 16)
    head = 16 * (6 * 32 + 2 * 2 * 8)
    token_ids = 16 * 8
    assert stage.activations_bytes == 4 * layer + head + token_ids
    assert stage.transient_bytes == 16 * 2 * 32  # logits in bf16
    assert stage.total_bytes == 18 * count + 4 * layer + head + token_ids


def test_the_loss_in_chunks_by_hand():
    whole, chunks = (stage_memory(make(training={"loss_chunk_rows": rows}))[0] for rows in (0, 7))
    logits = 16 * 6 * 32
    # three chunks of at most 6 rows; an eighth of the weight's gradient in bf16; the gradient of the norm's output
    work = 6 * 6 * 32 + 2 * 32 * 8 / 8 + 16 * 2 * 8
    row = 16 * (8 + 3 * 4)  # label, largest logit, sum of exponentials, the label's logit
    assert whole.activations_bytes - chunks.activations_bytes == logits - work - row
    plain, cut = (stage_memory(make(training={"loss_chunk_rows": rows, "precision": "fp32"}))[0] for rows in (0, 7))
    work = 6 * 4 * 32 + 16 * 4 * 8  # logits and their gradient are one array, and the product is added at once
    assert plain.activations_bytes - cut.activations_bytes == 16 * 8 * 32 - work - row


def test_fp32_needs_no_master_weight():
    (stage,) = stage_memory(make(training={"precision": "fp32"}))
    count = count_parameters(TINY).total
    assert (stage.parameters_bytes, stage.gradients_bytes, stage.optimizer_bytes) == (4 * count, 4 * count, 8 * count)


def test_full_recompute_keeps_the_input_and_repeats_one_layer():
    (stage,) = stage_memory(make(training={"recompute_granularity": "full"}))
    layer = 16 * (2 * (8 + 16 + 8 + 8 + 8 + 8 + 36) + 16)
    kept = 16 * 2 * 8
    head = 16 * (4 * 32 + 2 * 2 * 8)  # the logits in bf16 are free before a layer is made again
    # gradients of the second matrix of the MLP, in bf16, and of its input
    gradients = 2 * 8 * 12 + 16 * 2 * 12
    assert stage.activations_bytes == 4 * kept + head + 16 * 8 + layer - kept + gradients
    assert stage.transient_bytes == layer - kept + gradients


def test_selective_mlp_drops_what_the_mlp_makes():
    plain = stage_memory(make())[0]
    less = stage_memory(make(training={"recompute_granularity": "selective", "recompute_modules": ("mlp",)}))[0]
    mlp = 16 * 2 * 36
    assert plain.activations_bytes - plain.transient_bytes - (less.activations_bytes - less.transient_bytes) == 4 * mlp


def test_tensor_and_sequence_parallel_cut_everything_but_the_replicated():
    one = stage_memory(make())[0]
    both = stage_memory(make(world_size=2, tensor_model_parallel_size=2))[0]
    without = stage_memory(make(world_size=2, tensor_model_parallel_size=2, sequence_parallel=False))[0]
    token_ids = 16 * 8  # every rank looks its part of the vocabulary up for all tokens
    kept, half = (stage.activations_bytes - stage.transient_bytes - token_ids for stage in (one, both))
    assert half == kept / 2
    # a matrix's gradient and its input's, cut over the ranks; the buffer of gathered inputs, and a gathered gradient
    assert both.transient_bytes == (2 * 8 * 12 + 16 * 2 * 12) / 2 + 2 * 16 * 2 * 8
    assert both.activations_bytes < without.activations_bytes < one.activations_bytes


def test_first_stage_holds_the_most_microbatches():
    stages = stage_memory(make(world_size=4, pipeline_model_parallel_size=4))
    assert [stage.in_flight for stage in stages] == [(4,), (3,), (2,), (1,)]
    assert sum(stage.parameters.total for stage in stages) == count_parameters(TINY).total
    assert stages[0].activations_bytes > stages[1].activations_bytes > stages[2].activations_bytes


def test_distributed_optimizer_cuts_dense_by_dp_and_experts_by_expert_dp():
    parallel = dict(world_size=1024, tensor_model_parallel_size=4, pipeline_model_parallel_size=2,
                    expert_model_parallel_size=8, expert_tensor_parallel_size=1)  # fmt: skip
    training = {"seq_length": 8192, "global_batch_size": 512}
    plain = stage_memory(make(M39B, training, **parallel))[0]
    sharded = stage_memory(make(M39B, training, **parallel, use_distributed_optimizer=True))[0]
    count = plain.parameters
    assert plain.optimizer_bytes == 12 * count.total
    assert sharded.optimizer_bytes == 12 * (count.dense / 128 + count.expert / 64)
    assert sharded.activations_bytes == plain.activations_bytes


def test_more_expert_ranks_receive_more_token_rows_and_as_many_expert_rows():
    training = {"seq_length": 8192, "global_batch_size": 512}
    few = stage_memory(make(M39B, training, world_size=64, expert_model_parallel_size=2))[0]
    many = stage_memory(make(M39B, training, world_size=64, expert_model_parallel_size=16))[0]
    # 8 of 16 experts here: a token with 4 choices misses them with chance C(8, 4) / C(16, 4); 1 here: it meets 4 of 16
    # ranks
    rows = 4 - 2 * (1 - 70 / 1820)
    assert many.activations_bytes - few.activations_bytes == pytest.approx(30 * 8192 * 2 * 4096 * rows)
    assert few.parameters.expert == 8 * many.parameters.expert


def test_uneven_routing_costs_memory_on_the_busiest_rank():
    training = {"seq_length": 8192, "global_batch_size": 512}
    run = make(M39B, training, world_size=64, expert_model_parallel_size=8)
    even, uneven = stage_memory(run)[0], stage_memory(run, imbalance=2.0)[0]
    # gate and up, and the fp32 probability, of as many rows again; and up to as many token rows
    expert_rows = 30 * 8192 * 4 * (2 * 2 * 6144 + 4)
    token_rows = 30 * 8192 * 8 * (1 - 1001 / 1820) * 2 * 4096
    assert uneven.activations_bytes - even.activations_bytes == pytest.approx(expert_rows + token_rows)
    assert stage_memory(make(), imbalance=2.0) == stage_memory(make())


def test_interleaving_keeps_more_in_flight():
    parallel = dict(world_size=512, tensor_model_parallel_size=8, pipeline_model_parallel_size=8)
    training = {"seq_length": 8192, "global_batch_size": 256}
    plain = stage_memory(make(M115B, training, **parallel))
    interleaved = stage_memory(make(M115B, training, **parallel, num_virtual_stages_per_pipeline_rank=3))
    assert interleaved[0].activations_bytes > plain[0].activations_bytes
    assert sum(interleaved[0].in_flight) == 2 * 7 + 2 * 8 + 1


def test_averages_are_cut_like_the_optimizer_and_saved():
    """Four bytes of the moving average; eight of a window, which has its last mean and the one under way."""
    plain = make(M39B, world_size=4, expert_model_parallel_size=2, use_distributed_optimizer=True)
    for average, size in ((AverageConfig(ema_decay=0.9), 4), (AverageConfig(average_window_steps=5), 8)):
        run = replace(plain, average=average)
        (without,), (stage,) = stage_memory(plain), stage_memory(run)
        count = stage.parameters
        own = count.dense / 4 + count.expert / 2
        assert stage.optimizer_bytes - without.optimizer_bytes == size * own == averages_bytes(run, count)
        assert staging_bytes(run) - staging_bytes(plain) == size * own
        assert checkpoint_bytes(run, 100) - checkpoint_bytes(plain, 100) == 100 * size


def test_checkpoint_size():
    run = make()
    assert checkpoint_bytes(run, 100) == 1400
    assert checkpoint_bytes(replace(run, checkpoint=replace(run.checkpoint, no_save_optim=True)), 100) == 200


def test_published_115b_layout_fits_its_published_limit():
    """8 x 8 x 8 ranks, 8 micro-batches, no whole-layer recompute: published with a cap of 54.5 GB."""
    first, second, third = [3, 3, 4, 4, 4, 4, 4, 4], [3, 4, 4, 4, 4, 4, 4, 4], [4, 4, 4, 5, 5, 5, 5, 3]
    layout = "|".join(f"t*{count}" for count in first + second + third)
    run = make(
        M115B,
        {"seq_length": 8192, "global_batch_size": 64},
        world_size=512,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=8,
        num_virtual_stages_per_pipeline_rank=3,
        use_distributed_optimizer=True,
        pipeline_model_parallel_layout=f"E{layout}L",
    )
    totals = [stage.total_bytes for stage in stage_memory(run)]
    assert 45e9 < max(totals) < 54.5e9
    assert totals.index(max(totals)) == 3


GPT = replace(
    TINY, activation="gelu", untie_embeddings_and_output_weights=False, position_embedding_type="learned_absolute",
    max_position_embeddings=20, normalization="LayerNorm", add_bias_linear=True,
)  # fmt: skip
"""A model as Megatron-LM builds it without --swiglu, --untie-embeddings-and-output-weights, ..."""


def test_a_tied_matrix_lies_on_the_first_and_the_last_stage():
    # weights of q, k, v (16 x 8), output and MLP; a bias each; two norms with weight and bias
    layer = 16 * 8 + 16 + 8 * 8 + 8 + 12 * 8 + 12 + 8 * 12 + 8 + 2 * 16
    table, positions, norm = 32 * 8, 20 * 8, 16
    assert count_parameters(GPT).total == 4 * layer + table + positions + norm
    (one,) = stage_memory(make(GPT))
    assert one.parameters.total == 4 * layer + table + positions + norm
    first, middle, last = stage_memory(
        make(GPT, world_size=3, pipeline_model_parallel_size=3, pipeline_model_parallel_layout="Et|tt|tL")
    )
    assert first.parameters.total == layer + table + positions
    assert (middle.parameters.total, last.parameters.total) == (2 * layer, layer + norm + table)
    half, _ = stage_memory(make(GPT, world_size=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2))
    whole = 2 * (8 + 8 + 4 * 8)  # output biases and norms, on every rank
    assert half.parameters.total == (2 * layer - whole) // 2 + whole + table // 2 + positions


def test_what_a_layer_without_a_gate_keeps():
    gated, plain = (
        stage_memory(make(replace(TINY, activation=name)))[0].activations_bytes for name in ("swiglu", "gelu")
    )
    assert gated - plain == 4 * 16 * 2 * 12  # of 3 f elements one is not there
    dropped = stage_memory(make(replace(TINY, hidden_dropout=0.1)))[0].activations_bytes
    assert dropped - gated == (4 * 2 + 1) * 16 * 8  # a byte an element: two branches a layer, and the embedding
    normed = stage_memory(make(replace(TINY, qk_layernorm=True)))[0].activations_bytes
    assert normed - gated == 4 * 16 * 2 * (8 + 2 * 4)
