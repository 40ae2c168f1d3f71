"""One probe for every named fix: passes with the fixes, fails without its own.

Run as a program it prints, as JSON lines, how every probe ends with all fixes and without its own.
Each ending is a process of its own, forked after the imports: a fix cannot be taken back.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TE_WITHOUT_CORE = 'raise RuntimeError("transformer_engine: no CUDA core")\n'


def _world(parallel_changes: dict[str, int] | None = None) -> Any:
    """A world of this process, or of the forked ranks, through the public door."""
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import ParallelConfig, RunConfig

    world = int(os.environ.get("WORLD_SIZE", "1"))
    return parallel.initialize(
        RunConfig(parallel=ParallelConfig(world_size=world, **(parallel_changes or {}))), get_backend("cpu")
    )


def _moe_loss(parallel_changes: dict[str, int] | None = None, **config_changes: Any) -> float:
    from tests.backend import tiny_core

    state = _world(parallel_changes)
    config = tiny_core.transformer_config(state, experts=4, **config_changes)
    return tiny_core.train(state, config, steps=1)[0]


def current_device() -> None:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from tests.backend import tiny_core

    config = tiny_core.transformer_config(_world())
    layer = ColumnParallelLinear(4, 4, config=config, init_method=lambda w: w, bias=False)
    assert layer.weight.device.type == "cpu"


def synchronize() -> None:
    from megatron.core.timers import Timer

    timer = Timer("probe")
    timer.start()
    timer.stop()
    assert timer.elapsed() > 0


def streams() -> None:
    assert _moe_loss() > 0


def rng_state() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker().add("probe", 1)


def seed() -> None:
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    for name, value in (("one", 1), ("two", 2)):
        tracker.add(name, value)
    assert not torch.equal(tracker.states_["one"], tracker.states_["two"])
    assert torch.equal(tracker.states_["one"], torch.Generator().manual_seed(1).get_state())


def rng_restore() -> None:
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("probe", 1)
    before = torch.get_rng_state()
    with tracker.fork("probe"):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), before)


def rng_warning() -> None:
    import logging

    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(Collect())
    tracker = CudaRNGStatesTracker()
    tracker.add("probe", 1)
    with tracker.fork("probe"):
        torch.rand(3)
    assert not said, said


def factories() -> None:
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler

    assert ConstantGradScaler(2.0).scale.device.type == "cpu"


def tensor_type() -> None:
    import torch

    from tests.backend import tiny_core

    state = _world()
    for dtype, distributed in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
        tiny_core.train(state, tiny_core.transformer_config(state, dtype=dtype), 1, distributed)


def loss_scale_restore() -> None:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    scaler = DynamicGradScaler(1024.0, 1.0, 2.0, 0.5, 10, 1)
    state = scaler.state_dict()
    scaler.update(True)
    scaler.load_state_dict(state)
    assert float(scaler.scale) == 1024.0


def uneven_gather() -> None:
    import torch
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    state = _world()
    sizes = [3, 1]
    mine = torch.full((sizes[state.rank], 2), float(state.rank))
    whole = gather_from_sequence_parallel_region(mine, group=state.dp_group, output_split_sizes=sizes)
    assert whole[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0]


def split_sizes() -> None:
    assert _moe_loss({"expert_model_parallel_size": 2}) > 0


def router_gemm() -> None:
    import torch
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    logits = router_gating_linear(torch.ones(2, 3), torch.ones(4, 3), None, torch.float32)
    assert logits.tolist() == [[3.0] * 4] * 2


def triton() -> None:
    import megatron.core.pipeline_parallel  # noqa: F401


def clipping() -> None:
    import torch
    from megatron.core.optimizer import clip_grads

    def norm(device: str) -> torch.Tensor:
        grads = [torch.full((count,), 2.0, device=device) for count in (9, 16)]
        return clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, None, [grads], False)[0]

    assert norm("cpu").tolist() == [10.0]
    # A tensor without values: whoever asks for one raises.
    assert norm("meta").shape == (1,)
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    clip_grads.clip_grad_by_total_norm_fp32([parameter], max_norm=1.5, total_norm=6.0)
    assert torch.allclose(parameter.grad, torch.full((4,), 0.75))


def hide_gpu_packages() -> None:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "transformer_engine"
        package.mkdir()
        (package / "__init__.py").write_text(TE_WITHOUT_CORE)
        sys.path.insert(0, folder)
        import megatron.core  # noqa: F401


def eager_jit() -> None:
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    assert not hasattr(swiglu, "_torchdynamo_orig_callable")


def quiet() -> None:
    said: list[str] = []
    warnings.showwarning = lambda message, category, *_: said.append(f"{category.__name__}: {message}")
    import megatron.core.models.gpt  # noqa: F401
    import megatron.core.optimizer  # noqa: F401

    assert not said, said


PROBES: dict[str, tuple[Callable[[], None], int]] = {
    probe.__name__: (probe, ranks)
    for probe, ranks in (
        (quiet, 1),
        (router_gemm, 1),
        (triton, 1),
        (clipping, 1),
        (hide_gpu_packages, 1),
        (eager_jit, 1),
        (current_device, 1),
        (synchronize, 1),
        (streams, 1),
        (rng_state, 1),
        (seed, 1),
        (rng_restore, 1),
        (rng_warning, 1),
        (factories, 1),
        (tensor_type, 1),
        (loss_scale_restore, 1),
        (uneven_gather, 2),
        (split_sizes, 2),
    )
}


AT_IMPORT = ("quiet", "triton", "hide_gpu_packages", "eager_jit")


def _ending(name: str, without: tuple[str, ...]) -> str:
    """How a probe ends on its ranks: "" if well, else the last line of the first error."""
    probe, ranks = PROBES[name]
    with tempfile.TemporaryDirectory() as folder:
        children = [os.fork() or _child(probe, without, folder, rank, ranks) for rank in range(ranks)]
        for child in children:
            os.waitpid(child, 0)
        said = [Path(folder, f"{rank}.txt") for rank in range(ranks)]
        texts = [path.read_text() if path.exists() else "the process died" for path in said]
    return next((text for text in texts if text), "")


def _child(probe: Callable[[], None], without: tuple[str, ...], folder: str, rank: int, ranks: int) -> Any:
    """Run the probe in this forked process and end it."""
    text = ""
    try:
        import torch
        import torch.distributed as dist

        from megatron_telechat.backend.mcore_fixes import apply_fixes

        warnings.simplefilter("always", UserWarning)
        apply_fixes("cpu", torch.device("cpu"), without=without)
        if ranks > 1:
            os.environ["WORLD_SIZE"] = str(ranks)
            store = dist.FileStore(f"{folder}/store", ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        probe()
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        text = f"{type(error).__name__}: {str(error).strip()[-300:]} (in {frames[-1].name})"
    Path(folder, f"{rank}.txt").write_text(text)
    os._exit(0)


def _report(name: str) -> None:
    line = {"fix": name, "with_all": _ending(name, ()), "without": _ending(name, (name,))}
    print(json.dumps(line), flush=True)


def main(names: list[str]) -> None:
    import torch

    from megatron_telechat.backend.core_versions import installed_line
    from megatron_telechat.backend.mcore_fixes import FIXES
    from megatron_telechat.backend.triton_guard import let_core_import_without_triton

    torch.set_num_threads(1)
    chosen = names or [fix.name for fix in FIXES if installed_line() in fix.lines]
    # These are about the import itself.
    for name in chosen:
        if name in AT_IMPORT:
            _report(name)
    # What the others need, before any fix but one: the children then fork with everything loaded.
    let_core_import_without_triton()
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    import megatron.core.optimizer  # noqa: F401
    import megatron.core.pipeline_parallel  # noqa: F401
    import megatron.core.transformer.moe.moe_layer  # noqa: F401

    import tests.backend.tiny_core  # noqa: F401

    for name in chosen:
        if name not in AT_IMPORT:
            _report(name)


if __name__ == "__main__":
    main(sys.argv[1:])
