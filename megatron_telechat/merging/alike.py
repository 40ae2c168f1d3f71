"""Whether inputs are of one model and one tokenizer, so that their numbers may be added."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_telechat.checkpoint.meaning import ALLOW, CHANGED_ON_PURPOSE
from megatron_telechat.config.architecture import comparable
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.merging.inputs import Input


def require_alike(inputs: Sequence[Input], allow_change: bool) -> list[str]:
    """Hold every input against the first.

    Args:
        allow_change: what a training may change with ``--allow-model-change`` may differ, the tokenizer included; the
            first input's is kept.

    Returns:
        What differs and was allowed.

    Raises:
        CheckpointError: all that differs, named by input.
    """
    found = [difference for other in inputs[1:] for difference in _differences(inputs[0], other)]
    found += _tokenizers(inputs)
    refused = [problem for problem, may_change in found if not (may_change and allow_change)]
    if refused:
        raise CheckpointError(refused)
    return [problem.what for problem, _ in found]


def _differences(first: Input, other: Input) -> list[tuple[Problem, bool]]:
    """Values of the architecture that differ; equal ones mean equal tensors, shapes included."""
    ours, theirs = comparable(first.run.model), comparable(other.run.model)
    found = []
    for name in ours:
        if ours[name] == theirs[name]:
            continue
        may_change = name in CHANGED_ON_PURPOSE
        fix = "inputs of one architecture"
        if may_change:
            fix = (
                f"inputs that agree, or {ALLOW} if it is meant: every tensor fits, and the first input's value is kept"
            )
        what = f"{name} is {ours[name]} in {first.path} and {theirs[name]} in {other.path}"
        found.append((Problem(what, str(other.path), fix), may_change))
    return found


def _tokenizers(inputs: Sequence[Input]) -> list[tuple[Problem, bool]]:
    """Tokenizers of one kind of file whose ids differ; of two kinds nothing can be told."""
    first: dict[str, tuple[str, Input]] = {}
    found = []
    for one in inputs:
        if one.tokenizer is None:
            continue
        digest, holder = first.setdefault(one.tokenizer["kind"], (one.tokenizer["digest"], one))
        if digest != one.tokenizer["digest"]:
            what = f"the tokenizer of {one.path} gives other ids than that of {holder.path}"
            fix = f"models of one tokenizer, or {ALLOW} if the ids that they share are meant"
            found.append((Problem(what, str(one.path), fix), True))
    return found
