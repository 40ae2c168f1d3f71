"""Damaged checkpoints through the public door that loads them, on two ranks: what is found, named and passed over.

Two saves of one run, steps 1 and 2, are loaded again and again with something changed in the newer one. The state of
each rank is held against the live state of the step that was loaded.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tests.checkpoint.worker_layouts import Built, expert, run_config
from tests.harness import Cases

cases = Cases()

SHARED = Path(os.environ.get("CHECKPOINT_TEST_FOLDER", "/nonexistent"))
FLIPS = int(os.environ.get("CHECKPOINT_TEST_FLIPS", "60"))
NEWER = "iter_0000002"


class Saved:
    """A run of two steps with a checkpoint of each, and its live state at both."""

    def __init__(self, name: str, seed: int):
        from megatron_telechat.checkpoint import save_checkpoint
        from megatron_telechat.checkpoint.lineage import Branch

        self.root = SHARED / name
        self.built = Built(two_ranks(seed))
        branch = Branch()
        self.at: dict[int, dict[str, Any]] = {}
        for step in (1, 2):
            self.built.step()
            save_checkpoint(self.root, self.built.state(step, 4 * step, branch=branch), self.built.run, self.parallel)
            self.at[step] = self.live()

    @property
    def parallel(self) -> Any:
        return self.built.parallel

    def live(self) -> dict[str, Any]:
        from megatron_telechat.checkpoint.optimizer_state import optimizer_slices

        found = {f"{item.virtual_stage}/{item.name}": item.parameter.detach() for item in self.built.shards}
        for one in optimizer_slices(self.built.optimizer, self.built.shards):
            found |= {f"{name}/{one.shard.piece.key}/{one.start}": each for name, each in one.tensors.items()}
        return {key: value.clone() for key, value in found.items()}

    def load(self, root: Path | None = None, step: int | None = None) -> tuple[int, str]:
        """(step, notes) of what was loaded, held against the state of that step; (0, error) where nothing was."""
        from megatron_telechat.checkpoint import load_checkpoint
        from megatron_telechat.errors import CheckpointError

        before = self.live()
        try:
            info = load_checkpoint(root or self.root, self.built.state(), self.built.run, self.parallel, step=step)
        except CheckpointError as error:
            require_same(self.live(), before, "a load that fails touches nothing")
            return 0, str(error)
        require_same(self.live(), self.at[info.step], f"step {info.step}")
        return info.step, info.message

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        from megatron_telechat.parallel.agreement import from_rank_0

        return from_rank_0(work() if self.parallel.rank == 0 else None)


def two_ranks(seed: int) -> Any:
    first = SHARED / "first"
    (first / "hf").mkdir(parents=True, exist_ok=True)
    for name, text in (("config.json", '{"model_type": "none"}'), ("tokenizer.json", "{}" * 40)):
        (first / "hf" / name).write_text(text)
    run = run_config("moe", "bf16", expert(2), seed)
    return replace(
        run,
        parallel=replace(run.parallel, world_size=2),
        checkpoint=replace(run.checkpoint, pretrained_checkpoint=str(first)),
    )


def require_same(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    different = [key for key in wanted if not found[key].equal(wanted[key])]
    assert not different, f"{what}: {different[:3]} of {len(different)} differ"


@cache
def run() -> Saved:
    return Saved("run", seed=1)


@cases.case
def flipped_bits() -> dict:
    """A bit at a random place of a random file; counts by what came of it."""
    import torch

    saved, random_ = run(), random.Random(7)
    folder = saved.root / NEWER
    files = sorted(path for path in folder.rglob("*") if path.is_file()) + [saved.root / "latest"]
    counts = {"passed over and named": 0, "the hint, which decides nothing": 0, "blanks of the manifest": 0}
    contents = {file: file.read_bytes() for file in files}
    torch.distributed.barrier()
    for number in range(FLIPS):
        file = files[number % len(files)]
        sound = contents[file]
        place = random_.randrange(8 * len(sound))
        changed = bytearray(sound)
        changed[place // 8] ^= 1 << place % 8
        saved.on_rank_0(lambda file=file, changed=changed: file.write_bytes(changed))
        step, said = saved.load()
        where = f"bit {place} of {file.name}: step {step}, {said}"
        if step == 1:
            assert "passed over" in said and file.name in said, where
            counts["passed over and named"] += 1
        elif file.name == "latest":
            assert step == 2, where
            counts["the hint, which decides nothing"] += 1
        else:
            assert step == 2 and file.name == "manifest.json" and json.loads(changed) == json.loads(sound), where
            counts["blanks of the manifest"] += 1
        if saved.parallel.rank == 0:
            require_known_start(saved.root)
        saved.on_rank_0(lambda file=file, sound=sound: file.write_bytes(sound))
    assert saved.load()[0] == 2
    return {"counts": counts, "files": [file.name for file in files]}


def require_known_start(root: Path) -> None:
    """What a start is decided from, before anything is verified, is of a sound manifest too."""
    from megatron_telechat.checkpoint.start import Start, checkpoint_of

    found = checkpoint_of(Start(root))
    assert found is not None and (found.step, found.consumed_samples) in ((1, 4), (2, 8)), found
    assert found.lineage.number == found.step, found.lineage


def damages(folder: Path, other: Path) -> dict[str, tuple[str, Callable[[], None], str]]:
    """name -> (the file at fault, what is done to it, what must be said of it); ``other``: the newer save of another
    run."""
    older = folder.parent / "iter_0000001"
    first, manifest, companion = "rank_00000.safetensors", "manifest.json", "hf/tokenizer.json"

    def write(name: str, change: Callable[[bytes], bytes]) -> Callable[[], None]:
        return lambda: (folder / name).write_bytes(change((folder / name).read_bytes())) and None

    def copy(source: Path, name: str) -> Callable[[], None]:
        return lambda: shutil.copyfile(source / name, folder / name) and None

    def link(name: str) -> None:
        shutil.move(folder / name, folder.parent / "moved")
        (folder / name).symlink_to(folder.parent / "moved")

    found = {
        "shard of another step": (first, copy(older, first), "of another save (step 1"),
        "shard of another run": (
            "rank_00001.safetensors",
            copy(other, "rank_00001.safetensors"),
            "another save (step 2",
        ),
        "manifest of another step": (NEWER, copy(older, manifest), "of step 1"),
        "manifest of another run": (first, copy(other, manifest), "of another save (step 2"),
        "shards exchanged": (first, lambda: exchange(folder), "the manifest"),
        "rest of a manifest": (manifest, write(manifest, lambda data: data[: len(data) // 2]), "not JSON"),
    }
    for name in (first, manifest, companion):
        reason = {first: "the manifest says", companion: "the manifest says", manifest: "manifest"}[name]
        found[f"{name} cut"] = (name, write(name, lambda data: data[:-3]), reason)
        found[f"{name} empty"] = (name, write(name, lambda data: b""), reason)
        found[f"{name} zeros"] = (name, write(name, lambda data: bytes(len(data))), "manifest")
        found[f"{name} longer"] = (name, write(name, lambda data: data + b"x"), reason)
        found[f"{name} deleted"] = (name, (folder / name).unlink, "")
        found[f"{name} linked"] = (name, lambda name=name: link(name), "symbolic link")
    return found


def exchange(folder: Path) -> None:
    """Two files of one save in each other's place: same size, same save id."""
    one, two = (folder / f"rank_{rank:05d}.safetensors" for rank in (0, 1))
    one.rename(folder.parent / "moved")
    two.rename(one)
    (folder.parent / "moved").rename(two)


@cases.case
def damaged_files() -> dict:
    """Each damage is named and passed over; a checkpoint that is named itself is refused; nothing loads wrong."""
    saved = run()
    other = Saved("other", seed=2)
    folder, sound = saved.root / NEWER, SHARED / "sound"
    saved.on_rank_0(lambda: shutil.copytree(folder, sound) and None)
    said = {}
    for name, (file, work, reason) in damages(folder, other.root / NEWER).items():
        saved.on_rank_0(lambda work=work: work())
        step, notes = saved.load()
        named = saved.load(step=2)
        # asked by one rank: it may have put the folder back before another one looks
        there = saved.on_rank_0((folder / "manifest.json").is_file)
        alone = saved.load(folder) if there else named
        said[name] = {"step": step, "notes": notes, "named": named, "alone": alone, "file": file, "reason": reason}
        saved.on_rank_0(lambda: (shutil.rmtree(folder), shutil.copytree(sound, folder)) and None)
        saved.on_rank_0(lambda: (folder.parent / "moved").unlink(missing_ok=True))
    for text in ("", "garbage\0", "iter_0000009\n"):
        saved.on_rank_0(lambda text=text: (saved.root / "latest").write_text(text) and None)
        assert saved.load()[0] == 2
    return said


@cases.case
def the_work_is_shared() -> list:
    """(files checked by this rank, files it knew already) of a first and a second load."""
    from megatron_telechat.checkpoint import verify

    saved = run()
    read: list[str] = []
    original = verify.crc32_of_files

    def watched(files: Any, *more: Any) -> Any:
        read.extend(path.name for path, _ in files)
        return original(files, *more)

    verify.crc32_of_files = watched
    try:
        found = []
        for forget in (True, False):
            if forget:
                verify.forget()
            read.clear()
            assert saved.load()[0] == 2
            found.append(sorted(read))
        return found
    finally:
        verify.crc32_of_files = original


if __name__ == "__main__":
    cases.main()
