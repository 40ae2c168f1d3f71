"""Cases of local checkpoints, on jobs of two nodes; prints one JSON line a case. See `local_jobs`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch._dynamo  # noqa: E402, F401  (once, for all ranks; an optimizer loads it)

import megatron_telechat.training.sequence  # noqa: E402, F401
from megatron_telechat.cli import inspect_checkpoint, verify_checkpoint  # noqa: E402
from tests.training import writer_faults  # noqa: E402
from tests.training.local_jobs import DISK, FLAGS, LOCAL, MIRRORED, Job, flip  # noqa: E402
from tests.training.slow_copies import SlowCopies  # noqa: E402

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
CASES: dict[str, Callable[[], Any]] = {}
KILLED = [-9, -9]


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def job(name: str, flags: list[str] | None = None) -> Job:
    return Job(FOLDER / name, flags or [*FLAGS, *MIRRORED])


def whole() -> dict[str, list]:
    """The run without local checkpoints and kills."""
    one = Job(FOLDER / "whole", FLAGS)
    if not one.run.exists():
        assert one.start() == [0, 0], one.log()
    return one.losses()


def different(one: Job) -> dict[str, Any]:
    """Steps whose loss or gradient norm is not that of the whole run."""
    reference, found = whole(), one.losses()
    return {step: (found.get(step), reference[step]) for step in reference if found.get(step) != reference[step]}


def killed_at(name: str, until: int, flags: list[str] | None = None) -> Job:
    one = job(name, flags)
    assert one.start(until=until) == KILLED, one.log()
    return one


def copy_of(one: Job, name: str) -> Job:
    """What a killed job left, to be damaged in another way."""
    shutil.copytree(one.folder, FOLDER / name)
    return Job(FOLDER / name, one.flags, one.name, one.ranks)


@case
def a_node_is_lost() -> Any:
    """All ranks are killed, and the disk of a node is new."""
    one = killed_at("lost", 19)
    before = [one.parts(node) for node in (0, 1)]
    shutil.copytree(one.folder, FOLDER / "killed")
    disks = [str(one.node(node) / DISK) for node in (0, 1)]
    verified, told = _tool(verify_checkpoint.main, *disks)
    compared, equal = _tool(inspect_checkpoint.main, disks[0], "--compare", disks[1])
    one.wipe(1)
    codes = one.start()
    return {
        "before": before,
        "tools": [verified, compared, equal["compared"], equal["differences"]],
        "whole": {each["step"]: each["local"]["whole"] for each in told if "local" in each},
        "codes": codes,
        "resumed": one.resumed_at(),
        "different": different(one),
        "log": [line for line in one.log().splitlines() if "part" in line],
        "after": [one.parts(node) for node in (0, 1)],
        "local_steps": sorted({record["local_step"] for record in one.records() if "local_step" in record}),
    }


def _tool(main: Callable[[list[str]], int], *arguments: str) -> tuple[int, Any]:
    """Exit code and JSON of a tool."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*arguments, "--json"])
    return code, json.loads(out.getvalue())


def killed() -> Job:
    """A copy of the job of `a_node_is_lost` after its kill: shared 10, local 12 and 16."""
    if not (FOLDER / "killed").exists():
        one = killed_at("lost_again", 19)
        shutil.copytree(one.folder, FOLDER / "killed")
    return Job(FOLDER / "killed", [*FLAGS, *MIRRORED])


@case
def one_flipped_bit() -> Any:
    """In the own copy of a part; in both copies."""
    return {
        "own": damaged("own", ".safetensors", (0, 0, 16)),
        "both": damaged("both", ".safetensors", (0, 0, 16), (1, 0, 16)),
    }


@case
def every_copy_damaged() -> Any:
    """Both manifests of a part; both copies of a part of either save."""
    everything = ((0, 0, 16), (1, 0, 16), (0, 1, 12), (1, 1, 12))
    return {
        "manifest": damaged("manifest", ".json", (0, 1, 16), (1, 1, 16)),
        "all": damaged("all", ".safetensors", *everything),
    }


@case
def a_node_is_lost_and_its_mirror_damaged() -> Any:
    """All that is left of the parts of rank 1 is a damaged copy of each: the shared checkpoint, on both ranks."""
    return damaged("lost_all", ".safetensors", (0, 1, 16), (0, 1, 12), lost=1)


@case
def damage_in_two_places() -> Any:
    """Shared 10, local 12 and 16, of which several are hit."""
    everything = ((0, 0, 16), (1, 0, 16), (0, 1, 12), (1, 1, 12))
    return {
        "mirrors": damaged("mirrors", ".safetensors", (1, 0, 16), (0, 1, 16)),
        "lost": damaged("lost", ".safetensors", (0, 1, 16), lost=1),
        "shared": damaged("shared", ".safetensors", shared=10),
        "all": damaged("nothing_left", ".safetensors", *everything, shared=10),
    }


NINE = [*FLAGS, *MIRRORED, "--save-interval", "9"]
BOTH = {step: ((0, 0, step), (1, 0, step)) for step in (12, 16)}


def killed_behind_a_shared_save() -> Job:
    """Shared 9 and 18, local 12 and 16 between them."""
    one = Job(FOLDER / "killed_behind", NINE)
    return one if one.folder.exists() else killed_at("killed_behind", 19, NINE)


@case
def a_local_one_between_two_shared_ones() -> Any:
    """The newer shared one is damaged: the local one of step 16. Its run sets the damaged one aside with its own save
    of that step, behind which it is killed."""
    one = copy_of(killed_behind_a_shared_save(), "between")
    flip(one.run / "checkpoints" / "iter_0000018" / "rank_00001.safetensors")
    codes = [one.start(until=19)]
    passed, names = passed_over(one), sorted(path.name[:19] for path in (one.run / "checkpoints").glob("iter_*"))
    codes.append(one.start())
    return {
        "codes": codes,
        "resumed": one.resumed_at(),
        "passed": passed,
        "shared": names,
        "again": passed_over(one),
        "different": different(one),
    }


@case
def a_fall_back_over_both_tiers() -> Any:
    """Shared 18 is damaged, and the newest local one, or the older one too, or all; only its manifest; and a run that
    fell back to step 12 is killed again before it has saved into the shared folder."""
    behind = killed_behind_a_shared_save()
    every = (*BOTH[16], *BOTH[12])
    out: dict[str, Any] = {
        "newest": damaged("newest_too", ".safetensors", *BOTH[16], shared=18, of=behind),
        "both": damaged("both_tiers", ".safetensors", *every, shared=18, of=behind),
        "manifest": damaged("manifest_of_shared", "", shared=18, of=behind, name_of_shared="manifest.json"),
        "lost": damaged("lost_between", ".safetensors", (0, 1, 16), shared=18, lost=1, of=behind),
    }
    nothing = copy_of(behind, "nothing_sound")
    flip(nothing.run / "checkpoints" / "iter_0000009" / "rank_00000.safetensors")
    out["all"] = damaged("all_of_both", ".safetensors", *every, shared=18, of=nothing)
    again = copy_of(behind, "fell_back_twice")
    for path in (path for place in BOTH[16] for path in again.files(*place) if path.suffix == ".safetensors"):
        flip(path)
    flip(again.run / "checkpoints" / "iter_0000018" / "rank_00001.safetensors")
    out["twice"] = {"codes": [again.start(until=18), again.start()], "resumed": again.resumed_at()}
    out["twice"]["different"] = different(again)
    return out


def damaged(
    name: str,
    suffix: str,
    *places: tuple[int, int, int],
    lost: int | None = None,
    shared: int | None = None,
    of: Job | None = None,
    name_of_shared: str = "rank_00001.safetensors",
) -> dict[str, Any]:
    """What a start finds after one bit of a file was flipped in each place: node, rank, step.

    Args:
        lost: a node whose disk is new.
        shared: step of the shared checkpoint of which a bit is flipped, in this file of it.
        of: the job; unset: that of `killed`.
    """
    one = copy_of(of or killed(), f"flipped_{name}")
    if lost is not None:
        one.wipe(lost)
    for place in places:
        flip(next(path for path in one.files(*place) if path.suffix == suffix))
    if shared is not None:
        flip(one.run / "checkpoints" / f"iter_{shared:07d}" / name_of_shared)
    codes = one.start()
    found = {"codes": codes, "resumed": one.resumed_at(), "different": different(one), "passed": passed_over(one)}
    return {**found, "logs": [one.log(rank) for rank in (0, 1)] if codes != [0, 0] else []}


def passed_over(one: Job) -> list[str]:
    """What was passed over, node and folder without the names that each job has of its own."""
    found = dict.fromkeys(line.strip() for line in one.log().splitlines() if "passed over" in line)
    return [re.sub(rf"{re.escape(str(one.folder))}/(node\d)/{DISK}/[0-9a-f]+", r"\1", line) for line in found]


@case
def the_step_waits_for_the_copy() -> Any:
    """Of the weights, before it changes them."""

    def slow(trainer) -> None:
        trainer.tier.saves.backend = SlowCopies(trainer.backend, 0.3)
        trainer.tier.saves.copies_are_slow = True
        trainer.tier.interval = 12
        take_step = trainer.take_step

        def step(iterators):
            if trainer.step == 14:
                del trainer.tier.saves.copies_are_slow
            return take_step(iterators)

        trainer.take_step = step

    one = job("slow_copies")
    codes = [one.start(until=19, hook=slow), one.start()]
    return {"codes": codes, "resumed": one.resumed_at(), "different": different(one)}


@case
def the_shared_one_is_newer() -> Any:
    """Killed behind the shared save of step 10, before the local one of 12."""
    one = killed_at("shared", 12)
    return {"parts": one.parts(0), "codes": one.start(), "resumed": one.resumed_at(), "different": different(one)}


@case
def a_roll_back_is_not_undone() -> Any:
    """Back to the shared checkpoint of step 10, past the local one of 16. The same command goes on with what its branch
    saved on the nodes; without the flag the run is where it was, until the branch has saved into the shared folder."""
    one = copy_of(killed(), "rolled")
    back = ["--load-step", "10", "--lr", "2e-3"]
    out: dict[str, Any] = {"codes": [one.start(*back, until=15)]}
    out["branch"] = one.parts(0)
    other = copy_of(one, "rolled_trunk")
    out["codes"] += [one.start(*back), other.start(until=20)]
    out["resumed"] = [one.resumed_at(), other.resumed_at()]
    plain = copy_of(killed(), "rolled_whole")
    plain.wipe(0)
    plain.wipe(1)
    out["codes"].append(plain.start(*back))
    out["different"] = {step: loss for step, loss in one.losses().items() if plain.losses()[step] != loss}
    return out


@case
def a_run_from_other_weights_goes_on() -> Any:
    """--load of another run's folder, killed before anything is saved into its own."""
    source = killed()
    one = Job(
        FOLDER / "from_other", [*FLAGS, *MIRRORED, "--load", str(source.run / "checkpoints"), "--load-step", "10"]
    )
    codes = [one.start(until=15), one.start()]
    return {
        "codes": codes,
        "resumed": one.resumed_at(),
        "different": {k: v for k, v in different(one).items() if int(k) > 10},
    }


@case
def two_runs_share_a_disk() -> Any:
    """A run of another folder takes nothing and removes nothing."""
    one = copy_of(killed(), "neighbours")
    before = one.parts(0)
    other = Job(one.folder, one.flags, "other")
    codes = [other.start(until=11)]
    mixed = one.parts(0)
    own, theirs = ((run / "run_id").read_text().strip() for run in (other.run, one.run))
    # By mistake: parts of another run among those of this one.
    shutil.copytree(one.node(0) / DISK / theirs, one.node(0) / DISK / own, dirs_exist_ok=True)
    codes.append(other.start(until=19))
    return {
        "codes": codes,
        "before": before,
        "mixed": mixed,
        "resumed": other.resumed_at(),
        "after": one.parts(0),
        "passed": passed_over(other),
    }


@case
def a_disk_is_full() -> Any:
    """On one node: one warning, no local checkpoint, and everything else as without."""
    one = job("full")
    small = lambda trainer: _in_writer(trainer, writer_faults.small_disk, 4096)  # noqa: E731
    codes = one.start(hook=small, hooked=1)
    return {
        "codes": codes,
        "parts": [one.parts(0), one.parts(1)],
        "leftovers": [str(path) for node in (0, 1) for path in (one.node(node) / DISK).glob("*/*/*.tmp-*")],
        "warnings": [[line for line in one.log(rank).splitlines() if "warning" in line] for rank in (0, 1)],
        "different": different(one),
    }


@case
def a_writer_is_killed() -> Any:
    """The process beside a rank: no more local checkpoints, and the run goes on."""

    def end(trainer) -> None:
        trainer.tier.saves.writer.submit(writer_faults.end)
        while trainer.tier.saves.writer.is_alive():
            time.sleep(0.01)

    one = job("writer")
    codes = one.start(hook=end, hooked=1)
    warnings = [[line for line in one.log(rank).splitlines() if "warning" in line] for rank in (0, 1)]
    return {"codes": codes, "warnings": warnings, "different": different(one)}


@case
def without_copies_a_lost_node_is_lost() -> Any:
    """Then the shared folder is gone back to, and it is said."""
    one = killed_at("alone", 19, [*FLAGS, *LOCAL])
    before = [one.parts(node) for node in (0, 1)]
    one.wipe(1)
    codes = one.start()
    return {
        "before": before,
        "codes": codes,
        "resumed": one.resumed_at(),
        "passed": passed_over(one),
        "different": different(one),
    }


@case
def another_number_of_ranks() -> Any:
    """One rank reads what two have saved, its own part and the mirrored one."""
    one = copy_of(killed(), "fewer")
    fewer = Job(one.folder, one.flags[: one.flags.index("--replication")], one.name, 1)
    codes = fewer.start()
    return {"codes": codes, "resumed": fewer.resumed_at(), "steps": sorted(map(int, fewer.losses()))}


@case
def one_folder_for_two_nodes() -> Any:
    one = Job(FOLDER / "same", [*FLAGS, *MIRRORED, "--non-persistent-local-ckpt-dir", str(FOLDER / "same" / "disk")])
    return {"codes": one.start(), "log": one.log()}


@case
def a_disk_that_cannot_be_written() -> Any:
    """From the start, on one node: the run goes on without, and still reads what the other node holds."""
    one = copy_of(killed(), "unwritable")
    one.wipe(1)
    one.node(1).mkdir()
    (one.node(1) / DISK).write_text("a file in its place")
    codes = one.start()
    return {
        "codes": codes,
        "resumed": one.resumed_at(),
        "warnings": [line for line in one.log().splitlines() if "warning" in line],
        "different": different(one),
    }


@case
def beside_asynchronous_saves() -> Any:
    """The shared save of step 10 is slow: a local one of step 12 is whole before it is committed. Killed behind that,
    and before it."""
    out: dict[str, Any] = {"codes": [], "shared": [], "resumed": [], "different": []}
    for name, seconds, until in (("committed", 0.15, 19), ("not_committed", 60.0, 15)):
        one = job(f"beside_{name}", [*FLAGS, *MIRRORED, "--checkpoint-mode", "async"])

        def slow(trainer, seconds=seconds, until=until) -> None:
            beside = trainer.saving._beside
            beside._writer.submit(writer_faults.slow_disk, seconds)
            beside._writer.result()
            if until == 19:
                trainer.tier.interval = 12  # no later local one
            take_step = trainer.take_step

            def step(iterators):
                if trainer.step == 15:
                    assert beside.under_way and trainer.tier.step == 12, "what the case is about"
                while trainer.step == 16 and beside.under_way and not beside.report().over:
                    time.sleep(0.01)
                return take_step(iterators)

            trainer.take_step = step

        out["codes"].append(one.start(until=until, hook=slow))
        out["shared"].append(sorted(path.name for path in (one.run / "checkpoints").glob("iter_???????")))
        out["codes"].append(one.start())
        out["resumed"].append(one.resumed_at())
        out["different"].append(different(one))
    return out


STAGES = """
stages:
  - from_tokens: 0
  - {from_tokens: 2048, seq_length: 64, rotary_base: 1e5, rotary_training_seqlen: 64, global_batch_size: 4,
     tensor_model_parallel_size: 2}
"""


@case
def over_the_switch_of_a_stage() -> Any:
    """To another layout at step 8, which is a shared save. Killed behind the local one of step 12; and at step 7."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    config = FOLDER / "stages.yaml"
    config.write_text(STAGES)
    flags = [*FLAGS, "--config", str(config), "--save-interval", "100"]
    plain = Job(FOLDER / "stages_whole", flags)
    out: dict[str, Any] = {"codes": [plain.start()]}
    for until in (15, 8):
        one = Job(FOLDER / f"stages_{until}", [*flags, *MIRRORED])
        out["codes"].append(one.start(until=until))
        one.wipe(1)
        out["codes"].append(one.start())
        out[str(until)] = {
            "resumed": one.resumed_at(),
            "different": [step for step, values in plain.losses().items() if one.losses().get(step) != values],
        }
    return out


def _in_writer(trainer, function, *args) -> None:
    trainer.tier.saves.writer.submit(function, *args)
    trainer.tier.saves.writer.result()


def kills(points: list[str]) -> None:
    """Rank 1 is killed before so manieth call of its writer, rank 0 with it; then node 0 loses its disk."""
    for point in points:
        name, number = point.split(":")
        one = job(f"kill_{name}_{number}")
        codes = one.start(
            hook=lambda trainer, name=name, number=number: _in_writer(
                trainer, writer_faults.kill_rank_before, name, int(number)
            ),
            hooked=1,
        )
        newest = [one.parts(node) for node in (0, 1)]
        one.wipe(0)
        again = one.start()
        line = {"point": point, "codes": [codes, again], "parts": newest, "resumed": one.resumed_at()}
        print(json.dumps({**line, "different": different(one)}), flush=True)


def main() -> None:
    if sys.argv[2] == "kills":
        return kills(sys.argv[3:])
    for name in sys.argv[2:] or CASES:
        began = time.monotonic()
        try:
            line = {"case": name, "found": CASES[name]()}
        except BaseException:
            line = {"case": name, "error": traceback.format_exc()}
        print(json.dumps({**line, "seconds": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
