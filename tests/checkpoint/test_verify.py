"""What verification is made of: sums of pieces, shares of ranks, verdicts that are kept; and the tools that show it."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_telechat.checkpoint import CheckpointReader, CheckpointWriter, checksums, files, verify
from megatron_telechat.checkpoint.checksums import crc32_combine, crc32_of_files
from megatron_telechat.checkpoint.handed import to_hand_out
from megatron_telechat.checkpoint.lineage import look_at
from megatron_telechat.checkpoint.manifest import read_manifest
from megatron_telechat.checkpoint.stores import posix
from megatron_telechat.cli import inspect_checkpoint, verify_checkpoint
from megatron_telechat.errors import CheckpointError
from tests.checkpoint.test_format import edit_manifest, tensors, write


def test_the_sum_of_a_whole_is_that_of_its_parts():
    random_ = random.Random(1)
    for _ in range(200):
        first, second = (random_.randbytes(random_.choice((0, 1, 2, 31, 4096, 70001))) for _ in range(2))
        assert crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@pytest.mark.parametrize("threads", [1, 3])
def test_files_are_summed_in_pieces_and_one_that_cannot_be_read_is_told(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(checksums, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(posix, "_READ_BYTES", 64)
    contents = [random.Random(size).randbytes(size) for size in (0, 1, 999, 1000, 1001, 12345)]
    wanted: list[tuple[Path, int]] = []
    for number, data in enumerate(contents):
        (tmp_path / str(number)).write_bytes(data)
        wanted.append((tmp_path / str(number), len(data)))
    found = crc32_of_files([*wanted, (tmp_path / "none", 2500)], threads)
    assert found[:-1] == [f"{zlib.crc32(data):08x}" for data in contents] and isinstance(found[-1], OSError)


def test_a_file_is_summed_beside_its_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(posix, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(posix, "_SYNC_BYTES", 1000)
    given = [files.lazy(str(n), torch.randn(n * 37)) for n in range(1, 30)]
    entry = files.write_safetensors(tmp_path / "a.safetensors", given, {"save": "1"})
    data = (tmp_path / "a.safetensors").read_bytes()
    assert (entry.size, entry.crc32) == (len(data), f"{zlib.crc32(data):08x}")
    assert verify.metadata_of(tmp_path / "a.safetensors") == {"save": "1"}


def test_shares_are_even_each_file_once_and_where_it_is_read_anyway():
    random_ = random.Random(3)
    for ranks in (1, 2, 3, 8, 64):
        own = {f"rank_{rank:05d}": random_.randint(900, 1000) for rank in range(ranks)}
        found = verify.shares(own, [{name: 1} for name in own], [()] * ranks)
        assert found == [[name] for name in own], "in the same layout each rank checks its own"
        sizes = {f"file_{number:03d}": random_.randint(1, 1000) for number in range(200)}
        wanted = [dict.fromkeys(random_.sample(sorted(sizes), 5), rank + 1) for rank in range(ranks)]
        known = [[], *[["file_000"]] * (ranks - 1)]
        found = verify.shares(sizes, wanted, known)
        assert sorted(name for share in found for name in share) == sorted(sizes)
        assert ranks == 1 or "file_000" in found[1]
        loads = [sum(sizes[name] for name in share if name != "file_000" or ranks == 1) for share in found]
        assert max(loads) <= sum(loads) / ranks * 1.1 + 1000


def test_a_verdict_holds_until_the_file_is_touched(tmp_path, monkeypatch):
    path = write(tmp_path)
    manifest = read_manifest(path)
    name = "rank_00000.safetensors"
    read: list[Path] = []
    original = verify.crc32_of_files
    monkeypatch.setattr(verify, "crc32_of_files", lambda given: read.extend(p for p, _ in given) or original(given))
    for age, again in ((0, True), (10, False)):
        for file in manifest.files:
            os.utime(path / file)
        monkeypatch.setattr(verify.time, "time", lambda age=age: os.stat(path / name).st_ctime + age)
        assert verify.check_files(path, manifest, [name]) == [] and read == [path / name]
        read.clear()
        assert verify.check_files(path, manifest, [name]) == [] and bool(read) == again, "changed within a clock's tick"
        read.clear()
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    assert "content has changed" in verify.check_files(path, manifest, [name])[0].what


def test_a_manifest_that_is_handed_out_says_the_same(tmp_path):
    manifest = read_manifest(write(tmp_path))
    handed = to_hand_out(manifest)
    assert handed.tensors.keys() == manifest.tensors.keys()
    for key, entry in manifest.tensors.items():
        assert (handed.tensors[key].dtype, handed.tensors[key].shape) == (entry.dtype, entry.shape)
        assert tuple(handed.tensors[key].boxes) == entry.boxes and len(handed.tensors[key].boxes) == len(entry.boxes)
    assert handed.to_bytes() == manifest.to_bytes()


def test_nothing_is_decided_from_a_damaged_head_of_a_manifest(tmp_path):
    path = write(tmp_path)
    file, random_ = path / "manifest.json", random.Random(6)
    sound, told = file.read_bytes(), look_at(path)
    head = sound.index(b'"rng"')
    for place in random_.sample(range(8 * head), 400):
        changed = bytearray(sound)
        changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            found = look_at(path)
        except CheckpointError:
            continue
        # The digest of all is held against the lists later, when the whole is read.
        assert replace(found, digest=told.digest) == told, changed[place // 8 - 20 : place // 8 + 20]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(optimizer=7),
        lambda body: body.update(optimizer={"step": 1, "grad_scaler": []}),
        lambda body: body.update(optimizer={"step": "x", "grad_scaler": {}}),
        lambda body: body.update(rng=[7]),
        lambda body: body.update(rng=[{"rank": 0, "file": "rank_00000.safetensors", "state": 3}]),
        lambda body: body.update(save=3),
    ],
)
def test_forged_fields_are_refused(tmp_path, change):
    path = write(tmp_path)
    edit_manifest(path, change)
    with pytest.raises(CheckpointError, match="schema"):
        CheckpointReader(path)


def test_the_tool_lists_every_problem_of_many_checkpoints(tmp_path, capsys):
    root = tmp_path / "run"
    paths = [write(root, step) for step in (1, 2, 3, 4)]
    assert verify_checkpoint.main([str(root)]) == 0
    out = capsys.readouterr().out
    assert out.count(": sound, step") == 4
    (paths[1] / "rank_00000.safetensors").unlink()
    shutil.copy(paths[0] / "rank_00000-00001.safetensors", paths[1])
    (paths[2] / "manifest.json").write_text("{")
    (paths[3] / "notes.txt").write_text("x")
    assert verify_checkpoint.main([str(root), str(paths[0])]) == 4
    out, err = capsys.readouterr()
    assert out.count("DAMAGED") == 2 and "not of this save: notes.txt" in out and out.count("sound") == 3
    for text in ("3 problems", "the file is missing", "of another save (step 1", f"{paths[2]}/manifest.json", "fix:"):
        assert text in err, text
    assert verify_checkpoint.main([str(root), "--json"]) == 4
    out, err = capsys.readouterr()
    assert [len(one["problems"]) for one in json.loads(out)] == [0, 2, 1, 0] and err == ""
    assert verify_checkpoint.main([str(tmp_path / "nothing")]) == 4 and verify_checkpoint.main([]) == 2


def save_cut(root: Path, cuts: int, values: dict[str, torch.Tensor]) -> Path:
    """Each tensor in as many boxes along its first axis, as far as it has rows."""
    with CheckpointWriter(root, step=1, config="", max_file_bytes=200) as writer:
        for key, value in values.items():
            start = 0
            for rows in value.chunk(cuts):
                writer.add(key, value.shape, (start, *[0] * (value.dim() - 1)), rows)
                start += len(rows)
    assert writer.path is not None
    return writer.path


def test_digests_do_not_depend_on_the_layout_and_differences_are_named(tmp_path, capsys):
    values = tensors()
    values["model/a"][1, 2] = float("nan")
    one, two = save_cut(tmp_path / "one", 1, values), save_cut(tmp_path / "two", 3, values)
    found = []
    for path in (one, two):
        assert inspect_checkpoint.main([str(path), "--norms", "--digests", "--json"]) == 0
        found.append({row.pop("key"): row for row in json.loads(capsys.readouterr().out)["listed"]})
    assert [row.pop("boxes") for row in found[0].values()] != [row.pop("boxes") for row in found[1].values()]
    assert found[0] == found[1] and found[0]["model/a"]["not_finite"] == 1
    assert found[0]["model/c"]["norm"] == pytest.approx(float(values["model/c"].double().norm()))
    assert inspect_checkpoint.main([str(one), "--compare", str(two)]) == 0
    assert "4 tensors are equal, bit for bit" in capsys.readouterr().out
    changed = {key: value.clone() for key, value in values.items()}
    changed["model/b"][1, 2, 3] += 2
    changed["model/c"] = changed["model/c"].int()
    changed["model/d"] = changed.pop("optimizer/exp_avg/a")
    assert (
        inspect_checkpoint.main([str(one), "--compare", str(save_cut(tmp_path / "three", 2, changed)), "--json"]) == 4
    )
    told = {row["key"]: row for row in json.loads(capsys.readouterr().out)["differences"]}
    assert told.keys() == {"model/b", "model/c", "model/d", "optimizer/exp_avg/a"}
    assert (told["model/b"]["elements"], told["model/b"]["at"]) == (1, [1, 2, 3])
    assert told["model/b"]["largest"] == pytest.approx(2, abs=0.02) and "dtype" in told["model/c"]["what"]
    assert "only in" in told["model/d"]["what"]


def test_the_overview_of_a_checkpoint(tmp_path, capsys):
    path = write(tmp_path)
    assert inspect_checkpoint.main([str(tmp_path), "--tensors", "--only", "model/*"]) == 0
    out = capsys.readouterr().out
    for text in (f"{path}: step 5", "every byte is as it was saved", "model/b", "2x3x4", "bfloat16"):
        assert text in out, text
    assert "exp_avg/a" not in out.split("tensor")[-1]
    assert inspect_checkpoint.main([str(tmp_path), "--compare-step", "3"]) == 2
    (path / "rank_00000.safetensors").write_bytes(b"")
    assert inspect_checkpoint.main([str(path)]) == 4
    assert "rank_00000.safetensors" in capsys.readouterr().err
