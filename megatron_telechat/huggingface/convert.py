"""Conversion between Hugging Face folders and checkpoints, one tensor at a time, without a model or ranks."""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_telechat.checkpoint.averages import require_average, stored_average
from megatron_telechat.checkpoint.companions import carry_companions, on_this_machine
from megatron_telechat.checkpoint.disk import disk_error, require_free_space
from megatron_telechat.checkpoint.files import LazyTensor, dtype_name, dtype_named
from megatron_telechat.checkpoint.find import require_fit, weight_key
from megatron_telechat.checkpoint.folders import committed_folders
from megatron_telechat.checkpoint.format import CheckpointReader, CheckpointWriter
from megatron_telechat.checkpoint.lineage import look_at
from megatron_telechat.checkpoint.manifest import COMPANIONS
from megatron_telechat.checkpoint.opening import open_verified
from megatron_telechat.checkpoint.owner import OWNER
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.config.yaml_io import dump_model_config, dump_run_config, run_config_from_yaml
from megatron_telechat.errors import CheckpointError, ConfigError
from megatron_telechat.huggingface.files import write_hf_weights
from megatron_telechat.huggingface.folder import DTYPES, Modeling, plan_folder
from megatron_telechat.huggingface.weights import HfWeights, Link, weight_map
from megatron_telechat.locations import Location
from megatron_telechat.parallel.agreement import alone

KEEP = "keep"
WEIGHTS = "weights"
DEFAULT_SHARD_BYTES = 5 * 10**9

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """What a conversion left.

    Attributes:
        path: the checkpoint folder, or the Hugging Face folder.
        tensors: number of Hugging Face tensors.
        size_bytes: bytes of the weights.
        notes: what a person should know.
    """

    path: Location
    tensors: int
    size_bytes: int
    notes: tuple[str, ...]


def import_hf(hf: Path, root: Location, overwrite: bool = False, config: Path | None = None) -> Converted:
    """Turn a Hugging Face folder into ``root/iter_0000000``, a checkpoint of weights only.

    Every tensor keeps its dtype; the files that are not weights are carried along, unchanged, for
    a later export. Raises CheckpointError or ResourceError; nothing is committed then.

    Args:
        overwrite: an earlier import in ``root`` is replaced, once the new one is whole. Checkpoints of a training never
            are.
        config: file for the model section of a run with these weights, as ``--config`` reads it; None: none.
    """
    _require_free_place(root, overwrite)
    source = HfWeights(Path(hf))
    tensors = source.folder.tensors
    size = sum(header.dtype.itemsize * torch.Size(header.shape).numel() for header in tensors.values())
    if isinstance(root, Path):
        _make_folder(root)
    require_free_space(root, size)
    model = replace(source.model, name=_model_name(Path(hf), source.model))
    if config is not None:
        _write_text(config, dump_model_config(model))
    with CheckpointWriter(root, step=0, config=dump_run_config(RunConfig(model=model))) as writer:
        for link in source.links:
            writer.add(f"model/{link.key}", link.global_shape, link.box.offset, source.read_link(link))
        writer.files.update(carry_companions(Path(hf), writer.folder / COMPANIONS))
        writer.extra["hf"] = {"dtypes": _odd_dtypes(source), "absent": list(source.absent)}
    notes = tuple(f"{key} is not in the folder and was set to zero" for key in source.absent)
    for note in notes:
        log.info("%s", note)
    assert writer.path is not None
    return Converted(writer.path, len(tensors), size, notes)


def _require_free_place(root: Location, overwrite: bool) -> None:
    there = committed_folders(root)
    if not there and store_of(root).is_file(root / OWNER):
        raise CheckpointError("the output belongs to a training", where=str(root), fix="give another --output")
    if not there:
        return
    names = ", ".join(path.name for _, path in there)
    if not all(step == 0 and _is_import(path) for step, path in there):
        raise CheckpointError(
            f"the output holds checkpoints of a training: {names}", where=str(root), fix="give another --output"
        )
    if not overwrite:
        raise CheckpointError(
            f"the output already holds an import: {names}",
            where=str(root),
            fix="give another --output, or --overwrite to replace it",
        )


def _is_import(folder: Location) -> bool:
    try:
        return "hf" in look_at(folder).extra
    except CheckpointError:
        return True  # of step 0 and damaged: an import, which the next one fixes


def _write_text(path: Path, text: str) -> None:
    _make_folder(path.parent)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(path, error) from error


def _make_folder(path: Path) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(Path(path), error) from error


def _model_name(folder: Path, model: ModelConfig) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-.")
    return name or model.name


def _odd_dtypes(source: HfWeights) -> dict[str, str]:
    """Dtypes of the tensors that were widened to share a global tensor with others."""
    return {
        name: dtype_name(source.folder.tensors[name].dtype)
        for link in source.links
        if link.key not in source.absent
        for name in link.names
        if source.folder.tensors[name].dtype != source.dtype(link.key)
    }


def export_hf(
    checkpoint: Location,
    output: Path,
    *,
    template: Path | None = None,
    tokenizer: Path | None = None,
    modeling: Modeling = "auto",
    dtype: str = KEEP,
    values: str = WEIGHTS,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    step: int | None = None,
) -> Converted:
    """Turn the weights of a checkpoint into a Hugging Face folder.

    Args:
        checkpoint: a checkpoint, or a folder of checkpoints (the newest, or that of ``step``).
        output: a folder that does not exist yet, or is empty.
        template: folder whose config.json and other files are carried over unchanged; by default the
            files that the import kept, where config.json follows a run that changed its length or rotary base.
        tokenizer: a tokenizer file, or a folder with one, to put beside the weights; by default, where no tokenizer
            came with the weights, that of the run.
        modeling: whose modelling file: ours, the one that came with the weights (keep), or ours where config.json is
            written here (auto).
        dtype: keep (as stored), bf16, fp16 or fp32 (the fp32 master weights, where there are any).
        values: weights, or the kind of an average of them (`checkpoint.averages`).

    Raises CheckpointError or ResourceError; ``output`` is not made then.
    """
    with alone():
        reader, passed_over = open_verified(checkpoint, step)
    folder = reader.path
    run = readable_config(reader)
    model = run.model
    require_fit(reader, model)
    if values != WEIGHTS:
        require_average(reader.manifest.extra, values, str(folder))
    tensors = _export_list(reader, run, weight_map(model), None if dtype == KEEP else DTYPES[dtype], values)
    source = template if template is not None else folder / COMPANIONS
    with on_this_machine(source) as files:
        notes = write_hf_folder(
            Path(output),
            tensors,
            run,
            reader.manifest.extra,
            files,
            template_required=template is not None,
            tokenizer=tokenizer,
            modeling=modeling,
            max_shard_bytes=max_shard_bytes,
        )
    return Converted(Path(output), len(tensors), sum(tensor.nbytes for tensor in tensors), (*passed_over, *notes))


def write_hf_folder(
    output: Path,
    tensors: Sequence[LazyTensor],
    run: RunConfig,
    extra: Mapping[str, Any],
    source: Path,
    *,
    template_required: bool = False,
    tokenizer: Path | None = None,
    modeling: Modeling = "auto",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    more: Callable[[Path], object] | None = None,
) -> list[str]:
    """Write weights and all that belongs beside them as a new Hugging Face folder, whole or not at all.

    Args:
        output: a folder that does not exist yet, or is empty.
        tensors: every Hugging Face tensor of the model.
        run: configuration of the model that they are of.
        extra: ``extra`` of the checkpoint's manifest.
        source: folder whose other files are carried over, if it is there.
        template_required: the source must hold the config.json of this very model.
        tokenizer, modeling: see `export_hf`.
        more: called with the folder under way, before it gets its name.

    Returns:
        What a person should know.
    """
    plan = plan_folder(run, extra, source, modeling=modeling, template_required=template_required, tokenizer=tokenizer)
    staged = _stage(output, sum(tensor.nbytes for tensor in tensors))
    try:
        notes = plan.fill(staged, tensors)
        write_hf_weights(staged, tensors, max_shard_bytes)
        if more is not None:
            more(staged)
        os.rename(staged, output)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise disk_error(output, error) from error
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return notes


def readable_config(reader: CheckpointReader) -> RunConfig:
    """Configuration of the run that saved a checkpoint. Raises CheckpointError where this release cannot read it."""
    try:
        return run_config_from_yaml(reader.config, str(reader.path))
    except ConfigError as error:
        raise CheckpointError(
            f"the configuration in the manifest cannot be read: {error.problems[0].what}",
            where=str(reader.path),
            fix="use the release of this program that wrote the checkpoint",
        ) from error


def _export_list(
    reader: CheckpointReader, run: RunConfig, links: Sequence[Link], dtype: torch.dtype | None, values: str
) -> list[LazyTensor]:
    """Every Hugging Face tensor, to be read when its turn comes; a link that gives several is read once."""
    origin = reader.manifest.extra.get("hf", {})
    absent, odd = set(origin.get("absent", ())), origin.get("dtypes", {})
    tensors = []
    for link in links:
        stored = f"model/{link.key}"
        key = stored if dtype is None else weight_key(reader, link.key, dtype)
        if values != WEIGHTS:
            key = stored_average(values, link.key, run)
        if dtype is None and link.key in absent and not reader.read(key).any():
            continue
        read = functools.partial(reader.read, key, link.box.offset, link.box.shape)
        dtypes = [dtype or (dtype_named(odd[name]) if name in odd else reader.dtype(stored)) for name in link.names]
        tensors += link_tensors(link, read, dtypes)
    return tensors


def link_tensors(link: Link, read: Callable[[], torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[LazyTensor]:
    """The Hugging Face tensors of a link in these dtypes; ``read`` gives the values of its box when the first is
    written, and they are let go after the last."""
    parts = functools.lru_cache(maxsize=1)(lambda: link.split(read()))
    return [
        LazyTensor(name, dtype, tuple(shape), _part(parts, number, dtype, last=number == len(link.names) - 1))
        for number, (name, shape, dtype) in enumerate(zip(link.names, link.shapes, dtypes, strict=True))
    ]


def _part(parts: Any, number: int, dtype: torch.dtype, last: bool) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        value = parts()[number].to(dtype)
        if last:
            parts.cache_clear()  # bounded memory: only the link being written is held
        return value

    return load


def _stage(output: Path, size: int) -> Path:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            "the output already exists and is not empty",
            where=str(output),
            fix="give a new folder; nothing is overwritten",
        )
    _make_folder(output.parent)
    require_free_space(output.parent, size)
    staged = output.parent / f".{output.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        staged.mkdir()
    except OSError as error:
        raise disk_error(staged, error) from error
    return staged


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 200MB, 1GiB or 4096. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = 0
    if match:
        base = 1024 if match.group(3) else 1000
        size = int(float(match.group(1)) * base ** " KMGT".index(match.group(2).upper() or " "))
    if size <= 0:
        raise ConfigError(f"{text!r} is not a size", where="--max-shard-size", fix="write it like 5GB or 500MB")
    return size
