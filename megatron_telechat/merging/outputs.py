"""Writing merged weights: a checkpoint, or a Hugging Face folder. Whole, or not at all."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_telechat.checkpoint import commit as protocol
from megatron_telechat.checkpoint.averages import KEY
from megatron_telechat.checkpoint.companions import carry_companions, on_this_machine, write_companion
from megatron_telechat.checkpoint.disk import require_free_space
from megatron_telechat.checkpoint.files import FileEntry, LazyTensor, dtype_name
from megatron_telechat.checkpoint.format import PartWriter, versions
from megatron_telechat.checkpoint.manifest import COMPANIONS, Manifest
from megatron_telechat.checkpoint.meaning import TOKENIZER
from megatron_telechat.checkpoint.parts import merge_parts
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.config.yaml_io import dump_run_config
from megatron_telechat.errors import CheckpointError
from megatron_telechat.huggingface.convert import link_tensors, write_hf_folder
from megatron_telechat.huggingface.weights import weight_map
from megatron_telechat.locations import Location, Url
from megatron_telechat.merging.inputs import MODEL, PROVENANCE, CheckpointInput, Input
from megatron_telechat.merging.merged import Merged
from megatron_telechat.merging.sums import pieces

_BOX = 1 << 25
"""Elements of a box of a checkpoint."""
_FILE_BYTES = 256 << 20
"""A file of a checkpoint is held in memory before it is written."""


@dataclass(frozen=True)
class Written:
    """What was written: the checkpoint or the folder, bytes of its tensors, what a person should know."""

    path: Location
    size_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says of a run that goes on from it; of weights alone it is empty.

    Attributes:
        step, consumed_samples: where it goes on.
        optimizer: Adam's step and the loss scale, as the manifest keeps them.
        optimizer_keys: keys of the optimizer's tensors.
        data_fingerprint, extra: of the newest input, without averages of its weights: they are not merged.
    """

    step: int = 0
    consumed_samples: int = 0
    optimizer: Mapping[str, Any] | None = None
    optimizer_keys: Sequence[str] = ()
    data_fingerprint: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def progress_of(inputs: Sequence[Input], optimizer_keys: Sequence[str]) -> Progress:
    """Where a run goes on from an average of states: where the newest of them is.

    Raises:
        CheckpointError: an input is no checkpoint of a training.
    """
    newest: CheckpointInput | None = None
    for one in inputs:
        if not isinstance(one, CheckpointInput) or one.reader.manifest.optimizer is None:
            raise CheckpointError(
                "it holds no optimizer state", str(one.path), "leave --optimizer average out, or this input"
            )
        if newest is None or one.reader.manifest.step > newest.reader.manifest.step:
            newest = one
    assert newest is not None
    manifest = newest.reader.manifest
    return Progress(
        manifest.step,
        manifest.consumed_samples,
        manifest.optimizer,
        tuple(optimizer_keys),
        manifest.data_fingerprint,
        {name: value for name, value in manifest.extra.items() if name != KEY},
    )


def require_new(output: Location) -> None:
    """Raises CheckpointError where the output is there already."""
    occupied = (
        store_of(output).is_folder(output)
        if isinstance(output, Url)
        else output.exists() and (not output.is_dir() or any(output.iterdir()))
    )
    if occupied:
        raise CheckpointError(
            "the output already exists and is not empty", str(output), "give a new folder; nothing is overwritten"
        )


def write_checkpoint(merged: Merged, output: Location, progress: Progress, provenance: Mapping[str, Any]) -> Written:
    """Commit ``output/iter_…`` with the merged weights, and the optimizer's state where there is one.

    Raises:
        ResourceError: the disk is full, read-only or failing.
        NumericsError: a value is not finite. Nothing is committed then.
    """
    keys = [*(MODEL + key for key in merged.table), *progress.optimizer_keys]
    size = sum(_count(merged, key) * merged.dtype(key).itemsize for key in keys)
    attempt = protocol.begin(output, progress.step)
    try:
        require_free_space(output, size)
        writer = PartWriter(attempt, 0, _FILE_BYTES)
        for key in keys:
            for box in pieces(merged.shape(key), _BOX):
                writer.add(key, merged.shape(key), box.offset, merged.read(key, box.offset, box.shape))
        part = merge_parts([writer.close()])
        first = merged.inputs[0]
        manifest = Manifest(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            config=dump_run_config(first.run),
            topology={"world_size": 1},
            versions=versions(),
            files={**part.files, **_companions(first, attempt.temporary / COMPANIONS, provenance)},
            tensors=part.tensors,
            optimizer=progress.optimizer,
            data_fingerprint=progress.data_fingerprint,
            extra={**progress.extra, **_extra(merged)},
            save=attempt.save,
        )
        return Written(protocol.commit(attempt, manifest), size)
    except BaseException:
        protocol.abandon(attempt)
        _remove_empty(output)
        raise


def _count(merged: Merged, key: str) -> int:
    count = 1
    for extent in merged.shape(key):
        count *= extent
    return count


def _remove_empty(folder: Location) -> None:
    """Take the folder of checkpoints away again, where nothing came to lie in it."""
    if isinstance(folder, Url):
        return
    try:
        folder.rmdir()
    except OSError:
        pass  # it was not made, or something lies there


def _companions(first: Input, target: Location, provenance: Mapping[str, Any]) -> dict[str, FileEntry]:
    there = store_of(first.companions).is_folder(first.companions)
    entries = carry_companions(first.companions if there else None, target)
    store_of(target).make_folder(target)
    entries[f"{COMPANIONS}/{PROVENANCE}"] = _write_provenance(target, provenance)
    return entries


def _write_provenance(folder: Location, provenance: Mapping[str, Any]) -> FileEntry:
    path, data = folder / PROVENANCE, (json.dumps(provenance, indent=2, ensure_ascii=False) + "\n").encode()
    if isinstance(path, Path):
        path.unlink(missing_ok=True)  # an input's own, which this one quotes
    return write_companion(path, data)


def _extra(merged: Merged) -> dict[str, Any]:
    """Identity of the tokenizer, and what an export needs to know: which tensors have a dtype of their own, and which
    no input had."""
    first, odd = merged.inputs[0], {}
    for link in weight_map(first.run.model):
        key = MODEL + link.key
        for name in link.names:
            if merged.hf_dtype(key, name) != merged.dtype(key):
                odd[name] = dtype_name(merged.hf_dtype(key, name))
    tokenizer = next((one.tokenizer for one in merged.inputs if one.tokenizer is not None), None)
    return {
        "hf": {"dtypes": odd, "absent": sorted(_absent(merged))},
        **({TOKENIZER: dict(tokenizer)} if tokenizer is not None else {}),
    }


def _absent(merged: Merged) -> set[str]:
    """Keys that no input has in its Hugging Face layout: zeros that stand for nothing."""
    return set.intersection(*(set(one.extra.get("hf", {}).get("absent", ())) for one in merged.inputs))


def write_folder(
    merged: Merged, output: Path, provenance: Mapping[str, Any], tokenizer: Path | None, max_shard_bytes: int
) -> Written:
    """Write a Hugging Face folder; see `huggingface.convert.write_hf_folder`.

    Raises:
        ResourceError: the disk is full, read-only or failing.
        NumericsError: a value is not finite. ``output`` is not made then.
    """
    first, absent, tensors = merged.inputs[0], _absent(merged), list[LazyTensor]()
    for link in weight_map(first.run.model):
        key = MODEL + link.key
        if link.key in absent and not merged.read(key, link.box.offset, link.box.shape).any():
            continue
        read = functools.partial(merged.read, key, link.box.offset, link.box.shape)
        tensors += link_tensors(link, read, [merged.hf_dtype(key, name) for name in link.names])
    with on_this_machine(first.companions) as files:
        notes = write_hf_folder(
            output,
            tensors,
            first.run,
            first.extra,
            files,
            tokenizer=tokenizer,
            max_shard_bytes=max_shard_bytes,
            more=functools.partial(_write_provenance, provenance=provenance),
        )
    return Written(output, sum(tensor.nbytes for tensor in tensors), tuple(notes))
