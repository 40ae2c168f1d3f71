"""Dialogs to tokens, and which of them are learned. Sources of the templates: TeleChat's published fine-tuning
scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_telechat.data.chat.dialogs import BadDialog, Dialog
from megatron_telechat.data.tokenizers import (
    HuggingFaceTokenizer,
    Tokenizer,
    build_tokenizer,
    refuse_tokens_made_of_text,
)
from megatron_telechat.errors import ConfigError, DataError

TEMPLATES = ("telechat2", "telechat2-115b", "telechat")
"""telechat2: ``[<_system>text\\n](<_user>question<_bot>answer<_end>\\n)*``, of TeleChat2's tokenizers and train.py.
telechat2-115b: ``<_start>(<_user>question<_bot>answer<_end>)*``, of TeleChat2-115B's ``chat``.
telechat: the same without ``<_start>``, of the first generation."""

TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# What a token is to the loss. Kept in the cache, so that one encoding serves every convention.
CONTEXT, ANSWER, FRAME = 0, 1, 2
"""CONTEXT is read only; ANSWER are the words of the bot and ``<_end>``; FRAME are ``<_user>`` and ``<_bot>``."""

LEARNED = {"telechat": (ANSWER, FRAME), "answer": (ANSWER,)}
"""Convention → roles whose tokens count. telechat: TeleChat2's train.py and TeleChat's process_data.py; answer:
MindFormers' telechat_preprocess.py."""


class Part(NamedTuple):
    """A piece of a rendered dialog: text to encode, or the name of a special token."""

    text: str
    special: bool
    role: int


def render(dialog: Dialog, template: str, default_system: str | None = None, context_turns: int = 0) -> list[Part]:
    """The dialog in a published template.

    Args:
        default_system: system text of dialogs that have none; unset: no system turn.
        context_turns: the answers among so many first turns are context, and not answers.

    Raises:
        BadDialog: a system text where the template has no place for one.
    """
    parts: list[Part] = []
    system = default_system if dialog.system is None else dialog.system
    modern = template == "telechat2"
    if modern and system is not None:
        parts += [Part("<_system>", True, CONTEXT), *_content(system, CONTEXT), Part("\n", False, CONTEXT)]
    elif dialog.system is not None:
        raise BadDialog(
            f"a system text, for which the template {template} has no place (--sft-template telechat2 has one)"
        )
    if template == "telechat2-115b":
        parts.append(Part("<_start>", True, CONTEXT))
    for number, turn in enumerate(dialog.turns):
        answer = CONTEXT if number < context_turns else ANSWER
        if turn.role == "user":
            parts += [Part("<_user>", True, FRAME), *_content(turn.text, CONTEXT)]
        else:
            parts += [Part("<_bot>", True, FRAME), *_content(turn.text, answer), Part("<_end>", True, answer)]
            if modern:
                parts.append(Part("\n", False, CONTEXT))
    return parts


_TAG = re.compile("(" + "|".join(TOOL_TAGS) + ")")


def _content(text: str, role: int) -> list[Part]:
    """Text with the tags of tools as tokens of their own; every other special name in it is plain text."""
    return [Part(piece, piece in TOOL_TAGS, role) for piece in _TAG.split(text) if piece]


class ChatVocabulary:
    """A tokenizer as the templates need it: ids of special tokens by name, text that never becomes one.

    Raises:
        ConfigError: the tokenizer lacks a token of the template, or makes it of a text.
    """

    def __init__(self, tokenizer_type: str | None, tokenizer_model: str | None, template: str, vocab_size: int):
        # "<_user>" that a person typed stays text
        self.tokenizer = build_tokenizer(
            tokenizer_type, tokenizer_model, vocab_size=vocab_size, special_tokens_in_text=False
        )
        self.template, self.tokenizer_model = template, tokenizer_model
        self._added = _added_tokens(Path(tokenizer_model)) if tokenizer_model else {}
        self._huggingface = self.tokenizer if isinstance(self.tokenizer, HuggingFaceTokenizer) else None
        start = {"telechat2-115b": ("<_start>",), "telechat2": ("<_system>",)}.get(template, ())
        needed = (*start, "<_user>", "<_bot>", "<_end>")
        found = {name: self._find(name) for name in (*needed, *TOOL_TAGS)}
        self.ids = {name: number for name, number in found.items() if number is not None}
        missing = [name for name in needed if name not in self.ids]
        if missing:
            raise ConfigError(
                f"the tokenizer has no {', '.join(missing)}, which the template {template} needs",
                "tokenizer_model",
                "the tokenizer of a TeleChat model, or another --sft-template",
            )
        self._leave_text(needed)
        pad = self._find("<_pad>")
        self.pad: int = (
            pad if pad is not None else self.tokenizer.pad if self.tokenizer.pad is not None else self.ids["<_end>"]
        )

    def _find(self, name: str) -> int | None:
        if name in self._added:
            return self._added[name]
        backend: Any = getattr(self.tokenizer, "backend", None)
        if hasattr(backend, "token_to_id"):
            return backend.token_to_id(name)
        if hasattr(backend, "PieceToId"):
            found = backend.PieceToId(name)
            return None if found == backend.unk_id() and name != backend.IdToPiece(found) else found
        return None

    def _leave_text(self, names: Sequence[str]) -> None:
        """See to it that the template alone places these tokens, whatever the tokenizer calls them."""
        if self._huggingface is not None:
            self._huggingface.leave_text(names, names)
        else:
            made = [name for name, ids in zip(names, self.encode_texts(names), strict=True) if self.ids[name] in ids]
            refuse_tokens_made_of_text(Path(self.tokenizer_model or ""), made)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, without BOS or EOS."""
        if self._huggingface is not None:
            found = self._huggingface.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in found]
        return self.tokenizer.encode_batch(texts)

    def encode(self, dialogs: Sequence[Sequence[Part]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens (int64) and the role of each (uint8: CONTEXT, ANSWER, FRAME) of rendered dialogs."""
        texts: dict[str, None] = {}
        for parts in dialogs:
            texts.update((part.text, None) for part in parts if not self._is_token(part))
        encoded = dict(zip(texts, self.encode_texts(list(texts)), strict=True))
        return [self._join(parts, encoded) for parts in dialogs]

    def _is_token(self, part: Part) -> bool:
        """A tag of tools that the tokenizer does not have is text, as in the published pipeline."""
        return part.special and part.text in self.ids

    def _join(self, parts: Sequence[Part], encoded: dict[str, list[int]]) -> tuple[np.ndarray, np.ndarray]:
        tokens: list[int] = []
        roles: list[int] = []
        for part in parts:
            ids = [self.ids[part.text]] if self._is_token(part) else encoded[part.text]
            tokens += ids
            roles += [part.role] * len(ids)
        return np.array(tokens, np.int64), np.array(roles, np.uint8)


def learned(roles: np.ndarray, convention: str) -> np.ndarray:
    """Which tokens are learned (bool, same shape), by one of the conventions of ``LEARNED``."""
    return np.isin(roles, LEARNED[convention])


def _added_tokens(path: Path) -> dict[str, int]:
    """Names that tokenizer_config.json gives to ids: the newer releases label control pieces of the .model anew."""
    file = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
        return {entry["content"]: int(number) for number, entry in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read: {error!r}", "tokenizer_model", "restore or remove the file") from error


def tokenizer_files(tokenizer_model: str | None) -> list[Path]:
    """The files that decide the ids."""
    if not tokenizer_model:
        return []
    path = Path(tokenizer_model)
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer_config.json", "special_tokens_map.json")
    own = [path] if path.is_file() else sorted([*folder.glob("tokenizer.json"), *folder.glob("*.model")])
    return [*own, *(folder / name for name in names if (folder / name).is_file())]


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text of each token, for people. Of the tokens that make up one character the last shows it, the others
    ``·``."""
    out: list[str] = []
    pending: list[int] = []
    for token in tokens:
        alone = _text_alone(tokenizer, token)
        pending = [] if alone is not None else [*pending, token]
        together = tokenizer.decode(pending) if pending else ""
        if alone is None and "\ufffd" not in together:
            pending = []
        out.append(alone if alone is not None else "·" if pending else together)
    return out


def _text_alone(tokenizer: Tokenizer, token: int) -> str | None:
    """The text of a token that is whole characters, else None."""
    backend: Any = getattr(tokenizer, "backend", None)
    if hasattr(backend, "IdToPiece"):  # decoding one piece would drop its blank
        return None if backend.IsByte(token) else backend.IdToPiece(token).replace("\u2581", " ")
    text = tokenizer.decode([token])
    return None if "\ufffd" in text else text
