"""Configurations that no run can start with: each refused with what, where and how to fix it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.errors import EXIT_CONFIG, ConfigError

TINY = ("--preset", "telechat2-tiny", "--mock-data")
MOE = ("--preset", "telechat2-tiny-moe", "--mock-data")


def refusal(argv: tuple[str, ...] | list[str], world: int = 1, **environ: str) -> ConfigError:
    """The error of a command line on this many ranks."""
    with pytest.raises(ConfigError) as caught:
        load_run_config(list(argv), {"WORLD_SIZE": str(world), **environ})
    assert caught.value.exit_code == EXIT_CONFIG
    return caught.value


def case(name: str, argv: str, *expected: str, model: tuple[str, ...] = TINY, world: int = 1):
    return pytest.param((*model, *argv.split()), world, expected, id=name)


BAD = [
    # the model
    case("no model", "--mock-data", "no model", "--preset telechat2-tiny-moe", model=()),
    case(
        "half a model", "--num-layers 4 --mock-data", "incomplete, missing: hidden_size, num_attention_heads", model=()
    ),
    case("unknown preset", "--preset telechat2-7", "did you mean telechat2-7b?", "mixtral-8x7b"),
    case("no layers", "--num-layers 0", "num_layers=0 is less than 1    (flag)"),
    case("negative width", "--hidden-size -128", "hidden_size=-128 is less than 1"),
    case("heads do not divide the width", "--num-attention-heads 12", "does not divide by num_attention_heads=12"),
    case(
        "groups do not divide the heads",
        "--num-query-groups 3",
        "num_query_groups=3 does not divide",
        "--num-query-groups 2",
    ),
    case("odd head", "--kv-channels 15", "15 wide cannot be rotated", "--kv-channels 16"),
    case(
        "narrow head under NTK",
        "--kv-channels 2",
        "NTK-aware scaling (rotary_training_seqlen) needs two",
        "--kv-channels 4",
    ),
    case("no dense ffn", "--ffn-hidden-size 0", "ffn_hidden_size is not given"),
    case("top-k above experts", "--moe-router-topk 32", "moe_router_topk=32 is more than num_experts=16", model=MOE),
    case("top-k of nothing", "--moe-router-topk 0", "moe_router_topk=0 is less than 1", model=MOE),
    case(
        "top-1",
        "--moe-router-topk 1",
        "whatever the logit, so the loss would never train the router",
        "--moe-router-topk 2",
        model=MOE,
    ),
    case(
        "top-1 of one",
        "--moe-router-topk 1 --num-experts 1",
        "would never train the router",
        "leave --num-experts out",
        model=MOE,
    ),
    case(
        "one expert", "--num-experts 1", "moe_router_topk=4 is more than num_experts=1", "for a dense model", model=MOE
    ),
    case(
        "odd width in bf16",
        "--hidden-size 33 --kv-channels 4 --bf16",
        "hidden_size=33 is odd",
        "--hidden-size 34",
        model=MOE,
    ),
    case(
        "unaligned experts on a GPU",
        "--moe-ffn-hidden-size 100 --device cuda --bf16",
        "moe_ffn_hidden_size=100 is not a multiple of 8",
        "--moe-ffn-hidden-size 104",
        model=MOE,
    ),
    case(
        "no chunks",
        "--moe-input-chunks 0",
        "moe_input_chunks=0 is less than 1    (flag)",
        "exchange the whole input",
        model=MOE,
    ),
    case("fewer chunks", "--moe-input-chunks -2", "moe_input_chunks=-2 is less than 1", model=MOE),
    case("chunks in words", "--moe-input-chunks x", "--moe-input-chunks is 'x'", "an integer, or auto", model=MOE),
    case("more chunks than tokens", "--moe-input-chunks 600", "only 512 tokens", "--moe-input-chunks auto", model=MOE),
    case("less than no rows", "--loss-chunk-rows -1", "loss_chunk_rows=-1 is negative    (flag)", "0 or more"),
    case("rows in words", "--loss-chunk-rows all", "--loss-chunk-rows is 'all'", "an integer, or auto"),
    case("chunks of a dense model", "--moe-input-chunks auto", "moe_input_chunks=auto without num_experts"),
    case("trace of a dense model", "--moe-trace 3", "moe_trace=3 without num_experts"),
    case("trace of no step", "--moe-trace 0", "moe_trace='0' names no steps", "from 1 on", model=MOE),
    case("trace backwards", "--moe-trace 12-10", "names no steps", "the first one first", model=MOE),
    case("trace in words", "--moe-trace all", "names no steps", "10-12", model=MOE),
    case("trace after the run", "--moe-trace 500", "begins after the last step, train_iters=200", model=MOE),
    case("less than balanced", "--moe-memory-imbalance 0.5", "moe_memory_imbalance=0.5 is less than 1", model=MOE),
    case("no experts", "--num-experts 0", "num_experts=0", "leave it out for a dense model", model=MOE),
    case(
        "expert flags on a dense model",
        "--moe-router-topk 4",
        "moe_router_topk=4 without num_experts",
        "--num-experts N",
    ),
    case(
        "expert parallelism on a dense model",
        "--expert-parallel 2",
        "expert_model_parallel_size=2 without num_experts",
        world=2,
    ),
    case(
        "moe_layer_freq above the layers", "--moe-layer-freq 9", "moe_layer_freq=9 is more than num_layers=4", model=MOE
    ),
    case(
        "vocabulary over TP",
        "--vocab-size 8191 --tensor-model-parallel-size 2",
        "does not divide vocab_size=8191",
        "--vocab-size 8192",
        world=2,
    ),
    case("dropout of one", "--hidden-dropout 1.0", "hidden_dropout=1.0 is out of range"),
    case("negative dropout", "--attention-dropout -0.1", "attention_dropout=-0.1 is out of range"),
    case("negative epsilon", "--norm-epsilon 0", "norm_epsilon=0.0 is not more than 0"),
    case("rotary base of zero", "--rotary-base 0", "rotary_base=0.0 is not more than 0"),
    case(
        "half of the rotary lengths",
        "--rotary-training-seqlen none",
        "rotary_base_seqlen=256 without rotary_training_seqlen",
    ),
    case("negative auxiliary loss", "--moe-aux-loss-coeff -1", "moe_aux_loss_coeff=-1.0 is negative", model=MOE),
    case(
        "mixtral with biases",
        "--architecture mixtral",
        "attention_output_bias is on",
        "--no-mlp-output-bias",
        "rotary_training_seqlen",
        model=MOE,
    ),
    case("Qwen3-MoE without its norms", "--architecture qwen3_moe", "qk_layernorm is off", model=MOE),
    case("name with a slash", "--name a/b", "cannot name a folder"),
    # the ranks
    case(
        "TP does not divide the ranks",
        "--tensor-model-parallel-size 3",
        "world_size=4 does not divide by tensor_model_parallel_size=3",
        world=4,
    ),
    case(
        "TP does not divide the heads",
        "--tensor-model-parallel-size 16",
        "does not divide num_attention_heads=8",
        "--tensor-model-parallel-size 8",
        world=16,
    ),
    case(
        "TP does not divide the groups", "--tensor-model-parallel-size 8", "does not divide num_query_groups=4", world=8
    ),
    case(
        "TP does not divide the ffn",
        "--ffn-hidden-size 385 --tensor-model-parallel-size 2",
        "does not divide ffn_hidden_size=385",
        world=2,
    ),
    case(
        "SP does not divide the sequence",
        "--seq-length 255 --tensor-model-parallel-size 2",
        "sequence_parallel splits seq_length=255",
        "--seq-length 256",
        world=2,
    ),
    case("TP of zero", "--tensor-model-parallel-size 0", "tensor_model_parallel_size=0 is less than 1"),
    case(
        "TP x PP above the ranks",
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        "world_size=2 does not divide",
        "torchrun --nproc-per-node 4",
        world=2,
    ),
    case(
        "CP above the ranks",
        "--context-parallel-size 2 --tensor-model-parallel-size 2",
        "world_size=2 does not divide by tensor_model_parallel_size=2 x pipeline_model_parallel_size=1 x "
        "context_parallel_size=2",
        "torchrun --nproc-per-node 4",
        world=2,
    ),
    case(
        "CP cuts the sample unevenly",
        "--context-parallel-size 2 --seq-length 254",
        "seq_length=254 does not divide by 2 x context_parallel_size=2: every rank holds two equal chunks",
        "fix: --seq-length 256",
        world=2,
    ),
    case(
        "CP and SP cut the sample unevenly",
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --seq-length 252",
        "seq_length=252 does not divide by 2 x context_parallel_size=2 x tensor_model_parallel_size=2",
        "fix: --seq-length 256",
        world=4,
    ),
    case(
        "a2a+p2p without sizes",
        "--context-parallel-size 4 --cp-comm-type a2a+p2p",
        "cp_comm_type=a2a+p2p needs the ranks of each",
        'fix: --hierarchical-context-parallel-sizes "2 2", or --cp-comm-type auto',
        world=4,
    ),
    case(
        "sizes of another product",
        "--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 4",
        "hierarchical_context_parallel_sizes=2 4 are not two sizes whose product is context_parallel_size=4",
        'fix: --hierarchical-context-parallel-sizes "1 4", or leave it out',
        world=4,
    ),
    case(
        "three sizes",
        "--context-parallel-size 8 --hierarchical-context-parallel-sizes 2 2 2",
        "are not two sizes",
        world=8,
    ),
    case(
        "a size below one",
        "--context-parallel-size 4 --hierarchical-context-parallel-sizes -2 -2",
        "are not two sizes",
        world=4,
    ),
    case(
        "p2p with sizes of both",
        "--context-parallel-size 4 --cp-comm-type p2p --hierarchical-context-parallel-sizes 2 2",
        "cp_comm_type=p2p means 1 4, not hierarchical_context_parallel_sizes=2 2",
        "fix: --cp-comm-type a2a+p2p",
        world=4,
    ),
    case(
        "a2a above the groups",
        "--context-parallel-size 8 --cp-comm-type a2a",
        "a2a over 8 ranks cuts the 8 heads and 4 groups of a tensor-parallel rank",
        "fix: --cp-comm-type p2p, or at most 4 ranks of a2a",
        world=8,
    ),
    case(
        "a2a above the groups that TP leaves",
        "--context-parallel-size 4 --hierarchical-context-parallel-sizes 4 1 --tensor-model-parallel-size 2",
        "a2a over 4 ranks cuts the 4 heads and 2 groups of a tensor-parallel rank",
        "at most 2 ranks of a2a",
        world=8,
    ),
    case(
        "CP with attention dropout",
        "--context-parallel-size 2 --attention-dropout 0.1",
        "attention_dropout=0.1 is not possible with context_parallel_size=2",
        "fix: --attention-dropout 0.0",
        world=2,
    ),
    case("no pieces", "--cp-pieces 0", "cp_pieces=0 is not between 1 and 16", "fix: --cp-pieces auto"),
    case("too many pieces", "--cp-pieces 17", "cp_pieces=17 is not between 1 and 16"),
    case(
        "trace of CP without ranks",
        "--cp-trace 3",
        "cp_trace=3, but with context_parallel_size=1 no rank exchanges anything",
        "leave --cp-trace out, or --context-parallel-size 2",
    ),
    case(
        "routing of positions that change",
        "--context-parallel-size 2 --moe-routing-record /tmp/routing --reset-attention-mask",
        "cp_layout=auto gives a rank other positions in every sample, but moe_routing_record needs fixed ones",
        "fix: --cp-layout zigzag",
        model=MOE,
        world=2,
    ),
    case(
        "replay on another layout",
        "--context-parallel-size 2 --moe-routing-replay /tmp/routing --reset-attention-mask --cp-layout dealt",
        "cp_layout=dealt gives a rank other positions in every sample, but moe_routing_replay needs fixed ones",
        model=MOE,
        world=2,
    ),
    case(
        "CP by all-gather",
        "--context-parallel-size 2 --cp-comm-type all_gather",
        "--cp-comm-type all_gather (a Megatron-LM value) is refused: every rank would hold the keys and values of all",
        "fix: use --cp-comm-type p2p",
        world=2,
    ),
    case(
        "CP by all-gather in some layers",
        "--context-parallel-size 2 --cp-comm-type p2p allgather",
        "--cp-comm-type p2p allgather (a Megatron-LM value) is refused: every rank would hold",
        world=2,
    ),
    case(
        "CP by layer",
        "--context-parallel-size 2 --cp-comm-type p2p a2a p2p a2a",
        "--cp-comm-type p2p a2a (a Megatron-LM value) is refused: all layers exchange in the same way",
        "fix: use --cp-comm-type with one value",
        world=2,
    ),
    case(
        "CP in an unknown way",
        "--context-parallel-size 2 --cp-comm-type ring",
        "--cp-comm-type is 'ring'",
        "one of auto, p2p, a2a, a2a+p2p",
        world=2,
    ),
    case(
        "EP does not divide the experts",
        "--expert-model-parallel-size 3",
        "expert_model_parallel_size=3 does not divide num_experts=16",
        model=MOE,
        world=3,
    ),
    case(
        "EP above the ranks",
        "--expert-model-parallel-size 4",
        "does not divide the 2 ranks of a pipeline stage",
        model=MOE,
        world=2,
    ),
    case(
        "EP below TP when folding",
        "--expert-model-parallel-size 1 --tensor-model-parallel-size 2",
        "is not a multiple of tensor_model_parallel_size=2",
        "--no-fold-tensor-into-experts",
        model=MOE,
        world=2,
    ),
    case(
        "fold with ETP",
        "--expert-tensor-parallel-size 2 --tensor-model-parallel-size 2",
        "leaves no tensor domain inside an expert",
        "--expert-tensor-parallel-size 1",
        model=MOE,
        world=2,
    ),
    case(
        "ETP does not divide the expert",
        "--no-fold-tensor-into-experts --expert-tensor-parallel-size 5",
        "does not divide moe_ffn_hidden_size=192",
        model=MOE,
        world=5,
    ),
    case(
        "experts over TP without SP",
        "--tensor-model-parallel-size 2 --no-sequence-parallel",
        "sequence_parallel is off",
        "fix: --sequence-parallel",
        model=MOE,
        world=2,
    ),
    case(
        "parameter gather without sharding",
        "--overlap-param-gather",
        "needs use_distributed_optimizer",
        "needs overlap_grad_reduce",
    ),
    case("half a node", "--ranks-per-node 3", "ranks_per_node=3 does not divide world_size=4", world=4),
    case(
        "node above the world",
        "--ranks-per-node 8",
        "ranks_per_node=8 is more than world_size=4",
        "--ranks-per-node 4",
        world=4,
    ),
    case("world against torchrun", "--world-size 8", "--world-size 8, but torchrun started 4 ranks", world=4),
    # the pipeline
    case(
        "layers do not split",
        "--num-layers 30 --pipeline-model-parallel-size 4",
        "num_layers=30 does not split over pipeline_model_parallel_size=4    (num_layers: flag; "
        "pipeline_model_parallel_size: flag)",
        'fix: --pipeline-model-parallel-layout "Et*7|t*8|t*8|t*7L"  (tools/plan_pipeline.py prints the best one)',
        world=4,
    ),
    case(
        "layers do not split over virtual stages",
        "--num-layers 6 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        "x num_virtual_stages_per_pipeline_rank=2",
        '"Et|t*2|t*2|tL"',
        world=2,
    ),
    case(
        "more stages than layers",
        "--num-layers 1 --pipeline-model-parallel-size 4",
        "num_layers=1 does not split",
        "at most 3 stages",
        world=4,
    ),
    case(
        "virtual stages without a pipeline",
        "--num-virtual-stages-per-pipeline-rank 2",
        "interleaves virtual stages",
        "--pipeline-model-parallel-size 2",
    ),
    case(
        "layout with too few stages",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*4L",
        "1 stages, which is not a multiple of",
        '"Et*2|t*2L"',
        world=2,
    ),
    case(
        "layout with too few layers",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t*2L",
        "the layout holds 3 decoder layers, the model num_layers=4",
        world=2,
    ),
    case(
        "layout with too many virtual stages",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 1 --pipeline-model-parallel-layout "
        "Et|t|t|tL",
        "the layout has 4 stages, not 2",
        world=2,
    ),
    case(
        "layout with an empty stage",
        "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et*2|t||tL",
        "stage 3 of the layout is empty: the pipeline would deadlock",
        world=4,
    ),
    case(
        "layout without embedding",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout tt|ttL",
        "must hold E (embedding) exactly once",
        world=2,
    ),
    case(
        "layout with a late embedding",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout tE|t*3L",
        "E (embedding) must come first",
        world=2,
    ),
    case(
        "layout without loss",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|tt",
        "must hold L (loss) exactly once",
        world=2,
    ),
    case(
        "layout with a strange letter",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|xtL",
        "'x' is not valid in a layout",
        world=2,
    ),
    case(
        "layout with multi-token prediction",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|ttmL",
        "multi-token-prediction",
        world=2,
    ),
    case(
        "layout with an open bracket",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E(t|",
        "a ( without its )",
        world=2,
    ),
    case("layout without end", "--pipeline-model-parallel-layout Et*99999999L", "unrolls to more than"),
    case(
        "interleaving with odd micro-batches",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 6",
        "needs a number of micro-batches that pipeline_model_parallel_size=2 divides",
        "--global-batch-size 8",
        world=2,
    ),
    case(
        "a group of micro-batches below the pipeline",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--microbatch-group-size-per-virtual-pipeline-stage 1",
        "microbatch_group_size_per_virtual_pipeline_stage=1 is less than pipeline_model_parallel_size=2",
        "--microbatch-group-size-per-virtual-pipeline-stage 2 or more",
        world=2,
    ),
    case(
        "a group of more micro-batches than there are",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 10 "
        "--micro-batch-size 2 --microbatch-group-size-per-vp-stage 6",
        "is more than the 5 micro-batches that global_batch_size=10 gives",
        "--global-batch-size 12, or --microbatch-group-size-per-virtual-pipeline-stage 5",
        world=2,
    ),
    case(
        "a last group of too few micro-batches",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 14 "
        "--micro-batch-size 2 --microbatch-group-size-per-virtual-pipeline-stage 3",
        "leaves 1 of the 7 micro-batches to the last group; it needs none, or at least pipeline_model_parallel_size=2",
        "--global-batch-size 16, or --microbatch-group-size-per-virtual-pipeline-stage 4",
        world=2,
    ),
    case(
        "interleaving over two ranks without overlap",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --no-overlap-p2p-communication",
        "deadlocks without overlap_p2p_communication",
        world=2,
    ),
    case(
        "layers for each virtual stage",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
        "does not split into 3 layers per virtual stage",
        "--num-layers-per-virtual-pipeline-stage 2",
        world=2,
    ),
    # the batch
    case(
        "batch over the ranks",
        "--global-batch-size 6 --micro-batch-size 2",
        "global_batch_size=6 does not divide by micro_batch_size=2 x data parallel size 2",
        "--global-batch-size 8",
        world=2,
    ),
    case("micro-batch of zero", "--micro-batch-size 0", "micro_batch_size=0 is less than 1"),
    case("negative batch", "--global-batch-size -8", "global_batch_size=-8 is less than 1"),
    case("nothing to train", "--train-iters 0", "there is nothing to train", "--train-iters N"),
    case("exit at every step zero", "--exit-interval 0", "exit_interval=0 is less than 1"),
    case("unknown precision", "--precision fp8", "one of bf16, fp16, fp32"),
    case("two precisions", "--bf16 --fp16", "--bf16 says precision=bf16, --fp16 says precision=fp16"),
    case(
        "precision twice in two ways",
        "--precision fp32 --bf16",
        "--precision says precision=fp32, --bf16 says precision=bf16",
    ),
    case("unknown device", "--device gpu", "one of auto, cuda, npu, cpu"),
    case("memory level", "--empty-unused-memory-level 7", "empty_unused_memory_level=7 is out of range"),
    # recompute
    case(
        "selective with a number of layers",
        "--recompute-granularity selective --recompute-num-layers 2",
        "belongs to recompute_granularity full",
    ),
    case("layers without granularity", "--recompute-num-layers 2", "recompute_granularity full, which is unset"),
    case("method without granularity", "--recompute-method uniform", "recompute_method=uniform belongs to"),
    case(
        "uniform in groups",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        "recomputes every layer by itself",
        "--recompute-method block",
    ),
    case("modules without granularity", "--recompute-modules mlp", "belongs to recompute_granularity selective"),
    case(
        "unknown module",
        "--recompute-granularity selective --recompute-modules core_attn moe_router",
        "any of core_attn, mlp, moe, layernorm",
    ),
    case(
        "experts of a dense model",
        "--recompute-granularity selective --recompute-modules moe",
        "the model has no experts",
    ),
    case(
        "dense MLP of a MoE model",
        "--recompute-granularity selective --recompute-modules mlp",
        "every layer of the model has experts",
        model=MOE,
    ),
    case(
        "layout and granularity",
        "--recompute-granularity full --recompute-layout full*4",
        "contradict each other",
        "--recompute-layout none",
    ),
    case(
        "layout with too few entries",
        "--recompute-layout full*4 --pipeline-model-parallel-size 2",
        "has 1 entries, the pipeline 2 virtual stages",
        "full*2|full*2",
        world=2,
    ),
    case(
        "layout with too few layers of recompute", "--recompute-layout full*3", "names 3 layers, virtual stage 1 has 4"
    ),
    case("layout with an unknown module", "--recompute-layout attn*4", "unknown module attn"),
    case("layout that cannot be read", "--recompute-layout full*", "cannot read 'full*'"),
    # the schedule
    case("lr below min_lr", "--lr 1e-5 --min-lr 1e-4", "lr=1e-05 is less than min_lr=0.0001"),
    case("lr of zero", "--lr 0", "lr=0.0 is not more than 0"),
    case("lr that is not finite", "--lr nan", "a number, and a finite one"),
    case("WSD without its decay", "--lr-decay-style WSD", "needs lr_wsd_decay_iters", "--lr-wsd-decay-iters 20"),
    case("WSD decay without WSD", "--lr-wsd-decay-iters 10", "belongs to lr_decay_style WSD, which is cosine"),
    case("WSD decay above all", "--lr-decay-style WSD --lr-wsd-decay-iters 300", "is more than lr_decay_iters=200"),
    case("warm-up above the decay", "--lr-warmup-iters 200", "leaves nothing of lr_decay_iters=200 (= train_iters)"),
    case("two warm-ups", "--lr-warmup-iters 5 --lr-warmup-fraction 0.1", "both give the warm-up"),
    case("warm-up fraction", "--lr-warmup-fraction 1.5", "lr_warmup_fraction=1.5 is out of range"),
    case("warm-up from above", "--lr-warmup-init 1.0", "is more than lr=0.002"),
    case("unknown decay", "--lr-decay-style cosin", "did you mean cosine?"),
    case("beta of one", "--adam-beta2 1.0", "adam_beta2=1.0 is out of range"),
    case("negative weight decay", "--weight-decay -0.1", "weight_decay=-0.1 is negative"),
    case(
        "loss scales upside down",
        "--initial-loss-scale 1 --min-loss-scale 2",
        "initial_loss_scale=1 is less than min_loss_scale=2",
    ),
    case(
        "fewer skipped steps than the loss scale needs to fall",
        "--fp16 --hysteresis 4 --max-skipped-steps 4",
        "max_skipped_steps=4 would end the run before the loss scale halves",
        "--max-skipped-steps 54",
    ),
    case("negative skipped steps", "--max-skipped-steps -1", "max_skipped_steps=-1 is negative"),
    # what watches the run
    case(
        "a hang that collectives end first",
        "--hang-timeout-minutes 10",
        "hang_timeout_minutes=10 is not below distributed_timeout_minutes=10",
        "--hang-timeout-minutes 8",
    ),
    case("negative hang limit", "--hang-timeout-minutes -1", "hang_timeout_minutes=-1.0 is negative"),
    case("steps to skip that are none", "--iterations-to-skip 4-", "iterations_to_skip=4- names no steps", "10-12"),
    case("steps to skip backwards", "--iterations-to-skip 1,9-4", "iterations_to_skip=1,9-4 names no steps"),
    case("window of no spikes", "--spike-window 2", "spike_window=2 is too short", "--spike-threshold 0"),
    case("everyone is a straggler", "--straggler-factor 0.9", "straggler_factor=0.9 is not above 1"),
    case("a tracker's name alone", "--mlflow-run-name x", "mlflow_run_name without mlflow_experiment", "--mlflow-exp"),
    case("a tracker's mode alone", "--swanlab-mode local", "swanlab_mode without swanlab_project logs nowhere"),
    case("a W&B name alone", "--wandb-exp-name x", "wandb_exp_name without wandb_project logs nowhere"),
    # the data
    case("no data", "", "no training data", "--mock-data", model=("--preset", "telechat2-tiny")),
    case("data and mock data", "--data-path /nowhere/x", "mock_data and data_path contradict", "drop one of them"),
    case(
        "two kinds of data",
        "--data-path /nowhere/x --data-json /nowhere/y.json",
        "data_path and data_json contradict",
        model=("--preset", "telechat2-tiny"),
    ),
    case(
        "missing dataset",
        "--data-path /nowhere/x",
        "/nowhere/x.bin and /nowhere/x.idx are missing",
        "there is no folder /nowhere",
        model=("--preset", "telechat2-tiny"),
    ),
    case("missing data.json", "--data-json /nowhere/data.json", "is not a file", model=("--preset", "telechat2-tiny")),
    case(
        "weights out of turn",
        "--data-path 0.5 a b",
        "weights and prefixes do not come in turn",
        model=("--preset", "telechat2-tiny"),
    ),
    case(
        "weight of zero",
        "--data-path 0 a 1 b",
        "a weight is not a positive number",
        model=("--preset", "telechat2-tiny"),
    ),
    case(
        "validation data alone",
        "--data-path /nowhere/x --valid-data-path /nowhere/v",
        "needs train_data_path",
        model=("--preset", "telechat2-tiny"),
    ),
    case("split that cannot be read", "--split 9,x", "is not one to three shares"),
    case("negative split", "--split=-1,1,1", "is not one to three shares"),
    case("split of nothing", "--split 0,0,0", "is not one to three shares"),
    case("split without training", "--split 0,1,0", "leaves nothing to train on"),
    case(
        "evaluation without data",
        "--data-path /nowhere/x --split 1,0,0 --eval-interval 5",
        "needs validation data",
        model=("--preset", "telechat2-tiny"),
    ),
    case("missing tokenizer", "--tokenizer-model /nowhere/t.model", "tokenizer_model /nowhere/t.model does not exist"),
    case("tokenizer type alone", "--tokenizer-type SentencePieceTokenizer", "needs tokenizer_model"),
    case("unknown tokenizer", "--tokenizer-type Tik", "one of HuggingFaceTokenizer"),
    case("documents without a tokenizer", "--eod-mask-loss", "needs the end-of-document token"),
    # checkpoints, evaluation, reports
    case("checkpoint to load does not exist", "--load /nowhere/ckpt", "load /nowhere/ckpt is not a folder"),
    case(
        "step without checkpoints",
        "--load-step 10 --run-dir /nowhere/run",
        "load_step=10, but there is no checkpoint folder",
    ),
    case(
        "weights are not there",
        "--pretrained-checkpoint /nowhere/w",
        "pretrained_checkpoint /nowhere/w is not a folder",
    ),
    case("run folder is a file", "--run-dir setup.py", "run_dir setup.py is a file"),
    case("run folder below a file", "--run-dir setup.py/run", "cannot be made: setup.py is a file"),
    case("save interval of zero", "--save-interval 0", "save_interval=0", "to save only at the end"),
    case("negative keep", "--keep-last -1", "keep_last=-1 is negative"),
    case("evaluation every zero", "--eval-interval 0", "eval_interval=0", "to evaluate never"),
    case("log interval of zero", "--log-interval 0", "log_interval=0 is less than 1"),
    case("wandb name alone", "--wandb-exp-name x", "without wandb_project logs nowhere"),
    # typing
    case("unknown flag", "--tensor-model-parralel-size 2", "did you mean --tensor-model-parallel-size?"),
    case("abbreviation", "--tensor-model-par 2", "unknown flag --tensor-model-par"),
    case("flag of nowhere", "--zzzz", "unknown flag --zzzz", "--help lists all flags"),
    case("one hyphen", "-lr 3", "unknown flag -lr", "write --lr"),
    case("argument of no flag", "--seed 1 2", "--seed takes one value, not 2: 1 2"),
    case("value missing", "--lr --min-lr 1", "--lr has no value"),
    case("word for a number", "--lr fast", "--lr is 'fast'", "it takes a number"),
    case("fraction for a count", "--train-iters 1e3", "--train-iters is '1e3'", "it takes an integer"),
    case(
        "word behind a switch",
        "--sequence-parallel true",
        "--sequence-parallel takes no value",
        "--no-sequence-parallel",
    ),
    case(
        "two names, two values",
        "--tensor-parallel 2 --tensor-model-parallel-size 1",
        "--tensor-parallel says tensor_model_parallel_size=2",
        world=2,
    ),
    case(
        "missing file",
        "--config /nowhere/run.yaml",
        "cannot read --config /nowhere/run.yaml: No such file or directory",
    ),
    case("preset given as a file", "--config telechat2-7b", "fix: --preset telechat2-7b"),
    # FP8
    case(
        "FP8 on a CPU",
        "--fp8-format hybrid --device cpu",
        "Transformer Engine, which has no kernels for device=cpu    (fp8_format: flag; device: flag)",
        "fix: drop --fp8-format",
    ),
    case("FP8 on an NPU", "--fp8-format e4m3 --device npu", "has no kernels for device=npu"),
    case("FP8 beside fp16", "--fp8-format hybrid --fp16", "what is not FP8 must be bf16", "--precision bf16"),
    case("FP8 beside fp32", "--fp8-format hybrid --fp32", "what is not FP8 must be bf16"),
    case("a recipe of nothing", "--fp8-recipe mxfp8", "nothing is computed in FP8", "--fp8-format hybrid"),
    case("an unknown recipe", "--fp8-format hybrid --fp8-recipe custom", "one of delayed, tensorwise, blockwise"),
    case("a history of no scaling", "--fp8-amax-history-len 1024", "fp8_amax_history_len=1024 without fp8_format"),
    case("no history", "--fp8-format hybrid --fp8-amax-history-len 0", "fp8_amax_history_len=0 is less than 1"),
    case("a negative margin", "--fp8-format hybrid --fp8-margin -1", "fp8_margin=-1 is negative"),
    case(
        "a history of current scaling",
        "--fp8-format hybrid --fp8-recipe tensorwise --fp8-amax-compute-algo max",
        "fp8_amax_compute_algo=max belongs to fp8_recipe delayed, which is tensorwise",
        "--fp8-recipe delayed",
    ),
    case(
        "tokens that are no whole blocks",
        "--fp8-format hybrid --seq-length 72 --micro-batch-size 1",
        "needs multiples of 16; tokens of a micro-batch on a rank: 72",
        "or drop --fp8-format",
    ),
    case(
        "tokens of a tensor-parallel rank",
        "--fp8-format hybrid --seq-length 80 --tensor-model-parallel-size 4",
        "tokens of a micro-batch on a rank: 40",
        world=4,
    ),
    case(
        "widths that are no whole blocks",
        "--fp8-format e4m3 --fp8-recipe mxfp8 --ffn-hidden-size 400 --hidden-size 144 --kv-channels 18",
        "fp8_recipe=mxfp8 needs multiples of 32; hidden_size on a rank: 144",
        "columns of the output projection on a rank: 144",
        "ffn_hidden_size on a rank: 400",
    ),
    case(
        "FP8 with norms recomputed",
        "--fp8-format hybrid --recompute-granularity selective --recompute-modules layernorm,mlp",
        "recompute_modules names layernorm, which is not recomputed with fp8_format",
        "full, core_attn, mlp or moe",
    ),
    case(
        "FP8 with norms recomputed by layer",
        "--fp8-format hybrid --recompute-layout full,layernorm,none,none",
        "recompute_layout names layernorm",
    ),
    case("parameters in FP8", "--fp8-param-gather", "parameters are bf16"),
    case("some layers in bf16", "--fp8-format hybrid --first-last-layers-bf16", "FP8 is in all layers or in none"),
    case("attention in FP8", "--fp8-format hybrid --fp8-dot-product-attention", "and nowhere else"),
    case("gradients of weights not in FP8", "--fp8-format hybrid --no-fp8-wgrad", "ignores what says otherwise"),
    case("4-bit training", "--fp4-format e2m1", "4-bit training is not here"),
    # Megatron-LM's flags that would change the run
    case("layer norm", "--normalization LayerNorm", "--normalization LayerNorm contradicts this framework", "RMSNorm"),
    case("finetune", "--finetune", "none is given", "--load FOLDER (other than --save)"),
    case("finetune from its own folder", "--finetune --load a --save ./a", "none is given"),
    case("chat template", "--chat-template x", "use --sft-template"),
    case(
        "steps and epochs",
        "--train-iters 10 --train-epochs 1.5",
        "train_iters=10 and train_epochs=1.5 both give the length of the run",
        "train_epochs=1.5, but mock_data is a stream without an end",
        "--train-iters N",
    ),
    case("no epoch", "--train-epochs 0", "train_epochs=0.0 is not more than 0"),
    case("fine-tuning on mock data", "--sft", "sft and mock_data contradict each other"),
    case(
        "Megatron's order of mock data",
        "--data-order megatron",
        "data_order=megatron is for indexed text",
        "drop --data-order",
    ),
    case("pairs and dialogs", "--sft --dpo", "dpo and sft contradict each other"),
    case("settings of dpo alone", "--dpo-beta 0.3", "dpo_beta is given without dpo", "fix: --dpo"),
    case("pairs of mock data", "--dpo", "dpo and mock_data contradict each other"),
    case("beta of nothing", "--dpo --dpo-beta 0", "dpo_beta=0 is not a positive number", "--dpo-beta 0.1"),
    case("half of the labels wrong", "--dpo --dpo-label-smoothing 0.5", "at least 0 and below 0.5"),
    case("negative weight", "--dpo --dpo-sft-loss-weight -1", "dpo_sft_loss_weight=-1 is negative"),
    case("smoothing of ipo", "--dpo --dpo-loss-type ipo --dpo-label-smoothing 0.1", "has no effect with ipo"),
    case("halves that see each other", "--dpo --no-reset-attention-mask", "the two halves of a pair stand in one row"),
    case("no such reference", "--dpo --dpo-reference nowhere", "dpo_reference nowhere is not a folder"),
    case("masks of dialogs with pairs", "--dpo --sft-loss-mask answer", "sft_loss_mask is given without sft", "drop"),
    case(
        "pairs over ranks",
        "--dpo --context-parallel-size 2",
        "context_parallel_size=2 is not supported with dpo",
        "--context-parallel-size 1",
        world=2,
    ),
    case("fine-tuning settings alone", "--sft-loss-mask answer", "sft_loss_mask is given without sft", "fix: --sft"),
    case(
        "fine-tuning without a tokenizer",
        "--sft --data-path tests/conftest.py --eod-mask-loss --sft-system x --sft-template telechat",
        "needs the model's tokenizer",
        "--tokenizer-model PATH",
        "eod_mask_loss is for indexed text",
        "has no place for a system text",
        model=("--preset", "telechat2-tiny"),
    ),
    case(
        "no file of dialogs",
        "--sft --data-path nowhere.jsonl --tokenizer-model tests",
        "sft reads jsonl files, but nowhere.jsonl is not one",
        model=("--preset", "telechat2-tiny"),
    ),
    case(
        "borders in a stream without documents",
        "--reset-attention-mask --tokenizer-model tests",
        "reset_attention_mask has no effect with mock_data, which has no documents",
    ),
    case("average that keeps nothing", "--ema-decay 0", "ema_decay=0 is not between 0 and 1", "--ema-decay 0.9999"),
    case("average that never learns", "--ema-decay 1", "ema_decay=1 is not between 0 and 1"),
    case("window of no step", "--average-window-steps 0", "leave it out to keep no mean of a window"),
    case("interval of no average", "--average-interval 5", "but nothing is averaged", "--average-window-steps N"),
    case("start of no average", "--average-start-step 5", "average_start_step=5, but nothing is averaged"),
    case(
        "interval beside the window",
        "--average-window-steps 10 --average-interval 4",
        "average_interval=4 does not divide average_window_steps=10",
        "--average-window-steps 12",
    ),
    case(
        "average behind the end",
        "--train-iters 100 --ema-decay 0.9 --average-start-step 100",
        "average_start_step=100 leaves no step of train_iters=100 to average",
    ),
    case(
        "window behind the end",
        "--train-iters 100 --average-window-steps 60 --average-start-step 50",
        "no window of average_window_steps=60 behind average_start_step=50 ends within train_iters=100",
    ),
    case("capacity", "--moe-expert-capacity-factor 1.25", "the experts are dropless", model=MOE),
    case("samples and steps", "--train-iters 5 --train-samples 1000000", "both give the length of the run"),
    case("samples of less than a step", "--global-batch-size 8 --train-samples 7", "less than one step of"),
    case("samples and tokens", "--lr-decay-samples 9 --lr-decay-tokens 9", "gives the same length"),
    case("unknown flags", "--handler-name x --reuse-fp32-param", "unknown flags: --handler-name", "remove them"),
    case("window", "--window-size x", "window_size=x is not a number of earlier tokens"),
    case("sinkhorn", "--moe-router-load-balancing-type sinkhorn", "contradicts this framework", model=MOE),
    case("spec", "--spec a b", "--spec (a Megatron-LM flag) is refused", "leave it out"),
]


@pytest.mark.parametrize("argv, world, expected", BAD)
def test_refused_with_origin_and_fix(argv: tuple[str, ...], world: int, expected: tuple[str, ...]) -> None:
    text = refusal(argv, world).render()
    for part in expected:
        assert part in text
    assert "Traceback" not in text


def test_there_are_enough_of_them() -> None:
    assert len(BAD) >= 100


@pytest.mark.heavy
def test_every_problem_says_where_or_how() -> None:
    for parameters in BAD:
        argv, world, _ = parameters.values
        for problem in refusal(argv, world).problems:
            assert problem.where or problem.fix, problem


def test_all_problems_at_once() -> None:
    error = refusal(
        [
            *MOE,
            "--num-layers",
            "30",
            "--pipeline-model-parallel-size",
            "4",
            "--moe-router-topk",
            "17",
            "--lr",
            "x",
            "--sqlit",
            "1",
            "--expert-parallel",
            "5",
        ],
        20,
    )
    assert len(error.problems) == 5
    assert error.render().startswith("config error: 5 problems\n  1. ")


def test_a_wrong_value_is_reported_once() -> None:
    error = refusal([*TINY, "--pipeline-model-parallel-size", "0"], 4)
    assert [problem.what for problem in error.problems] == ["pipeline_model_parallel_size=0 is less than 1"]
    error = refusal([*TINY, "--num-attention-heads", "eight"], 4)
    assert len(error.problems) == 1


def test_unknown_preset_alone_is_reported() -> None:
    assert len(refusal(["--preset", "telechat3", "--mock-data", "--train-iters", "1"]).problems) == 1


def test_world_size_without_torchrun() -> None:
    with pytest.raises(ConfigError, match="single process without torchrun"):
        load_run_config([*TINY, "--world-size", "4"], {})


def test_broken_environment() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE='four' is not a number of ranks"):
        load_run_config(list(TINY), {"WORLD_SIZE": "four"})


class TestData:
    """What is there, and what is only nearly there."""

    def test_suffix_of_the_prefix_forgotten(self, tmp_path: Path) -> None:
        for suffix in (".bin", ".idx"):
            (tmp_path / f"corpus_text_document{suffix}").touch()
        base = ["--preset", "telechat2-tiny", "--data-path"]
        assert "corpus_text_document is there; name it" in refusal([*base, str(tmp_path / "corpus")]).render()
        load_run_config([*base, str(tmp_path / "corpus_text_document")], {})
        load_run_config([*base, str(tmp_path / "corpus_text_document.bin")], {})

    def test_half_a_dataset(self, tmp_path: Path) -> None:
        (tmp_path / "x.bin").touch()
        text = refusal(["--preset", "telechat2-tiny", "--data-path", "1", str(tmp_path / "x")]).render()
        assert f"{tmp_path}/x.idx is missing" in text

    def test_raw_text(self, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").touch()
        text = refusal(["--preset", "telechat2-tiny", "--data-path", str(tmp_path / "x.jsonl")]).render()
        assert "is raw text" in text and "tools/preprocess_data.py" in text

    def test_evaluation_beside_training_data_of_its_own(self, tmp_path: Path) -> None:
        for suffix in (".bin", ".idx"):
            (tmp_path / f"x{suffix}").touch()
        text = refusal(
            ["--preset", "telechat2-tiny", "--train-data-path", str(tmp_path / "x"), "--eval-interval", "5"]
        ).render()
        assert "train_data_path comes without valid_data_path" in text


class TestYaml:
    """Files: every complaint with file and line."""

    def read(self, tmp_path: Path, text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return refusal([*TINY, "--config", str(path)]).render().replace(f"{tmp_path}/", "")

    @pytest.mark.parametrize(
        "text, expected",
        [
            (
                "parallel:\n\n  tensor_model_parralel_size: 2\n",
                "unknown key parallel.tensor_model_parralel_size in run.yaml:3: did you mean "
                "tensor_model_parallel_size?",
            ),
            ("paralel:\n  x: 1\n", "unknown section paralel: did you mean parallel?    (run.yaml:1)"),
            (
                "num_layers: 4\n",
                "key num_layers is outside of any section    (run.yaml:1)\n  fix: indent it under model:",
            ),
            (
                "training:\n  lr: 1\n",
                "key lr does not belong in section training    (run.yaml:2)\n  fix: move it under optimizer:",
            ),
            ("training:\n  learning_rat: 1\n", "unknown key training.learning_rat in run.yaml:2"),
            ("optimizer:\n  lr: fast\n", "optimizer.lr is 'fast'    (run.yaml:2)\n  fix: it takes a number"),
            ("optimizer:\n  lr: [1, 2]\n", "optimizer.lr is a sequence"),
            ("model:\n  num_layers: 4.5\n", "model.num_layers is '4.5'"),
            ("model:\n  num_layers: null\n", "model.num_layers is 'null'"),
            ("parallel:\n  sequence_parallel: maybe\n", "it takes true or false"),
            ("training:\n  precision: fp23\n", "did you mean fp32?"),
            ("training:\n  recompute_modules: [mlp, attn]\n", "any of core_attn, mlp, moe, layernorm"),
            (
                "model:\n  num_layers: 4\n  num_layers: 5\n",
                "model.num_layers is given twice, first in line 2    (run.yaml:3)",
            ),
            ("model:\n  a: 1\nmodel:\n  b: 2\n", "model is given twice"),
            ("- a\n- b\n", "the file is not a mapping of sections    (run.yaml:1)"),
            ("model: 7\n", "section model is not a mapping"),
            ("model:\n  num_layers: [1\n", "cannot read the YAML"),
            ("model: {num_layers: 4}}\n", "run.yaml:1"),
            ("\tmodel: 1\n", "cannot read the YAML"),
            ("preset: telechat2-7\n", "did you mean telechat2-7b?"),
            (
                "model:\n  num_layers: 6\nparallel:\n  pipeline_model_parallel_size: 4\n",
                "num_layers: run.yaml:2; pipeline_model_parallel_size: run.yaml:4",
            ),
        ],
    )
    def test_refused(self, tmp_path: Path, text: str, expected: str) -> None:
        if text.startswith("preset"):
            path = tmp_path / "run.yaml"
            path.write_text(text)
            assert expected in refusal(["--config", str(path), "--mock-data"]).render()
        else:
            assert expected in self.read(tmp_path, text)

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_bytes(b"model:\n  name: \xff\xfe\n")
        assert "it is not UTF-8 text" in refusal([*TINY, "--config", str(path)]).render()

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        assert "Is a directory" in refusal([*TINY, "--config", str(tmp_path)]).render()
