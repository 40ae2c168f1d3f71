"""What transformers needs to open a tokenizer that has only its vocabulary: tokenizer_config.json, a chat template, and
for sentencepiece a tokenizer class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_telechat.config.data_formats import data_format
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.chat.template import TOOL_TAGS
from megatron_telechat.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_telechat.errors import ConfigError, DataError
from megatron_telechat.huggingface.chat_templates import NAME_KEY, chat_template

TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_CLASS_FILE, _CLASS = "tokenization_megatron_telechat.py", "MegatronTelechatTokenizer"
_TEMPLATE_TOKENS = ("<_system>", "<_user>", "<_bot>")
_PROBES = ("a", "a.", "1", "。", "}", ">")
"""Ends of a system text; a tokenizer may make one token of such an end and the line end behind it."""


def complete_tokenizer(folder: Path, run: RunConfig) -> list[str]:
    """Add what is missing beside the tokenizer of an exported folder. Files that are there stay as they are.

    Returns:
        What a person should know.
    """
    try:
        tokenizer = build_tokenizer(None, str(folder), special_tokens_in_text=True)
    except (DataError, ConfigError) as error:
        return [f"no tokenizer that could be read is in the folder: {error.problems[0].what}"]
    template = data_format(run.data).template(run.data)
    jinja = None if template is None else chat_template(template, run.data.sft_system)
    path = folder / TOKENIZER_CONFIG
    if path.exists():
        if jinja is not None and not has_template(folder):
            (folder / CHAT_TEMPLATE).write_text(jinja, encoding="utf-8")
    else:
        config = _tokenizer_config(tokenizer)
        if "auto_map" in config:
            shutil.copyfile(Path(__file__).parent / "exported" / _CLASS_FILE, folder / _CLASS_FILE)
        if jinja is not None and not has_template(folder):
            config |= {"chat_template": jinja, NAME_KEY: template}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return _joined_line_ends(tokenizer) if template == "telechat2" else []


def has_template(folder: Path) -> bool:
    """Whether a folder has a chat template of its own."""
    return chat_template_of(folder) is not None


def chat_template_of(folder: Path) -> str | None:
    """The Jinja text of a folder's chat template, or None.

    Raises:
        DataError: tokenizer_config.json is damaged.
    """
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    found = tokenizer_config_of(folder).get("chat_template")
    return found if isinstance(found, str) else None


def tokenizer_config_of(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a folder; empty where there is none.

    Raises:
        DataError: it is damaged.
    """
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"it is not JSON: {error}", str(path), "restore or remove the file") from error
    return content if isinstance(content, dict) else {}


def special_tokens(folder: Path) -> Mapping[str, int]:
    """Ids of the tokenizer that lies in the folder, so that generation knows where to stop."""
    try:
        tokenizer = build_tokenizer(None, str(folder))
    except (DataError, ConfigError):
        return {}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad}
    return {name: number for name, number in ids.items() if number is not None}


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Class and special tokens; nothing is put around a text, and spaces stay as they are."""
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eod, "pad_token": tokenizer.pad}
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = tokenizer.backend
        config |= {
            "tokenizer_class": _CLASS,
            "auto_map": {"AutoTokenizer": [f"{_CLASS_FILE.removesuffix('.py')}.{_CLASS}", None]},
            "added_tokens_decoder": {
                str(number): _added_token(model.IdToPiece(number), special=model.IdToPiece(number) not in TOOL_TAGS)
                for number in range(model.GetPieceSize())
                if model.IsControl(number) or model.IsUnknown(number) or model.IdToPiece(number) in TOOL_TAGS
            },
        }
        names = {role: None if number is None else model.IdToPiece(number) for role, number in roles.items()}
        unknown = model.IdToPiece(model.unk_id())
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        backend = tokenizer.backend
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        missing = [
            name
            for name in _TEMPLATE_TOKENS
            if backend.token_to_id(name) is not None and name not in tokenizer.added_tokens
        ]
        if missing:
            config["additional_special_tokens"] = missing
        names = {role: None if number is None else backend.id_to_token(number) for role, number in roles.items()}
        unknown = getattr(backend.model, "unk_token", None)
    else:
        return config
    return config | {role: name for role, name in {**names, "unk_token": unknown}.items() if name is not None}


def _added_token(name: str, special: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": name, **flags, "special": special}


def _joined_line_ends(tokenizer: Tokenizer) -> list[str]:
    """A note where the tokenizer makes one token of the end of a system text and the line end behind it: the training
    encodes the two apart, and one rendered text cannot say that."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return []
    apart = [tokenizer.encode(text) + tokenizer.encode("\n") for text in _PROBES]
    together = [tokenizer.encode(text + "\n") for text in _PROBES]
    if apart == together:
        return []
    return [
        "the chat template ends a system text with a line end that this tokenizer may join with the text, where the "
        "training kept it apart"
    ]
