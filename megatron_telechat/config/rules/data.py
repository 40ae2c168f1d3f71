"""Rules of the data: that there is some, that it is there, that the blend can be read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace

from megatron_telechat.config.data_formats import DataFormat, data_format
from megatron_telechat.config.data_names import data_json_entries, same_data
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.origins import Check, Rule
from megatron_telechat.errors import DataError, Problem

SOURCES = ("data_path", "data_json", "train_data_path")


def _format(check: Check) -> DataFormat:
    check.take("sft", "dpo", "mock_data")
    return data_format(check.run.data)


def one_source(check: Check) -> Iterator[Problem]:
    """Exactly one of mock_data, data_path, data_json and train_data_path names the training data."""
    mock, valid = check.take("mock_data", "valid_data_path")
    given = [name for name in SOURCES if check.take(name)]
    if mock:
        named = [*given, *(["valid_data_path"] if valid else [])]
        if named:
            yield check.problem(
                f"mock_data and {' and '.join(named)} contradict each other",
                "mock_data",
                *named,
                fix="drop one of them",
            )
        return
    if not given:
        if not check.dry_run:
            yield Problem(
                "no training data",
                "",
                "--data-path, --data-json or --train-data-path (or --mock-data for a smoke test)",
            )
        return
    if len(given) > 1:
        yield check.problem(f"{' and '.join(given)} contradict each other", *given, fix="keep one of them")
    if valid and "train_data_path" not in given:
        yield check.problem(
            f"valid_data_path needs train_data_path and cannot be combined with {given[0]}",
            "valid_data_path",
            given[0],
            fix="--train-data-path, or drop --valid-data-path and let --split cut the validation off",
        )


def blends_can_be_read(check: Check) -> Iterator[Problem]:
    """Data paths are prefixes alone, or positive weights and prefixes in turn."""
    for name in ("data_path", "train_data_path", "valid_data_path"):
        if name in check.bad:
            continue
        items = check.take(name)
        complaint = _blend_complaint(items)
        if complaint:
            yield check.problem(
                f"{name}: {complaint}: {' '.join(items)}",
                name,
                fix="a weight for each prefix (0.7 en 0.3 zh), or for none",
            )
            continue
        format = _format(check)
        for prefix in _prefixes(items):
            wrong = format.complaint(prefix)
            if wrong is not None:
                gone = not any(os.path.lexists(file) for file in (prefix, *format.files(prefix)))
                yield replace(check.problem(wrong.what, name, fix=wrong.fix), missing=name if gone else "")


def _blend_complaint(items: tuple[str, ...]) -> str | None:
    """Megatron's rule: weights and prefixes in turn, or prefixes alone."""
    numbers = [_number(item) for item in items]
    if all(number is None for number in numbers):
        return None
    weights = [number for number in numbers[0::2] if number is not None]
    if 2 * len(weights) != len(items) or any(number is not None for number in numbers[1::2]):
        return "weights and prefixes do not come in turn"
    if any(not 0 < weight < math.inf for weight in weights):
        return "a weight is not a positive number"
    return None


def _prefixes(items: tuple[str, ...]) -> tuple[str, ...]:
    return items[1::2] if items and _number(items[0]) is not None else items


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def fine_tuning_is_whole(check: Check) -> Iterator[Problem]:
    """What fine-tuning needs, and its settings where there is none."""
    sft, dpo, mock, model, eod = check.take("sft", "dpo", "mock_data", "tokenizer_model", "eod_mask_loss")
    of_dialogs = ("sft_loss_mask", "sft_overlong")
    for name in () if sft else of_dialogs if dpo else (*of_dialogs, "sft_template", "sft_system", "sft_packing"):
        if check.said_by_person(name) and check.take(name) != fields_by_name()[name].default:
            fix = f"drop {fields_by_name()[name].flag}: of a pair the answers are learned, and it is never truncated"
            yield check.problem(f"{name} is given without sft and has no effect", name, fix=fix if dpo else "--sft")
    if not (sft or dpo):
        return
    asked = "dpo" if dpo else "sft"
    if mock:
        yield check.problem(f"{asked} and mock_data contradict each other", asked, "mock_data", fix="drop one of them")
    elif model is None and not check.dry_run:
        yield check.problem(
            f"{asked} encodes dialogs, for which it needs the model's tokenizer", asked, fix="--tokenizer-model PATH"
        )
    if eod:
        yield check.problem(
            f"eod_mask_loss is for indexed text; with {asked} the mask of the dialogs says what is learned",
            "eod_mask_loss",
            asked,
            fix="drop --eod-mask-loss" + ("" if dpo else ", or choose with --sft-loss-mask"),
        )
    system, template = check.take("sft_system", "sft_template")
    if system is not None and template != "telechat2":
        yield check.problem(
            f"sft_system is given, but the template {template} has no place for a system text",
            "sft_system",
            "sft_template",
            fix="--sft-template telechat2",
        )


def borders_are_known(check: Check) -> Iterator[Problem]:
    """Options that act at the end of a document mean nothing in a stream without documents."""
    format, model = _format(check), check.take("tokenizer_model")
    for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        if check.take(name) and not format.has_documents and model is not None:
            yield check.problem(
                f"{name} has no effect with {format.field}, which has no documents",
                name,
                format.field,
                fix="drop one of them",
            )


def order_has_documents(check: Check) -> Iterator[Problem]:
    """Megatron's order is one of documents; dialogs and mock data have one order only."""
    order, format = check.take("data_order"), _format(check)
    if order == "megatron" and not format.megatrons_order:
        yield check.problem(
            f"data_order=megatron is for indexed text, and has no effect with {format.field}",
            "data_order",
            format.field,
            fix="drop --data-order",
        )


def data_json_can_be_read(check: Check) -> Iterator[Problem]:
    """data_json is a readable {prefix: weight} file whose datasets exist."""
    path, format = check.take("data_json"), _format(check)
    if path is None:
        return
    if not os.path.isfile(path):
        fix = 'a file such as {"corpus_text_document": 1.0}'
        yield check.absent(f"data_json {path} is not a file", path, "data_json", fix)
        return
    try:
        data_json_entries(path, format)
    except DataError as error:
        yield from (check.one(problem.what, "data_json", problem.fix) for problem in error.problems)


def datasets_are_named_once(check: Check) -> Iterator[Problem]:
    """A dataset under two names gives each of its samples twice, and no word of it is in the loss."""
    format = _format(check)
    for name, names in _lists_of_data(check):
        for same in same_data(names, format):
            yield check.problem(
                f"{name} names the same data more than once: {', '.join(same.names)} ({same.how}); it would "
                f"be read twice",
                name,
                fix="name it once, with the sum of the weights"
                if _weighs(check, name)
                else "name it once; with weights (0.7 en 0.3 zh) data is read as often as the run needs",
            )


def validation_is_not_trained_on(check: Check) -> Iterator[Problem]:
    """valid_data_path shares no file with train_data_path."""
    train, valid = map(_prefixes, check.take("train_data_path", "valid_data_path"))
    for same in same_data([*train, *valid], _format(check)):
        shared = [name for name in same.names if name in valid]
        if shared and any(name in train for name in same.names):
            yield check.problem(
                f"{shared[0]} is used for both training and validation "
                f"({', '.join(dict.fromkeys(same.names))}: {same.how}), "
                "so its loss says nothing about text that the model has not seen",
                "valid_data_path",
                "train_data_path",
                fix="other data for --valid-data-path, or --data-path with --split 99,1, which keeps the two apart",
            )


def _lists_of_data(check: Check) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every list of datasets that the run names: field, names without weights."""
    for name in ("data_path", "train_data_path", "valid_data_path"):
        if name not in check.bad and not _blend_complaint(check.take(name)):
            yield name, _prefixes(check.take(name))
    path = check.take("data_json")
    if path is not None:
        yield "data_json", tuple(entry for entry, _ in data_json_entries(path, _format(check)))


def _weighs(check: Check, name: str) -> bool:
    """Whether the datasets of a field have weights."""
    items = check.take(name)
    return name == "data_json" or _prefixes(items) != items


def split_can_be_read(check: Check) -> Iterator[Problem]:
    """split is one to three shares with a positive sum, and leaves training data."""
    split = check.take("split")
    numbers = [_number(part) for part in re.split(r"[,\s]+", split.strip()) if part]
    shares = [number for number in numbers if number is not None and 0 <= number < math.inf]
    if not 1 <= len(numbers) <= 3 or len(shares) != len(numbers) or sum(shares) <= 0:
        yield check.one(
            f"split={split!r} is not one to three shares with a positive sum", "split", fix="--split 969,30,1"
        )
    elif shares[0] == 0:
        yield check.one(f"split={split!r} leaves nothing to train on", "split", fix="--split 969,30,1")


def evaluation_has_data(check: Check) -> Iterator[Problem]:
    """eval_interval needs validation data."""
    interval, mock, train, valid, split = check.take(
        "eval_interval", "mock_data", "train_data_path", "valid_data_path", "split"
    )
    if interval is None or mock:
        return
    if train and not valid:
        yield check.problem(
            "eval_interval is given, but train_data_path comes without valid_data_path",
            "eval_interval",
            "train_data_path",
            fix="--valid-data-path, or drop --eval-interval",
        )
    shares = [_number(part) for part in re.split(r"[,\s]+", split.strip()) if part]
    if not train and not valid and (len(shares) < 2 or not shares[1]):
        yield check.problem(
            f"eval_interval={interval} needs validation data, and split={split!r} leaves none",
            "eval_interval",
            "split",
            fix="--split 969,30,1, or drop --eval-interval",
        )


def tokenizer_is_there(check: Check) -> Iterator[Problem]:
    """The tokenizer file exists, and a tokenizer type comes with a file where it needs one."""
    model, kind = check.take("tokenizer_model", "tokenizer_type")
    if model is not None and not os.path.exists(model):
        fix = "the path of a local file or folder (nothing is downloaded)"
        yield check.absent(f"tokenizer_model {model} does not exist", model, "tokenizer_model", fix)
    elif model is None and kind not in (None, "NullTokenizer"):
        yield check.problem(
            f"tokenizer_type={kind} needs tokenizer_model",
            "tokenizer_type",
            fix=f"{fields_by_name()['tokenizer_model'].flag} PATH",
        )


def end_of_document_is_known(check: Check) -> Iterator[Problem]:
    """Options that act on end-of-document tokens need a tokenizer that defines one."""
    model, kind = check.take("tokenizer_model", "tokenizer_type")
    marked = _format(check).marks_tokens
    for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        if check.take(name) and model is None and kind != "NullTokenizer" and not marked:
            yield check.problem(
                f"{name} needs the end-of-document token, which only a tokenizer defines",
                name,
                fix="--tokenizer-model PATH",
            )


RULES: tuple[Rule, ...] = (
    one_source,
    blends_can_be_read,
    data_json_can_be_read,
    datasets_are_named_once,
    validation_is_not_trained_on,
    split_can_be_read,
    evaluation_has_data,
    tokenizer_is_there,
    end_of_document_is_known,
    borders_are_known,
    order_has_documents,
    fine_tuning_is_whole,
)
