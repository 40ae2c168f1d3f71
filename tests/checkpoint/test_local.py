"""Local checkpoints without a training: which one continues a run, damage, what lies in a folder, what peers say."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_telechat.checkpoint import CheckpointWriter
from megatron_telechat.checkpoint.commit import Attempt
from megatron_telechat.checkpoint.disk import write_synced
from megatron_telechat.checkpoint.format import PartWriter
from megatron_telechat.checkpoint.lineage import Began, Branch, Candidate, Lineage, Saved, look_at
from megatron_telechat.checkpoint.local import parts, worker
from megatron_telechat.checkpoint.local.copies import LocalCopies, Place
from megatron_telechat.checkpoint.local.inventory import (
    LocalCheckpoint,
    NodeParts,
    checkpoints_of,
    continuing,
    in_order,
)
from megatron_telechat.checkpoint.local.marker import LocalMarker, read_marker, write_marker
from megatron_telechat.checkpoint.local.newest import open_newest
from megatron_telechat.checkpoint.local.peers import RemotePart, connect
from megatron_telechat.checkpoint.manifest import Manifest, read_manifest
from megatron_telechat.checkpoint.opening import open_verified
from megatron_telechat.checkpoint.start import Start
from megatron_telechat.checkpoint.verify import forget
from megatron_telechat.errors import CheckpointError, ResourceError

RUN, SECRET = "a" * 32, "secret"
KEY, NORM = "model/weight", "model/norm"


def save_id(number: int) -> str:
    return f"{number:032x}"[::-1]


def write_part(
    root: Path, number: int, step: int, rank: int = 0, ranks: int = 2, run: str = RUN, continues: Sequence[str] = ()
) -> Path:
    """A committed part: row ``rank`` of a tensor whose values are the step; of rank 0 another one, whole."""
    save = save_id(number)
    temporary = parts.temporary(root, rank, step, save)
    temporary.mkdir(parents=True)
    writer = PartWriter(Attempt(parts.part_folder(root, rank), step, save), rank)
    writer.add(KEY, (ranks, 4), (rank, 0), torch.full((1, 4), float(step)))
    if rank == 0:
        writer.add(NORM, (2,), (0,), torch.full((2,), float(step)))
    part = writer.close()
    manifest = Manifest(
        step, 8 * step, "config" if rank == 0 else "", {}, {}, part.files, part.tensors,
        lineage=Lineage(1, None).to_json() if rank == 0 else None, save=save,
        part=parts.description(run, rank, ranks, number, continues, "", {"steps": [step], "grad_scaler": {}}),
    )  # fmt: skip
    write_synced(temporary / "manifest.json", manifest.to_bytes())
    parts.commit(root, rank, step, save)
    return parts.committed(root, rank, step, save)


def copies_in(root: Path) -> LocalCopies:
    found, notes = parts.parts_in(root, RUN)
    return LocalCopies(root, RUN, [Place(0, ("127.0.0.1", 0))], SECRET, [NodeParts(0, tuple(found), tuple(notes))])


def opened_step(root: Path) -> tuple[int | None, tuple[str, ...]]:
    """Step of the local checkpoint that a run begins with; its tensor is that of the step."""
    forget()
    newest = open_newest(copies_in(root), Start(None), None)
    opened, notes = newest.local, newest.notes
    if opened is None:
        return None, notes
    assert opened.reader.read(KEY).tolist() == [[float(opened.saved.step)] * 4] * 2
    assert opened.saved.digest == opened.reader.manifest.digest != ""
    return opened.saved.step, notes


@pytest.fixture()
def disk(tmp_path):
    root = tmp_path / RUN
    for number, step in ((1, 4), (2, 8)):
        for rank in (0, 1):
            write_part(root, number, step, rank)
    return root


def test_all_parts_are_one_checkpoint(disk):
    assert opened_step(disk) == (8, ())
    shutil.rmtree(parts.committed(disk, 1, 8, save_id(2)))
    step, notes = opened_step(disk)
    assert step == 4 and notes == ("passed over: local checkpoint of step 8: no node holds the part of rank 1",)


def test_no_flipped_bit_loads(disk, tmp_path):
    """Anywhere in the files of the newest: the older one is taken, and the file is named."""
    draw = random.Random(1)
    files = sorted(path for rank in (0, 1) for path in parts.committed(disk, rank, 8, save_id(2)).iterdir())
    sizes = [path.stat().st_size for path in files]
    for _ in range(80):
        path = draw.choices(files, sizes)[0]
        before = path.read_bytes()
        raw = bytearray(before)
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(raw))
        step, notes = opened_step(disk)
        assert step == 4 and any(str(path.parent) in note for note in notes), (path, notes)
        path.write_bytes(before)
    assert opened_step(disk)[0] == 8


@pytest.mark.parametrize("harm", ["other step", "other save", "other run", "link", "file of another rank"])
def test_what_does_not_belong_there(disk, harm, tmp_path):
    here, older = (parts.committed(disk, 1, step, save_id(number)) for step, number in ((8, 2), (4, 1)))
    shutil.rmtree(here)
    if harm == "other step":
        shutil.copytree(older, here)
    elif harm == "other save":
        shutil.copytree(write_part(tmp_path / "elsewhere", 9, 8, 1), here)
    elif harm == "other run":
        shutil.copytree(write_part(tmp_path / "elsewhere", 2, 8, 1, run="b" * 32), here)
    elif harm == "link":
        here.symlink_to(write_part(tmp_path / "elsewhere", 2, 8, 1))
    else:
        shutil.copytree(parts.committed(disk, 0, 8, save_id(2)), here)
    assert opened_step(disk)[0] == 4


def test_a_part_is_no_checkpoint_and_a_checkpoint_is_no_part(disk, tmp_path):
    here = tmp_path / "checkpoints" / "iter_0000008"
    shutil.copytree(parts.committed(disk, 0, 8, save_id(2)), here)
    for reads in (lambda: look_at(here), lambda: read_manifest(here), lambda: open_verified(here.parent)):
        with pytest.raises(CheckpointError, match="one rank's part"):
            reads()
    with CheckpointWriter(tmp_path / "whole", step=8, config="") as writer:
        writer.add(KEY, (2, 4), (0, 0), torch.zeros(2, 4))
    assert writer.path is not None
    with pytest.raises(CheckpointError, match="whole checkpoint"):
        read_manifest(writer.path, part=True)


def test_old_saves_go_and_nothing_else(disk):
    stranger = write_part(disk, 1, 4, 5, 8, run="b" * 32)
    left = parts.temporary(disk, 0, 9, save_id(3))
    left.mkdir()
    parts.prune(disk, RUN, 2)
    assert [(part.rank, part.step) for part in parts.parts_in(disk, RUN)[0]] == [(0, 8), (1, 8)]
    assert stranger.exists() and left.exists()
    parts.clean(disk)
    assert stranger.exists() and not left.exists()


# ---- which one continues a run --------------------------------------------------------------

BACK = Began("/run", 10, "ten")


def shared(step: int, name: str, began: tuple[Began, ...] = ()) -> Saved:
    return Saved(Path(f"iter_{step:07d}"), step, f"digest of {name}", Lineage(1, None, began), save=f"save of {name}")


def local(step: int, *continues: str, under_way: str = "", began: tuple[Began, ...] = (), number: int = 1):
    digests = tuple(f"digest of {name}" for name in continues)
    saved = Saved(Path("local"), step, "", Lineage(2, None, began))
    save = f"save of {under_way}" if under_way else ""
    return LocalCheckpoint(str(number), step, number, 1, saved, digests, save, {0: (0,)})


GO_ON, NEW = Start(Path("run")), Start(None)
BRANCH = Start(Path("run"), began=(BACK,))
ROLL = Start(Path("run"), 10, opens="/run")
TEN = shared(10, "ten")


@pytest.mark.parametrize(
    ("one", "start", "newest", "taken"),
    [
        (local(12, "ten"), GO_ON, TEN, True),
        (local(12, "nine", under_way="ten"), GO_ON, TEN, True),
        (local(12, "nine", under_way="ten"), GO_ON, shared(9, "nine"), True),
        (local(10, "ten"), GO_ON, TEN, False),
        (local(8, "nine"), GO_ON, TEN, False),
        (local(12, "nine"), GO_ON, TEN, False),
        (local(12, "ten"), BRANCH, shared(11, "branch", (BACK,)), False),
        (local(12, "ten"), GO_ON, replace(TEN, digest="another save of step 10", save="x"), False),
        (local(12, "ten", "damaged"), GO_ON, shared(11, "damaged"), True),
        (local(12, "ten", began=(BACK,)), GO_ON, TEN, False),
        (local(12, "branch", began=(BACK,)), BRANCH, shared(11, "branch", (BACK,)), True),
        (local(12), NEW, None, True),
        (local(12, under_way="ten"), NEW, None, True),
        (local(12, "ten"), NEW, None, False),
        (local(12), GO_ON, TEN, False),
        (local(12), Start(Path("weights"), weights_only=True), TEN, True),
        (local(12, "ten"), ROLL, TEN, False),
        (local(12, "ten", began=(Began("/run", 10, "digest of ten"),)), ROLL, TEN, True),
        (local(12, "ten", began=(Began("/other", 10, "digest of ten"),)), ROLL, TEN, False),
    ],
)
def test_a_local_checkpoint_continues_one_line_only(one, start, newest, taken):
    """The newest shared one, or one that was still being saved; no other branch, no abandoned one."""
    assert (continuing([one], start, newest) == [one]) == taken


def test_of_several_the_one_saved_last():
    """Not that of the largest step: a branch that was left has larger ones."""
    nodes = [NodeParts(0, tuple(_part(number, step) for number, step in ((1, 12), (2, 16), (3, 14))))]
    found = checkpoints_of(nodes)
    assert [one.step for one in continuing(found, GO_ON, TEN)] == [14, 16, 12]


def _part(number: int, step: int) -> parts.LocalPart:
    return parts.LocalPart(0, 1, step, number, save_id(number), local(step).saved, ("digest of ten",))


# ---- shared and local ones together ---------------------------------------------------------


def folder(saved: Saved | None, step: int = 0) -> Candidate:
    return (
        Candidate(saved.step, saved.path, saved) if saved is not None else Candidate(step, Path(f"unread_{step}"), None)
    )


def order(found: Sequence[LocalCheckpoint], start: Start, *newest_first: Candidate) -> list[str]:
    """Steps; of local ones with what they go on from, after an @."""
    newest = next((one.saved for one in newest_first if one.saved is not None), None)
    choices = in_order(found, start, newest, newest_first if start.step is None else ())
    steps = {one.path: one.step for one in newest_first}
    return [
        f"{one.local.step}@{one.base.removeprefix('digest of ')}" if one.local else str(steps[one.shared or Path()])
        for one in choices
    ]


def test_shared_and_local_ones_are_tried_newest_first():
    """Also what was saved before the first shared one; those that lack a part are passed by in their place."""
    five, twenty = shared(5, "five"), shared(20, "twenty")
    found = [local(24, "twenty"), local(16, "ten"), local(12, "ten"), local(8, "five"), local(4), local(12, "gone")]
    run = [folder(one) for one in (twenty, TEN, five)]
    assert order(found, GO_ON, *run) == ["24@twenty", "20", "16@ten", "12@ten", "10", "8@five", "5", "4@"]
    unread = [folder(None, 30), run[0], folder(None, 14), run[1], folder(None, 3)]
    assert order(found, GO_ON, *unread) == ["30", "24@twenty", "20", "16@ten", "14", "12@ten", "10", "4@", "3"]
    nobody = replace(found[1], saved=None, holders={})
    assert order([nobody], GO_ON, *run) == ["20", "16@ten", "10", "5"]
    assert order(found, NEW) == ["4@"] and order([], GO_ON, *run) == ["20", "10", "5"]


def test_a_fall_back_keeps_to_its_line():
    """The branch goes on from step 10 of the trunk, of which a local one lies on the nodes. What a fall-back has saved
    on the nodes is found by the next one."""
    five, branch = shared(5, "five"), shared(20, "branch", (BACK,))
    run = [folder(branch), folder(TEN), folder(five)]
    trunk, own, before = local(16, "ten"), local(12, "ten", began=(BACK,)), local(8, "five")
    assert order([trunk, own, before], BRANCH, *run) == ["20", "12@ten", "10", "8@five", "5"]
    fallen = [local(14, "branch", "ten", began=(BACK,)), local(7, "branch", "five", began=(BACK,))]
    assert order(fallen, BRANCH, *run) == ["20", "14@ten", "10", "7@five", "5"]
    first = local(3, "branch", began=(BACK,))
    assert order([first, local(3, "gone", began=(BACK,))], BRANCH, *run)[-1] == "3@"


def test_a_fall_back_behind_a_beginning_that_is_named():
    """--load-step takes that one checkpoint; --load of another folder the newest sound one there, and a local one that
    began with it, but none of the run before."""
    began = local(12, "ten", began=(Began("/run", 10, "digest of ten"),))
    twenty = shared(20, "twenty")
    assert order([local(12, "ten"), began], ROLL, folder(TEN)) == ["12@ten", "10"]
    load = Start(Path("other"), opens="/run")
    assert order([local(24, "twenty"), began, local(4)], load, folder(twenty), folder(TEN)) == ["20", "12@ten", "10"]


def write_shared(root: Path, step: int, branch: Branch) -> Saved:
    with CheckpointWriter(root, step=step, config="", branch=branch) as writer:
        writer.add(KEY, (2, 4), (0, 0), torch.full((2, 4), float(step)))
    assert writer.path is not None
    return look_at(writer.path)


def test_bytes_decide_which_one_is_taken(tmp_path, caplog):
    """Shared 10 and 20, local 4 from before them, 12 and 16 between them: one after the other is damaged."""
    root, disk = tmp_path / "checkpoints", tmp_path / RUN
    branch = Branch.opening(root)
    ten, twenty = (write_shared(root, step, branch) for step in (10, 20))
    for number, step in ((1, 4), (2, 12), (3, 16)):
        for rank in (0, 1):
            write_part(disk, number, step, rank, continues=[ten.digest] if step > 10 else [])
    start = Start(root)
    damaged: list[Path] = []
    for what, taken in (
        (twenty.path, 16),
        (parts.committed(disk, 1, 16, save_id(3)), 12),
        (parts.committed(disk, 0, 12, save_id(2)), 10),
        (ten.path, 4),
    ):
        path = next(what.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        damaged.append(path)
        forget()
        caplog.clear()
        newest = open_newest(copies_in(disk), start, twenty)
        reader = newest.local.reader if newest.local is not None else newest.shared
        assert reader is not None and reader.read(KEY).tolist() == [[float(taken)] * 4] * 2
        assert len(newest.notes) == len(damaged) == len(caplog.messages)
        assert all(str(one) in note for one, note in zip(damaged, newest.notes, strict=True))
        assert newest.base == (ten.digest if taken in (16, 12) else "")
    path = next(parts.committed(disk, 0, 4, save_id(1)).glob("*.safetensors"))
    path.write_bytes(b"")
    forget()
    with pytest.raises(CheckpointError) as error:
        open_newest(copies_in(disk), start, twenty)
    assert [one.where for one in error.value.problems] == list(map(str, [*damaged, path]))


# ---- peers ----------------------------------------------------------------------------------


@pytest.fixture()
def server(disk):
    port, problem = worker.listen(disk, "127.0.0.1", SECRET, cleans=True)
    assert problem == ""
    return "127.0.0.1", port


def put(server, rank: object, save: str, name: str, content: bytes, manifest: bytes) -> dict | None:
    channel = connect(server, SECRET)
    channel.send({"do": "put", "rank": rank, "step": 12, "save": save, "files": [[name, len(content)]]})
    try:
        channel.send_bytes(content)
        channel.send_sized(manifest)
        return channel.receive()
    except OSError:
        return None
    finally:
        channel.close()


def test_a_copy_arrives_whole_or_not_at_all(server, disk, tmp_path):
    """Changed bytes, a manifest that is none, an end in the middle: no part, and nothing is left of it."""
    made = write_part(tmp_path / "owner", 3, 12, 1)
    tensors, manifest = (made / "rank_00001.safetensors").read_bytes(), (made / "manifest.json").read_bytes()
    name, save = "rank_00001.safetensors", save_id(3)
    changed = tensors[:-1] + bytes([tensors[-1] ^ 1])
    for content, said in ((changed, manifest), (tensors, b"{}"), (tensors[:-8], manifest)):
        reply = put(server, 1, save, name, content, said)
        assert reply is not None and "error" in reply
        assert worker._received(save) == set()
        assert not parts.temporary(disk, 1, 12, save).exists()
    channel = connect(server, SECRET)
    channel.send({"do": "put", "rank": 1, "step": 12, "save": save, "files": [[name, len(tensors)]]})
    channel.send_bytes(tensors[:100])
    channel.close()
    deadline = time.monotonic() + 5
    while not (parts.temporary(disk, 1, 12, save) / name).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # until the end was noticed
    assert worker._received(save) == set()
    assert put(server, 1, save, name, tensors, manifest) == {"ok": True}
    assert worker._received(save) == {1}
    parts.commit(disk, 1, 12, save)
    assert (parts.committed(disk, 1, 12, save) / name).read_bytes() == tensors


@pytest.mark.parametrize(
    ("rank", "save", "name"),
    [
        (1, save_id(3), "../../escaped.safetensors"),
        (1, save_id(3), "/tmp/escaped.safetensors"),
        (1, save_id(3), "manifest.json"),
        (1, "../../escaped", "rank_00001.safetensors"),
        ("../1", save_id(3), "rank_00001.safetensors"),
        (-1, save_id(3), "rank_00001.safetensors"),
    ],
)
def test_names_of_peers_lead_nowhere(server, disk, rank, save, name):
    before = sorted(disk.parent.rglob("*"))
    assert put(server, rank, save, name, b"x" * 100, b"{}") is None
    assert sorted(disk.parent.rglob("*")) == before


def test_ranges_are_read_by_who_knows_the_secret(server, disk):
    path = parts.committed(disk, 1, 8, save_id(2)) / "rank_00001.safetensors"
    whole = path.read_bytes()
    remote = RemotePart(server, SECRET, 1, 8, save_id(2))
    assert remote.read(path.name, 0, 10**6) == whole and remote.read(path.name, 8, 20) == whole[8:20]
    for name in ("../part_00000/x.safetensors", "rank_00009.safetensors"):
        with pytest.raises(ResourceError, match="another node"):
            remote.read(name, 0, 8)
    stranger = RemotePart(server, "guess", 1, 8, save_id(2))
    with pytest.raises(ResourceError, match="connection ended"):
        stranger.read(path.name, 0, 8)


def test_threads_take_turns_at_a_part(server, disk):
    path = parts.committed(disk, 1, 8, save_id(2)) / "rank_00001.safetensors"
    whole = path.read_bytes()
    remote = RemotePart(server, SECRET, 1, 8, save_id(2))
    ranges = [(start, start + 1 + start % 50) for start in range(0, len(whole) - 60)] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: remote.read(path.name, *one), ranges))
    assert found == [whole[start:stop] for start, stop in ranges]


# ---- the run folder -------------------------------------------------------------------------


def test_the_marker_says_which_is_the_newest(tmp_path):
    from megatron_telechat.cli.launch import _Folders

    folders = _Folders(tmp_path, tmp_path / "checkpoints")
    assert read_marker(tmp_path) is None and folders.newest_checkpoint() is None
    for step in (4, 8):
        write_marker(tmp_path, LocalMarker(step, save_id(step), "/nvme", "now"))
        assert folders.newest_checkpoint() == (step, save_id(step)), "a job that gets on"
    with CheckpointWriter(tmp_path / "checkpoints", step=10, config="") as writer:
        writer.add(KEY, (1,), (0,), torch.zeros(1))
    newest = folders.newest_checkpoint()
    assert newest is not None and newest[0] == 10
    (tmp_path / "local_checkpoint.json").write_text("{")
    assert read_marker(tmp_path) is None
