"""Saving in one layout and loading in another, with real models and optimizers. Four ranks.

Gradients are functions of the global tensors, so that every layout takes the same optimizer steps
without a forward; truth is assembled from the live parameters, not from the files.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.harness import Cases

cases = Cases()

SHARED = Path(os.environ.get("CHECKPOINT_TEST_FOLDER", "/nonexistent"))
BETA1, BETA2 = 0.9, 0.95

TP2 = {"tensor_model_parallel_size": 2}
CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
INTERLEAVED = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
UNEVEN = {**PP2, "pipeline_model_parallel_layout": "Et*3|tL"}
FOLDED = {**TP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}


def expert(size: int) -> dict[str, int]:
    return {"expert_model_parallel_size": size}


def etp(size: int) -> dict[str, int]:
    return {"expert_tensor_parallel_size": size}


# name: model, precision, saved in, loaded in
PAIRS: dict[str, tuple[str, str, dict, dict]] = {
    "tp2_to_pp2": ("dense", "bf16", TP2, PP2),
    "tp2_distributed_to_pp2_plain": ("dense", "bf16", {**TP2, **DISTRIBUTED}, PP2),
    "dp4_plain_to_tp2_distributed": ("dense", "bf16", {}, {**TP2, **DISTRIBUTED}),
    "interleaved_to_tp2": ("dense", "bf16", INTERLEAVED, {**TP2, **DISTRIBUTED}),
    "interleaved_distributed_to_uneven": ("dense", "fp32", {**INTERLEAVED, **DISTRIBUTED}, UNEVEN),
    "uneven_to_tp4": ("dense", "fp32", UNEVEN, {"tensor_model_parallel_size": 4}),
    "dp4_distributed_to_itself": ("dense", "bf16", DISTRIBUTED, DISTRIBUTED),
    "ep2_to_ep1": ("moe", "bf16", expert(2), expert(1)),
    "ep2_distributed_to_ep4": ("moe", "bf16", {**expert(2), **DISTRIBUTED}, expert(4)),
    "ep1_distributed_to_ep2": ("moe", "fp32", {**expert(1), **DISTRIBUTED}, expert(2)),
    "tp2_ep2_to_pp2": ("moe", "bf16", {**FOLDED, **DISTRIBUTED}, PP2),
    "tp2_pp2_ep2_to_etp2": ("moe", "bf16", {**FOLDED, **PP2}, {**TP2, "expert_tensor_parallel_size": 2, **DISTRIBUTED}),
    "etp2_distributed_to_ep4": ("moe", "bf16", {**TP2, "expert_tensor_parallel_size": 2, **DISTRIBUTED}, expert(4)),
    "cp4_distributed_to_cp2_tp2": ("dense", "bf16", {**CP4, **DISTRIBUTED}, {**CP2, **TP2, **DISTRIBUTED}),
    "cp2_ep4_to_dp4": ("moe", "bf16", {**CP2, **expert(4)}, expert(1)),
    "fp16_with_loss_scale": ("moe", "fp16", expert(2), {**FOLDED, **DISTRIBUTED}),
    "ep4_to_ep1_distributed": ("moe", "bf16", expert(4), {**expert(1), **DISTRIBUTED}),
    "ep1_to_ep4": ("moe", "bf16", expert(1), expert(4)),
    "ep1_distributed_to_ep4_distributed": ("moe", "fp32", {**expert(1), **DISTRIBUTED}, {**expert(4), **DISTRIBUTED}),
    "etp4_to_tp2_ep2": ("moe", "bf16", {**TP2, **etp(4)}, FOLDED),
    "etp2_to_etp4_distributed": ("moe", "bf16", etp(2), {**TP2, **etp(4), **DISTRIBUTED}),
    "ep2_etp2_distributed_to_dp4": ("moe", "fp32", {**expert(2), **etp(2), **DISTRIBUTED}, expert(1)),
    "uneven_to_interleaved": ("dense", "bf16", UNEVEN, INTERLEAVED),
    "uneven_distributed_to_interleaved_distributed": (
        *("dense", "bf16"),
        {**UNEVEN, **DISTRIBUTED},
        {**INTERLEAVED, **DISTRIBUTED},
    ),
    "dp4_to_tp4": ("dense", "fp32", {}, {"tensor_model_parallel_size": 4}),
    "tp4_distributed_to_dp4_distributed": (
        *("dense", "bf16"),
        {"tensor_model_parallel_size": 4, **DISTRIBUTED},
        DISTRIBUTED,
    ),
    "pp4_to_dp4_distributed": ("dense", "fp32", {"pipeline_model_parallel_size": 4}, DISTRIBUTED),
    "tp2_pp2_to_cp2_tp2": ("dense", "bf16", {**TP2, **PP2}, {**CP2, **TP2}),
    "moe_uneven_ep2_to_ep4": ("moe", "bf16", {**UNEVEN, **expert(2)}, {**expert(4), **DISTRIBUTED}),
    "moe_interleaved_ep2_distributed_to_etp2": (
        *("moe", "bf16"),
        {**INTERLEAVED, **expert(2), **DISTRIBUTED},
        {**TP2, **etp(2)},
    ),
    "ep4_distributed_to_tp2_ep2": ("moe", "fp32", {**expert(4), **DISTRIBUTED}, FOLDED),
    "cp2_ep2_distributed_to_pp2": ("moe", "bf16", {**CP2, **expert(2), **DISTRIBUTED}, PP2),
}

SHORT_FORM = {
    *("tp2_distributed_to_pp2_plain", "dp4_plain_to_tp2_distributed", "interleaved_distributed_to_uneven"),
    *("dp4_distributed_to_itself", "ep2_distributed_to_ep4", "tp2_pp2_ep2_to_etp2", "fp16_with_loss_scale"),
}
SLOW = set(PAIRS) - SHORT_FORM
"""Pairs whose parts others hold too: with the tests marked slow."""

PRECISION_CHANGES = {
    "bf16_to_fp32": ("bf16", "fp32"),
    "fp32_to_bf16": ("fp32", "bf16"),
}


def run_config(model: str, precision: str, layout: dict, seed: int) -> Any:
    from megatron_telechat.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig

    experts = {"num_experts": 4, "moe_ffn_hidden_size": 12} if model == "moe" else {}
    layout = {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 1, **layout}
    return RunConfig(
        model=ModelConfig(
            name=model,
            num_layers=4,
            hidden_size=24,
            ffn_hidden_size=20,
            num_attention_heads=4,
            vocab_size=32,
            **experts,
        ),
        parallel=ParallelConfig(
            world_size=4, sequence_parallel=layout.get("tensor_model_parallel_size", 1) > 1, **layout
        ),
        training=TrainingConfig(device="cpu", precision=precision, seq_length=8, seed=seed, global_batch_size=4),
        optimizer=OptimizerConfig(
            lr=1e-2, clip_grad=0.0, adam_beta1=BETA1, adam_beta2=BETA2, initial_loss_scale=8.0, loss_scale_window=2
        ),
    )


def averaged(run: Any) -> Any:
    from megatron_telechat.config.schema import AverageConfig

    return replace(run, average=AverageConfig(ema_decay=0.5, average_window_steps=3))


class Built:
    """Model, wrapped, with its optimizer, in one layout."""

    def __init__(self, run: Any):
        from megatron_telechat import parallel
        from megatron_telechat.backend import get_backend
        from megatron_telechat.model import build_model, parameter_shards
        from megatron_telechat.training.averages import Averages
        from megatron_telechat.training.optimizer import build_optimizer, wrap_data_parallel

        parallel.destroy(keep_world=True)
        self.run = run
        self.backend = get_backend("cpu")
        self.parallel = parallel.initialize(run, self.backend)
        models = build_model(run, self.parallel, self.backend)
        self.shards = parameter_shards(models, run, self.parallel)
        self.virtual_stages = wrap_data_parallel(models, run, self.parallel)
        self.optimizer = build_optimizer(self.virtual_stages, run, self.parallel)
        self.averages = Averages(self.optimizer, self.shards, run.average)
        self.averages.begin(0, {})
        self.steps = 0

    def state(self, step: int = 0, samples: int = 0, **more: Any) -> Any:
        from megatron_telechat.checkpoint import TrainState

        averages = self.averages.slices(begun=step > 0)
        return TrainState(self.shards, self.optimizer, step, samples, self.backend, averages=averages, **more)

    def step(self) -> None:
        """One optimizer step on gradients that depend on the global position only."""
        scale = float(self.optimizer.get_loss_scale())
        for item in self.shards:
            flat = item.parameter.main_grad.view(-1)
            spec, box = item.piece.spec, item.piece.box
            flat.copy_(gradient(spec.key, spec.shape)[box.slices()].reshape(-1) * scale)
        done, _, _ = self.optimizer.step()
        assert done
        self.steps += 1
        self.averages.follow(self.steps, taken=True)

    def full(self) -> dict[str, Any]:
        """Every global tensor, weights, optimizer state and averages, on every rank."""
        import torch

        from megatron_telechat.checkpoint.optimizer_state import optimizer_slices
        from megatron_telechat.parallel.agreement import gather_objects

        mine: list[tuple[str, tuple, tuple, int, Any]] = []
        for item in self.shards:
            mine += _flat_parts("weight", item, 0, item.parameter.detach().view(-1))
        for found in (*optimizer_slices(self.optimizer, self.shards), *self.averages.slices(begun=True)):
            for name, tensor in found.tensors.items():
                mine += _flat_parts(name, found.shard, found.start, tensor)
        full: dict[str, Any] = {}
        seen: dict[str, Any] = {}
        for rank in gather_objects(mine):
            for key, shape, elements, values in rank:
                if key not in full:
                    full[key] = torch.zeros(shape, dtype=values.dtype)
                    seen[key] = torch.zeros(shape, dtype=torch.bool)
                flat, marks = full[key].view(-1), seen[key].view(-1)
                known = marks[elements]
                assert torch.equal(flat[elements][known], values[known]), f"replicas of {key} differ"
                flat[elements] = values
                marks[elements] = True
        assert all(bool(marks.all()) for marks in seen.values())
        return full


def _flat_parts(name: str, item: Any, start: int, values: Any) -> list:
    """(key, shape, global flat indices, values) of a flat range, by plain index arithmetic."""
    import torch

    spec, box = item.piece.spec, item.piece.box
    numbers = torch.arange(spec.numel).view(spec.shape)
    elements = numbers[box.slices()].reshape(-1)[start : start + values.numel()]
    return [(f"{name}/{spec.key}", spec.shape, elements, values.clone())] if values.numel() else []


def gradient(key: str, shape: tuple[int, ...]) -> Any:
    import zlib

    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(shape, generator=generator)


def require_equal(found: dict, wanted: dict) -> None:
    import torch

    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    different = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not different, f"{len(different)} of {len(wanted)} tensors differ: {different[:4]}"


def require_close(found: dict, wanted: dict) -> None:
    import torch

    for key in wanted:
        torch.testing.assert_close(found[key].float(), wanted[key].float(), rtol=1e-5, atol=1e-6, msg=key)


def require_real_moments(full: dict) -> None:
    """Two steps on one gradient g: exp_avg = (1 - b1)(1 + b1) g, exp_avg_sq = (1 - b2)(1 + b2) g^2."""
    import torch

    keys = [key for key in full if key.startswith("exp_avg/")]
    assert keys
    for key in keys:
        name = key.split("/", 1)[1]
        g = gradient(name, tuple(full[key].shape))
        torch.testing.assert_close(full[key], (1 - BETA1**2) * g, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(full[f"exp_avg_sq/{name}"], (1 - BETA2**2) * g * g, rtol=1e-4, atol=1e-6)


def pair(name: str, model: str, precision: str, saved_in: dict, loaded_in: dict) -> dict:
    from megatron_telechat.checkpoint import CheckpointReader, load_checkpoint, save_checkpoint

    root = SHARED / name
    first = Built(averaged(run_config(model, precision, saved_in, seed=1)))
    first.step()
    first.step()
    extra = {"note": "n", **first.averages.extra}
    path = save_checkpoint(root, first.state(2, 8, extra=extra), first.run, first.parallel)
    wanted = first.full()
    require_real_moments(wanted)
    assert {key.split("/")[0] for key in wanted} >= {"ema", "window_under_way"}
    first.step()
    third = first.full()

    second = Built(averaged(run_config(model, precision, loaded_in, seed=2)))
    info = load_checkpoint(root, second.state(), second.run, second.parallel)
    assert (info.path, info.step, info.consumed_samples, dict(info.extra)) == (path, 2, 8, extra)
    second.averages.begin(2, info.extra)
    second.steps = 2
    assert ("reseeded" in info.message) == (saved_in != loaded_in), info.message
    require_equal(second.full(), wanted)
    second.step()
    require_close(second.full(), third)
    if precision == "fp16":
        assert float(second.optimizer.get_loss_scale()) == float(first.optimizer.get_loss_scale()) == 16.0
    if second.parallel.rank == 0:
        CheckpointReader(path, verify=True)
    return {"tensors": len(wanted)}


for _name, _pair in PAIRS.items():
    if _name not in SLOW or os.environ.get("CHECKPOINT_TEST_SLOW"):
        cases.add(_name, lambda name=_name, about=_pair: pair(name, *about))


@cases.case
def replicas_share_the_writing() -> dict:
    """Bytes of tensors that each rank writes, by layout; what was expected of this rank; whether any is cut."""
    from megatron_telechat.checkpoint import CheckpointReader, save_checkpoint
    from megatron_telechat.checkpoint.train_state import expected_bytes

    found = {}
    for name, (model, layout) in SHARED_WRITING.items():
        built = Built(run_config(model, "bf16", layout, seed=1))
        expected = expected_bytes(built.state(), built.run, built.parallel)
        built.step()
        reader = CheckpointReader(
            save_checkpoint(SHARED / f"shared_{name}", built.state(1, 4), built.run, built.parallel)
        )
        written = [0] * 4
        for key, entry in reader.entries.items():
            for stored in entry.boxes:
                written[int(stored.file[5:10])] += stored.box.numel * reader.dtype(key).itemsize
        assert written[built.parallel.rank] == expected, (written, expected)
        found[name] = {"written": written, "boxes": max(len(entry.boxes) for entry in reader.entries.values())}
    return found


SHARED_WRITING = {
    "dp4": ("dense", {}),
    "dp2_tp2": ("dense", TP2),
    "cp2": ("dense", CP2),
    "ep2": ("moe", expert(2)),
    "ep4_distributed": ("moe", {**expert(4), **DISTRIBUTED}),
}


@cases.case
def as_the_first_release_wrote_it() -> None:
    """Neither a lineage, nor an id of the save, nor metadata in the files (commit 3d9b954)."""
    from megatron_telechat.checkpoint import load_checkpoint, save_checkpoint

    first = Built(run_config("moe", "bf16", {**expert(2), **DISTRIBUTED}, seed=1))
    first.step()
    path = save_checkpoint(SHARED / "first_release", first.state(1, 4), first.run, first.parallel)
    wanted = first.full()
    if first.parallel.rank == 0:
        as_first_release(path)
    second = Built(run_config("moe", "bf16", FOLDED, seed=2))
    assert load_checkpoint(path.parent, second.state(), second.run, second.parallel).step == 1
    require_equal(second.full(), wanted)


def as_first_release(path: Path) -> None:
    import json
    import zlib

    from safetensors.torch import load_file, save_file

    from megatron_telechat.checkpoint.manifest import _digest

    body = json.loads((path / "manifest.json").read_text())
    for name in ("digest", "head_digest", "save", "lineage"):
        del body[name]
    for name, entry in body["files"].items():
        save_file(load_file(path / name), path / name)
        data = (path / name).read_bytes()
        entry.update(size=len(data), crc32=f"{zlib.crc32(data):08x}")
    (path / "manifest.json").write_text(json.dumps({"digest": _digest(body), **body}, indent=1, ensure_ascii=False))


def precision_change(name: str, saved_in: str, loaded_in: str) -> None:
    """The master weights survive bitwise; without masters in the file the fp32 weights become them."""
    from megatron_telechat.checkpoint import load_checkpoint, save_checkpoint

    first = Built(run_config("dense", saved_in, DISTRIBUTED, seed=1))
    first.step()
    save_checkpoint(SHARED / name, first.state(1, 4), first.run, first.parallel)
    before = first.full()
    second = Built(run_config("dense", loaded_in, TP2, seed=2))
    load_checkpoint(SHARED / name, second.state(), second.run, second.parallel)
    after = second.full()
    exact, fine = ("master", "weight") if saved_in == "bf16" else ("weight", "master")
    for key in [key for key in before if key.startswith("weight/")]:
        name = key.split("/", 1)[1]
        router = "router" in name
        assert (before[key] if router else before[f"{exact}/{name}"]).equal(after[f"{fine}/{name}"])
    for key in before:
        if key.startswith("exp_avg"):
            assert before[key].equal(after[key])


for _name, _change in PRECISION_CHANGES.items():
    cases.add(_name, lambda name=_name, about=_change: precision_change(name, *about))


@cases.case
def weights_only_begins_anew() -> dict:
    from megatron_telechat.checkpoint import load_checkpoint, save_checkpoint
    from megatron_telechat.checkpoint.optimizer_state import adam_steps

    first = Built(run_config("moe", "bf16", expert(2), seed=1))
    first.step()
    save_checkpoint(SHARED / "weights_only", first.state(1, 4), first.run, first.parallel)
    wanted = first.full()
    second = Built(run_config("moe", "bf16", {**expert(4), **DISTRIBUTED}, seed=2))
    info = load_checkpoint(SHARED / "weights_only", second.state(), second.run, second.parallel, weights_only=True)
    found = second.full()
    assert (info.step, info.consumed_samples) == (0, 0)
    assert not adam_steps(second.optimizer) and not any(key.startswith("exp_avg") for key in found)
    require_equal(found, {key: value for key, value in wanted.items() if not key.startswith("exp_avg")})
    return {"message": info.message}


@cases.case
def without_optimizer_state() -> None:
    from megatron_telechat.checkpoint import CheckpointReader, load_checkpoint, save_checkpoint

    run = run_config("dense", "bf16", TP2, seed=1)
    run = replace(run, checkpoint=replace(run.checkpoint, no_save_optim=True))
    first = Built(run)
    first.step()
    path = save_checkpoint(SHARED / "no_optim", first.state(1, 4), run, first.parallel)
    assert not [key for key in CheckpointReader(path).entries if key.startswith("optimizer/")]
    info = load_checkpoint(SHARED / "no_optim", first.state(), run, first.parallel)
    assert info.step == 1 and "fresh" in info.message


@cases.case
def generators_go_on_in_the_same_layout() -> None:
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_telechat.checkpoint import load_checkpoint, save_checkpoint

    def draw() -> list:
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(3).tolist()
        return [*torch.rand(3).tolist(), *inside]

    built = Built(run_config("dense", "fp32", TP2, seed=1))
    draw()
    save_checkpoint(SHARED / "rng", built.state(1, 4), built.run, built.parallel)
    wanted = draw()
    assert draw() != wanted
    load_checkpoint(SHARED / "rng", built.state(), built.run, built.parallel)
    assert draw() == wanted


@cases.case
def generators_of_another_device_are_not_restored() -> list[str]:
    """As from a GPU: its generators' states, 16 bytes each, mean nothing to those of the CPU, and are refused by
    them."""
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_telechat.checkpoint import load_checkpoint, save_checkpoint

    built = Built(run_config("dense", "fp32", TP2, seed=1))
    state, backend = built.state(1, 4), built.backend
    here = backend.rng_state
    there = torch.zeros(16, dtype=torch.uint8)
    backend.rng_state = lambda: {**here(), "device": there, "tracker": dict.fromkeys(here()["tracker"], there)}
    save_checkpoint(SHARED / "rng_of_a_gpu", state, built.run, built.parallel)
    del backend.rng_state
    notes = []
    for _ in range(2):
        notes.append(load_checkpoint(SHARED / "rng_of_a_gpu", built.state(), built.run, built.parallel).message)
        with get_cuda_rng_tracker().fork():
            notes.append(str(torch.rand(3).tolist()))
    assert notes[:2] == notes[2:], "seeded by the step, not left as they were"
    return notes


@cases.case
def an_error_on_one_rank_is_an_error_on_all() -> str:
    """One rank cannot write; nothing is committed and the older checkpoint still loads."""
    import errno

    from megatron_telechat.checkpoint import latest_checkpoint, save_checkpoint
    from megatron_telechat.checkpoint.stores.posix import FileSink
    from megatron_telechat.errors import ResourceError

    built = Built(run_config("dense", "bf16", TP2, seed=1))
    root = SHARED / "failing"
    older = save_checkpoint(root, built.state(1, 4), built.run, built.parallel)
    original = FileSink.write

    def full_disk(sink: FileSink, data: memoryview) -> None:
        original(sink, data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if built.parallel.rank == 1:
        FileSink.write = full_disk
    try:
        save_checkpoint(root, built.state(2, 8), built.run, built.parallel)
    except ResourceError as error:
        message = str(error)
    finally:
        FileSink.write = original
    assert latest_checkpoint(root) == older
    if built.parallel.rank == 0:  # the rank that clears up
        assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", "latest"]
    return message


@cases.case
def another_model_is_refused_on_all_ranks() -> str:
    from megatron_telechat.checkpoint import load_checkpoint, save_checkpoint
    from megatron_telechat.errors import CheckpointError

    first = Built(run_config("dense", "bf16", {}, seed=1))
    save_checkpoint(SHARED / "other", first.state(1, 4), first.run, first.parallel)
    second = Built(run_config("moe", "bf16", {}, seed=1))
    try:
        load_checkpoint(SHARED / "other", second.state(), second.run, second.parallel)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it was loaded")


def fp16_checkpoint(name: str, grad_scaler: dict) -> tuple[Any, Path]:
    """A run, and a checkpoint of it whose manifest holds this state of the loss scale."""
    import torch

    from megatron_telechat.checkpoint import save_checkpoint
    from megatron_telechat.checkpoint.manifest import read_manifest
    from megatron_telechat.checkpoint.names import MANIFEST

    first = Built(run_config("moe", "fp16", expert(2), seed=1))
    first.step()
    path = save_checkpoint(SHARED / name, first.state(1, 4), first.run, first.parallel)
    if first.parallel.rank == 0:
        manifest = read_manifest(path)
        assert set(manifest.optimizer["grad_scaler"]) == {"scale", "growth_tracker", "hysteresis_tracker"}
        manifest = replace(manifest, optimizer={**manifest.optimizer, "grad_scaler": grad_scaler})
        (path / MANIFEST).write_bytes(manifest.to_bytes())
    torch.distributed.barrier()
    return first, path


def tracked(scale: float, growth: int, hysteresis: int) -> dict:
    return {"scale": scale, "growth_tracker": growth, "hysteresis_tracker": hysteresis}


@cases.case
def loss_scales_that_have_parted() -> dict:
    """As a release with a scale for each optimizer wrote them: refused, unless the moments are left behind."""
    from megatron_telechat.checkpoint import load_checkpoint
    from megatron_telechat.checkpoint.optimizer_state import adam_steps
    from megatron_telechat.errors import CheckpointError

    first, path = fp16_checkpoint("parted", {"dense": tracked(2048.0, 3, 1), "expert": tracked(134217728.0, 900, 2)})
    try:
        load_checkpoint(path, first.state(), first.run, first.parallel)
    except CheckpointError as error:
        refused = str(error)
    fresh = Built(replace(first.run, checkpoint=replace(first.run.checkpoint, no_load_optim=True)))
    info = load_checkpoint(path, fresh.state(), fresh.run, fresh.parallel)
    assert info.step == 1 and not adam_steps(fresh.optimizer) and fresh.optimizer.loss_scale == 8.0
    return {"refused": refused, "note": info.message}


@cases.case
def loss_scales_that_agree() -> dict:
    """The older form of a sound checkpoint: one scale goes on, with the trackers that are the more careful."""
    from megatron_telechat.checkpoint import load_checkpoint

    first, path = fp16_checkpoint("agreed", {"dense": tracked(512.0, 1, 1), "expert": tracked(512.0, 0, 2)})
    second = Built(first.run)
    info = load_checkpoint(path, second.state(), second.run, second.parallel)
    states = [
        {name: float(value) for name, value in part.grad_scaler.state_dict().items()}
        for part in second.optimizer.chained_optimizers
    ]
    return {"states": states, "adam_step": info.adam_step}


OWNERS: dict[str, dict] = {
    "etp2": {"expert_tensor_parallel_size": 2},
    "ep2_etp2_distributed": {**expert(2), "expert_tensor_parallel_size": 2, **DISTRIBUTED},
    "tp2_etp4": {**TP2, "expert_tensor_parallel_size": 4},
    "tp2_etp1": TP2,
    "tp4_ep2_etp2": {"tensor_model_parallel_size": 4, **expert(2), "expert_tensor_parallel_size": 2},
    "tp2_pp2_etp2": {**TP2, **PP2, "expert_tensor_parallel_size": 2, **DISTRIBUTED},
}


@cases.case
def every_number_counts_once() -> dict:
    """Gradients of ones have the number of parameters as the square of their norm; gradients of zeros as the count of
    zeros."""
    from megatron_telechat.costs import count_parameters

    found = {}
    for name, layout in OWNERS.items():
        built = Built(run_config("moe", "fp32", layout, seed=1))
        for value in (0.0, 1.0):
            for item in built.shards:
                item.parameter.main_grad.fill_(value)
            built.optimizer.prepare_grads()
            if value:
                norm = float(built.optimizer.get_grad_norm())
            else:
                zeros = float(built.optimizer.count_zeros())
        found[name] = [round(norm**2, 1), zeros, count_parameters(built.run.model).total]
    return found


HF_MODELS = {False: ("heads_24_24", "heads_32_32", "heads_48_48", "heads_64_8"), True: ("moe",)}
HF_LAYOUTS: dict[str, tuple[bool, dict]] = {  # of MoE models or of dense ones
    "tp1": (False, {}),
    "tp2": (False, TP2),
    "tp4": (False, {"tensor_model_parallel_size": 4}),
    "uneven": (False, {**PP2, "pipeline_model_parallel_layout": "Ettt|ttL"}),
    "moe_ep4": (True, expert(4)),
    "moe_tp2_ep2": (True, FOLDED),
    "moe_uneven_ep2": (True, {**PP2, "pipeline_model_parallel_layout": "Ettt|ttL", **expert(2)}),
}


def hf_round_trip(label: str, moe: bool, layout: dict) -> None:
    """Checkpoint imported from Hugging Face -> models in a layout -> checkpoint -> Hugging Face."""
    import torch

    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.checkpoint import TrainState, load_checkpoint, save_checkpoint
    from megatron_telechat.huggingface import export_hf
    from megatron_telechat.huggingface.weights import HfWeights
    from megatron_telechat.model import build_model, parameter_shards
    from tests.huggingface.folders import assert_same_folder

    backend = get_backend("cpu")
    run = run_config("moe" if moe else "dense", "fp32", layout, seed=3)
    state = parallel.initialize(run, backend)
    for name in HF_MODELS[moe]:
        imported = SHARED / "imported" / name
        run = replace(
            run,
            model=HfWeights(SHARED / "hf" / name).model,
            checkpoint=replace(run.checkpoint, pretrained_checkpoint=str(imported)),
        )
        shards = parameter_shards(build_model(run, state, backend), run, state)
        train_state = TrainState(shards, None, 0, 0)
        load_checkpoint(imported, train_state, run, state, weights_only=True)
        path = save_checkpoint(SHARED / "saved" / label / name, train_state, run, state)
        if state.rank == 0:
            exported = SHARED / "exported" / label / name
            export_hf(path, exported, max_shard_bytes=50_000)
            assert_same_folder(SHARED / "hf" / name, exported)
        torch.distributed.barrier()


for _name, _layout in HF_LAYOUTS.items():
    cases.add(f"hf_{_name}", lambda name=_name, about=_layout: hf_round_trip(name, *about))


if __name__ == "__main__":
    cases.main()
