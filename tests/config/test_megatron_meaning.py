"""A command whose model comes from flags alone, read as Megatron-LM reads it: its absent flags too."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_telechat.config import LoadedConfig, load_run_config
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.megatron.meaning import ARCHITECTURE, DEFAULTS, default_ffn_hidden_size, differing
from megatron_telechat.config.schema import PLANNED_ONLY
from megatron_telechat.config.vocabulary import vocabulary_of_file
from megatron_telechat.costs import count_parameters
from megatron_telechat.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs"
RUN = "--micro-batch-size 1 --global-batch-size 64 --bf16 --data-path /nowhere/corpus"
LLAMA = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0"
)
GPT3 = """
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
    --micro-batch-size 1 --global-batch-size 1536 --train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9
    --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6
    --lr-warmup-fraction .001 --lr-decay-iters 430000 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16
    --data-path /nowhere/corpus --vocab-file /nowhere/gpt2-vocab.json --merge-file /nowhere/gpt2-merges.txt
    --split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --save /nowhere/c --load /nowhere/c
    --eval-iters 10
"""


def plan(command: str, *more: str) -> LoadedConfig:
    return load_run_config([*shlex.split(command), *more, "--dry-run"], {}, planning=True)


def refused(*argv: str, planning: bool = False) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_run_config([*argv, "--dry-run"], {}, planning=planning)
    return caught.value


def sizes(layers: int, hidden: int, heads: int, ffn: int = 0, groups: int = 0, vocab: int = 0) -> str:
    text = (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --seq-length 4096 {RUN} --lr 1e-4"
    )
    text += f" --ffn-hidden-size {ffn}" * bool(ffn) + f" --vocab-size {vocab}" * bool(vocab)
    return text + f" --group-query-attention --num-query-groups {groups}" * bool(groups)


@pytest.mark.parametrize(
    "command, total, active",
    [
        # 96 (12 h^2 + 13 h) + 2 h, h = 12288; 2048 positions; 50257 tokens, a multiple of 128 x TP8
        (GPT3, 96 * (12 * 12288**2 + 13 * 12288) + 2 * 12288 + (2048 + 51200) * 12288, 0),
        # GPT-2 medium
        ("--max-position-embeddings 1024 " + sizes(24, 1024, 16, vocab=50257).replace("4096", "1024"), 354_871_296, 0),
        (sizes(32, 4096, 32, 11008, vocab=32000) + f" {LLAMA}", 6_738_415_616, 0),  # LLaMA-2 7B
        (sizes(80, 8192, 64, 28672, 8, 32000) + f" {LLAMA}", 68_976_648_192, 0),  # LLaMA-2 70B
        (sizes(32, 4096, 32, 14336, 8, 128256) + f" {LLAMA}", 8_030_261_248, 0),  # LLaMA-3 8B
        (sizes(28, 3584, 28, 18944, 4, 152064) + f" {LLAMA} --add-qkv-bias", 7_615_616_512, 0),  # Qwen2 7B
        (
            sizes(24, 896, 14, 4864, 2, 151936)
            + f" {LLAMA} --add-qkv-bias".replace(" --untie-embeddings-and-output-weights", ""),
            494_032_768,
            0,
        ),  # Qwen2 0.5B
        # Qwen3 8B
        (sizes(36, 4096, 32, 12288, 8, 151936) + f" {LLAMA} --kv-channels 128 --qk-layernorm", 8_190_735_360, 0),
        (
            sizes(44, 6144, 64, vocab=50432) + " --use-rotary-position-embeddings --rotary-percent 0.25 "
            "--untie-embeddings-and-output-weights",
            20_554_567_680,
            0,
        ),  # GPT-NeoX 20B
        # squared ReLU, LayerNorm, no biases: q, k, v, output, two matrices of the MLP, weight and bias of two norms
        (
            sizes(32, 6144, 48, 24576, 8, 256000) + " --squared-relu --untie-embeddings-and-output-weights "
            "--disable-bias-linear "
            "--position-embedding-type rope --rotary-percent 0.5 --apply-layernorm-1p",
            # Nemotron-4 15B
            32 * (2 * 6144**2 + 2 * 6144 * 1024 + 2 * 6144 * 24576 + 4 * 6144) + 2 * 256000 * 6144 + 2 * 6144,
            0,
        ),
        (
            sizes(32, 4096, 32, 14336, 8, 32000) + f" {LLAMA} --num-experts 8 --moe-router-topk 2 --moe-grouped-gemm",
            46_702_792_704,
            12_879_925_248,
        ),  # Mixtral 8x7B
        (
            sizes(48, 2048, 32, 6144, 4, 151936) + f" {LLAMA} --kv-channels 128 --qk-layernorm --num-experts 128 "
            "--moe-ffn-hidden-size 768 --moe-router-topk 8",
            30_532_122_624,
            3_353_032_704,
        ),  # Qwen3 30B-A3B
        (
            sizes(24, 2048, 16, 5632, vocab=151936) + f" {LLAMA} --add-qkv-bias --num-experts 60 --moe-ffn-hidden-size "
            f"1408 "
            # Qwen1.5-MoE
            "--moe-router-topk 4 --moe-shared-expert-intermediate-size 5632 --moe-shared-expert-gate",
            14_315_784_192,
            0,
        ),
        (
            sizes(28, 2048, 16, 10944, vocab=102400) + f" {LLAMA} --num-experts 64 --moe-ffn-hidden-size 1408 "
            f"--moe-router-topk 6 "
            # DeepSeekMoE 16B
            "--moe-shared-expert-intermediate-size 2816 --moe-layer-freq [0]*1+[1]*27",
            16_375_728_128,
            0,
        ),
    ],
    ids="gpt3 gpt2-medium llama2-7b llama2-70b llama3-8b qwen2-7b qwen2-0.5b qwen3-8b neox-20b nemotron-15b mixtral "
    "qwen3-30b qwen1.5-moe deepseek-moe".split(),
)
def test_published_models_are_counted_as_published(command: str, total: int, active: int) -> None:
    count = count_parameters(plan(command).run.model)
    assert count.total == total
    assert count.active == (active or count.active)


def test_absent_flags_are_megatrons() -> None:
    loaded = plan("--num-layers 4 --hidden-size 1000 --num-attention-heads 8 --vocab-size 1000 --seq-length 512")
    model = loaded.run.model
    for name, (value, _) in ARCHITECTURE.items():
        assert getattr(model, name) == value, name
    assert (model.ffn_hidden_size, model.max_position_embeddings, model.vocab_size) == (4000, 512, 1024)
    assert (model.hidden_dropout, loaded.run.training.precision) == (0.1, "fp32")
    assert any("missing flags as Megatron-LM reads them: activation=gelu" in note for note in loaded.notes)
    swiglu = plan("--swiglu --num-layers 4 --hidden-size 1000 --num-attention-heads 8 --vocab-size 1000").run.model
    assert swiglu.ffn_hidden_size == default_ffn_hidden_size(1000, "swiglu") == 2624 == 41 * 64
    assert not plan(f"{sizes(4, 1024, 8, vocab=1024)} --tensor-model-parallel-size 2").run.parallel.sequence_parallel


def test_groups_need_their_switch() -> None:
    without = sizes(4, 1024, 8, groups=2, vocab=1024).replace("--group-query-attention", "")
    loaded = plan(without)
    assert loaded.run.model.query_groups == 8
    assert any("--num-query-groups as Megatron-LM reads it: no effect" in note for note in loaded.notes)
    assert plan(sizes(4, 1024, 8, groups=2, vocab=1024)).run.model.query_groups == 2
    bare = shlex.split(sizes(4, 1024, 8, vocab=1024))
    assert "--num-query-groups N" in refused(*bare, "--group-query-attention", planning=True).render()


@pytest.mark.parametrize("own", ["--preset telechat2-7b", "--architecture telechat2"])
def test_a_model_of_ours_keeps_our_defaults(own: str) -> None:
    model = plan(f"{own} {sizes(4, 1024, 8, 4096)}").run.model
    assert not model.not_built and model.vocab_size == 131072 and model.mlp_output_bias


def test_a_model_in_a_file_keeps_our_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  num_layers: 4\n  hidden_size: 64\n  num_attention_heads: 4\n  ffn_hidden_size: 128\n")
    loaded = load_run_config(["--config", str(path), "--mock-data", "--dry-run"], {})
    assert not loaded.run.model.not_built and not loaded.notes


# ---- the vocabulary -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, tensor, rows",
    [
        ("--vocab-size 50257", 1, 50304),
        ("--vocab-size 50257", 8, 51200),
        ("--vocab-size 50257 --make-vocab-size-divisible-by 1", 1, 50257),
        ("--padded-vocab-size 32000", 8, 32000),
        ("--tokenizer-type GPT2BPETokenizer", 1, 50304),
        ("--vocab-file /nowhere/v.json --merge-file /nowhere/m.txt", 2, 50432),
        ("--tokenizer-type Llama2Tokenizer --tokenizer-model /nowhere/tokenizer.model", 1, 32000),
        ("--tokenizer-type TikTokenizer --tokenizer-model /nowhere/vocab.json --tiktoken-pattern v2", 1, 131072),
        ("--tokenizer-type NullTokenizer --vocab-size 128256", 1, 128256),
        ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model org/name --vocab-size 1000", 1, 1024),
    ],
)
def test_rows_of_the_embedding(words: str, tensor: int, rows: int) -> None:
    loaded = plan(f"{sizes(4, 1024, 8)} --tensor-model-parallel-size {tensor} {words}")
    assert loaded.run.model.vocab_size == rows


@pytest.mark.parametrize(
    "words",
    ["", "--tokenizer-type HuggingFaceTokenizer --tokenizer-model org/name", "--tokenizer-type BertWordPieceCase"],
)
def test_a_vocabulary_that_nothing_says_is_assumed_and_said(words: str) -> None:
    loaded = plan(f"{sizes(4, 1024, 8)} {words}")
    assert loaded.run.model.vocab_size == 131072
    assert any(note.startswith("assumed: 131,072 tokens") and "--vocab-size N" in note for note in loaded.notes)


@pytest.mark.parametrize(
    "words, rows",
    [
        ("--tokenizer-model deepseek-ai/DeepSeek-V3 --make-vocab-size-divisible-by 3232", 129280),
        ("--tokenizer-model Qwen/Qwen3-30B-A3B --make-vocab-size-divisible-by 1187", 151936),
        ("--tokenizer-model meta-llama/Llama-3.1-8B", 128256),
        ("--tokenizer-name-or-path /data/Mixtral-8x7B-v0.1", 32000),
        ("--extra-vocab-size 421 --patch-tokenizer-type Qwen2Tokenizer", 152064),
        ("--extra-vocab-size 2400 --patch-tokenizer-type DeepSeekV2Tokenizer", 102400),
        ("--pad-vocab-size-to 250880 --tokenizer-type PretrainedFromHF", 250880),
    ],
)
def test_the_vocabulary_of_published_models_by_name(words: str, rows: int) -> None:
    assert plan(f"{sizes(4, 1024, 8)} --tokenizer-type HuggingFaceTokenizer {words}").run.model.vocab_size == rows


def test_the_size_of_a_tokenizer_that_is_here(tmp_path: Path) -> None:
    tokens = {f"t{number}": number for number in range(1500)}
    (tmp_path / "gpt2.json").write_text(json.dumps(tokens))
    folder = tmp_path / "hf"
    folder.mkdir()
    more = [{"id": 1500, "content": "<end>"}, {"id": 3, "content": "t3"}]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": more}))
    for words, rows in (
        (f"--tokenizer-type GPT2BPETokenizer --vocab-file {tmp_path}/gpt2.json --merge-file m", 1536),
        (f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder} --make-vocab-size-divisible-by 1", 1501),
    ):
        assert plan(f"{sizes(4, 1024, 8)} {words}").run.model.vocab_size == rows
    assert vocabulary_of_file(tmp_path / "nowhere.json") is None
    (tmp_path / "bad.model").write_bytes(b"\x0a\xff\xff")
    assert vocabulary_of_file(tmp_path / "bad.model") is None


def test_pieces_of_a_sentencepiece_model_are_those_its_library_counts(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a small text, {number * 37}" for number in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=120, model_type="bpe", minloglevel=2
    )
    size = sentencepiece.SentencePieceProcessor(str(tmp_path / "m.model")).GetPieceSize()
    assert vocabulary_of_file(tmp_path / "m.model") == size


# ---- what is no model of the planner, and none of the training -------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--hybrid-override-pattern M-M*",
        "--attention-output-gate",
        "--moe-latent-size 64",
        "--position-embedding-type deepseek4",
    ],
)
def test_another_model_is_refused_by_name_also_by_the_planner(flags: str) -> None:
    text = refused(*shlex.split(sizes(4, 1024, 8, vocab=1024)), *flags.split(), planning=True).render()
    assert flags.split()[0] in text


def test_what_costs_nothing_is_noted_by_the_planner() -> None:
    flags = "--rotary-percent 0.5 --moe-router-load-balancing-type seq_aux_loss --apply-layernorm-1p --optimizer sgd"
    notes = "\n".join(plan(f"{sizes(4, 1024, 8, vocab=1024)} {flags}").notes)
    for flag in flags.split()[::2]:
        assert f"{flag}" in notes and "not modelled" in notes


def test_the_training_says_in_one_problem_what_another_model_lacks() -> None:
    error = refused(*shlex.split(GPT3.replace("--data-path /nowhere/corpus", "--mock-data").split("--vocab-file")[0]))
    assert len(error.problems) == 1
    text = error.render()
    for _, flag in ARCHITECTURE.values():
        assert flag in text
    assert "activation=gelu" in text and "--vocab-size N" in text and "--architecture telechat2" in text


@pytest.mark.parametrize(
    "absent", [flag for _, flag in ARCHITECTURE.values()] + ["--vocab-size 32000", "--group-query-attention"]
)
def test_each_absent_flag_of_the_architecture_is_a_problem(absent: str) -> None:
    whole = sizes(4, 1024, 8, 4096, 2, 32000).replace("--data-path /nowhere/corpus", "--mock-data") + f" {LLAMA}"
    assert load_run_config([*shlex.split(whole), "--dry-run"], {}).run.model.query_groups == 2
    error = refused(*shlex.split(whole.replace(absent, "")))
    assert len(error.problems) == 1 and absent.split()[0] in error.problems[0].fix


@pytest.mark.parametrize(
    "flags",
    [
        "--squared-relu",
        "--normalization LayerNorm",
        "--add-qkv-bias",
        "--quick-geglu",
        "--no-untie-embeddings-and-output-weights",
        "--moe-layer-freq [1]*2+[0]*2",
    ],
)
def test_the_training_refuses_what_it_cannot_build(flags: str) -> None:
    error = refused("--preset", "telechat2-tiny-moe", "--mock-data", *flags.split())
    assert len(error.problems) == 1 and "contradicts this framework: the training builds" in error.render()


def test_other_defaults_are_one_note() -> None:
    whole = sizes(4, 1024, 8, vocab=32000).replace("--data-path /nowhere/corpus", "--mock-data") + f" {LLAMA}"
    loaded = load_run_config([*shlex.split(whole.replace("--bf16", "")), "--dry-run"], {})
    (note,) = [note for note in loaded.notes if "another default" in note]
    for part in (
        "precision fp32 / bf16",
        "lr_decay_style linear / cosine",
        "weight_decay 0.01 / 0.1",
        "adam_beta2 0.999 / 0.95",
        "init_method_std 0.02 / 0.0048",
        "eval_interval 1000 / none",
        "eval_iters 100 / 10",
    ):
        assert part in note, part
    assert "lr none" not in note and "dropout" not in note, "what is given is not listed"
    assert any("ffn_hidden_size=2688, as Megatron-LM takes it" in note for note in loaded.notes)
    preset = load_run_config(["--preset", "telechat2-tiny", "--mock-data", "--dry-run"], {})
    assert not any("Megatron" in note for note in preset.notes)


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("[0]*1+[1]*2", "is of 3 layers, the model has num_layers=4"),
        ("[0]*x", "not a list of 0 and 1"),
        ("[2]*4", "not a list of 0 and 1"),
        ("[1]*9999999999", "not a list of 0 and 1"),
    ],
)
def test_patterns_that_are_none(pattern: str, said: str) -> None:
    words = f"{sizes(4, 1024, 8, 4096, vocab=1024)} {LLAMA} --num-experts 4"
    assert said in refused(*shlex.split(words), "--moe-layer-freq", pattern, planning=True).render()


# ---- the tables -----------------------------------------------------------------------------


def test_the_tables_are_of_our_fields_and_really_differ() -> None:
    known = fields_by_name()
    assert set(DEFAULTS) | set(ARCHITECTURE) <= set(known)
    assert all(known[name].default != value for name, (value, _) in ARCHITECTURE.items())
    assert set(ARCHITECTURE) <= set(PLANNED_ONLY)
    assert {"precision", "lr", "lr_decay_style", "weight_decay", "adam_beta2", "eval_interval"} <= set(differing())
    assert "min_lr" not in differing(), "a low --lr alone is no error"


def test_docs_list_every_default_that_differs() -> None:
    text = (DOCS / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `--([a-z0-9-]+)`[^|]*\| ([^|]+) \|", text, re.MULTILINE))
    for name in (*differing(), *ARCHITECTURE):
        assert name.replace("_", "-") in rows, name
    for name, value in differing().items():
        said = rows[name.replace("_", "-")].replace("2³²", f"{2.0**32:g}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wanted = f"{value:g}" if number else {None: "none", False: "off"}.get(value, value)
        assert said.startswith(wanted), (name, said)
