"""Everything of an exported Hugging Face folder but its weights: configuration, modelling and tokenizer files.

What came with the first weights is carried over unchanged. What is missing is added only where the folder is ours: its
config.json was written here, its tokenizer came from the run, or the run was fine-tuned on dialogs.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from megatron_telechat.checkpoint.companions import carry_companions, companions
from megatron_telechat.checkpoint.files import LazyTensor
from megatron_telechat.checkpoint.meaning import TOKENIZER, read_identity
from megatron_telechat.config.data_formats import data_format
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.order import SAVED_AS
from megatron_telechat.errors import CheckpointError, ConfigError, DataError
from megatron_telechat.huggingface.config import (
    POSITIONS,
    config_differences,
    hf_config_of,
    model_config_from_hf,
    with_our_modeling,
    with_reached_positions,
)
from megatron_telechat.huggingface.files import CONFIG, read_json
from megatron_telechat.huggingface.tokenizer_files import complete_tokenizer, special_tokens

Modeling = Literal["auto", "ours", "keep"]
MODELING = get_args(Modeling)
"""auto: our modelling file where config.json is written here; ours: always; keep: never."""

GENERATION_CONFIG = "generation_config.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_EXPORTED = Path(__file__).parent / "exported"
_CODE = ("configuration_megatron_telechat.py", "modeling_megatron_telechat.py")
_THEIR_CODE = re.compile(r"(configuration|modeling)_\w+\.py")
_TOKENIZER_FILES = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|.*\.model|tokenization.*\.py"
    r"|chat_template\.jinja)"
)
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True)
class FolderPlan:
    """What will lie beside the weights, decided before anything is written.

    Attributes:
        run: configuration of the model.
        extra: ``extra`` of the checkpoint's manifest.
        source: folder whose other files are carried over; None: there is none.
        modeling: whose modelling file.
        moved: config.json of the source must follow the positions that the run has reached.
        tokenizer: a tokenizer file, or a folder with one, to put beside the weights; None: see `fill`.
        notes: what a person should know.
    """

    run: RunConfig
    extra: Mapping[str, Any]
    source: Path | None
    modeling: Modeling
    moved: bool
    tokenizer: Path | None
    notes: tuple[str, ...]

    def fill(self, folder: Path, tensors: Sequence[LazyTensor]) -> list[str]:
        """Put all files but the weights into a new folder.

        Returns:
            What a person should know.

        Raises:
            DataError: the tokenizer that was asked for is not there.
            ResourceError, OSError: a file cannot be read or written.
        """
        notes = list(self.notes)
        carry_companions(self.source, folder)
        copied = self._bring_tokenizer(folder, notes)
        written = self._write_config(folder, tensors, notes)
        if not (written or copied or data_format(self.run.data).template(self.run.data)):
            return notes
        if not _has_tokenizer(folder):
            notes.append("no tokenizer is in the folder; whoever reads it needs one")
        else:
            notes += complete_tokenizer(folder, self.run)
            ids = special_tokens(folder)
            if ids and not (folder / GENERATION_CONFIG).exists():
                write_json(folder / GENERATION_CONFIG, ids)
        return notes

    def _write_config(self, folder: Path, tensors: Sequence[LazyTensor], notes: list[str]) -> bool:
        """Write or change config.json, and put our modelling file beside it; whether config.json is ours."""
        path, ours = folder / CONFIG, self.modeling == "ours"
        if self.moved:
            write_json(path, with_reached_positions(read_json(path), self.run.model, self.run.training.seq_length))
        written = not path.exists()
        if written:
            config = hf_config_of(
                self.run.model, _precision(tensors), special_tokens(folder), self.run.training.seq_length
            )
            write_json(path, config)
            notes.append("config.json was made from the checkpoint's configuration")
            ours = self.modeling != "keep" and self.run.model.architecture == "telechat2"
        if ours:
            write_json(path, with_our_modeling(read_json(path), self.run.model))
            replaced = sorted(file.name for file in folder.iterdir() if _THEIR_CODE.fullmatch(file.name))
            for name in replaced:
                (folder / name).unlink()
            for name in _CODE:
                shutil.copyfile(_EXPORTED / name, folder / name)
            left_out = ", ".join(name for name in replaced if name not in _CODE)
            notes.append(
                f"{_CODE[1]} reads the folder in transformers (trust_remote_code)"
                + (f"; it takes the place of {left_out}" if left_out else "")
            )
        elif self.run.model.architecture == "telechat2":
            notes += self._about_their_code(read_json(path).get("auto_map"))
        return written or ours

    def _about_their_code(self, auto_map: Any) -> list[str]:
        """What to know of the modelling file that came with the weights."""
        if not isinstance(auto_map, dict):
            return ["no modelling file of transformers reads the folder; --modeling ours writes one"]
        theirs = str(auto_map.get("AutoModelForCausalLM", ""))
        if self.moved and not theirs.startswith(_CODE[1].removesuffix(".py")):
            return ["whether its modelling file reads these positions was not checked; --modeling ours reads them"]
        return []

    def _bring_tokenizer(self, folder: Path, notes: list[str]) -> bool:
        """Copy the tokenizer that was given, else, where none was carried over, the run's; whether one was copied."""
        saved = self.extra.get(TOKENIZER)
        if self.tokenizer is not None:
            _copy_tokenizer(self.tokenizer, folder)
            given = read_identity(None, str(folder))
            if saved and given and saved["kind"] == given["kind"] and saved != given:
                notes.append(f"{self.tokenizer} gives other ids than the tokenizer that the model was trained with")
            return True
        named = self.run.data.tokenizer_model
        if not named or _has_tokenizer(folder):
            return False
        found = read_identity(self.run.data.tokenizer_type, named)
        if found is None or saved != found:
            why = "is not there" if found is None else "is not known to be" if saved is None else "has changed since"
            notes.append(f"no tokenizer is in the folder: the run's, {named}, {why}; --tokenizer puts one there")
            return False
        _copy_tokenizer(Path(named), folder)
        notes.append(f"the tokenizer is the run's, {named}")
        return True


def plan_folder(
    run: RunConfig,
    extra: Mapping[str, Any],
    source: Path,
    *,
    modeling: Modeling,
    template_required: bool = False,
    tokenizer: Path | None = None,
) -> FolderPlan:
    """Decide what lies beside the weights.

    Args:
        source: folder whose files are carried over, if it is there.
        template_required: it must hold the config.json of this very model.

    Raises:
        CheckpointError: config.json is of another architecture or not there.
        ConfigError: our modelling file is asked for, and the model is not its.
    """
    if modeling == "ours" and run.model.architecture != "telechat2":
        raise ConfigError(
            f"our modelling file is of TeleChat2, not of {run.model.architecture}",
            "--modeling",
            "leave it out: transformers has this model itself",
        )
    moved, notes = _check_template(source, run, extra, template_required)
    return FolderPlan(run, extra, source if source.is_dir() else None, modeling, moved, tokenizer, tuple(notes))


def _check_template(folder: Path, run: RunConfig, extra: Mapping[str, Any], required: bool) -> tuple[bool, list[str]]:
    """Whether its config.json must follow what the run changed on its way, and notes.

    Raises CheckpointError when it is of another architecture or not there.
    """
    path = folder / CONFIG
    if not path.is_file():
        if required:
            raise CheckpointError(f"no {CONFIG} in the template", where=str(folder), fix="give a Hugging Face folder")
        return False, []
    try:
        theirs = model_config_from_hf(read_json(path), str(path))
    except CheckpointError as error:
        return False, [f"config.json was carried over, but could not be compared: {error.problems[0].what}"]
    differences = config_differences(run.model, theirs)
    changed_length = len(extra.get(SAVED_AS, {}).get("legs", ())) > 1
    if not required and (differences or changed_length) and set(differences) <= set(POSITIONS):
        reached = "; ".join(differences.values()) or f"seq_length: {run.training.seq_length} in the checkpoint"
        return True, [f"config.json has the positions and lengths that the run has reached ({reached})"]
    if differences:
        raise CheckpointError(
            "config.json describes another model: " + "; ".join(differences.values()),
            where=str(path),
            fix="give the folder the weights came from with --hf-template, or an edited copy of it",
        )
    return False, []


def _has_tokenizer(folder: Path) -> bool:
    return any(_TOKENIZER_FILES.fullmatch(name) for name in companions(folder))


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer and the files that say what its tokens mean. A single file gets the name that is looked for."""
    if source.is_file():
        name = {".model": "tokenizer.model", ".json": "tokenizer.json"}.get(source.suffix, source.name)
        beside = [source.parent / other for other in _BESIDE_TOKENIZER]
        files = {source: name, **{file: file.name for file in beside if file.is_file() and file != source}}
    elif source.is_dir():
        found = [name for name in companions(source) if _TOKENIZER_FILES.fullmatch(name)]
        files = {source / name: name.rpartition("/")[2] for name in found}
    else:
        files = {}
    if not files:
        raise DataError(
            "no tokenizer there", where=str(source), fix="give tokenizer.json, tokenizer.model or their folder"
        )
    for file, name in files.items():
        shutil.copyfile(file, target / name)


def _precision(tensors: Sequence[LazyTensor]) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    kinds = {tensor.dtype for tensor in tensors if len(tensor.shape) > 1}
    return names.get(functools.reduce(torch.promote_types, kinds), "fp32")


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """An indented UTF-8 JSON file."""
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
