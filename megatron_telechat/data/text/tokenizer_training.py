"""A byte-level BPE tokenizer with TeleChat2's special tokens at their ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_telechat.data.text.documents import BadLine, find_inputs, parse_document
from megatron_telechat.data.text.readers import read_lines
from megatron_telechat.errors import ConfigError, DataError, ResourceError

# Ids 0 to 8, in this order.
SPECIAL_TOKENS = (
    "<_unk>",
    "<_start>",
    "<_end>",
    "<_pad>",
    "<_user>",
    "<_bot>",
    "<_system>",
    "<_observation>",
    "<_sep>",
)
# Qwen2's split, which all fast engines read. Digits stand alone, as in TeleChat2's own tokenizer.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST = len(SPECIAL_TOKENS) + 256


def train_tokenizer(inputs: Sequence[str], vocab_size: int, output: Path, json_key: str = "text") -> int:
    """Train on jsonl files and write a ``tokenizer.json`` (and, beside it, the ``tokenizer_config.json`` that
    Hugging Face's AutoTokenizer asks for). The same input gives the same file.

    Returns:
        The vocabulary size reached; a small input may hold fewer pairs than asked for.

    Raises:
        ConfigError: a vocabulary smaller than the bytes and special tokens.
        DataError: no input, or a bad line.
        ResourceError: the output cannot be written.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small",
            "command line",
            f"at least {SMALLEST}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(inputs, json_key), trainer=trainer)
    _write(tokenizer.to_str(pretty=True), output)
    return tokenizer.get_vocab_size()


def _write(content: str, output: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<_start>",
        "eos_token": "<_end>",
        "pad_token": "<_pad>",
        "unk_token": "<_unk>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
        partial.write_text(content, encoding="utf-8")
        partial.replace(output)
        if output.name == "tokenizer.json":
            output.with_name("tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write {output}: {error}", "--output", "choose another --output") from error


def _texts(inputs: Sequence[str], key: str) -> Iterator[str]:
    for line in read_lines(find_inputs(inputs)):
        try:
            yield from parse_document(line, (key,))[key]
        except BadLine as reason:
            raise DataError(str(reason), line.place, "fix the line") from reason
