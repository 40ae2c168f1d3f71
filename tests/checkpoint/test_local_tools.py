"""The tools on local checkpoints: what the folders of one node or of several hold, alone and together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_telechat.checkpoint import CheckpointWriter
from megatron_telechat.checkpoint.local import parts
from megatron_telechat.checkpoint.manifest import read_manifest
from megatron_telechat.checkpoint.verify import forget
from megatron_telechat.cli import inspect_checkpoint, verify_checkpoint
from megatron_telechat.tensors.boxes import Box
from tests.checkpoint.test_local import KEY, NORM, RUN, save_id, write_part

OTHER = "b" * 32


@pytest.fixture()
def nodes(tmp_path):
    """Two nodes that mirror each other, with the saves of steps 4 and 8 of two ranks."""
    places = [tmp_path / "node0", tmp_path / "node1"]
    for number, step in ((1, 4), (2, 8)):
        for rank in (0, 1):
            write_part(places[0] / RUN, number, step, rank)
    shutil.copytree(places[0], places[1])
    return places


def part(place: Path, rank: int, step: int) -> Path:
    return parts.committed(place / RUN, rank, step, save_id(step // 4))


def alone(places: list[Path]) -> list[Path]:
    """Without copies: each node holds the part of its own rank."""
    for number, place in enumerate(places):
        shutil.rmtree(parts.part_folder(place / RUN, 1 - number))
    return places


def flip(folder: Path, suffix: str = ".safetensors") -> Path:
    file = next(path for path in folder.iterdir() if path.suffix == suffix)
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 1
    file.write_bytes(bytes(raw))
    return file


@pytest.fixture()
def verify(capsys):
    def run(*paths: Path | str, code: int = 0) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """(verdicts of parts and checkpoints by path, what is said of the local checkpoints by step)."""
        forget()
        assert verify_checkpoint.main([*map(str, paths), "--json"]) == code
        found = json.loads(capsys.readouterr().out)
        assert all({"path", "step", "save", "files", "bytes", "seconds", "problems"} <= one.keys() for one in found)
        return {one["path"]: one for one in found}, {one["step"]: one["local"] for one in found if "local" in one}

    return run


def test_what_the_nodes_hold_together(nodes, verify, capsys):
    found, local = verify(*nodes)
    assert len(found) == 8 + 2 and list(local) == [8, 4], "eight parts, two checkpoints, the one saved last first"
    assert found[str(part(nodes[1], 0, 8))]["part"] == {"run": RUN, "rank": 0, "ranks": 2}
    for step in (4, 8):
        assert local[step]["whole"] and local[step]["missing"] == local[step]["damaged"] == []
        assert local[step]["held"] == {str(place): [0, 1] for place in nodes}
        assert local[step]["lost_with"] == {str(place): [] for place in nodes}
    assert verify_checkpoint.main([str(nodes[0])]) == 0
    out = capsys.readouterr().out
    for text in (
        f"{part(nodes[0], 1, 8)}: sound, part of rank 1 of 2, step 8",
        f"local checkpoint of step 8, save {save_id(2)[:8]}, run {RUN[:8]}: whole",
        "no other has rank 0-1",
    ):
        assert text in out, text


def test_what_one_of_several_nodes_holds(nodes, verify):
    alone(nodes)
    _, local = verify(nodes[0])
    assert not local[8]["whole"] and local[8]["missing"] == [1], "no damage: it may lie on a node that was not given"
    _, local = verify(*nodes)
    assert local[8]["whole"] and local[8]["lost_with"] == {str(nodes[0]): [0], str(nodes[1]): [1]}


def test_damage_is_named_and_what_is_whole_in_spite_of_it(nodes, verify, capsys):
    file = flip(part(nodes[0], 1, 8))
    found, local = verify(*nodes, code=4)
    problems = found[str(file.parent)]["problems"]
    assert [problem["where"] for problem in problems] == [str(file)] and "checksum differs" in problems[0]["what"]
    assert local[8]["whole"] and local[8]["held"] == {str(nodes[0]): [0], str(nodes[1]): [0, 1]}
    assert local[8]["lost_with"][str(nodes[1])] == [1]
    assert verify(nodes[0], code=4)[1][8]["damaged"] == [1]
    flip(part(nodes[1], 1, 8), ".json")
    _, local = verify(*nodes, code=4)
    assert not local[8]["whole"] and (local[8]["damaged"], local[8]["missing"]) == ([1], []) and local[4]["whole"]
    assert verify_checkpoint.main(list(map(str, nodes))) == 4
    out, err = capsys.readouterr()
    assert out.count("DAMAGED") == 2 and "damaged in every copy: rank 1" in out and str(file) in err and "fix:" in err


def test_copies_that_are_sound_and_differ(nodes, tmp_path, verify):
    """Saved anew under the same name: each agrees with its own manifest."""
    shutil.rmtree(part(nodes[1], 1, 8))
    changed = write_part(tmp_path / "elsewhere" / RUN, 2, 8, 1, continues=("another",))
    shutil.copytree(changed, part(nodes[1], 1, 8))
    found, local = verify(*nodes, code=4)
    said = found[part(nodes[0], 0, 8).name]["problems"]
    assert len(said) == 1 and "differs from the one in" in said[0]["what"] and local[4]["whole"]


def test_pieces_that_do_not_make_the_tensors(nodes, tmp_path, verify):
    """A manifest that puts a row where another rank has put one, with a digest of its own."""
    folder = part(nodes[0], 1, 8)
    manifest = read_manifest(folder, part=True)
    (stored,) = manifest.tensors[KEY].boxes
    moved = replace(manifest.tensors[KEY], boxes=(replace(stored, box=Box((0, 0), (1, 4))),))
    forged = replace(manifest, tensors={**manifest.tensors, KEY: moved})
    (folder / "manifest.json").write_bytes(forged.to_bytes())
    found, local = verify(nodes[0], code=4)
    assert "do not hold every tensor exactly once" in found[folder.name]["problems"][0]["what"] and local[4]["whole"]


def test_a_part_of_another_number_of_ranks_is_of_another_save(nodes, tmp_path, verify):
    shutil.rmtree(part(nodes[0], 1, 8))
    shutil.copytree(write_part(tmp_path / "three" / RUN, 2, 8, 1, 3), part(nodes[0], 1, 8))
    assert not verify(nodes[0])[1][8]["whole"]


def test_folders_at_any_height_and_what_is_none(nodes, tmp_path, verify, capsys):
    run = nodes[0] / RUN
    for path, held in ((run, 4), (run / "part_00001", 2), (part(nodes[0], 1, 8), 1)):
        found, _ = verify(path)
        assert len([one for one in found.values() if "part" in one]) == held, path
    shutil.copytree(run, tmp_path / "brought")
    assert verify(tmp_path / "brought")[1][8]["run"] == RUN, "the parts say whose they are"
    write_part(nodes[0] / OTHER, 1, 6, 0, run=OTHER)
    found, local = verify(nodes[0])
    assert local[8]["run"] == RUN and local[6]["run"] == OTHER and local[6]["missing"] == [1]
    shutil.copytree(nodes[0] / OTHER / "part_00000", run / "part_00000", dirs_exist_ok=True)
    found, _ = verify(run, code=4)
    stranger = next(one for path, one in found.items() if "iter_0000006" in path)
    assert "of another run" in stranger["problems"][0]["what"]
    (tmp_path / "links" / RUN / "part_00000").mkdir(parents=True)
    (tmp_path / "links" / RUN / "part_00000" / part(nodes[0], 0, 8).name).symlink_to(part(nodes[0], 0, 8))
    for empty in (tmp_path / "links", tmp_path / "nothing"):
        assert verify_checkpoint.main([str(empty)]) == 4
        assert "no checkpoint there" in capsys.readouterr().err


def test_local_and_shared_ones_beside_each_other(nodes, tmp_path, verify):
    with CheckpointWriter(tmp_path / "shared", step=8, config="") as writer:
        writer.add(KEY, (2, 4), (0, 0), torch.zeros(2, 4))
    found, local = verify(tmp_path / "shared", nodes[0])
    assert "part" not in found[str(writer.path)] and len(found) == 1 + 4 + 2 and local[8]["whole"]


# ---- what is in them ------------------------------------------------------------------------


@pytest.fixture()
def inspect(capsys):
    def run(*arguments: Path | str, code: int = 0) -> dict[str, Any]:
        forget()
        assert inspect_checkpoint.main([*map(str, arguments), "--json"]) == code
        out, err = capsys.readouterr()
        return {**json.loads(out), "err": err}

    return run


def shared_of(root: Path, value: float) -> Path:
    """A checkpoint of the shared folder with the tensors that the parts hold together."""
    with CheckpointWriter(root, step=8, config="config") as writer:
        writer.add(KEY, (2, 4), (0, 0), torch.full((2, 4), value))
        writer.add(NORM, (2,), (0,), torch.full((2,), value))
    return root


def test_a_local_checkpoint_has_the_digests_of_a_shared_one(nodes, tmp_path, inspect):
    alone(nodes)
    local = inspect(*nodes, "--norms", "--digests")
    shared = inspect(shared_of(tmp_path / "shared", 8.0), "--norms", "--digests")
    rows = [{row["key"]: (row["digest"], row["norm"]) for row in one["listed"]} for one in (local, shared)]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert (local["step"], local["save"], local["parameters"]) == (8, save_id(2), 10)
    assert local["local"]["from"] == {str(rank): str(part(nodes[rank], rank, 8)) for rank in (0, 1)}
    flags = ("--compare", nodes[0], "--compare", nodes[1])
    assert inspect(tmp_path / "shared", *flags)["compared"] == 2
    found = inspect(tmp_path / "shared", *flags, "--compare-step", "4", code=4)
    assert [(one["key"], one["elements"], one["largest"]) for one in found["differences"]] == [
        (NORM, 2, 4.0), (KEY, 8, 4.0),
    ]  # fmt: skip


def test_what_is_not_in_the_folders_is_said_and_never_read(nodes, tmp_path, inspect, capsys):
    alone(nodes)
    found = inspect(nodes[0], "--tensors")
    rows = {row["key"]: row for row in found["listed"]}
    assert rows[KEY]["elements_here"] == 4 and "elements_here" not in rows[NORM]
    assert found["local"]["missing"] == [1] and found["bytes"]["model"] == 4 * (4 + 2)
    assert inspect(nodes[0], "--digests", "--only", NORM)["not_whole"] == []
    found = inspect(nodes[0], "--digests", code=4)
    assert {row["key"]: row["digest"] is None for row in found["listed"]} == {KEY: True, NORM: False}
    assert found["not_whole"] == [KEY] and f"not whole in the folders that were given: {KEY}" in found["err"]
    # What could not be compared is not equal.
    found = inspect(shared_of(tmp_path / "shared", 8.0), "--compare", nodes[0], code=4)
    assert (found["compared"], found["differences"], found["not_whole"]) == (1, [], [KEY])
    found = inspect(tmp_path / "shared", "--compare", nodes[1], code=4)
    assert (found["compared"], found["differences"], found["not_whole"]) == (0, [], [NORM, KEY]), "none is only there"
    assert inspect_checkpoint.main([str(nodes[1]), "--norms"]) == 4
    out, err = capsys.readouterr()
    for text in ("50% here", "in none of the folders: rank 0", "in the part of rank 0", "of rank 1, of 2 ranks"):
        assert text in out, text
    assert "the folders of all nodes" in err


def test_damage_is_passed_over(nodes, inspect):
    flip(part(nodes[0], 0, 8))
    found = inspect(nodes[0])
    assert found["step"] == 4 and len(found["notes"]) == 1 and str(part(nodes[0], 0, 8)) in found["notes"][0]
    found = inspect(*nodes)
    assert found["step"] == 8 and found["local"]["from"]["0"] == str(part(nodes[1], 0, 8))
    found = inspect(nodes[0], "--step", "8", "--digests", code=4)
    assert found["local"]["damaged"] == [0] and found["not_whole"] == [KEY]
    for rank, step in ((0, 4), (1, 4), (1, 8)):
        flip(part(nodes[0], rank, step), ".json")
    assert inspect_checkpoint.main([str(nodes[0])]) == 4
    found = inspect(nodes[0], nodes[1], "--step", "4")
    assert len(found["notes"]) == 2 and all("iter_0000004" in note for note in found["notes"])


def test_what_cannot_be_opened_is_said(nodes, tmp_path, capsys):
    write_part(nodes[1] / OTHER, 1, 6, 0, run=OTHER)
    shared = shared_of(tmp_path / "shared", 1.0)
    for arguments, code, text in (
        ((nodes[1],), 4, "of 2 runs"),
        ((nodes[0], "--step", "5"), 4, "no local checkpoint of step 5; there: 8, 4"),
        ((shared, nodes[0]), 2, f"hold no part of one: {shared}"),
        ((shared, shared), 2, "several folders"),
        ((tmp_path / "nothing",), 4, "no checkpoint there"),
    ):
        assert inspect_checkpoint.main(list(map(str, arguments))) == code, arguments
        err = capsys.readouterr().err
        assert text in err and "fix:" in err, err
