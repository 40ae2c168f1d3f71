"""A tokenizer of single characters with TeleChat2's special tokens, dialogs, and runs on them: expectations can be
written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.config.schema import RunConfig
from tests.data.material import VOCAB, make_run

SPECIAL = (
    "<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>", "<_observation>", "<_sep>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
PAD = SPECIAL.index("<_pad>")


def letters_tokenizer(folder: Path, without: Sequence[str] = ()) -> str:
    """A tokenizer.json whose ordinary tokens are bytes: an ASCII text has as many tokens as characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    names = [name if name not in without else f"<_control{number}>" for number, name in enumerate(SPECIAL)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*names, *letters])}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<_unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def write_lines(path: Path, lines: Sequence) -> str:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def single(question: str, answer: str, system: str | None = None) -> dict:
    """The shape of TeleChat2's train.py."""
    turns = [{"role": "user", "content": question}, {"role": "bot", "content": answer}]
    return {"system": system, "dialog": turns, "multiturn": False, "tool": False}


def numbered(count: int, longest: int = 40, first: int = 0) -> list[dict]:
    """Dialogs that tell their number, of lengths that vary."""
    return [single(f"q{n}", f"a{n}" + "x" * (n * 7919 % longest)) for n in range(first, first + count)]


def chat_run(tmp_path: Path, *files: str, seq_length: int = 64, tokenizer: str | None = None, **options) -> RunConfig:
    tokenizer = tokenizer or letters_tokenizer(tmp_path / "tokenizer")
    settings = {"data_path": files, "split": "1", "sft": True, "tokenizer_model": tokenizer, **options}
    return make_run(tmp_path, seq_length=seq_length, **settings)


def read(source, sample: int) -> str:
    """The text of a row, without its padding."""
    tokenizer = source.tokenizer_of_test
    ids = [int(token) for token in source.tokens(sample) if token != PAD]
    return tokenizer.decode(ids)


assert VOCAB > len(SPECIAL) + 256
