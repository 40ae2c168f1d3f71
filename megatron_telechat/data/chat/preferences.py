"""Pairs of a chosen and a rejected answer: the usual jsonl shapes read into one form. No torch, no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from megatron_telechat.data.chat.dialogs import ROLES, BadDialog, Dialog, from_messages, text_of

HALVES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two dialogs that are the same up to an answer.

    Attributes:
        shared_turns: how many first turns they share; the next one is an answer in both, and another one. All turns
            where the two are the same: such a pair prefers nothing.
    """

    chosen: Dialog
    rejected: Dialog
    shared_turns: int


def parse_pair(line: Any) -> Pair:
    """One decoded line of a jsonl file, in a shape that TRL's preference trainers read.

    ``{"prompt", "chosen", "rejected"}`` where each is a text or a list of ``{"role", "content"}``; or without
    ``prompt``, where both are whole dialogs. A prompt that is given beside whole dialogs must be in them. ``system``
    may stand beside them.

    Raises:
        BadDialog: no such shape, or two dialogs that do not differ in an answer first.
    """
    if not isinstance(line, dict) or not all(half in line for half in HALVES):
        raise BadDialog("a pair needs the keys 'chosen' and 'rejected', and 'prompt' where they are no whole dialogs")
    chosen, rejected = (from_messages(_messages(line, half), half, line) for half in HALVES)
    if chosen.system != rejected.system:
        raise BadDialog("chosen and rejected have different system texts: they do not answer the same")
    equal = takewhile(lambda turns: turns[0] == turns[1], zip(chosen.turns, rejected.turns, strict=False))
    shared = sum(1 for _ in equal)
    if chosen.turns != rejected.turns:
        if shared == min(len(chosen.turns), len(rejected.turns)):
            raise BadDialog("one of chosen and rejected is the beginning of the other: there is no other answer in it")
        if chosen.turns[shared].role == "user":
            raise BadDialog(f"chosen and rejected differ in a question first (turn {shared + 1}), not in an answer")
    return Pair(chosen, rejected, shared)


def _messages(line: dict, half: str) -> list:
    """The whole dialog of a half."""
    prompt, answer = line.get("prompt"), line[half]
    if isinstance(answer, str):
        if prompt is None:
            raise BadDialog(f"{half} is a text without a prompt: give 'prompt', or lists of turns")
        return [*_prompt(prompt), {"role": "assistant", "content": text_of(answer, half)}]
    if not isinstance(answer, list) or not answer:
        raise BadDialog(f"{half} is neither a text nor a list of turns")
    if prompt is None:
        return answer
    first = answer[0].get("role") if isinstance(answer[0], dict) else None
    if isinstance(first, str) and ROLES.get(first) == "bot":
        return [*_prompt(prompt), *answer]
    if isinstance(prompt, list):
        inside = answer[: len(prompt)] == prompt
    else:
        inside = any(
            isinstance(turn, dict) and turn.get("role") == "user" and turn.get("content") == prompt for turn in answer
        )
    if not inside:
        raise BadDialog(f"{half} does not begin with an answer, and the prompt is not in it")
    return answer


def _prompt(prompt: Any) -> list:
    if isinstance(prompt, list):
        return prompt
    return [{"role": "user", "content": text_of(prompt, "prompt")}]
