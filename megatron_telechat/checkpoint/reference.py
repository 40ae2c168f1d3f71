"""Which weights a run of preference training is held against; they stay the same for the whole run. No torch.

The run's own checkpoints keep which ones: a resume that named others would go on with another loss, and one that took
its own, trained weights would undo what was learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_telechat.checkpoint.lineage import Saved
from megatron_telechat.checkpoint.meaning import require_meaning
from megatron_telechat.checkpoint.start import Start, checkpoint_of
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import CheckpointError, ConfigError
from megatron_telechat.locations import Location, location

REFERENCE = "dpo_reference"
"""Of what a checkpoint keeps beside weights and optimizer; also the field that names it."""


@dataclass(frozen=True)
class Reference:
    """The weights that answers are held against.

    Attributes:
        path: the checkpoint.
        step: of it.
        digest: of its manifest, which names the digests of all its files.
        is_there: whether the checkpoint is still there.
    """

    path: Location
    step: int
    digest: str
    is_there: bool = True

    @property
    def extra(self) -> dict[str, Any]:
        """What a checkpoint of the run keeps of it."""
        folder = store_of(self.path).identity(self.path)
        return {REFERENCE: {"folder": folder, "step": self.step, "digest": self.digest}}


def reference_of(run: RunConfig, start: Start, saved: Saved | None) -> Reference | None:
    """The reference of a run; None: it trains no pairs. Reads the first part of manifests only.

    Args:
        start: what the run begins with.
        saved: the checkpoint that it most likely loads.

    Raises:
        ConfigError: no reference is named, or the run would begin with initial weights.
        CheckpointError: it is not there, is of another model, or is not the one that the run began with.
    """
    if not run.data.dpo:
        return None
    named = run.preference.dpo_reference or run.checkpoint.pretrained_checkpoint
    kept = _kept(saved.extra, saved) if saved is not None and not start.weights_only else None
    if named is None and kept is None:
        raise ConfigError(
            "dpo holds answers against a reference, but no weights are named",
            "dpo",
            "--finetune --load FOLDER (a checkpoint of a run, or of tools/convert_checkpoint.py import), or "
            "--dpo-reference FOLDER beside --load",
        )
    if start.root is None:
        raise ConfigError(
            "dpo would train initial weights: a reference is named, but no weights to begin with",
            "dpo",
            "--finetune --load FOLDER; without --dpo-reference they are the reference too",
        )
    if named is None:
        assert kept is not None
        named = str(kept.path)
    try:
        chosen = checkpoint_of(Start(location(named)))
    except CheckpointError:
        if kept is None:
            raise
        return kept
    assert chosen is not None, "a folder was named"
    if kept is not None and kept.digest != chosen.digest:
        raise CheckpointError(
            f"the reference is not the one that the run began with: {chosen.path} (step {chosen.step}) is named, and "
            f"it began with {kept.path} (step {kept.step})",
            str(saved.path) if saved is not None else "",
            f"--dpo-reference {kept.path}; or a new --run-dir, to begin a run with another reference",
        )
    if kept is None and run.preference.dpo_reference is not None:
        require_meaning(chosen.config, chosen.extra, run, chosen.path)  # of the others the start has asked
    return Reference(chosen.path, chosen.step, chosen.digest)


def _kept(extra: Mapping[str, Any], saved: Saved) -> Reference | None:
    """What a checkpoint of the run says, as a reference that may be gone; None: it is not of such a run."""
    entry = extra.get(REFERENCE)
    if entry is None:
        return None
    try:
        return Reference(location(str(entry["folder"])), int(entry["step"]), str(entry["digest"]), is_there=False)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"what it says of its reference cannot be read: {error!r}",
            str(saved.path),
            "use another checkpoint (--load-step)",
        ) from error
