"""manifest.json: what a checkpoint holds and where. Written last; parsed with suspicion.

The schema is in docs/checkpoints.md. Everything read here may be damaged or hostile:
each field's type is checked, and file names can only name files inside the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_telechat.checkpoint.names import DTYPE_TAGS, MANIFEST, FileEntry
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.errors import CheckpointError
from megatron_telechat.locations import Location
from megatron_telechat.tensors.boxes import Box, tiling_fault

FORMAT = "megatron_telechat"
SCHEMA_VERSION = 1
COMPANIONS = "hf"  # folder of the Hugging Face files that are not weights

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_FILE_NAME = re.compile(rf"{_PART}\.safetensors")
_COMPANION_NAME = re.compile(rf"{COMPANIONS}(/[^/\\\x00]+)+")


@dataclass(frozen=True)
class StoredBox:
    """One box of a global tensor: tensor ``name`` of ``file``."""

    file: str
    name: str
    box: Box


@dataclass(frozen=True)
class TensorEntry:
    """A global tensor of a checkpoint; its boxes tile it."""

    dtype: str
    shape: tuple[int, ...]
    boxes: Sequence[StoredBox]


def usual_name(key: str, offset: Sequence[int]) -> str:
    """The name of a box of tensor ``key`` in its file."""
    return f"{key}@{','.join(map(str, offset))}"


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint (docs/checkpoints.md, "Manifest")."""

    step: int
    consumed_samples: int
    config: str
    topology: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    optimizer: Mapping[str, Any] | None = None
    rng: tuple[Mapping[str, Any], ...] = ()
    data_fingerprint: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, Any] | None = None
    save: str | None = None
    """Id of the save, also in the metadata of each of its safetensors files; None where an older release saved it."""
    part: Mapping[str, Any] | None = None
    """Whose part it is, where it lists what one rank has written (`local.parts`); its boxes do not tile the tensors
    then. None in a checkpoint."""
    digest: str = ""
    """Of a manifest that was read; to_bytes takes it anew."""

    def to_bytes(self) -> bytes:
        """Content of manifest.json.

        Its first entry is the digest of all others: BLAKE2b, 16 bytes, over their JSON with sorted keys. The lists that
        grow with ranks and tensors come last, so that `lineage.look_at` need not read them.
        """
        head = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            **{
                name: getattr(self, name)
                for name in (
                    "step",
                    "consumed_samples",
                    "config",
                    "topology",
                    "versions",
                    "optimizer",
                    "data_fingerprint",
                    "extra",
                    "lineage",
                    "save",
                )
            },
            **({} if self.part is None else {"part": self.part}),
        }
        body = {
            HEAD_DIGEST: _digest(head),
            **head,
            "rng": list(self.rng),
            "files": {name: {"size": entry.size, "crc32": entry.crc32} for name, entry in self.files.items()},
            "tensors": {
                key: {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "boxes": [
                        {
                            "file": stored.file,
                            "name": stored.name,
                            "offset": list(stored.box.offset),
                            "shape": list(stored.box.shape),
                        }
                        for stored in entry.boxes
                    ],
                }
                for key, entry in self.tensors.items()
            },
        }
        return _as_lines({"digest": _digest(body), **body}).encode()

    def digested(self) -> Manifest:
        """The same, with the digest that `to_bytes` would give it."""
        return replace(self, digest=json.loads(self.to_bytes())["digest"])


HEAD_DIGEST = "head_digest"
_LISTS = ("rng", "files", "tensors")


def _as_lines(body: Mapping[str, Any]) -> str:
    """JSON with one line for each file, tensor and rank; an encoder that indents everything is slow and makes lists of
    many ranks twice as long."""
    fields = [
        f"{_json(name)}: {_list_as_lines(value) if name in _LISTS else json.dumps(value, indent=1, ensure_ascii=False)}"
        for name, value in body.items()
    ]
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _list_as_lines(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{\n" + ",\n".join(f" {_json(key)}: {_json(item)}" for key, item in value.items()) + "\n}"
    return "[\n" + ",\n".join(f" {_json(item)}" for item in value) + "\n]"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def is_sound_head(found: Mapping[str, Any]) -> bool:
    """Whether the fields that stand before the lists of a manifest are those that were written; true for manifests of
    older releases, which cannot tell without the lists."""
    said = found.get(HEAD_DIGEST)
    return said is None or said == _digest({k: v for k, v in found.items() if k not in ("digest", HEAD_DIGEST)})


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_manifest(folder: Location, part: bool = False) -> Manifest:
    """Parse and check ``folder/manifest.json``, the tiling of every tensor included.

    Args:
        part: that of what one rank has written, in place of that of a checkpoint; neither is taken for the other.

    Raises CheckpointError naming the file when it is missing, truncated, changed,
    of another version, or names files outside the folder.
    """
    path, store = folder / MANIFEST, store_of(folder)
    if store.is_link(path):
        raise _damaged(path, "is a symbolic link")
    try:
        raw = store.read(path)
    except OSError as error:
        raise CheckpointError(
            f"no readable {MANIFEST}: {error.strerror or error}",
            where=str(folder),
            fix="give a folder iter_… that holds one: without it a save was never committed",
        ) from error
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not JSON ({error})") from error
    try:
        return _parse(path, body, part)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"does not follow the schema ({type(error).__name__}: {error})") from error


def _parse(path: Location, body: Any, part: bool) -> Manifest:
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _damaged(path, "is not the manifest of a megatron_telechat checkpoint")
    version = body["schema_version"]
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"schema version {version!r}, this program reads {SCHEMA_VERSION}",
            where=str(path),
            fix="use the release that wrote the checkpoint, or convert it through the Hugging Face layout",
        )
    digest = body.pop("digest", None)
    head = {name: value for name, value in body.items() if name not in _LISTS}
    if digest != _digest(body) or not is_sound_head(head):
        raise _damaged(path, "has changed since it was written (its digest differs)")
    files = {
        _file_name(path, name): FileEntry(_natural(e["size"]), str(e["crc32"])) for name, e in body["files"].items()
    }
    if (body.get("part") is not None) != part:
        raise _damaged(path, "is that of a whole checkpoint" if part else "is that of one rank's part of a checkpoint")
    tensors = {key: _tensor(path, key, entry, files, part) for key, entry in body["tensors"].items()}
    for state in body["rng"]:
        if state["file"] not in files:
            raise _damaged(path, f"names the file {state['file']!r}, which it does not list")
        _natural(state["rank"])
        _mapping(state["state"])
    if body["optimizer"] is not None:
        _natural(body["optimizer"]["step"])
        _mapping(body["optimizer"]["grad_scaler"])
    return Manifest(
        step=_natural(body["step"]),
        consumed_samples=_natural(body["consumed_samples"]),
        config=_text(body["config"]),
        topology=dict(body["topology"]),
        versions=dict(body["versions"]),
        files=files,
        tensors=tensors,
        optimizer=body["optimizer"],
        save=_text(body["save"]) if body.get("save") is not None else None,
        rng=tuple(body["rng"]),
        data_fingerprint=body["data_fingerprint"],
        extra=dict(body["extra"]),
        digest=digest,
        lineage=body.get("lineage"),  # absent in manifests of older releases
        part=_mapping(body["part"]) if part else None,
    )


def _tensor(path: Location, key: str, entry: Any, files: Mapping[str, FileEntry], part: bool) -> TensorEntry:
    shape = tuple(_natural(extent) for extent in entry["shape"])
    if entry["dtype"] not in DTYPE_TAGS:
        raise _damaged(path, f"gives {key} the unknown dtype {entry['dtype']!r}")
    boxes = tuple(
        StoredBox(b["file"], _text(b["name"]), Box(tuple(map(_natural, b["offset"])), tuple(map(_natural, b["shape"]))))
        for b in entry["boxes"]
    )
    for stored in boxes:
        if stored.file not in files or not _FILE_NAME.fullmatch(stored.file):
            raise _damaged(path, f"puts {key} into the file {stored.file!r}, which it does not list")
    fault = None if part else tiling_fault(shape, [stored.box for stored in boxes])
    if fault:
        raise _damaged(path, f"does not hold {key} exactly once: {fault}")
    return TensorEntry(entry["dtype"], shape, boxes)


def _file_name(path: Location, name: Any) -> str:
    if _FILE_NAME.fullmatch(_text(name)):
        return name
    if _COMPANION_NAME.fullmatch(name) and not {".", ".."} & set(name.split("/")):
        return name
    raise _damaged(path, f"names the file {name!r}, which is not a plain name inside the folder")


def _natural(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not an integer from 0")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not an object")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _damaged(path: Location, what: str) -> CheckpointError:
    return CheckpointError(
        f"the manifest {what}",
        where=str(path),
        fix="use another checkpoint (--load-step), or restore this folder from a copy",
    )
