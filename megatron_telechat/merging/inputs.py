"""What is merged: a checkpoint of any layout or a Hugging Face folder, read box by box."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_telechat.checkpoint.averages import KINDS, stored_average
from megatron_telechat.checkpoint.files import dtype_named, read_file_error
from megatron_telechat.checkpoint.find import find_checkpoint, require_fit
from megatron_telechat.checkpoint.folders import committed_folders
from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.checkpoint.manifest import COMPANIONS
from megatron_telechat.checkpoint.meaning import TOKENIZER, identity_beside, read_identity, saved_values
from megatron_telechat.checkpoint.names import MANIFEST
from megatron_telechat.checkpoint.opening import open_verified
from megatron_telechat.checkpoint.optimizer_state import MASTER
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import CheckpointError
from megatron_telechat.files import sha256_of
from megatron_telechat.huggingface.convert import readable_config
from megatron_telechat.huggingface.files import CONFIG
from megatron_telechat.huggingface.weights import HfWeights
from megatron_telechat.locations import Location
from megatron_telechat.tensors.frozen import frozen_keys

PROVENANCE = "merge_provenance.json"
"""Beside the weights of what this program merged: from what, how."""
MODEL = "model/"


class Input(Protocol):
    """One input of a merge.

    Attributes:
        path: the checkpoint, or the Hugging Face folder.
        run: configuration of the run that saved it; of a Hugging Face folder the model's alone.
        step: of the run; None for a Hugging Face folder.
        extra: ``extra`` of the manifest that a copy of it would have.
        companions: where its files that are not weights lie.
        keys: what it stores: ``model/<key>``, ``optimizer/<name>/<key>``.
        tokenizer: {"kind", "digest"} of its tokenizer, None where that is not known.
    """

    path: Location
    run: RunConfig
    step: int | None
    extra: Mapping[str, Any]
    companions: Location
    keys: Iterable[str]
    tokenizer: Mapping[str, str] | None

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a key is stored in."""
        ...

    def hf_dtype(self, key: str, name: str) -> torch.dtype:
        """The dtype of the Hugging Face tensor ``name``, which is a part of the key."""
        ...

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """A box of a key, on the CPU, in the stored dtype."""
        ...

    def release(self) -> None:
        """Let go of the pages that reads have mapped."""
        ...

    def identity(self) -> dict[str, Any]:
        """What names its content in a provenance file."""
        ...


class CheckpointInput:
    """A checkpoint of this program, whatever layout it was saved in. See :class:`Input`.

    Args:
        path: a checkpoint, or a folder of them: the newest sound one is taken.
        verify: compare the checksum of every byte; without it a checkpoint is sound if its files have their sizes.

    Raises:
        CheckpointError: nothing there, damaged, or of a configuration that cannot be read.
    """

    def __init__(self, path: Location, verify: bool = True):
        self.reader = open_verified(path)[0] if verify else _open_unverified(path)
        self.path = folder = self.reader.path
        self.run = readable_config(self.reader)
        require_fit(self.reader, self.run.model)
        manifest = self.reader.manifest
        self.step: int | None = manifest.step
        self.extra: Mapping[str, Any] = manifest.extra
        self.companions = folder / COMPANIONS
        self.keys: Iterable[str] = self.reader.entries.keys()
        said = saved_values(manifest.config)
        self.tokenizer: Mapping[str, str] | None = (
            self.extra.get(TOKENIZER)
            or read_identity(said.get("tokenizer_type"), said.get("tokenizer_model"))
            or identity_beside(self.companions)
        )
        self._odd: Mapping[str, str] = self.extra.get("hf", {}).get("dtypes", {})

    def dtype(self, key: str) -> torch.dtype:
        """See :class:`Input`."""
        return self.reader.dtype(key)

    def hf_dtype(self, key: str, name: str) -> torch.dtype:
        """See :class:`Input`."""
        return dtype_named(self._odd[name]) if name in self._odd else self.dtype(key)

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """See :class:`Input`."""
        return self.reader.read(key, offset, shape)

    def release(self) -> None:
        """See :class:`Input`."""
        self.reader.close()

    def identity(self) -> dict[str, Any]:
        """The digest of the manifest, which holds the checksum of every file."""
        return {"kind": "checkpoint", "step": self.step, "manifest_digest": self.reader.manifest.digest}


class HfInput:
    """A Hugging Face folder. See :class:`Input`.

    Raises:
        CheckpointError: configuration or weights are missing, damaged or unsupported.
    """

    def __init__(self, path: Path):
        self._folder = path
        self.path: Location = path
        self.weights = HfWeights(path)
        self.run = RunConfig(model=self.weights.model)
        self.step: int | None = None
        self.companions: Location = path
        self.keys: Iterable[str] = [MODEL + key for key in dict.fromkeys(link.key for link in self.weights.links)]
        self.extra: Mapping[str, Any] = {"hf": {"absent": list(self.weights.absent)}}
        self.tokenizer: Mapping[str, str] | None = read_identity(None, str(path))

    def dtype(self, key: str) -> torch.dtype:
        """See :class:`Input`."""
        return self.weights.dtype(key.removeprefix(MODEL))

    def hf_dtype(self, key: str, name: str) -> torch.dtype:
        """See :class:`Input`."""
        header = self.weights.folder.tensors.get(name)
        return self.dtype(key) if header is None else header.dtype

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """See :class:`Input`."""
        return self.weights.read(key.removeprefix(MODEL), offset, shape)

    def release(self) -> None:
        """See :class:`Input`: its one open file is let go when the next is opened."""

    def identity(self) -> dict[str, Any]:
        """SHA-256 of config.json and of every file of weights, as the hub shows them."""
        names = sorted({CONFIG, *(header.file for header in self.weights.folder.tensors.values())})
        return {"kind": "hf", "sha256": {name: _sha256(self._folder / name) for name in names}}


def open_input(path: Location, verify: bool = True) -> CheckpointInput | HfInput:
    """Open what a path names.

    Raises:
        CheckpointError: there is neither a checkpoint nor a Hugging Face folder, or it is damaged.
    """
    if store_of(path).is_file(path / MANIFEST) or committed_folders(path):
        return CheckpointInput(path, verify)
    if isinstance(path, Path) and (path / CONFIG).is_file():
        return HfInput(path)
    raise CheckpointError(
        "neither a checkpoint nor a Hugging Face folder is there",
        str(path),
        f"give a folder with {MANIFEST}, with folders iter_…, or with {CONFIG} and weights",
    )


def without_master(one: Input) -> str | None:
    """The first weight that it does not hold in fp32, neither itself nor as a master; None where it holds all. A frozen
    weight has no master, and is exact as it is."""
    keys, frozen = set(one.keys), frozen_keys(one.run)
    trained = (key for key in one.keys if key.startswith(MODEL) and key.removeprefix(MODEL) not in frozen)
    narrow = (key for key in trained if one.dtype(key) != torch.float32)
    return next((key for key in narrow if master_key(key) not in keys), None)


def has_masters(one: Input) -> bool:
    """Whether it holds fp32 master weights beside its own."""
    return any(key.startswith(f"optimizer/{MASTER}/") for key in one.keys)


def master_key(key: str) -> str:
    """Key of the master of ``model/<key>``."""
    return f"optimizer/{MASTER}/{key.removeprefix(MODEL)}"


def values_key(one: Input, key: str, values: str) -> str:
    """Where an input keeps these values of ``model/<key>``; its weights where it has no master of them."""
    if values in KINDS:
        return stored_average(values, key.removeprefix(MODEL), one.run)
    master = master_key(key)
    return master if values == "master" and master in one.keys else key


def provenance_of(one: Input) -> Any:
    """What an earlier merge left beside an input, None where it is no merge."""
    path = one.companions / PROVENANCE
    if not store_of(path).is_file(path):
        return None
    try:
        return json.loads(store_of(path).read(path))
    except (OSError, ValueError) as error:
        raise read_file_error(path, error, "restore or remove the file") from error


def _open_unverified(path: Location) -> CheckpointReader:
    folder, _ = find_checkpoint(path)
    if folder is None:
        raise CheckpointError("no checkpoint there", str(path), "give a folder iter_… or one that holds some")
    return CheckpointReader(folder)


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise read_file_error(path, error, "copy the file again") from error
