"""What the numbers of a checkpoint mean: its model and tokenizer against those of the run that wants to read it. No
torch.

Shapes do not tell: the rows of four heads of 64 are the rows of eight heads of 32, and no shape knows of the experts a
token is sent to, of rotary bases or of a norm's epsilon.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from megatron_telechat.checkpoint.companions import on_this_machine
from megatron_telechat.checkpoint.manifest import COMPANIONS
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.config.architecture import comparable
from megatron_telechat.config.fields import fields_by_name, make_run
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.config.yaml_io import read_yaml
from megatron_telechat.data.tokenizers import tokenizer_identity
from megatron_telechat.errors import CheckpointError, ConfigError, DataError, Problem
from megatron_telechat.locations import Location

ALLOW = "--allow-model-change"
CHANGED_ON_PURPOSE = ("moe_router_topk", "norm_epsilon", "rotary_base", "rotary_training_seqlen", "rotary_base_seqlen")
"""Values that every tensor can be computed with, so that a run may change them: a longer context, fewer experts of a
token."""
TOKENIZER = "tokenizer"
"""Key of the tokenizer's identity in a manifest's ``extra``."""
_FLAGS = {"query_groups": "num_query_groups", "head_dim": "kv_channels"}
_SCALES = ("rotary_base", "rotary_training_seqlen", "rotary_base_seqlen")


def require_meaning(
    config: str, extra: Mapping[str, Any], run: RunConfig, folder: Location, saved_by: RunConfig | None = None
) -> list[str]:
    """Hold the model and tokenizer of a checkpoint against the run's.

    Args:
        config: the configuration in the manifest, YAML; what this release does not know of it is not compared.
        extra: ``extra`` of the manifest.
        folder: the checkpoint.
        saved_by: the stage of the run that ends with the checkpoint, where the run goes on in another one: its model is
            as good.

    Returns:
        What differs and was allowed.

    Raises:
        CheckpointError: everything that differs.
    """
    said = saved_values(config)
    model = _model_differences(said, run.model)
    if model and saved_by is not None and not _model_differences(said, saved_by.model):
        model = []
    differences = model + _tokenizer_difference(said, extra, run, folder)
    allowed = run.checkpoint.allow_model_change
    problems = [problem for problem, may_change in differences if not (may_change and allowed)]
    if problems:
        raise CheckpointError(problems)
    return [problem.what for problem, _ in differences]


def saved_values(config: str) -> dict[str, Any]:
    """The values of a saved configuration that this release knows, by field."""
    return {said.name: said.value for said in read_yaml(config, "manifest").said}


def _model_differences(said: Mapping[str, Any], model: ModelConfig) -> list[tuple[Problem, bool]]:
    """(problem, whether it may be allowed) for each value of the model that differs."""
    if not said.get("num_layers"):
        return []  # a checkpoint without a model, of a tool
    saved = make_run({name: value for name, value in said.items() if fields_by_name()[name].section == "model"}).model
    theirs, ours = comparable(saved), comparable(model)
    found = []
    for name in theirs:
        if theirs[name] == ours[name]:
            continue
        field = _FLAGS.get(name, name)
        may_change = name in CHANGED_ON_PURPOSE
        found.append((_difference(field, theirs[name], ours[name], may_change), may_change))
    return found


def _difference(field: str, theirs: Any, ours: Any, may_change: bool) -> Problem:
    what = f"{field} is {_text(theirs)} in the checkpoint and {_text(ours)} in the run"
    flag = fields_by_name()[field].flag
    fix = f"{flag} {_text(theirs) if theirs is not None else 'none'}, or the preset of the model that was saved"
    if may_change:
        reason = "longer contexts are trained that way" if field in _SCALES else "every tensor fits"
        stage = f"a stage of the run that sets {field} from here on (stages:), or " if field in _SCALES else ""
        ours = _text(theirs) if theirs is not None else "none"
        fix = f"{flag} {ours}; or {stage}{ALLOW} if the change is meant ({reason})"
    return Problem(what, "model", fix)


def _text(value: Any) -> str:
    if value is None:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)


def tokenizer_of(run: RunConfig) -> dict[str, str] | None:
    """Identity of the run's tokenizer for its manifests, None where it names none or it cannot be read here."""
    return _identity(run.data.tokenizer_type, run.data.tokenizer_model)


@lru_cache(maxsize=8)  # each save asks for the run's own
def _identity(kind: str | None, path: str | None) -> dict[str, str] | None:
    return read_identity(kind, path)


def read_identity(kind: str | None, path: str | None) -> dict[str, str] | None:
    """Identity of the tokenizer that lies there, None where there is none or it cannot be read."""
    if not path or not os.path.exists(path):
        return None
    try:
        return tokenizer_identity(kind, path)
    except (DataError, ConfigError, OSError):
        return None


def identity_beside(companions: Location) -> dict[str, str] | None:
    """Identity of the tokenizer among the Hugging Face files of a checkpoint, None where there is none."""
    if not store_of(companions).is_folder(companions):
        return None
    with on_this_machine(companions) as files:
        return read_identity(None, str(files))


def _tokenizer_difference(
    said: Mapping[str, Any], extra: Mapping[str, Any], run: RunConfig, folder: Location
) -> list[tuple[Problem, bool]]:
    """A tokenizer that gives other ids. Not told are tokenizers of two kinds of files, and those that are no longer
    there."""
    ours = tokenizer_of(run)
    if ours is None:
        return []
    companions = folder / COMPANIONS
    theirs = extra.get(TOKENIZER) or _identity(said.get("tokenizer_type"), said.get("tokenizer_model"))
    theirs = theirs or identity_beside(companions)
    if not isinstance(theirs, Mapping) or theirs.get("kind") != ours["kind"] or theirs.get("digest") == ours["digest"]:
        return []
    what = (
        f"tokenizer_model {run.data.tokenizer_model} gives other ids than the tokenizer that the checkpoint was "
        f"trained with"
    )
    return [(Problem(what, "tokenizer_model", f"name that tokenizer, or {ALLOW} if the change is intended"), True)]
