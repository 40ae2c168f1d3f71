"""The commit of a save by one process, once every rank has written its part: merge, manifest, rename, retention.

No torch: the process that does it beside a training need not load it (`writer_process`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_telechat.checkpoint import commit as protocol
from megatron_telechat.checkpoint.companions import carry_companions
from megatron_telechat.checkpoint.folders import committed_folders
from megatron_telechat.checkpoint.manifest import COMPANIONS, Manifest
from megatron_telechat.checkpoint.parts import Part, merge_parts
from megatron_telechat.checkpoint.retention import prune
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.checkpoint.verify import remember_manifest
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.yaml_io import dump_run_config
from megatron_telechat.errors import CheckpointError
from megatron_telechat.locations import Location, location

Written = tuple[Part, dict[str, Any] | None]
"""What one rank has written, and the scalars of its optimizer."""


def always_writable() -> None:
    """The folder of a save that no other job can take."""


@dataclass(frozen=True)
class CommitRecord:
    """What a manifest says beside the parts of the ranks: host values, as they were when the save began.

    Attributes:
        run: the configuration of the run.
        versions: see `format.versions`.
        extra: with the identity of the tokenizer.
        resumed_from: the checkpoint this run began from; --keep-last never removes it.
        require_writable: raises a UserError where the folder belongs to another job by now.
    """

    run: RunConfig
    versions: Mapping[str, str]
    topology: Mapping[str, Any]
    step: int
    consumed_samples: int
    data_fingerprint: Mapping[str, Any] | None
    extra: Mapping[str, Any]
    lineage: Mapping[str, Any]
    resumed_from: Location | None
    require_writable: Callable[[], None] = always_writable


def commit_parts(attempt: protocol.Attempt, gathered: Sequence[Written], record: CommitRecord) -> Location:
    """Merge the parts, commit the folder and remove what is beyond --keep-last; by one process, without the ranks.

    Raises ResourceError, CheckpointError, or what the record raises.
    """
    part = merge_parts(item for item, _ in gathered)
    run = record.run
    companions = carry_companions(_companion_source(attempt.root, run), attempt.temporary / COMPANIONS)
    manifest = Manifest(
        step=record.step,
        consumed_samples=record.consumed_samples,
        config=dump_run_config(run),
        topology=record.topology,
        versions=record.versions,
        files={**part.files, **companions},
        tensors=part.tensors,
        optimizer=merged_scalars([scalars for _, scalars in gathered]),
        rng=tuple(item.rng for item, _ in gathered if item.rng),
        data_fingerprint=record.data_fingerprint,
        extra=record.extra,
        lineage=record.lineage,
        save=attempt.save,
    )
    record.require_writable()
    folder = protocol.commit(attempt, manifest)
    remember_manifest(folder, manifest.files)
    prune(attempt.root, run.checkpoint.keep_last, record.resumed_from)
    return folder


def merged_scalars(found: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What the ranks say of the optimizer beside its tensors, as a manifest keeps it. Raises CheckpointError."""
    saved = [item for item in found if item is not None]
    if not saved:
        return None
    steps = sorted({step for item in saved for step in item["steps"]})
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters have taken different numbers of optimizer steps: {steps}",
            fix="nothing was saved; this is a bug, please report it",
        )
    scaler = saved[0]["grad_scaler"]
    if any(item["grad_scaler"] != scaler for item in saved):
        raise CheckpointError(
            "the ranks have different loss scales", fix="nothing was saved; this is a bug, please report it"
        )
    return {"step": steps[0] if steps else 0, "grad_scaler": scaler}


def _companion_source(root: Location, run: RunConfig) -> Location | None:
    """Where the Hugging Face files of this model's origin lie: a newer checkpoint of the run, or its first weights."""
    folders = [path for _, path in reversed(committed_folders(root))]
    first = run.checkpoint.pretrained_checkpoint
    if first:
        place = location(first)
        folders += [place, *(path for _, path in reversed(committed_folders(place)))]
    return next((path / COMPANIONS for path in folders if store_of(path).is_folder(path / COMPANIONS)), None)
