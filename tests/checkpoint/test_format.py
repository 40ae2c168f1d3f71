"""The checkpoint folder: what is written is read, what is damaged is named, what is interrupted never counts."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from megatron_telechat.checkpoint import CheckpointReader, CheckpointWriter, latest_checkpoint
from megatron_telechat.checkpoint.companions import carry_companions
from megatron_telechat.checkpoint.find import find_checkpoint
from megatron_telechat.checkpoint.manifest import _digest
from megatron_telechat.errors import CheckpointError, ResourceError
from megatron_telechat.tensors.boxes import flat_range_boxes

ROOT = Path(__file__).resolve().parents[2]


def write(root: Path, step: int = 5, value: float = 0.0, max_file_bytes: int = 100) -> Path:
    with CheckpointWriter(root, step=step, config="model: {}\n", max_file_bytes=max_file_bytes) as writer:
        for key, tensor in tensors(value).items():
            size = tensor.numel()
            cuts = [0, size // 3, size // 2 + 1, size]
            for low, high in zip(cuts, cuts[1:], strict=False):
                for flat, box in flat_range_boxes(tuple(tensor.shape), low, high):
                    writer.add(key, tensor.shape, box.offset, tensor.view(-1)[flat : flat + box.numel].view(box.shape))
    assert writer.path is not None
    return writer.path


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "model/a": torch.randn(5, 7, generator=generator) + value,
        "model/b": torch.randn(2, 3, 4, generator=generator).bfloat16() + value,
        "optimizer/exp_avg/a": torch.randn(9, generator=generator).half() + value,
        "model/c": torch.arange(12).view(3, 4),
    }


def edit_manifest(path: Path, change) -> None:
    """Change the manifest and give it a right digest again: a forger, not an accident."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    for field in ("digest", "head_digest"):
        body.pop(field)
    change(body)
    file.write_text(json.dumps({"digest": _digest(body), **body}))


def test_every_box_of_every_tensor_reads_back(tmp_path):
    reader = CheckpointReader(write(tmp_path), verify=True)
    assert len(reader.manifest.files) > 2
    random_ = random.Random(1)
    for key, tensor in tensors().items():
        assert reader.read(key).equal(tensor) and reader.read(key).dtype == tensor.dtype
        for _ in range(30):
            offset = [random_.randrange(s) for s in tensor.shape]
            shape = [random_.randint(1, s - o) for s, o in zip(tensor.shape, offset, strict=True)]
            index = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
            assert reader.read(key, offset, shape).equal(tensor[index])


def test_the_files_are_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    path = write(tmp_path, max_file_bytes=1 << 30)
    found = load_file(path / "rank_00000.safetensors")
    assert sum(tensor.numel() for tensor in found.values()) == sum(t.numel() for t in tensors().values())
    assert (tmp_path / "latest").read_text() == "iter_0000005\n"


def test_tensors_that_are_not_covered_exactly_once_are_not_committed(tmp_path):
    with pytest.raises(CheckpointError, match="model/a: 2 of 4 elements are missing"):
        with CheckpointWriter(tmp_path, step=1, config="") as writer:
            writer.add("model/a", (4,), (0,), torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_commits_nothing(tmp_path):
    with pytest.raises(KeyError):
        with CheckpointWriter(tmp_path, step=1, config="") as writer:
            writer.add("model/a", (4,), (0,), torch.zeros(4))
            raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "longer", "missing", "empty", "link"])
def test_a_damaged_file_is_named_when_the_checkpoint_is_opened(tmp_path, damage):
    path = write(tmp_path)
    for name in CheckpointReader(path).manifest.files:
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        file = copy / name
        data = file.read_bytes()
        file.unlink()
        if damage == "link":
            file.symlink_to(path / name)
        elif damage != "missing":
            file.write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b""}[damage])
        with pytest.raises(CheckpointError, match=str(file)) as error:
            CheckpointReader(copy)
        assert "--load-step" in str(error.value)
        shutil.rmtree(copy)


def test_any_flipped_bit_of_a_file_is_found_by_verify(tmp_path):
    path = write(tmp_path)
    random_ = random.Random(4)
    for name in CheckpointReader(path).manifest.files:
        data = (path / name).read_bytes()
        for _ in range(25):
            position = random_.randrange(len(data) * 8)
            flipped = bytearray(data)
            flipped[position // 8] ^= 1 << position % 8
            (path / name).write_bytes(flipped)
            with pytest.raises(CheckpointError, match=name):
                CheckpointReader(path, verify=True)
        (path / name).write_bytes(data)
    CheckpointReader(path, verify=True)


def test_a_manifest_that_is_cut_or_changed_anywhere_is_refused(tmp_path):
    path = write(tmp_path)
    file = path / "manifest.json"
    data = file.read_bytes()
    random_ = random.Random(5)
    for number in range(300):
        changed = bytearray(data)
        if number % 3 == 0:
            changed = changed[: random_.randrange(len(data))]
        else:
            changed[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        file.write_bytes(changed)
        try:
            CheckpointReader(path)
        except CheckpointError as error:
            assert "manifest.json" in str(error)
        else:  # only what JSON itself does not tell apart, such as blank space, may pass
            assert json.loads(changed) == json.loads(data)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", "hf/../../x", "x.bin", "hf/.."]
)
def test_a_manifest_that_names_a_file_outside_the_folder_is_refused(tmp_path, name):
    path = write(tmp_path)

    def add(body):
        body["files"][name] = {"size": 1, "crc32": "00000000"}

    edit_manifest(path, add)
    with pytest.raises(CheckpointError, match="not a plain name inside the folder"):
        CheckpointReader(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda body: body["tensors"]["model/a"]["boxes"].pop(), "elements are missing"),
        (lambda body: body["tensors"]["model/a"]["boxes"].append(body["tensors"]["model/a"]["boxes"][0]), "overlap"),
        (lambda body: body["tensors"]["model/a"]["boxes"][0].update(file="other.safetensors"), "does not list"),
        (lambda body: body["tensors"]["model/a"].update(dtype="object"), "unknown dtype"),
        (lambda body: body["tensors"]["model/a"].update(shape=[5, -7]), "schema"),
        (lambda body: body.update(tensors=7), "schema"),
        (lambda body: body.update(step="five"), "schema"),
        (lambda body: body.pop("extra"), "schema"),
        (lambda body: body.update(schema_version=99), "schema version 99"),
        (lambda body: body.update(format="other"), "not the manifest"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, change, message):
    path = write(tmp_path)
    edit_manifest(path, change)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path)


def test_a_tensor_that_is_not_what_the_manifest_says_is_refused(tmp_path):
    path = write(tmp_path)
    edit_manifest(path, lambda body: body["tensors"]["optimizer/exp_avg/a"].update(dtype="bfloat16"))
    with pytest.raises(CheckpointError, match="the manifest says bfloat16"):
        CheckpointReader(path).read("optimizer/exp_avg/a")


def test_the_newest_sound_checkpoint_is_found_and_the_damaged_ones_are_named(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "nothing") is None
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == newer and latest_checkpoint(older) == older
    for hint in ("", "garbage\0", "iter_0000999\n"):
        (tmp_path / "latest").write_text(hint)
        assert latest_checkpoint(tmp_path) == newer
    (newer / "rank_00000.safetensors").unlink()
    path, notes = find_checkpoint(tmp_path)
    assert path == older and "rank_00000.safetensors" in notes[0]
    (older / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="2 problems"):
        latest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there: 5, 10"):
        find_checkpoint(tmp_path, 7)


def test_a_step_saved_again_replaces_the_old_folder_as_a_whole(tmp_path):
    write(tmp_path, 5, value=0.0)
    path = write(tmp_path, 5, value=1.0)
    reader = CheckpointReader(path, verify=True)
    assert all(reader.read(key).equal(tensor) for key, tensor in tensors(1.0).items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_0000005", "latest"]


def test_a_full_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    from megatron_telechat.checkpoint import disk

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(100, 0, 119))
    disk.require_free_space(tmp_path, 99)
    with pytest.raises(ResourceError, match="free"):
        disk.require_free_space(tmp_path, 100)


def test_only_the_newest_sound_checkpoints_are_kept(tmp_path):
    from megatron_telechat.checkpoint.retention import prune

    paths = [write(tmp_path, step) for step in (1, 2, 3, 4, 5)]
    (paths[3] / "manifest.json").write_text("{")  # damaged: not counted, not removed
    assert prune(tmp_path, 0) == []
    assert prune(tmp_path, 2, protected=paths[0]) == [paths[1]]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [paths[i].name for i in (0, 2, 3, 4)]


@pytest.mark.heavy
@pytest.mark.parametrize("scenario", ["new", "replace"])
def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(tmp_path, scenario):
    worker = Path(__file__).with_name("worker_killed_save.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), scenario],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) > 8 and lines[-1]["killed_before"] is None
    for line in lines:
        assert line["newest"] in ([1.0], [2.0]), line  # all old or all new, never a mix
        assert line["committed"] == ([10, 20] if line["newest"] == [2.0] and scenario == "new" else [10]), line
        wanted = {"iter_0000030", "latest", *(f"iter_{step:07d}" for step in line["committed"])}
        found = set(line["after_the_next_save"])
        assert {name.split(".")[0] for name in found} == wanted, line
        assert not any(".tmp-" in name for name in found), line
    assert lines[0]["newest"] == [1.0] and lines[-1]["newest"] == [2.0]
    assert any(line["leftovers"] for line in lines)


def test_files_beside_the_weights_that_cannot_be_written_are_a_resource_error(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "occupied").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        carry_companions(tmp_path / "hf", tmp_path / "occupied")
