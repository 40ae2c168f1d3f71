"""The named fixes for megatron-core: each with its reason, its versions and when it applies.

megatron-core is written for CUDA. On another device, and where Transformer Engine is absent, a
few places break, some of them silently. Nothing is copied from it: a fix exchanges what its
modules see of torch (`core_patch`), or one function. tests/backend/test_mcore_fixes.py
takes every fix away in turn and shows what breaks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_telechat.backend.core_patch import CorePatch, ModuleView, rebind, replace_constants
from megatron_telechat.backend.core_versions import LINES, installed_line
from megatron_telechat.backend.triton_guard import let_core_import_without_triton, triton_present
from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.errors import ConfigError

ALL_LINES = tuple(LINES)


@dataclass(frozen=True)
class Fix:
    """One deviation from megatron-core as published.

    Attributes:
        name: how it is listed and tested.
        reason: what happens without it.
        when: "always"; "te_absent"; "triton_absent"; or the backends it is for, such as ("cpu", "npu").
        apply: registers the change with the patch; gets the device of this rank.
        lines: the release lines of megatron-core it was written for (`core_versions.LINES`), and applied to.
    """

    name: str
    reason: str
    when: str | tuple[str, ...]
    apply: Callable[[CorePatch, Any], None]
    lines: tuple[str, ...] = ALL_LINES

    def applies(self, backend: str, te_present: bool, line: str) -> bool:
        """Whether a process on this backend and release line of megatron-core needs the fix."""
        if line not in self.lines:
            return False
        if self.when == "always":
            return True
        if self.when == "te_absent":
            # Off CUDA Transformer Engine is hidden, installed or not.
            return backend != "cuda" or not te_present
        if self.when == "triton_absent":
            return not triton_present()
        return backend in self.when


class InertStream:
    """Stands for a CUDA stream, and for an event, where work is done when the call returns."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any):
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    wait = wait_stream = wait_event = synchronize = record = _nothing

    def record_event(self, event: Any = None) -> InertStream:
        """The given event, or a new one: it has happened as soon as it is recorded."""
        return InertStream() if event is None else event

    def query(self) -> bool:
        """True: no work is ever under way."""
        return True

    def elapsed_time(self, _: Any) -> float:
        """0 milliseconds: an event keeps no time."""
        return 0.0


def _current_device(patch: CorePatch, device: Any) -> None:
    patch.cuda["current_device"] = lambda: device


def _synchronize(patch: CorePatch, device: Any) -> None:
    patch.cuda["synchronize"] = lambda *_, **__: None


def _streams(patch: CorePatch, device: Any) -> None:
    stream = InertStream()
    patch.cuda.update(
        Stream=InertStream,
        Event=InertStream,
        current_stream=lambda *_, **__: stream,
        default_stream=lambda *_, **__: stream,
        stream=lambda _: contextlib.nullcontext(),
    )


def _rng_state(patch: CorePatch, device: Any) -> None:
    import torch

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    patch.cuda["get_rng_state"] = get_rng_state
    patch.cuda["random"] = ModuleView(torch.cuda.random, {"get_rng_state": get_rng_state})


def _seed(patch: CorePatch, device: Any) -> None:
    import torch

    patch.cuda["manual_seed"] = torch.default_generator.manual_seed


def _rng_restore(patch: CorePatch, device: Any) -> None:
    import torch

    def set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
        if device.type == "cpu":
            torch.set_rng_state(new_state)
        else:
            getattr(torch, device.type).set_rng_state(new_state, device)

    patch.after_import(
        "megatron.core.tensor_parallel.random",
        lambda module: rebind(module, "_set_cuda_rng_state", set_rng_state),
    )


def _rng_warning(patch: CorePatch, device: Any) -> None:
    def keep(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(keep)


def _factories(patch: CorePatch, device: Any) -> None:
    import torch

    def on_device(factory: Callable) -> Callable:
        def create(*args: Any, **kwargs: Any) -> torch.Tensor:
            wanted = kwargs.get("device")
            if wanted is not None and str(wanted).startswith("cuda"):
                kwargs["device"] = device
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return create

    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "ones_like"):
        patch.torch[name] = on_device(getattr(torch, name))


def _tensor_type(patch: CorePatch, device: Any) -> None:
    prefix = "torch." if device.type == "cpu" else f"torch.{device.type}."
    table = {f"torch.cuda.{kind}": prefix + kind for kind in ("FloatTensor", "HalfTensor", "BFloat16Tensor")}

    def distributed_optimizer(module: Any) -> None:
        replace_constants(module.DistributedOptimizer.__init__, table)
        replace_constants(module.DistributedOptimizer._build_model_and_main_param_groups, table)

    patch.after_import("megatron.core.optimizer.distrib_optimizer", distributed_optimizer)
    patch.after_import(
        "megatron.core.optimizer.optimizer",
        lambda module: replace_constants(module.Float16OptimizerWithFloat16Params.__init__, table),
    )
    patch.after_import(
        "megatron.core.optimizer.clip_grads",
        lambda module: replace_constants(module.clip_grad_by_total_norm_fp32, table),
    )


def _loss_scale_restore(patch: CorePatch, device: Any) -> None:
    def load_state_dict(self: Any, state: dict) -> None:
        self._scale = state["scale"].to(device)
        self._growth_tracker = state["growth_tracker"]
        self._hysteresis_tracker = state["hysteresis_tracker"]

    patch.after_import(
        "megatron.core.optimizer.grad_scaler",
        lambda module: setattr(module.DynamicGradScaler, "load_state_dict", load_state_dict),
    )


def _uneven_gather(patch: CorePatch, device: Any) -> None:
    import torch
    import torch.distributed as dist

    def replace(module: Any) -> None:
        gather_even = module._gather_along_first_dim

        def gather(input_, group, output_split_sizes=None, use_global_buffer=False):
            """[rows of this rank, ...] -> [rows of all ranks, ...]; the numbers of rows may differ."""
            sizes = None if output_split_sizes is None else [int(size) for size in output_split_sizes]
            if sizes is None or group.size() == 1:
                return gather_even(input_, group, sizes, use_global_buffer)
            rows = max(sizes)
            padded = input_.new_zeros((rows, *input_.shape[1:]))
            padded[: input_.shape[0]] = input_
            gathered = input_.new_empty((rows * len(sizes), *input_.shape[1:]))
            dist.all_gather_into_tensor(gathered, padded, group=group)
            return torch.cat([part[:size] for part, size in zip(gathered.chunk(len(sizes)), sizes, strict=True)])

        rebind(module, "_gather_along_first_dim", gather)

    patch.after_import("megatron.core.tensor_parallel.mappings", replace)


def _split_sizes(patch: CorePatch, device: Any) -> None:
    import torch

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """The tensor on the CPU, as a numpy array if asked; anything else as it is."""
        if not torch.is_tensor(tensor):
            return tensor
        # Blocking: no event of another stream has to be waited for, and nothing has to be recorded.
        tensor = tensor.to("cpu")
        return tensor.numpy() if as_numpy else tensor

    patch.after_import(
        "megatron.core.transformer.moe.moe_utils",
        lambda module: rebind(module, "maybe_move_tensor_to_cpu", to_host),
    )


def _eager_jit(patch: CorePatch, device: Any) -> None:
    patch.after_import("megatron.core.jit", lambda module: module.disable_jit_fuser())


def _hide_gpu_packages(patch: CorePatch, device: Any) -> None:
    for name in ("transformer_engine", "apex"):
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]


def _triton(patch: CorePatch, device: Any) -> None:
    let_core_import_without_triton()


def _router_gemm(patch: CorePatch, device: Any) -> None:
    patch.after_import(
        "megatron.core.transformer.moe.moe_utils",
        lambda module: module.__dict__.setdefault("te_general_gemm", None),
    )


def _clipping(patch: CorePatch, device: Any) -> None:
    import torch
    from torch import _foreach_mul_ as foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
    from torch import _foreach_norm as foreach_norm  # pyright: ignore[reportPrivateImportUsage]

    def l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: list[list], per_tensor: bool) -> tuple[Any, None]:
        """[1] fp32 on the device: the norm of all tensors together."""
        norms = foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
        return torch.linalg.vector_norm(torch.stack(norms).float()).reshape(1), None

    def scale(chunk_size: int, noop_flag: Any, tensor_lists: list[list], factor: float) -> None:
        """Clipping writes where it reads."""
        sources, targets = tensor_lists
        assert sources is targets
        foreach_mul_(targets, factor)

    def replace(module: Any) -> None:
        if hasattr(module, "local_multi_tensor_l2_norm"):  # else it has apex's kernels
            module.l2_norm_impl, module.multi_tensor_scale_impl = l2_norm, scale

    patch.after_import("megatron.core.optimizer.clip_grads", replace)


QUIET = (
    # Optional packages, said by five modules at import; the console line at the start names what is used.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back",
    # 0.19 would rather log through absl.
    "absl.logging is not installed",
    # Of a class that is not used, when 0.19 is imported.
    "MimoModelConfig is experimental",
    # About the default of a field that nobody set, at every TransformerConfig.
    "full scope is deprecated",
    # At every expert layer where the tensor domain is folded into the expert domain: it is meant.
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
    # The optimizers look at .grad of their fp32 shards, which are views: None is the right answer.
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    # A group that was not told its device takes the current one, which is the rank's.
    r"barrier\(\): using the device under current context",
    # Names of collectives that the pinned release uses and newer torch renames.
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
)
QUIET_OFF_CUDA = ("When using sequence parallelism it is recommended to set the environment variable CUDA",)


QUIET_LOG = ("torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME")
"""Logger and begin of what torch says off CUDA where a CUDA compiler is installed: 0.19 imports that module."""


def _quiet(patch: CorePatch, device: Any) -> None:
    name, begin = QUIET_LOG
    logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(begin))
    for message in QUIET if device.type == "cuda" else QUIET + QUIET_OFF_CUDA:
        warnings.filterwarnings("ignore", message=message, category=Warning)


CPU = tuple(name for name, traits in DEVICE_KINDS.items() if traits.torch_cuda == "absent")
NOT_CUDA = tuple(name for name, traits in DEVICE_KINDS.items() if traits.torch_cuda != "native")

FIXES: tuple[Fix, ...] = (
    Fix("quiet", "every rank prints warnings about optional packages and about defaults nobody set", "always", _quiet),
    Fix(
        "router_gemm",
        "the fp32 router reads te_general_gemm, a name that is undefined without Transformer Engine: NameError",
        "te_absent",
        _router_gemm,
        lines=("0.16",),
    ),
    Fix(
        "triton",
        "import megatron.core needs triton, which it does not declare: ModuleNotFoundError",
        "triton_absent",
        _triton,
        lines=("0.19",),
    ),
    Fix(
        "hide_gpu_packages",
        "Transformer Engine and apex, where installed, are used off CUDA",
        NOT_CUDA,
        _hide_gpu_packages,
    ),
    Fix(
        "clipping",
        "without apex or Transformer Engine the norm waits once a parameter, and clipping copies each gradient",
        "te_absent",
        _clipping,
    ),
    Fix("eager_jit", "torch.compile starts a C++ compiler for tiny functions on every rank", NOT_CUDA, _eager_jit),
    Fix(
        "current_device",
        "torch.cuda.current_device is where tensors are made, at about 60 places",
        CPU,
        _current_device,
    ),
    Fix(
        "synchronize", "torch.cuda.synchronize raises without CUDA (timers, batched pipeline sends)", CPU, _synchronize
    ),
    Fix("streams", "the MoE dispatcher, shared experts and DDP make streams and events", CPU, _streams),
    Fix("rng_state", "torch.cuda.get_rng_state raises without CUDA (RNG tracker, recompute)", CPU, _rng_state),
    Fix("seed", "torch.cuda.manual_seed is queued likewise: dropout is silently unseeded", CPU, _seed),
    Fix(
        "rng_restore",
        "the restored RNG state is queued for a CUDA that never comes: recompute silently draws another dropout",
        NOT_CUDA,
        _rng_restore,
    ),
    Fix(
        "rng_warning",
        "tracker and CPU generator are one here, so that a warning is printed at every dropout",
        CPU,
        _rng_warning,
    ),
    Fix("factories", "device='cuda' and pin_memory literals in tensor factories", CPU, _factories),
    Fix(
        "tensor_type",
        "the optimizers compare Tensor.type() with torch.cuda.* names and refuse others",
        NOT_CUDA,
        _tensor_type,
    ),
    Fix("loss_scale_restore", "restoring the fp16 loss scale calls Tensor.cuda", CPU, _loss_scale_restore),
    Fix(
        "uneven_gather",
        "gloo has no all_gather of unequal sizes (expert tensor parallelism with EP > 1)",
        CPU,
        _uneven_gather,
    ),
    Fix(
        "split_sizes",
        "split sizes that lie on the CPU already stay tensors, which all_to_all refuses",
        NOT_CUDA,
        _split_sizes,
    ),
)


def transformer_engine_present() -> bool:
    """Whether Transformer Engine can be used.

    Raises:
        ConfigError: it is installed but cannot be imported; megatron-core would die of the same error.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        return False
    except Exception as error:
        # The meta wheel alone raises RuntimeError where its CUDA core is missing.
        raise ConfigError(
            f"transformer_engine is installed but does not load: {error}",
            "Python environment",
            "pip uninstall transformer-engine, or install it whole: pip install 'megatron_telechat[te]'",
        ) from error
    return True


def apply_fixes(backend: str, device: Any, without: Iterable[str] = ()) -> tuple[str, ...]:
    """Apply the fixes that a backend needs; idempotent.

    Args:
        backend: "cuda", "npu" or "cpu".
        device: torch.device of this rank.
        without: names of fixes to leave out; for the tests that show what breaks.

    Returns:
        Names of the fixes applied in this process.

    Raises:
        ConfigError: another megatron-core version, a broken Transformer Engine, or the process
            already runs on another backend.
    """
    installed = CorePatch.installed()
    if installed is not None:
        if installed.backend != backend:
            raise ConfigError(
                f"this process already runs on {installed.backend} and cannot change to {backend}",
                "--device",
                "start a new process",
            )
        return installed.fixes
    line = installed_line()
    te_present = backend == "cuda" and transformer_engine_present()
    left_out = frozenset(without)
    chosen = [fix for fix in FIXES if fix.applies(backend, te_present, line) and fix.name not in left_out]
    patch = CorePatch(backend, tuple(fix.name for fix in chosen))
    for fix in chosen:
        fix.apply(patch, device)
    patch.install()
    return patch.fixes


def applied_fixes() -> tuple[Fix, ...]:
    """The fixes applied in this process, in order; empty before ``Backend.install``."""
    installed: CorePatch | None = CorePatch.installed()
    names = () if installed is None else installed.fixes
    return tuple(fix for fix in FIXES if fix.name in names)
