# SPDX-License-Identifier: Apache-2.0
"""A sentencepiece tokenizer of TeleChat2 in transformers, with the ids that megatron_telechat trains on.

This file stands alone: it is copied into the exported folder and needs sentencepiece and transformers only.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

SYSTEM = "<_system>"
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


class MegatronTelechatTokenizer(PreTrainedTokenizer):
    """Texts between special tokens go to sentencepiece one by one, as the training encodes the parts of a dialog.

    The line end that closes a system turn is a part of its own there, and a tag of tools is, whether the vocabulary has
    a token for it or not.

    Args:
        vocab_file: the ``tokenizer.model``.
        kwargs: of transformers; ``added_tokens_decoder`` names the special tokens.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any):
        self.vocab_file = vocab_file
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Pieces of the model."""
        return self.sp_model.GetPieceSize()

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        pieces = {self.sp_model.IdToPiece(number): number for number in range(self.vocab_size)}
        return {**pieces, **self.added_tokens_encoder}

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The tokens of a text, special ones by their names."""
        special = self.added_tokens_encoder
        names = sorted({*special, *TOOL_TAGS}, key=len, reverse=True)
        parts = [part for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text) if part]
        tokens: list[str] = []
        in_system = False
        for number, part in enumerate(parts):
            if part in special:
                tokens.append(part)
                in_system = part == SYSTEM or (in_system and part in TOOL_TAGS)
                continue
            follower = parts[number + 1] if number + 1 < len(parts) else None
            ends_turn = follower is None or (follower in special and follower not in TOOL_TAGS)
            if in_system and ends_turn and part.endswith("\n"):
                tokens += self._tokenize(part[:-1]) + self._tokenize("\n")
            else:
                tokens += self._tokenize(part)
        return tokens

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_model.EncodeAsPieces(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.PieceToId(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.IdToPiece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens that are not special."""
        return self.sp_model.DecodePieces(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the model into a folder; the path of the copy."""
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / name
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
