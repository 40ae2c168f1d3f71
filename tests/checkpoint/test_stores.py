"""Checkpoints in every store: a file system, and through fsspec a local folder, memory and an S3-compatible server."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_telechat.checkpoint import CheckpointReader, CheckpointWriter, latest_checkpoint, stores
from megatron_telechat.checkpoint.commit import begin, clean_leftovers
from megatron_telechat.checkpoint.folders import committed_folders, folders_aside
from megatron_telechat.checkpoint.lineage import Branch, folder_of_step, look_at, saved_in
from megatron_telechat.checkpoint.names import MANIFEST, FileEntry
from megatron_telechat.checkpoint.opening import open_verified
from megatron_telechat.checkpoint.owner import OWNER, claim_store, require_owner
from megatron_telechat.checkpoint.ranged import RangedFile
from megatron_telechat.checkpoint.retention import prune
from megatron_telechat.checkpoint.stores import ObjectStore, objects, posix, store_of
from megatron_telechat.checkpoint.verify import check_together
from megatron_telechat.checkpoint.writer_process import FileImage, write_images
from megatron_telechat.cli.convert_checkpoint import main as convert
from megatron_telechat.cli.inspect_checkpoint import main as inspect
from megatron_telechat.cli.verify_checkpoint import main as verify
from megatron_telechat.errors import CheckpointError, ConfigError, LeaseError, ResourceError
from megatron_telechat.locations import Location, Url, is_url, location
from tests.checkpoint.object_server import BUCKET, object_server

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("posix", "file", "memory", "s3")
OBJECTS = KINDS[1:]

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with object_server() as environment:
        yield environment


@pytest.fixture
def place(request, tmp_path) -> Callable[[str], Location]:
    """An empty root in a store of this kind."""

    def make(kind: str) -> Location:
        if kind == "s3":
            request.getfixturevalue("server")
            return location(f"s3://{BUCKET}/{uuid.uuid4().hex}/run")
        roots = {"posix": str(tmp_path / "run"), "file": f"file://{tmp_path}/run"}
        return location(roots.get(kind) or f"memory://{uuid.uuid4().hex}/run")

    return make


def values_of(value: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "model/a": torch.randn(5, 7, generator=generator) + value,
        "model/b": torch.randn(2, 3, 4, generator=generator).bfloat16() + value,
        "optimizer/exp_avg/a": torch.randn(9, generator=generator).half() + value,
        "model/c": torch.arange(12).view(3, 4),
        "model/scalar": torch.tensor(value),
    }


def save(root: Location, step: int, value: float = 0.0, branch: Branch | None = None) -> Location:
    with CheckpointWriter(root, step=step, config="model: {}\n", max_file_bytes=100, branch=branch) as writer:
        for key, tensor in values_of(value).items():
            half = tensor.shape[0] // 2 if tensor.ndim else 0
            for low, high in ((0, half), (half, tensor.shape[0])) if half else ((0, 0),):
                part = tensor[low:high] if half else tensor
                writer.add(key, tensor.shape, (low, *[0] * (tensor.ndim - 1)) if tensor.ndim else (), part)
    assert writer.path is not None
    return writer.path


def line_of(root: Location, *steps: int) -> None:
    branch = Branch.opening(root)
    for step in steps:
        save(root, step, float(step), branch)


def put(path: Location, data: bytes) -> None:
    """Change a file behind the program's back."""
    if isinstance(path, Path):
        path.write_bytes(data)
    else:
        store = store_of(path)
        assert isinstance(store, ObjectStore)
        store.put(path, data)


def take_away(path: Location) -> None:
    if isinstance(path, Path):
        path.unlink()
    else:
        fs(path).rm_file(str(path))


def fs(path: Location):
    store = store_of(path)
    assert isinstance(store, ObjectStore)
    return store._fs


def steps_of(root: Location) -> list[int]:
    return [saved.step for saved in saved_in(root)]


def value_of(folder: Location) -> float:
    return float(CheckpointReader(folder, verify=True).read("model/scalar"))


# ---- what is written is read ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_box_reads_back_and_the_files_are_the_same(place, kind, tmp_path):
    folder = save(place(kind), 5, 1.0)
    reader = CheckpointReader(folder, verify=True)
    random_ = random.Random(1)
    for key, tensor in values_of(1.0).items():
        assert reader.read(key).equal(tensor), key
        for _ in range(5):
            low = [random_.randrange(extent) for extent in tensor.shape]
            high = [random_.randint(at + 1, extent) for at, extent in zip(low, tensor.shape, strict=True)]
            shape = tuple(stop - start for start, stop in zip(low, high, strict=True))
            box = tuple(slice(start, stop) for start, stop in zip(low, high, strict=True))
            assert reader.read(key, tuple(low), shape).equal(tensor[box]), (key, box)
    other = save(tmp_path / "other", 5, 1.0)
    theirs, ours = (CheckpointReader(one).manifest for one in (other, folder))
    assert theirs.tensors == ours.tensors and theirs.files.keys() == ours.files.keys()
    for name in ours.files:
        mine = store_of(folder).read(folder / name).replace(str(ours.save).encode(), b"")
        assert mine == (other / name).read_bytes().replace(str(theirs.save).encode(), b"")


def test_ranges_of_a_file_join_only_what_lies_near(monkeypatch):
    from safetensors.torch import save as as_bytes

    from megatron_telechat.checkpoint import ranged

    tensors = {"a": torch.randn(6, 8, 10), "b": torch.arange(7), "c": torch.zeros(0, 3)}
    data, asked = as_bytes(tensors), []
    for gap in (0, 100, 1 << 20):
        monkeypatch.setattr(ranged, "_GAP_BYTES", gap)
        file = RangedFile(lambda start, stop: asked.append((start, stop)) or data[start:stop])
        assert sorted(file.keys()) == ["a", "b", "c"]
        for name, tensor in tensors.items():
            assert file.get_tensor(name).equal(tensor)
        asked.clear()
        box = (slice(1, 5), slice(2, 4), slice(3, 9))
        assert file.get_slice("a")[box].equal(tensors["a"][box])
        assert len(asked) == {0: 8, 100: 4, 1 << 20: 1}[gap]
    for cut in (4, 20, len(data) - 5):
        with pytest.raises(ValueError):
            RangedFile(lambda start, stop, cut=cut: data[:cut][start:stop]).get_tensor("a")
            RangedFile(lambda start, stop, cut=cut: data[:cut][start:stop]).get_tensor("b")


def test_a_large_file_goes_up_in_parts(place, monkeypatch):
    monkeypatch.setattr(objects, "_PART_BYTES", 5 << 20)
    folder = place("s3")
    data = random.Random(2).randbytes(12 << 20)
    with store_of(folder).create(folder / "large") as sink:
        sink.write(memoryview(data))
    assert store_of(folder).read(folder / "large") == data
    assert re.search(r"-\d", fs(folder).info(str(folder / "large"))["ETag"]), "the tag of an upload in parts"


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_fails_leaves_no_file_that_looks_whole(place, kind):
    root = place(kind)
    attempt = begin(root, 1)
    with pytest.raises(ZeroDivisionError), store_of(root).create(attempt.temporary / "file") as sink:
        sink.write(memoryview(b"half"))
        raise ZeroDivisionError
    assert kind == "posix" or store_of(root).files(attempt.temporary) == []
    with pytest.raises(ZeroDivisionError), CheckpointWriter(root, step=2, config="") as writer:
        writer.add("model/a", (2,), (0,), torch.zeros(2))
        raise ZeroDivisionError
    clean_leftovers(root)
    assert committed_folders(root) == [] and store_of(root).files(root) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_process_beside_a_rank_says_what_a_store_says(place, kind, tmp_path, monkeypatch):
    """Its shared memory can be closed after the error, and a whole file is as it was in memory."""
    folder = begin(place(kind), 1).temporary
    memory = os.memfd_create("test")
    data = random.Random(4).randbytes(9 << 20)
    os.write(memory, data)
    entry = write_images(memory, [FileImage(folder / "whole", 0, len(data))])["whole"]
    assert store_of(folder).read(folder / "whole") == data
    assert entry == FileEntry(len(data), f"{zlib.crc32(data):08x}")

    class Full:
        def write(self, part):
            raise OSError(28, "No space left on device")

        def fileno(self):
            return memory

        def close(self):
            pass

    if kind == "posix":
        monkeypatch.setattr(posix, "open", lambda *args, **options: Full(), raising=False)
    else:
        monkeypatch.setattr(fs(folder), "open", lambda *args, **options: Full())
    with pytest.raises((OSError, ResourceError), match="No space left on device"):
        write_images(memory, [FileImage(folder / "half", 0, len(data))])
    os.close(memory)


# ---- damage -----------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_the_older_one_loads(place, kind):
    root = place(kind)
    line_of(root, 10, 20)
    older, newer = (saved.path for saved in saved_in(root))
    name = sorted(CheckpointReader(newer).manifest.files)[1]
    data = store_of(newer).read(newer / name)
    damages = {
        "content has changed": lambda: put(newer / name, flipped(data)),
        "bytes, the manifest says": lambda: put(newer / name, data[:-1]),
        "of another save": lambda: put(newer / name, store_of(older).read(older / name)),
        "file is missing": lambda: take_away(newer / name),
    }
    for what, damage in damages.items():
        damage()
        reader, notes = open_verified(root)
        assert value_of(reader.path) == 10.0 and what in notes[0] and str(newer / name) in notes[0]
        with pytest.raises(CheckpointError, match=what):
            open_verified(root, 20)
        with pytest.raises(CheckpointError, match=what):
            open_verified(newer)
        put(newer / name, data)
        assert value_of(open_verified(root)[0].path) == 20.0
    manifest = store_of(newer).read(newer / MANIFEST)
    put(newer / MANIFEST, manifest.replace(b'"crc32": "', b'"crc32": "f', 1))
    reader, notes = open_verified(root)
    assert value_of(reader.path) == 10.0 and "manifest has changed" in notes[0]


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_store_that_does_not_answer_is_no_damage(place, kind, monkeypatch):
    """An older checkpoint would be a wrong answer: the run ends, and may be started again."""
    root = place(kind)
    line_of(root, 10, 20)
    newest = saved_in(root)[-1].path
    name = sorted(CheckpointReader(newest).manifest.files)[0]
    for method, path in (("cat_file", newest / name), ("cat_file", newest / MANIFEST), ("ls", root)):
        original = getattr(fs(root), method)

        def refuse(url, *args, original=original, path=path, **options):
            if url == str(path):
                raise PermissionError("Access Denied")
            return original(url, *args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(fs(root), method, refuse)
            with pytest.raises(ResourceError, match="Access Denied") as caught:
                open_verified(root)
            assert "allowed to list, read, write and delete" in str(caught.value)
    assert value_of(open_verified(root)[0].path) == 20.0


@pytest.mark.parametrize("kind", OBJECTS)
def test_what_a_rank_checks_and_reads_comes_over_the_network_once(place, kind, monkeypatch):
    folder = save(place(kind), 5, 1.0)
    manifest = CheckpointReader(folder).manifest
    read: list[str] = []
    original = fs(folder).cat_file

    def noted(url, **options):
        read.append(url)
        return original(url, **options)

    monkeypatch.setattr(fs(folder), "cat_file", noted)
    wanted = {name: entry.size for name, entry in manifest.files.items()}
    for _ in range(2):  # a fall-back over both tiers looks before there is a model, the load again
        assert check_together(folder, manifest, wanted) == []
    assert sorted(read) == sorted(str(folder / name) for name in wanted)
    reader = CheckpointReader(folder, check_sizes=False, manifest=manifest)
    for key, tensor in values_of(1.0).items():
        assert reader.read(key).equal(tensor)
    assert len(read) == len(wanted)
    reader.close()
    assert reader.read("model/a").equal(values_of(1.0)["model/a"]) and len(read) > len(wanted), "memory is given back"


def test_ranges_that_overlap_do_not_make_a_held_file_whole(place):
    folder = save(place("memory"), 5, 1.0)
    store = store_of(folder)
    name = next(iter(CheckpointReader(folder).manifest.files))
    data = store.read(folder / name)
    half = len(data) // 2
    store.hold({folder / name: len(data)})
    for start, stop in ((0, half), (0, len(data) - half)):
        assert store.read(folder / name, start, stop) == data[start:stop]
    assert store.read(folder / name) == data
    store.release(folder)


# ---- lineage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_roll_back_lasts_and_nothing_of_the_trunk_is_deleted(place, kind):
    root = place(kind)
    line_of(root, 10, 20, 30, 40)
    ten, trunk = saved_in(root)[0], saved_in(root)[1:]
    save(root, 20, 2.0, Branch.opening(root, (10, ten.digest)))
    assert steps_of(root) == [10, 20] and value_of(latest_checkpoint(root) or root) == 2.0
    aside = folders_aside(root)
    assert len(aside) == 3 and sorted(map(value_of, aside)) == [20.0, 30.0, 40.0]
    assert value_of(folder_of_step(root, 20)) == 2.0
    # The branch loses its newest: the trunk does not come back.
    head = saved_in(root)[-1].path
    put(head / MANIFEST, b"{")
    assert value_of(open_verified(root)[0].path) == 10.0
    with pytest.raises(CheckpointError, match="set aside by a roll-back"):
        folder_of_step(root, 40)
    assert {look_at(path).digest for path in aside} == {saved.digest for saved in trunk}


@pytest.mark.parametrize("kind", KINDS)
def test_retention_follows_the_lineage(place, kind):
    root = place(kind)
    line_of(root, 10, 20, 30)
    first, second, third = saved_in(root)
    save(root, 15, 2.0, Branch.opening(root, (10, first.digest)))
    assert prune(root, 1, protected=first.path) == []
    removed = prune(root, 1)
    assert removed == [first.path] and steps_of(root) == [15]
    assert sorted(map(value_of, folders_aside(root))) == [20.0, 30.0]
    left = store_of(root).files(root)
    assert not any(name.startswith(f"{first.path.name}/") for name in left)
    assert third.digest != second.digest


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_without_a_branch_replaces_that_of_its_step(place, kind):
    root = place(kind)
    save(root, 0, 1.0)
    save(root, 0, 2.0)
    assert [value_of(path) for _, path in committed_folders(root)] == [2.0] and folders_aside(root) == []
    assert store_of(root).read(root / "latest").decode().strip() == committed_folders(root)[0][1].name


# ---- object stores ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OBJECTS)
def test_files_without_a_manifest_are_no_checkpoint(place, kind):
    root = place(kind)
    line_of(root, 10)
    attempt = begin(root, 20)
    put(attempt.temporary / "rank_00000.safetensors", b"half")
    assert steps_of(root) == [10] and [step for step, _ in committed_folders(root)] == [10]
    begin(root, 30)
    assert store_of(root).files(attempt.temporary) == [] and steps_of(root) == [10]


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_listing_that_lags_behind_deletes_nothing_and_hides_no_file(place, kind, monkeypatch):
    root = place(kind)
    line_of(root, 10, 20)
    folder = saved_in(root)[-1].path
    files = CheckpointReader(folder).manifest.files
    with monkeypatch.context() as patched:
        patched.setattr(fs(root), "find", lambda url, **options: {})
        assert store_of(root).faults(folder, files) == {} and len(files) > 1
        clean_leftovers(root)
        assert steps_of(root) == [10, 20]
    original = fs(root).info
    with monkeypatch.context() as patched:
        # And the other way round: a look that lags behind the listing deletes nothing.
        def missing(url, **options):
            if str(url).endswith(MANIFEST):
                raise FileNotFoundError(url)
            return original(url, **options)

        patched.setattr(fs(root), "info", missing)
        assert store_of(root).clean(root) == []
    assert steps_of(root) == [10, 20]


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_manifest_that_arrived_makes_a_checkpoint_whatever_the_put_said(place, kind, monkeypatch):
    root = place(kind)
    line_of(root, 10)
    original = fs(root).pipe_file

    def arrives(url, data, **options):
        original(url, data, **options)
        if url.endswith(MANIFEST):
            raise TimeoutError("no answer")

    monkeypatch.setattr(fs(root), "pipe_file", arrives)
    with pytest.raises(ResourceError, match="no answer"):
        save(root, 20, 20.0, Branch.opening(root, (10, saved_in(root)[-1].digest)))
    assert value_of(open_verified(root)[0].path) == 20.0


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_prefix_belongs_to_one_run_folder(place, kind, tmp_path):
    root, said = place(kind), []
    assert isinstance(root, Url)
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    for folder in (ours, theirs):
        folder.mkdir()
    mine = claim_store(root, ours, False, said.append)
    assert claim_store(root, ours, False, said.append) == mine and said == []
    require_owner(*mine)
    with pytest.raises(LeaseError, match=f"belongs to the run folder {ours}"):
        claim_store(root, theirs, False, said.append)
    stolen = claim_store(root, theirs, True, said.append)
    assert len(said) == 1
    require_owner(*stolen)
    with pytest.raises(LeaseError, match=f"was taken by the run folder {theirs}"):
        require_owner(*mine)
    put(root / OWNER, b"?")
    with pytest.raises(LeaseError, match="nobody known"):
        require_owner(*stolen)
    take_away(root / OWNER)
    with pytest.raises(LeaseError, match="is gone"):
        require_owner(*stolen)


def test_what_is_wrong_with_a_store_is_said(server, monkeypatch):
    with pytest.raises(ResourceError, match="there is no bucket nowhere") as caught:
        saved_in(location("s3://nowhere/run"))
    assert "make the bucket" in str(caught.value)
    with pytest.raises(ResourceError, match="there is no bucket nowhere"):
        begin(location("s3://nowhere/run"), 1)
    assert saved_in(location(f"s3://{BUCKET}/nothing")) == []
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        saved_in(location("gs://bucket/run"))
    with pytest.raises(ConfigError, match="knows no protocol"):
        saved_in(location("nothing://bucket/run"))
    stores._objects.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(ResourceError, match="credentials") as caught:
        saved_in(location(f"s3://{BUCKET}/run"))
    assert "AWS_ACCESS_KEY_ID" in str(caught.value) and caught.value.exit_code == 6
    stores._objects.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["new", "branch"])
def test_a_save_killed_before_any_request_leaves_a_whole_checkpoint(server, scenario, tmp_path):
    """SIGKILL before each request that changes the store, retention included."""
    worker = Path(__file__).with_name("worker_killed_objects.py")
    root = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    done = subprocess.run(
        [sys.executable, str(worker), root, scenario], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines[-1]["killed_before"] is None and len(lines) > 6
    new, old = (2.0, 10.0)
    for line in lines:
        committed = line["killed_before"] is None or line["killed_before"] > lines[0]["manifest_is"]
        assert line["newest"] == [new if committed else old], line
        assert line["then"] == [3.0] and line["rubbish"] == [], line
        if scenario == "branch":
            assert line["trunk"] == [20.0, 30.0], line


# ---- the tools --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OBJECTS)
def test_tools_take_urls(place, kind, capsys):
    root = place(kind)
    line_of(root, 10, 20)
    newest = saved_in(root)[-1].path
    assert verify([str(root)]) == 0
    assert inspect([str(newest), "--compare", str(saved_in(root)[0].path)]) == 4
    assert inspect([str(root), "--norms", "--only", "model/a"]) == 0
    out = capsys.readouterr().out
    assert out.count("sound") == 2 and "tensors differ" in out
    put(newest / "rank_00000.safetensors", b"?")
    assert verify([str(root)]) == 4
    assert str(newest / "rank_00000.safetensors") in capsys.readouterr().err
    assert convert(["export", "--checkpoint", str(root), "--output", f"{root}/out"]) == 2
    assert "is a URL" in capsys.readouterr().err


def test_a_url_is_no_path():
    url = location("S3://bucket/a/b/")
    assert url == Url("s3://bucket/a/b") and url / "c" == Url("s3://bucket/a/b/c") and url.parent.name == "a"
    assert isinstance(url, Url) and url.bucket == "bucket" and (url / "x.safetensors").suffix == ".safetensors"
    assert location("a/b") == Path("a/b") and not is_url("C:\\x") and not is_url(None)
    with pytest.raises(TypeError):
        open(url)  # pyright: ignore[reportArgumentType, reportCallIssue]
