"""Runs with their optimizer state on the host, or in 16 bits: digests of weights and state, accounts of their bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, MOE, make_trainer  # noqa: E402

STEPS = 30
KILLED_AFTER = 17
BUCKET_ELEMENTS = 4096
"""Small, so that there are many buckets, and parameters that are cut into several."""
BF16, FP16 = ([f"--{kind}" if word == "--fp32" else word for word in DENSE] for kind in ("bf16", "fp16"))
MOE_BF16 = ["--bf16" if word == "--fp32" else word for word in MOE]
SCHEDULE = ["--lr-decay-style", "cosine", "--lr-decay-iters", "40"]
SHARDED = ["--use-distributed-optimizer"]
OVERLAPPED = [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]
OFFLOAD = ["--optimizer-cpu-offload"]
IN_TURN = [*OFFLOAD, "--overlap-cpu-optimizer-d2h-h2d"]
NARROW = "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16".split()

cases = Cases()


def folder_of(name: str) -> Path:
    return Path(os.environ["OFFLOAD_DIR"]) / name


def trainer_of(flags: list[str], name: str, steps: int = STEPS):
    from megatron_telechat.training import resting

    with patch.object(resting, "BUCKET_ELEMENTS", BUCKET_ELEMENTS):
        return make_trainer([*flags, *SCHEDULE, "--train-iters", str(steps)], folder_of(name))


def close(trainer) -> None:
    """End a trainer, so that another one can begin."""
    from megatron_telechat import parallel

    trainer.release()
    parallel.destroy(keep_world=True)


def slices(trainer) -> Iterator:
    from megatron_telechat.checkpoint.optimizer_state import optimizer_slices

    yield from sorted(
        optimizer_slices(trainer.optimizer, trainer.shards), key=lambda one: (one.shard.piece.key, one.start)
    )


def digest(trainer) -> str:
    """Of every bit of the parameters of this rank and of its optimizer's state."""
    import torch

    from megatron_telechat.checkpoint.optimizer_state import adam_steps
    from megatron_telechat.training.param_gather import gathered_parameters

    found = hashlib.sha256()

    def add(name: str, tensor: torch.Tensor) -> None:
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    with gathered_parameters(trainer.virtual_stages):
        for shard in trainer.shards:
            add(shard.piece.key, shard.parameter)
    for item in slices(trainer):
        for name in sorted(item.tensors):
            add(f"{item.shard.piece.key} {item.start} {name}", item.tensors[name])
    found.update(str(sorted(adam_steps(trainer.optimizer))).encode())
    return found.hexdigest()


def account(trainer) -> dict[str, int]:
    """Bytes of the optimizer that are alive: on the device, on the host, and those that the memory model says."""
    from megatron_telechat.checkpoint.optimizer_state import leaf_optimizers, leaves_of
    from megatron_telechat.costs.memory import stage_memory
    from megatron_telechat.training.resting import RestingAdam

    tensors = []
    for part in leaf_optimizers(trainer.optimizer):
        tensors += [leaf.stepped for leaf in leaves_of(part) if not leaf.own_master]
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        if isinstance(part.optimizer, RestingAdam):
            tensors += list(part.optimizer.tensors())
    of_device, of_host = {}, {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        place = of_host if trainer.backend.host_memory.holds(tensor) else of_device
        place[storage._cdata] = storage.nbytes()
    with patch("megatron_telechat.costs.optimizer_state.BUCKET_ELEMENTS", BUCKET_ELEMENTS):
        stage = stage_memory(trainer.run)[trainer.state.pp_rank]
    return {
        "device": sum(of_device.values()),
        "host": sum(of_host.values()),
        "ledger": trainer.backend.host_memory.nbytes,
        "modelled device": round(stage.optimizer_bytes),
        "modelled host": round(stage.host_bytes),
    }


def train(flags: list[str], name: str, steps: int = STEPS) -> dict:
    """Train up to this step."""
    trainer = trainer_of(flags, name)
    try:
        iterators = trainer.training_iterators()
        results = [trainer.take_step(iterators)[0] for _ in range(steps - trainer.step)]
        return {
            "digest": digest(trainer),
            "loss": [result.loss for result in results],
            "grad_norm": [result.grad_norm for result in results],
            "skipped": sum(result.skipped is not None for result in results),
            "bytes": account(trainer),
        }
    finally:
        close(trainer)


def fit(flags: list[str], name: str, steps: int) -> str:
    """Run to this step and save; on from the checkpoint that is there. Returns the digest."""
    trainer = trainer_of([*flags, "--checkpoint-mode", "async"], name, steps)
    try:
        assert trainer.fit() == 0
        return digest(trainer)
    finally:
        close(trainer)


def tensors_of(folder: Path) -> dict[str, str]:
    """Digest of every tensor of a checkpoint."""
    import torch

    from megatron_telechat.checkpoint import CheckpointReader

    reader = CheckpointReader(folder)
    found = {}
    for key in sorted(reader.entries):
        values = reader.read(key).contiguous().view(-1)
        found[key] = f"{values.dtype} {hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()}"
    return found


def pair(name: str, flags: list[str], offload: list[str], **more) -> dict:
    """A run without and a run with offload."""
    return {"none": train(flags, f"{name}_none", **more), "offload": train([*flags, *offload], name, **more)}


if os.environ.get("WORLD_SIZE") == "4":

    @cases.case
    def tp2_pp2():
        flags = [*BF16, *"--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers 2".split()]
        return pair("tp2_pp2", flags, OFFLOAD)

else:

    @cases.case
    def dp2_sharded_overlapped():
        return pair("dp2_sharded_overlapped", [*BF16, *OVERLAPPED], IN_TURN)

    @cases.case
    def ep2_sharded():
        return pair("ep2_sharded", [*MOE_BF16, *SHARDED, "--expert-model-parallel-size", "2"], OFFLOAD)

    @cases.case
    def fp16_skips():
        """The first gradients overflow at this scale."""
        flags = [*FP16, *SHARDED, *"--initial-loss-scale 16777216 --hysteresis 1 --loss-scale-window 5".split()]
        return pair("fp16_skips", flags, IN_TURN)

    @cases.case
    def half_of_it():
        return pair("half_of_it", BF16, [*IN_TURN, "--optimizer-offload-fraction", "0.5"], steps=6)

    @cases.case
    def fp32_moments_alone():
        return pair("fp32_moments_alone", [*DENSE, *SHARDED], OFFLOAD, steps=6)

    @cases.case
    def narrow_moments():
        """In bf16, on the device and on the host."""
        flags = [*BF16, *SHARDED, *NARROW]
        wide = train([*BF16, *SHARDED], "wide_moments", steps=6)
        return {**pair("narrow_moments", flags, IN_TURN, steps=6), "wide": wide}

    @cases.case
    def on_and_off_over_resumes():
        """Without, with, without; and what the checkpoints hold."""
        straight = fit(BF16, "straight", 9)
        fit(BF16, "changing", 3)
        fit([*BF16, *IN_TURN], "changing", 6)
        ended = fit(BF16, "changing", 9)
        fit([*BF16, *IN_TURN], "with", 6)
        fit(BF16, "without", 6)
        saved = [tensors_of(folder_of(name) / "checkpoints" / "iter_0000006") for name in ("with", "without")]
        return {"same": ended == straight, "saved alike": saved[0] == saved[1], "tensors": len(saved[0])}

    @cases.case
    def narrow_moments_over_a_resume():
        flags = [*BF16, *SHARDED, *NARROW]
        straight = fit(flags, "narrow_straight", 6)
        fit(flags, "narrow_changing", 3)
        kinds = {
            value.split()[0] for value in tensors_of(folder_of("narrow_changing") / "checkpoints/iter_0000003").values()
        }
        return {"same": fit([*flags, *IN_TURN], "narrow_changing", 6) == straight, "types": sorted(kinds)}

    @cases.case
    def loaded_masters():
        """Weights of another run are begun with: its masters where it saved them, else its weights."""
        found = {}
        for name, source in (("with_optimizer", []), ("weights_alone", ["--no-save-optim"])):
            fit([*BF16, *source, "--seed", "77"], f"source_{name}", 2)
            load = ["--finetune", "--load", str(folder_of(f"source_{name}") / "checkpoints")]
            trainer = trainer_of([*BF16, *IN_TURN], f"fresh_{name}")
            fresh = [one.tensors["master"].clone() for one in slices(trainer)]
            close(trainer)
            trainer = trainer_of([*BF16, *IN_TURN, *load], f"begun_{name}")
            loaded = list(slices(trainer))
            masters = [one.tensors["master"] for one in loaded]
            rounded = [
                one.shard.parameter.detach().view(-1)[one.start : one.stop].equal(master.bfloat16())
                for one, master in zip(loaded, masters, strict=True)
            ]
            exact = all(bool((master.bfloat16().float() == master).all()) for master in masters)
            moved = sum(not one.equal(other) for one, other in zip(masters, fresh, strict=True)) >= len(fresh) // 2
            close(trainer)
            same = pair(f"begun_{name}_step", [*BF16, *load], IN_TURN, steps=2)
            found[name] = {
                "masters are the weights": all(rounded), "16 bits": exact, "moved": moved,
                "same": same["none"]["digest"] == same["offload"]["digest"],
            }  # fmt: skip
        return found


def killed() -> None:
    """Train with offload, save, go on, and be killed."""
    trainer = trainer_of([*BF16, *OVERLAPPED, *IN_TURN, "--save-interval", "10"], "killed")
    take_step = trainer.take_step

    def step(iterators):
        result = take_step(iterators)
        if trainer.step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    trainer.take_step = step
    trainer.fit()


if os.environ.get("WORLD_SIZE") == "2":

    @cases.case
    def resumed_after_a_kill():
        flags = [*BF16, *OVERLAPPED]
        resumed = train([*flags, *IN_TURN], "killed")
        straight = train(flags, "never_killed")
        return {"steps": len(resumed["loss"]), "same": resumed["digest"] == straight["digest"]}


if __name__ == "__main__":
    if sys.argv[1:] == ["killed"]:
        killed()
    else:
        cases.main()
