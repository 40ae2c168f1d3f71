"""A dialog with a model: every turn in the template that it was tuned with, what was said before in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_telechat.data.chat.dialogs import BadDialog, Dialog, Turn
from megatron_telechat.data.chat.template import ChatVocabulary, Part, render
from megatron_telechat.errors import ConfigError
from megatron_telechat.huggingface.chat_templates import NAME_KEY, template_of
from megatron_telechat.huggingface.generation import PiecewiseText, Sampling, new_tokens, require_vocabulary
from megatron_telechat.huggingface.model import HfModel
from megatron_telechat.huggingface.tokenizer_files import chat_template_of, tokenizer_config_of
from megatron_telechat.model.key_value_cache import KeyValueCache


class Chat:
    """Questions and answers. All ranks call the same methods with the same arguments.

    An answer is kept as the tokens that were generated: it is not decoded and encoded again.

    Args:
        model: the model.
        folder: with its tokenizer.
        template: one of `data.chat.template.TEMPLATES`.
        system: system text; None: none.
        ends: ids that end a text.
        sampling: how tokens are chosen; one stream of random numbers serves the whole dialog.
        max_new_tokens: longest answer.

    Raises:
        ConfigError: the template has no place for a system text, or the tokenizer lacks a token of the template.
        DataError: the tokenizer is damaged or another model's.
    """

    def __init__(
        self,
        model: HfModel,
        folder: Path,
        template: str,
        system: str | None,
        ends: frozenset[int],
        sampling: Sampling,
        max_new_tokens: int,
    ):
        vocabulary = ChatVocabulary(None, str(folder), template, model.run.model.vocab_size)
        self._model, self._vocabulary, self._template = model, vocabulary, template
        self._sampling, self._max_new_tokens = sampling, max_new_tokens
        # a model that goes on with a question of its own has ended its answer
        self._ends = ends | {vocabulary.ids["<_end>"], vocabulary.ids["<_user>"]}
        self._generator = torch.Generator().manual_seed(sampling.seed)
        try:
            self._opening = self._tokens(render(Dialog((), system), template))
        except BadDialog as error:
            raise ConfigError(str(error), "--system", "leave it out") from error
        require_vocabulary([*self._opening, *vocabulary.ids.values()], model, folder)
        self.clear()

    def clear(self) -> None:
        """Begin a new dialog."""
        self._cache = KeyValueCache()
        self._unread = self._opening

    def answer(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; every piece is whole characters."""
        asked, closing = self._turn(question)
        prompt, before = [*self._unread, *asked], self._cache.length
        text, found = PiecewiseText(self._vocabulary.tokenizer), list[int]()
        for token in new_tokens(
            self._model, prompt, self._max_new_tokens, self._ends, self._sampling, self._cache, self._generator
        ):
            found.append(token)
            yield text.add(token)
        yield text.rest()
        read = self._cache.length - before - len(prompt)
        self._unread = [*found[read:], *closing]

    def _turn(self, question: str) -> tuple[list[int], list[int]]:
        """Tokens of a question up to where the answer begins, and those that end the answer."""
        nothing = len(render(Dialog(()), self._template))
        parts = render(Dialog((Turn("user", question), Turn("bot", ""))), self._template)[nothing:]
        begin = 1 + max(number for number, part in enumerate(parts) if part.special and part.text == "<_bot>")
        return self._tokens(parts[:begin]), self._tokens(parts[begin:])

    def _tokens(self, parts: list[Part]) -> list[int]:
        return self._vocabulary.encode([parts])[0][0].tolist()


def template_of_folder(folder: Path) -> str:
    """The name of the template that a folder's tokenizer says.

    Raises:
        ConfigError: it says none, or one that is not ours.
        DataError: tokenizer_config.json is damaged.
    """
    said = tokenizer_config_of(folder).get(NAME_KEY)
    jinja = chat_template_of(folder)
    found = said if isinstance(said, str) else None if jinja is None else template_of(jinja)
    if found is None:
        raise ConfigError(
            "the folder has no chat template"
            if jinja is None
            else "the folder's chat template is not one of TeleChat's",
            str(folder),
            "give --template telechat2, telechat2-115b (TeleChat2-115B) or telechat (first generation)",
        )
    return found
