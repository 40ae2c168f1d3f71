"""Megatron-LM's flags: each has an answer, and a pasted command is answered flag by flag."""

from __future__ import annotations

import re
import shlex

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.flags import ACTION_FLAGS, read_command_line
from megatron_telechat.config.megatron.answers import (
    Alias,
    Always,
    Answer,
    Ignored,
    LayersPerVirtualStage,
    Refused,
    UnevenSplit,
)
from megatron_telechat.config.megatron.flags import ANSWERS, WORDS
from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.errors import ConfigError

OURS = {info.flag[2:] for info in fields_by_name().values()}
SWITCHES = {f"no-{info.flag[2:]}" for info in fields_by_name().values() if info.kind is bool}

MIXTRAL = """
    --use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32
    --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0
    --hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
    --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion
    --no-position-embedding --rotary-base 1000000 --num-experts 8 --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce --vocab-size 32000 --mock-data
    --split 99990,8,2 --micro-batch-size 1 --global-batch-size 256 --lr 1e-4 --train-iters 500000
    --lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500
    --clip-grad 1.0 --bf16 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4
    --expert-model-parallel-size 8 --use-distributed-optimizer --sequence-parallel --log-interval 1
    --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save /tmp/mixtral-ckpt --load /tmp/mixtral-ckpt
    --tensorboard-dir /tmp/mixtral-ckpt/tensorboard --no-load-optim --no-load-rng
"""

DENSE = """
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2
    --context-parallel-size 1 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --distributed-backend nccl --distributed-timeout-minutes 60 --num-layers 32 --hidden-size 4096
    --ffn-hidden-size 11008 --num-attention-heads 32 --kv-channels 128 --seq-length 4096
    --max-position-embeddings 4096 --make-vocab-size-divisible-by 128 --norm-epsilon 1e-5 --rotary-percent 1.0
    --use-rotary-position-embeddings --attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32
    --no-bias-swiglu-fusion --no-rope-fusion --no-gradient-accumulation-fusion --transformer-impl transformer_engine
    --attention-backend flash --use-flash-attn --cross-entropy-loss-fusion --optimizer adam --adam-beta1 0.9
    --adam-beta2 0.95 --adam-eps 1e-8 --lr 3e-4 --min-lr 3e-5 --lr-warmup-fraction 0.01 --train-iters 10000
    --micro-batch-size 1 --global-batch-size 64 --bf16 --recompute-activations --manual-gc --manual-gc-interval 10
    --ckpt-format torch_dist --async-save --ckpt-fully-parallel-load --exit-signal-handler --log-throughput
    --log-params-norm --timing-log-level 2 --tensorboard-queue-size 5 --wandb-project p --wandb-exp-name n
    --dataloader-type single --num-workers 4 --no-create-attention-mask-in-dataloader --mock-data
    --vocab-size 32000 --tp-comm-overlap --deterministic-mode --seed 42 --profile --profile-step-start 5
    --profile-step-end 8 --profile-ranks 0 1 --untie-embeddings-and-output-weights --swiglu --normalization RMSNorm
    --disable-bias-linear
"""

MOE_REFUSED = """
    --preset telechat2-tiny-moe --mock-data --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-num-groups 8 --multi-latent-attention --mtp-num-layers 1 --fp8-param-gather --optimizer muon
    --moe-token-dispatcher-type flex --moe-router-dtype fp32 --moe-permute-fusion --moe-shared-expert-overlap
"""


@pytest.mark.parametrize("command, world", [(MIXTRAL, 64), (DENSE, 8)])
def test_a_pasted_command_runs_and_every_flag_is_answered(command: str, world: int) -> None:
    argv = shlex.split(command)
    loaded = load_run_config(argv, {"WORLD_SIZE": str(world)})
    notes = "\n".join(loaded.notes)
    for token in argv:
        if token.startswith("--"):
            ours = token[2:] in OURS | SWITCHES | {"bf16", "num-layers-per-virtual-pipeline-stage"}
            assert ours or f"{token}" in notes, token


def test_mixtral_pasted_is_mixtral() -> None:
    run = load_run_config(shlex.split(MIXTRAL), {"WORLD_SIZE": "64"}).run
    assert not run.model.attention_output_bias and not run.model.mlp_output_bias
    assert run.model.moe_ffn_hidden_size == 14336
    assert run.logging.tensorboard and run.training.precision == "bf16"


def test_what_cannot_be_is_refused_one_by_one() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(shlex.split(MOE_REFUSED), {})
    text = caught.value.render()
    for flag in (
        "--moe-router-score-function",
        "--moe-router-enable-expert-bias",
        "--moe-router-num-groups",
        "--multi-latent-attention",
        "--mtp-num-layers",
        "--fp8-param-gather",
        "--optimizer",
    ):
        assert flag in text
    assert len(caught.value.problems) == 7


def test_flags_of_overlap_name_ours() -> None:
    flags = ("overlap-moe-expert-parallel-comm", "moe-shared-expert-overlap", "delay-wgrad-compute")
    line = read_command_line([f"--{flag}" for flag in flags])
    assert len(line.notes) == 3 and all("--moe-input-chunks auto" in note for note in line.notes)


def test_the_table_covers_what_people_paste() -> None:
    assert len(ANSWERS) > 1000
    assert not set(ANSWERS) & (OURS | SWITCHES | set(ACTION_FLAGS)), "a flag of ours needs no answer"


def test_each_flag_has_one_answer() -> None:
    """One loop and no parametrisation: a thousand test items would cost more than they tell."""
    for name, answer in ANSWERS.items():
        assert re.fullmatch(r"[A-Za-z0-9-]+", name)
        line = read_command_line([f"--{name}", *arguments(answer)])
        assert bool(line.problems) == isinstance(answer, Refused), name
        assert len(line.problems) + len(line.notes) == 1 or isinstance(
            answer, (Alias, LayersPerVirtualStage, UnevenSplit)
        ), name
        if isinstance(answer, (Ignored, Refused, Always)):
            assert answer.because, name


def arguments(answer: Answer) -> list[str]:
    """Something to write behind the flag that its answer accepts."""
    if isinstance(answer, Always):
        return list(answer.values[:1])
    if isinstance(answer, Alias):
        needs = answer.value is None and fields_by_name()[answer.fields[0]].kind is not bool
        return ["1"] if needs else []
    counted = isinstance(answer, UnevenSplit) and answer.part in ("first", "last")
    return ["1"] if counted or isinstance(answer, LayersPerVirtualStage) else []


def test_a_contradicting_value_is_a_problem() -> None:
    for name, answer in ANSWERS.items():
        if isinstance(answer, Always) and answer.values:
            line = read_command_line([f"--{name}", "something-else"])
            assert len(line.problems) == 1 and line.problems[0].fix, name


def test_no_answer_names_a_flag_that_is_not_there() -> None:
    known = OURS | SWITCHES | set(ACTION_FLAGS) | {"bf16"}
    for name, answer in ANSWERS.items():
        if isinstance(answer, Alias):
            assert set(answer.fields) <= set(fields_by_name()), name
            continue
        text = " ".join(str(getattr(answer, part, "")) for part in ("because", "use", "fix"))
        for flag in re.findall(r"--([a-z][a-z0-9-]+)", text):
            assert flag in known or flag == "signal", f"{name}: --{flag}"


def test_words_are_for_fields_and_values_that_are_there() -> None:
    for field, words in WORDS.items():
        assert set(words.values()) <= set(fields_by_name()[field].choices)


def test_tokenizer_words() -> None:
    line = read_command_line(["--tokenizer-type", "Llama2Tokenizer"])
    assert line.said[0].value == "SentencePieceTokenizer" and "taken as" in line.notes[0]


def test_no_flag_is_refused_that_says_what_the_program_does() -> None:
    """Against the configuration that megatron-core gets: `calculate_per_token_loss` is on, so its flag is nothing to
    do."""
    from dataclasses import fields
    from types import SimpleNamespace

    from megatron_telechat.model.transformer_config import transformer_config

    run = load_run_config(["--preset", "telechat2-tiny-moe", "--mock-data", "--dry-run"], {}).run
    config = transformer_config(
        run, SimpleNamespace(tp_size=1, pp_size=1, cp_size=1, ep_size=1, etp_size=1), DEVICE_KINDS["cpu"]
    )
    # of megatron-core's experts, which ours take the place of, or details of what is off
    aside = {"moe-grouped-gemm", "cpu-offloading-activations", "fp8-wgrad", "use-mamba-mem-eff-path"}
    seen: dict[str, object] = {}
    wrong = []
    for name in (field.name for field in fields(config)):
        flag, value = name.replace("_", "-"), getattr(config, name)
        answer = ANSWERS.get(flag)
        if isinstance(value, bool) and answer is not None and flag not in aside:
            seen[flag] = value
            wrong += [flag] * (
                value and isinstance(answer, Refused) or not value and isinstance(answer, Always) and not answer.values
            )
    assert not wrong
    assert len(seen) > 30 and seen["calculate-per-token-loss"]


@pytest.mark.parametrize(
    "flag, says",
    [
        ("calculate-per-token-loss", "the tokens that count of the whole global batch"),
        ("fp16-lm-cross-entropy", "the loss is computed in fp32"),
        ("no-attention-softmax-in-fp32", "softmax of the attention is computed in fp32"),
        ("cross-entropy-loss-fusion", "--loss-chunk-rows"),
        ("cross-entropy-fusion-impl", "--loss-chunk-rows"),
        ("log-params-norm", "not recorded here"),
        ("log-throughput", "throughput"),
        ("moe-use-upcycling", "a dense model is not turned into a mixture"),
        ("use-custom-fsdp", "the optimizer state alone can be sharded"),
        ("non-persistent-local-ckpt-algo", "checkpoints"),
        ("num-microbatches-with-partial-activation-checkpoints", "recompute"),
    ],
)
def test_reasons_are_those_of_the_program(flag: str, says: str) -> None:
    assert says in ANSWERS[flag].because
