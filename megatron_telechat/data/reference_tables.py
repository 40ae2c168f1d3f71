"""Log-probabilities that a reference gave the answers of pairs, in the cache beside the encoded data. No torch."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import DataPlan
from megatron_telechat.data.corpus import EncodingFactory
from megatron_telechat.data.formats import corpus_factory
from megatron_telechat.data.pieces import IndexFolder

# Takes part in the name of a table: raise it when the same weights and data give other numbers.
_FORMAT = 1
_TABLE, _ABOUT = "log_probs.npy", "about.json"
_NO_NUMBERS = (
    *("init_method_std", "router_init_std", "name", "moe_aux_loss_coeff", "moe_aux_loss_formula", "moe_z_loss_coeff"),
)
"""Of the model, what no forward depends on."""


def table_folders(run: RunConfig, plan: DataPlan, digest: str) -> dict[str, Path]:
    """Of each dataset the folder of its table, named after the weights, the tokens, and all that changes a
    log-probability by more than rounding. Neither beta nor the layout is part of it.

    Args:
        digest: of the manifest of the reference.

    Raises:
        DataError: a file of pairs cannot be read.
    """
    factory = corpus_factory(plan.format)
    assert isinstance(factory, EncodingFactory)
    common = {
        "format": _FORMAT,
        "weights": digest,
        "model": {name: value for name, value in asdict(run.model).items() if name not in _NO_NUMBERS},
        "sequence_length": run.training.seq_length,
        "precision": run.training.precision_text,
        "encoding": factory.settings(run)["encoding"],
    }

    def key(name: str) -> str:
        parts = {**common, "file": factory.file_fingerprint(name)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]

    return {name: run.cache_dir / f"dpo-{key(name)}" for name in plan.names}


def read_table(folder: Path) -> np.ndarray | None:
    """float64 [pairs, 2]; None where the table is not there, or not as it was written."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        body = (folder / _TABLE).read_bytes()
        if hashlib.sha256(body).hexdigest() != about["sha256"]:
            return None
        return np.load(io.BytesIO(body), allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_table(folder: Path, table: np.ndarray, about: Mapping[str, str]) -> None:
    """Write a table beside its place and rename it into it. What is there was found not to be whole, and is removed.

    Args:
        about: what a person may want to know of it.

    Raises:
        ResourceError: the cache cannot be written.
    """

    def write(partial: Path) -> None:
        with open(partial / _TABLE, "wb") as file:
            np.save(file, table, allow_pickle=False)
        digest = hashlib.sha256((partial / _TABLE).read_bytes()).hexdigest()
        (partial / _ABOUT).write_text(json.dumps({**about, "sha256": digest}), encoding="utf-8")

    shutil.rmtree(folder, ignore_errors=True)
    IndexFolder(folder.parent, builds=True).piece(folder.name, write)
