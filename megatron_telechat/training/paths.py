"""The folders and files of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ResourceError
from megatron_telechat.locations import Location, Url
from megatron_telechat.training.tolerance import tolerated


@dataclass(frozen=True)
class RunPaths:
    """Where a run reads and writes.

    Attributes:
        run_dir: config.yaml, metrics.jsonl and what has no place of its own.
        save_dir: root of the checkpoints written.
        load_dir: root of the checkpoints resumed from.
    """

    run_dir: Path
    save_dir: Location
    load_dir: Location

    @classmethod
    def of(cls, run: RunConfig) -> RunPaths:
        """The folders of a run, with their defaults where the configuration leaves them open."""
        return cls(run.run_dir, run.save_dir, run.load_dir)

    def create(self) -> None:
        """Make the folders. Raises ResourceError where that cannot be done."""
        for folder in (self.run_dir, self.save_dir):
            if isinstance(folder, Url):
                continue  # nothing is written there before the first save
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ResourceError(
                    f"cannot create {folder}: {error.strerror}", where="run_dir/save", fix="choose a writable --run-dir"
                ) from error

    def write_config(self, document: str) -> None:
        """Keep the resolved configuration beside the records of the run; the training needs it not."""
        with tolerated(str(self.run_dir / "config.yaml")):
            (self.run_dir / "config.yaml").write_text(document, encoding="utf-8")
