"""Checkpoints in an object store, through fsspec: nothing can be renamed, so a save has a name of its own from the
first byte on, and **the manifest, put last, is the commit**. A deletion removes the manifest first. No torch.

What is assumed of a store: a whole object appears at once, and a look for one object (HEAD) sees what was put before.
Listings may lag behind: what a listing lacks is looked for before it is called missing, or deleted.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from megatron_telechat.checkpoint.names import (
    MANIFEST,
    FileEntry,
    is_aside,
    is_of_objects,
    objects_name,
    step_of,
    step_of_name,
)
from megatron_telechat.checkpoint.stores.protocol import Signature
from megatron_telechat.errors import ConfigError, ResourceError, UserError
from megatron_telechat.host import available_bytes
from megatron_telechat.locations import Location, Url, url_fault

_ASIDE = ".aside"
"""``NAME.aside`` beside a checkpoint ``NAME`` says that a roll-back has set it aside."""
_PART_BYTES = 32 << 20
"""Of an upload: at most 10,000 parts, so 320 GB."""
_CHUNK_BYTES = 4 << 20
_REQUESTS = 16
"""At a time, where many objects are looked for."""
_CONTENT = ("etag", "md5hash", "generation")
_NO_BUCKET = ("bucket does not exist", "nosuchbucket")
"""How drivers tell that from a prefix with nothing in it. To look at the bucket itself needs rights that a job on a
prefix may not have."""
_TIMES = ("lastmodified", "mtime", "created", "updated", "ino")


@dataclass
class _Held:
    """A file in memory: what was read of it, and by their beginnings the lengths of the pieces that it has.

    Pieces do not overlap. Ranges of a reader do, so they are not kept: their lengths say nothing of gaps.
    """

    data: bytearray
    pieces: dict[int, int] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return sum(self.pieces.values()) == len(self.data)


class ObjectStore:
    """See :class:`Store`. One for all URLs of a protocol.

    Raises ConfigError where no driver here reads them.
    """

    remote = True

    def __init__(self, protocol: str):
        import fsspec

        url = Url(f"{protocol}://bucket")
        fault = url_fault(url)
        if fault is not None:
            raise ConfigError(fault[0], f"{protocol}://", fault[1])
        options = {} if url.has_bucket else {"auto_mkdir": True}
        with _asked(url, "load its driver"):
            self._fs: Any = fsspec.filesystem(
                protocol, use_listings_cache=False, skip_instance_cache=not url.is_of_this_process, **options
            )
        # A file of the memory file system has one position for all who read it.
        self._alone = threading.Lock() if url.is_of_this_process else contextlib.nullcontext()
        self._held: dict[Url, _Held] = {}
        self._holding = threading.Lock()

    # ---- names ------------------------------------------------------------------------------

    def identity(self, place: Location) -> str:
        """See :class:`Store`."""
        return str(place)

    def is_link(self, place: Location) -> bool:
        """See :class:`Store`."""
        return False

    def is_file(self, place: Location) -> bool:
        """See :class:`Store`."""
        return self._info(_url(place)) is not None

    def is_folder(self, place: Location) -> bool:
        """See :class:`Store`."""
        return bool(self._listing(_url(place)))

    def folders(self, root: Location) -> list[Location]:
        """See :class:`Store`: those with a manifest that were not set aside."""
        named, marked = self._named(_url(root))
        candidates = [path for path in named if step_of(path) is not None and path.name not in marked]
        there = self._each(lambda path: self.is_file(path / MANIFEST), candidates)
        return [path for path, committed in zip(candidates, there, strict=True) if committed]

    def aside(self, root: Location) -> list[Location]:
        """See :class:`Store`: those that are marked, or were copied from a file system."""
        named, marked = self._named(_url(root))
        return [path for path in named if step_of_name(path) is not None and (is_aside(path) or path.name in marked)]

    def files(self, folder: Location) -> list[str]:
        """See :class:`Store`."""
        return sorted(self._sizes(_url(folder)))

    # ---- reading ----------------------------------------------------------------------------

    def faults(self, folder: Location, entries: Mapping[str, FileEntry], patient: bool = False) -> dict[str, str]:
        """See :class:`Store`: one listing, and a look for each file that it lacks. What was put is seen."""
        sizes = self._sizes(_url(folder)) if len(entries) > 1 else {}
        absent = [name for name in entries if name not in sizes]
        for name, info in zip(absent, self._each(self._info, (_url(folder) / name for name in absent)), strict=True):
            if info is not None:
                sizes[name] = int(info["size"])
        found: dict[str, str] = {}
        for name, entry in entries.items():
            if name not in sizes:
                found[name] = "the file is missing"
            elif sizes[name] != entry.size:
                found[name] = f"the file has {sizes[name]} bytes, the manifest says {entry.size}"
        return found

    def signature(self, place: Location) -> Signature | None:
        """See :class:`Store`: the store's own tag of the content, else times."""
        info = self._info(_url(place))
        if info is None:
            return None
        known = {key.lower(): str(value) for key, value in info.items()}
        tags = tuple(known[key] for key in _CONTENT if key in known) or tuple(
            known[key] for key in _TIMES if key in known
        )
        return Signature((int(info["size"]), *tags), None) if tags else None

    def read(self, place: Location, start: int = 0, stop: int | None = None) -> bytes:
        """See :class:`Store`. Raises FileNotFoundError, ResourceError."""
        url = _url(place)
        held = self._held.get(url)
        if held is not None and held.whole:
            return bytes(memoryview(held.data)[start:stop])
        if stop is not None and stop <= start:
            return b""
        whole = start == 0 and stop is None
        with _asked(url, "read"), self._alone:
            try:
                data = self._fs.cat_file(str(url), **({} if whole else {"start": start, "end": stop}))
            except Exception:
                # A range behind the end of an object is an error of its own in most stores.
                info = self._info(url)
                if info is None or start < int(info["size"]):
                    raise
                data = b""
        return data

    def pieces(self, place: Location, start: int, length: int) -> Iterator[memoryview]:
        """See :class:`Store`: one request. What is held is filled here."""
        data = self.read(place, start, start + length)
        held = self._held.get(_url(place))
        if held is not None:
            with self._holding:
                held.data[start : start + len(data)] = data
                held.pieces[start] = len(data)
        yield memoryview(data)

    def hold(self, sizes: Mapping[Location, int]) -> None:
        """See :class:`Store`: what `pieces` reads. Half of the free host memory is used at most, shared by the ranks of
        the node."""
        room = available_bytes() // 2 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        for place, size in sizes.items():
            held = self._held.get(_url(place))
            if held is not None and held.whole and len(held.data) == size:
                continue  # it was checked before, and is not read again
            if 0 < size <= room:
                room -= size
                self._held[_url(place)] = _Held(bytearray(size))

    def release(self, folder: Location) -> None:
        """See :class:`Store`."""
        for url in [url for url in self._held if url.text.startswith(f"{folder}/")]:
            del self._held[url]

    # ---- writing ----------------------------------------------------------------------------

    def create(self, place: Location, aligned: bool = False) -> ObjectSink:
        """See :class:`Store`: an upload in parts. Raises ResourceError."""
        return ObjectSink(self._fs, _url(place))

    def put(self, place: Location, data: bytes) -> None:
        """Put a small object, whatever was there. Raises ResourceError."""
        with _asked(_url(place), "write"), self._alone:
            self._fs.pipe_file(str(place), data)

    def put_new(self, place: Location, data: bytes) -> bool:
        """Put a small object; False where one is there. Of several who try, one succeeds, if the store can do that (S3
        and Google Cloud Storage can). Raises ResourceError."""
        try:
            with _asked(_url(place), "write"), self._alone:
                self._fs.pipe_file(str(place), data, mode="create")
        except FileExistsError:
            return False
        return True

    def make_folder(self, folder: Location) -> None:
        """See :class:`Store`: there are no folders."""

    def prepare(self, root: Location) -> None:
        """See :class:`Store`: the bucket must be there. Raises ResourceError."""
        url = _url(root)
        if url.has_bucket:
            self._listing(url)
            return
        with _asked(url, "write to"):
            self._fs.makedirs(str(url), exist_ok=True)

    def clean(self, root: Location) -> list[Location]:
        """See :class:`Store`: names that only saves give, without a manifest in the listing and by a look."""
        named, marked = self._named(_url(root))
        removed: list[Location] = []
        for path in named:
            if is_of_objects(path) and path.name not in marked and not self._has_manifest(path):
                self._remove_all(path)
                removed.append(path)
        return removed

    # ---- commit -----------------------------------------------------------------------------

    def written_at(self, root: Location, step: int, identifier: str) -> Location:
        """See :class:`Store`."""
        return root / objects_name(step, identifier)

    def committed_at(self, root: Location, step: int, identifier: str) -> Location:
        """See :class:`Store`: the same; no two saves have one name."""
        return root / objects_name(step, identifier)

    def begin(self, folder: Location) -> None:
        """See :class:`Store`: there are no folders."""

    def commit(self, written: Location, final: Location, manifest: bytes, identifier: str) -> list[Location]:
        """See :class:`Store`: the put of the manifest is the commit. Raises ResourceError."""
        url = _url(final)
        before = [path for path in self.folders(url.parent) if step_of(path) == step_of(url)]
        self.put(url / MANIFEST, manifest)
        return before

    def abandon(self, written: Location) -> None:
        """See :class:`Store`. A manifest that did arrive, though its put failed here, makes a checkpoint."""
        with contextlib.suppress(UserError, OSError):
            if not self._has_manifest(_url(written)):
                self._remove_all(_url(written))

    def remove(self, folder: Location, step: int, identifier: str) -> None:
        """See :class:`Store`: the manifest goes first. Raises ResourceError."""
        url = _url(folder)
        with _asked(url, "delete"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(str(url / MANIFEST))
        self._remove_all(url)

    def set_aside(self, folder: Location, step: int, identifier: str) -> Location:
        """See :class:`Store`: a mark beside it. Raises ResourceError."""
        url = _url(folder)
        self.put(url.parent / f"{url.name}{_ASIDE}", b"set aside by a roll-back\n")
        return url

    def put_hint(self, root: Location, name: str, text: str, identifier: str) -> None:
        """See :class:`Store`. Raises ResourceError."""
        self.put(root / name, text.encode())

    # ---- requests ---------------------------------------------------------------------------

    def _info(self, url: Url) -> Mapping[str, Any] | None:
        """What the store says of an object; None where there is none."""
        try:
            with _asked(url, "look for"):
                info = self._fs.info(str(url))
        except FileNotFoundError:
            return None
        return info if info["type"] == "file" else None

    def _listing(self, folder: Url) -> list[Mapping[str, Any]]:
        """Objects and prefixes directly below. Raises ResourceError where the bucket is not there."""
        try:
            with _asked(folder, "list"):
                return self._fs.ls(str(folder), detail=True, refresh=True)
        except FileNotFoundError as error:
            if any(words in str(error).lower() for words in _NO_BUCKET):
                raise ResourceError(
                    f"there is no bucket {folder.bucket}", str(folder), "make the bucket, or correct its name"
                ) from error
            return []

    def _named(self, root: Url) -> tuple[list[Url], set[str]]:
        """(prefixes directly below by name, names of those that are marked as set aside)."""
        prefixes: set[str] = set()
        marked: set[str] = set()
        for entry in self._listing(root):
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if entry["type"] == "directory":
                prefixes.add(name)
            elif name.endswith(_ASIDE):
                marked.add(name.removesuffix(_ASIDE))
        return [root / name for name in sorted(prefixes)], marked

    def _sizes(self, folder: Url) -> dict[str, int]:
        """Bytes of all objects below, by relative name."""
        try:
            with _asked(folder, "list"):
                found = self._fs.find(str(folder), detail=True)
        except FileNotFoundError:
            return {}
        top = f"{self._fs._strip_protocol(str(folder)).rstrip('/')}/"
        return {path.removeprefix(top): int(info["size"]) for path, info in found.items()}

    def _has_manifest(self, folder: Url) -> bool:
        return self.is_file(folder / MANIFEST) or MANIFEST in self._sizes(folder)

    def _remove_all(self, folder: Url) -> None:
        with _asked(folder, "delete"), contextlib.suppress(FileNotFoundError):
            self._fs.rm(str(folder), recursive=True)

    def _each(self, look: Callable[[Url], Any], places: Iterable[Url]) -> list[Any]:
        given = list(places)
        if len(given) < 2:
            return [look(place) for place in given]
        with ThreadPoolExecutor(min(_REQUESTS, len(given))) as pool:
            return list(pool.map(look, given))


class ObjectSink:
    """A new object, uploaded in parts while it is written. It appears when the sink is left.

    Raises ResourceError.
    """

    def __init__(self, fs: Any, url: Url):
        self._fs, self._url = fs, url
        self._stream: Any = None

    def __enter__(self) -> ObjectSink:
        with _asked(self._url, "write"):
            self._stream = self._fs.open(str(self._url), "wb", block_size=_PART_BYTES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                with _asked(self._url, "write"):
                    self._stream.close()
            except BaseException:
                self._discard()
                raise
        else:
            self._discard()

    def write(self, data: memoryview) -> None:
        """The next bytes. Raises ResourceError."""
        with _asked(self._url, "write"):
            for start in range(0, len(data), _CHUNK_BYTES):
                with data[start : start + _CHUNK_BYTES] as part:  # released also where an error keeps this frame
                    self._stream.write(part)

    def _discard(self) -> None:
        """Leave nothing: a stream that is only closed would put what it has."""
        from fsspec.spec import AbstractBufferedFile

        with contextlib.suppress(Exception):
            if isinstance(self._stream, AbstractBufferedFile):
                self._stream.discard()
                self._stream.closed = True
            else:
                self._stream.close()
                self._fs.rm_file(str(self._url))


@contextlib.contextmanager
def _asked(url: Url, what: str) -> Iterator[None]:
    """Turn what a driver raises into a ResourceError; what is not there, or there already, is left as it is."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, UserError):
        raise
    except Exception as error:  # drivers have types of their own, some of them below Exception only
        kind = type(error).__name__
        reason = " ".join(str(error).split()) or kind
        raise ResourceError(f"cannot {what}: {reason}", str(url), _fix(kind, error)) from error


def _fix(kind: str, error: Exception) -> str:
    if "Credential" in kind or "credential" in str(error).lower():
        return (
            "give the driver credentials as it expects them; for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or a role of the machine"
        )
    if isinstance(error, PermissionError):
        return "these credentials must be allowed to list, read, write and delete there"
    if isinstance(error, ImportError):
        return "install the packages of the driver again"
    return (
        "look at the network, the endpoint (for s3:// AWS_ENDPOINT_URL) and the store; committed checkpoints are "
        "untouched: run the same command again"
    )


def _url(place: Location) -> Url:
    assert isinstance(place, Url), f"{place} is not in an object store"
    return place
