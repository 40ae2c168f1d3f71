"""Small datasets, runs and tokenizers for the tests of this folder."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_telechat.config.schema import DataConfig, EvaluationConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_telechat.data.indexed.dataset import IndexedWriter

VOCAB = 512


@dataclass(frozen=True)
class Rank:
    """What build_datasets and batches ask of a ParallelState."""

    rank: int = 0
    dp_rank: int = 0
    dp_size: int = 1


def write_dataset(prefix: Path, documents: int, seed: int = 0, longest: int = 120, dtype=np.uint16) -> str:
    """Random documents, each ending with token 2."""
    rng = np.random.default_rng(seed)
    with IndexedWriter(str(prefix), dtype) as writer:
        for _ in range(documents):
            writer.add_document([*rng.integers(3, VOCAB, rng.integers(1, longest)), 2])
    return str(prefix)


def make_run(
    tmp_path: Path, *, seq_length=32, mbs=2, gbs=8, iters=40, eval_interval=None, seed=1234, **data
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocab_size=VOCAB),
        training=TrainingConfig(
            seq_length=seq_length, micro_batch_size=mbs, global_batch_size=gbs, train_iters=iters, seed=seed
        ),
        data=DataConfig(**{"data_cache_path": str(tmp_path / "cache"), **data}),
        evaluation=EvaluationConfig(eval_interval=eval_interval, eval_iters=2),
    )


def with_training(run: RunConfig, **changes) -> RunConfig:
    return replace(run, training=replace(run.training, **changes))


TEXTS = [
    "The tide comes in twice a day, and the harbour fills with boats.",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "Seven of the 42 lamps were lit; the rest waited for the evening.",
    "小桥流水人家，古道西风瘦马。",
]


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def huggingface_tokenizer(folder: Path) -> Path:
    """A tiny byte-level BPE tokenizer.json with TeleChat2's special tokens."""
    from megatron_telechat.data.text.tokenizer_training import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(folder / "source.jsonl", TEXTS * 4)
    train_tokenizer([str(source)], 320, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def sentencepiece_tokenizer(path: Path) -> Path:
    """A tiny model built as TeleChat's: control ids 1 to 3, user-defined digits, no dummy prefix, identity."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece="<_unk>",
        bos_piece="<_start>",
        eos_piece="<_end>",
        pad_piece="<_pad>",
        control_symbols=["<_user>", "<_bot>"],
        user_defined_symbols=[*"0123456789", "\n"],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path
