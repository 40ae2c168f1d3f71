"""Losses of the inputs on a few examples, by our own forward: what LM-Cocktail weighs them by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_telechat.backend import get_backend
from megatron_telechat.data.chat.dialogs import BadDialog, Dialog, parse_dialog
from megatron_telechat.data.chat.template import ChatVocabulary, learned, render
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.errors import DataError, NumericsError, Problem
from megatron_telechat.huggingface.model import HfModel, running_model
from megatron_telechat.merging.inputs import MODEL, Input
from megatron_telechat.merging.request import Examples

_ROWS = 256
_COMPLAINTS = 20


@dataclass(frozen=True)
class Example:
    """Token ids (int64), and which of them are learned (bool, same length; never the first)."""

    tokens: np.ndarray
    counted: np.ndarray


def losses_of(inputs: Sequence[Input], wanted: Examples) -> list[float]:
    """The loss of each input: cross entropy in nats, the mean over the learned tokens of all examples.

    One model at a time is in memory.

    Raises:
        DataError: the examples or the tokenizer cannot be used.
        NumericsError: a loss is not finite.
    """
    model = inputs[0].run.model
    examples = read_examples(wanted, _tokenizer(inputs, wanted), model.vocab_size)
    precision = wanted.precision or get_backend(wanted.device).traits.generation_precision
    length = max(example.tokens.size for example in examples)
    found = []
    for one in inputs:
        source = _Weights(one)
        with running_model(
            source, one.run.model, device=wanted.device, precision=precision, seq_length=length
        ) as running:
            loss = mean_loss(running, examples)
        one.release()
        if not np.isfinite(loss):
            raise NumericsError(f"the loss on the examples is {loss}", str(one.path), "leave this input out")
        found.append(loss)
    return found


class _Weights:
    """The weights of an input by the keys of the model (`checkpoint.loading.WeightSource`)."""

    def __init__(self, one: Input):
        self._one = one

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        return self._one.read(MODEL + key, offset, shape)


def mean_loss(model: HfModel, examples: Sequence[Example]) -> float:
    """Cross entropy in nats, the mean over the learned tokens of all examples."""
    total, count = 0.0, 0
    for example in examples:
        logits = model.logits(torch.from_numpy(example.tokens[None, :-1]))[0]
        labels = torch.from_numpy(example.tokens[1:]).to(logits.device)
        rows = torch.from_numpy(example.counted[1:]).to(logits.device).nonzero().flatten()
        for part in rows.split(_ROWS):  # in fp64, so few at a time
            losses = torch.nn.functional.cross_entropy(logits[part].double(), labels[part], reduction="sum")
            total += float(losses)
        count += rows.numel()
    return total / count


def _tokenizer(inputs: Sequence[Input], wanted: Examples) -> str:
    if wanted.tokenizer is not None:
        return str(wanted.tokenizer)
    for one in inputs:
        said = one.run.data.tokenizer_model
        beside = [one.companions] if isinstance(one.companions, Path) else []
        for place in (*beside, *([Path(said)] if said else [])):
            if place.is_file() or any(place.glob("tokenizer.json")) or any(place.glob("*.model")):
                return str(place)
    raise DataError("no input has a tokenizer beside it", "--examples", "give --tokenizer FILE_OR_FOLDER")


def read_examples(wanted: Examples, tokenizer: str, vocab_size: int) -> list[Example]:
    """The examples of a jsonl file: dialogs, masked as in fine-tuning, or ``{"text": ...}``, where every token after
    the first counts, the end of the document included.

    Raises:
        DataError: lines that are neither (the first twenty are named), no learned token, or ids beyond the vocabulary.
    """
    parsed = _parsed(wanted.file)
    chat = [(number, line) for number, line in parsed if isinstance(line, Dialog)]
    texts = [line for _, line in parsed if isinstance(line, str)]
    examples = _dialogs(chat, wanted, tokenizer, vocab_size) + _texts(texts, tokenizer)
    examples = [example for example in examples if example.counted.any()]
    if not examples:
        raise DataError("no token of the examples is learned", str(wanted.file), "dialogs with answers, longer texts")
    highest = max(int(example.tokens.max()) for example in examples)
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer gives ids up to {highest}, the models have {vocab_size}",
            tokenizer,
            "the tokenizer of these models (--tokenizer)",
        )
    return examples


def _parsed(file: Path) -> list[tuple[int, Dialog | str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the examples: {error}", str(file), "a jsonl file") from error
    found: list[tuple[int, Dialog | str]] = []
    problems: list[Problem] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line: Any = json.loads(text)
            plain = isinstance(line, dict) and isinstance(line.get("text"), str)
            found.append((number, line["text"] if plain else parse_dialog(line)))
        except (BadDialog, ValueError) as error:
            problems.append(Problem(f"neither a dialog nor a text: {error}", f"{file}:{number}", "fix or remove it"))
    if problems:
        raise DataError(problems[:_COMPLAINTS])
    if not found:
        raise DataError("the file holds no example", str(file), "a jsonl file with one dialog or text a line")
    return found


def _dialogs(dialogs: Sequence[tuple[int, Dialog]], wanted: Examples, tokenizer: str, vocab_size: int) -> list[Example]:
    if not dialogs:
        return []
    vocabulary = ChatVocabulary(None, tokenizer, wanted.template, vocab_size)
    rendered = []
    for number, dialog in dialogs:
        try:
            rendered.append(render(dialog, wanted.template))
        except BadDialog as error:
            raise DataError(str(error), f"{wanted.file}:{number}", "fix or remove it") from error
    return [_example(tokens, learned(roles, wanted.loss_mask)) for tokens, roles in vocabulary.encode(rendered)]


def _texts(texts: Sequence[str], tokenizer: str) -> list[Example]:
    if not texts:
        return []
    opened = build_tokenizer(None, tokenizer)
    end = [] if opened.eod is None else [opened.eod]
    found = []
    for ids in opened.encode_batch(list(texts)):
        tokens = np.array([*ids, *(end if ids[-1:] != end else [])], np.int64)
        found.append(_example(tokens, np.ones(tokens.size, bool)))
    return found


def _example(tokens: np.ndarray, counted: np.ndarray) -> Example:
    counted = counted.copy()
    counted[:1] = False  # nothing predicts it
    return Example(tokens, counted)
