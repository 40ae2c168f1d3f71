"""What a command says and leaves out, against what our training builds and defaults to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_telechat.config.fields import fields_by_name, values_of
from megatron_telechat.config.megatron.meaning import ARCHITECTURE
from megatron_telechat.config.origins import Check, Rule, flag
from megatron_telechat.errors import Problem


def training_builds_it(check: Check) -> Iterator[Problem]:
    """What the flags ask for, and what absent flags ask for in Megatron-LM, is a model of our training."""
    if check.described:
        return
    absent = check.meaning.model if check.meaning else {}
    for name, value in check.run.model.not_built.items():
        if name not in absent and name not in check.bad:
            fix = ARCHITECTURE[name][1] if name in ARCHITECTURE else flag(name, fields_by_name()[name].default)
            yield check.problem(
                f"{flag(name, value)} contradicts this framework: the training builds "
                f"{_text(fields_by_name()[name].default)} only",
                name,
                fix=f"{fix}, if the model is to be another one; tools/plan_pipeline.py plans this one as it is",
            )
    if check.meaning is None or not check.meaning.add:
        return
    said = [f"{name}={value}" for name, value in absent.items() if name != "ffn_hidden_size"]
    rows = check.meaning.vocabulary
    if any(word.startswith("--vocab-size") for word in check.meaning.add):
        said.append(f"vocab_size={rows.size} ({rows.source})" if rows else "the vocabulary of its tokenizer")
    yield Problem(
        f"missing flags mean a different model in Megatron-LM than here: {', '.join(said)}",
        "flags alone describe the model, without --preset, YAML file or --architecture",
        f"add {' '.join(check.meaning.add)}; or --architecture telechat2, if it is a TeleChat2 model, with our "
        f"defaults",
    )


def defaults_of_megatron(check: Check) -> Iterator[Problem]:
    """A note, where flags alone describe the run and some that are not given have another default in Megatron-LM."""
    if check.meaning is None or check.described:
        return iter(())
    values, width = values_of(check.run), check.meaning.model.get("ffn_hidden_size")
    if width is not None:
        check.notes.append(f"ffn_hidden_size={width}, as Megatron-LM takes it where it is not given")
    theirs = check.meaning.values.items()
    pairs = [f"{name} {_text(value)} / {_text(values[name])}" for name, value in theirs if values[name] != value]
    if pairs:
        check.notes.append(
            f"missing flags have another default in Megatron-LM (its default / ours): {', '.join(pairs)}"
        )
    return iter(())


def _text(value: Any) -> str:
    return (
        "none"
        if value is None
        else f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


RULES: tuple[Rule, ...] = (training_builds_it, defaults_of_megatron)
