"""Continuing a prompt. The whole sequence is computed anew for each token.

No key/value cache: with NTK-aware scaling the rotary table depends on the length of the whole
sequence, so keys rotated for a shorter one are not those of the longer one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_telechat.backend import get_backend
from megatron_telechat.config.schema import Precision
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.device_kinds import DeviceChoice
from megatron_telechat.errors import DataError
from megatron_telechat.huggingface.files import CONFIG, read_json
from megatron_telechat.huggingface.model import HfModel, hf_model


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_k and top_p narrow the choice of the others."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def continue_text(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    device: DeviceChoice = "auto",
    precision: Precision | None = None,
) -> str:
    """What the model of a Hugging Face folder adds to a prompt.

    Args:
        folder: with config.json, weights and tokenizer.
        precision: None: fp32 on the CPU, else bf16.

    Raises:
        CheckpointError: configuration or weights are missing or damaged.
        DataError: the tokenizer is missing, damaged or another model's; the prompt has no tokens.
    """
    config = read_json(folder / CONFIG)
    tokenizer = build_tokenizer(None, str(folder))
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise DataError("the prompt has no tokens", "--prompt", "give some text")
    ends = end_tokens_of(folder, config, tokenizer.eod)
    precision = precision or get_backend(device).traits.generation_precision
    length = len(tokens) + max_new_tokens
    with hf_model(folder, device=device, precision=precision, seq_length=length) as model:
        vocab_size = model.run.model.vocab_size
        if max(tokens) >= vocab_size:
            raise DataError(
                f"the tokenizer gives ids up to {max(tokens)}, the model has {vocab_size}",
                str(folder),
                "put the tokenizer of this model into the folder",
            )
        return tokenizer.decode(generate(model, tokens, max_new_tokens, ends, sampling))


def generate(
    model: HfModel, prompt: Sequence[int], max_new_tokens: int, end_tokens: frozenset[int], sampling: Sampling
) -> list[int]:
    """The new token ids; the end token, where one came, is not among them."""
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits = model.logits(torch.tensor([tokens]))[0, -1].cpu()
        token = choose(logits, sampling, generator)
        if token in end_tokens:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token of fp32 logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, ids = (logits / sampling.temperature).sort(descending=True, stable=True)
    probabilities = ordered.softmax(dim=0)
    if sampling.top_k is not None:
        probabilities[sampling.top_k :] = 0
    if sampling.top_p is not None:
        # the smallest set that reaches top_p of what top_k left: a token stays while those before it fall short
        probabilities = probabilities / probabilities.sum()
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities[before >= sampling.top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def end_tokens_of(folder: Path, config: dict[str, Any], tokenizer_end: int | None) -> frozenset[int]:
    """Ids that end a text: of generation_config.json, config.json and the tokenizer.

    Raises:
        DataError: generation_config.json is damaged; without its ids a text might not end.
    """
    found: set[int] = set() if tokenizer_end is None else {tokenizer_end}
    path = folder / "generation_config.json"
    sources = [config]
    if path.is_file():
        try:
            sources.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise DataError(f"it is not JSON: {error}", str(path), "restore or remove the file") from error
    for source in sources:
        value = source.get("eos_token_id") if isinstance(source, dict) else None
        found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return frozenset(found)
