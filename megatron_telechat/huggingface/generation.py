"""Continuing a text token by token, with or without a key-value cache (`model.key_value_cache`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_telechat.backend import get_backend
from megatron_telechat.config.schema import Precision
from megatron_telechat.data.tokenizers import Tokenizer, build_tokenizer
from megatron_telechat.device_kinds import DeviceChoice
from megatron_telechat.errors import DataError
from megatron_telechat.huggingface.files import CONFIG, read_json
from megatron_telechat.huggingface.model import HfModel, hf_model
from megatron_telechat.model.key_value_cache import KeyValueCache


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_k and top_p narrow the choice of the others."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """Where a model runs.

    Attributes:
        precision: None: fp32 on the CPU, else bf16.
        ranks: all ranks of the job, which share the model.
    """

    device: DeviceChoice = "auto"
    precision: Precision | None = None
    ranks: int = 1

    @property
    def compute(self) -> Precision:
        """The precision, with its default."""
        return self.precision or get_backend(self.device).traits.generation_precision


def continue_text(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    place: Place,
    use_cache: bool = True,
) -> str:
    """What the model of a Hugging Face folder adds to a prompt. Every rank gets the whole text.

    Args:
        folder: with config.json, weights and tokenizer.

    Raises:
        CheckpointError: configuration or weights are missing or damaged.
        ConfigError: the ranks do not divide the model.
        DataError: the tokenizer is missing, damaged or another model's; the prompt has no tokens.
    """
    config = read_json(folder / CONFIG)
    tokenizer = build_tokenizer(None, str(folder))
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise DataError("the prompt has no tokens", "--prompt", "give some text")
    ends = end_tokens_of(folder, config, tokenizer.eod)
    length = len(tokens) + max_new_tokens
    with hf_model(folder, device=place.device, precision=place.compute, seq_length=length, ranks=place.ranks) as model:
        require_vocabulary(tokens, model, folder)
        cache = KeyValueCache() if use_cache else None
        return tokenizer.decode(list(new_tokens(model, tokens, max_new_tokens, ends, sampling, cache)))


def require_vocabulary(tokens: Sequence[int], model: HfModel, folder: Path) -> None:
    """Raises DataError where the tokenizer gives ids that the model does not have."""
    vocab_size = model.run.model.vocab_size
    if tokens and max(tokens) >= vocab_size:
        raise DataError(
            f"the tokenizer gives ids up to {max(tokens)}, the model has {vocab_size}",
            str(folder),
            "put the tokenizer of this model into the folder",
        )


def generate(
    model: HfModel, prompt: Sequence[int], max_new_tokens: int, end_tokens: frozenset[int], sampling: Sampling
) -> list[int]:
    """The new token ids, by way of a cache; the end token, where one came, is not among them."""
    return list(new_tokens(model, prompt, max_new_tokens, end_tokens, sampling, KeyValueCache()))


def new_tokens(
    model: HfModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    end_tokens: frozenset[int],
    sampling: Sampling,
    cache: KeyValueCache | None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The new token ids one by one, the same on all ranks; an end token is not among them.

    Args:
        prompt: tokens that are not in the cache yet.
        cache: None: the whole sequence is computed anew for each token. Of what is yielded it holds all but the last
            token.
        generator: of the random choices; None: one of the sampling's seed.
    """
    generator = generator or torch.Generator().manual_seed(sampling.seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits = model.logits(torch.tensor([tokens]), cache)[0, -1].cpu()
        # ranks may round sums differently and so choose differently: the first one's choice counts
        token = model.of_first_rank(choose(logits, sampling, generator))
        if token in end_tokens:
            return
        yield token
        tokens = [token] if cache is not None else [*tokens, token]


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


class PiecewiseText:
    """The text of tokens that come one by one: a character that takes several tokens comes out with the last of them.

    A window is decoded that begins with the piece before the new one, since a tokenizer may write a token differently
    at the beginning of a text (sentencepiece leaves a blank out).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._before = self._done = 0
        """The window begins at `_before`; the text of the tokens up to `_done` was given out."""

    def add(self, token: int) -> str:
        """The text that is whole now; empty while a character is not."""
        self._tokens.append(token)
        new = self._new_text()
        if new.endswith("\ufffd"):
            return ""
        self._before, self._done = self._done, len(self._tokens)
        return new

    def rest(self) -> str:
        """What no further token will make whole."""
        new = self._new_text()
        self._before = self._done = len(self._tokens)
        return new

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._tokens[self._before : self._done])
        return self._tokenizer.decode(self._tokens[self._before :])[len(shown) :]


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
