"""A stand-in for the package ``transformer_engine``, on the CPU: the real signatures of a release, plain arithmetic.

megatron-core's own wrappers (`megatron.core.extensions.transformer_engine`) are imported on it and called by the real
model. Every call is bound to the release's signature (`te_facts`) and noted. What the stand-ins compute is what the
real modules compute up to rounding: products, causal attention, FP8 as a rounding of both operands of a product to
float8_e4m3fn, and the weights of the first micro-batch kept in FP8 for the others. They say nothing about kernels.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from tests.model.te_facts import NAMES, RECIPES, names_of, signature

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class Quantisation:
    """What `fp8_autocast` has set, and what was seen of it."""

    enabled = False
    recipe: Any = None
    group: Any = None


class Log:
    """Calls by callable: (arguments by position, keywords); and of every product whether it was one of FP8."""

    def __init__(self, release: str):
        self.release = release
        self.calls: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
        self.products: list[tuple[str, bool]] = []
        self.ignored: set[str] = set()

    def bind(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call by name; TypeError where the release does not take them."""
        self.calls.setdefault(name, []).append((len(args), tuple(kwargs)))
        bound = signature(name, self.release).bind(*args, **kwargs).arguments
        self.ignored |= set(bound.pop("ignored", ()))
        return bound


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to FP8 with one scale for the tensor; the gradient passes as it is."""
    scale = FP8_MAX / tensor.detach().abs().amax().float().clamp(min=1e-30)
    low = (tensor.detach().float() * scale).to(torch.float8_e4m3fn).float() / scale
    return tensor + (low.to(tensor.dtype) - tensor).detach()


class Gathered(torch.autograd.Function):
    """The tensors of all ranks, [ranks, ...]; the gradient of each goes to its rank."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        out = tensor.new_empty((group.size(), *tensor.shape))
        torch.distributed.all_gather(list(out), tensor.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


def install(release: str) -> Log:
    """Put the stand-in of a release into ``sys.modules``; before megatron-core is imported."""
    log = Log(release)
    objects = {**_modules(log), **_fp8(log), **_recipes(log)}
    top = _module("transformer_engine")
    top.__dict__["__version__"] = release
    _module("transformer_engine_torch")
    for name in ("common", *NAMES):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            _module(".".join(("transformer_engine", *parts[:depth])))
        if name in NAMES:
            module = sys.modules[f"transformer_engine.{name}"]
            for item in names_of(name, release):
                module.__dict__[item] = objects.get(item) or type(item, (torch.nn.Module,), {})
    return log


def _module(name: str) -> ModuleType:
    """A module that is a package, so that what is not in the table fails to be imported from it."""
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    return sys.modules[name]


def _modules(log: Log) -> dict[str, Any]:
    class Linear(torch.nn.Module):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__()
            given = log.bind("Linear.__init__", *args, **kwargs)
            ranks, mode = given.get("tp_size", 1), given.get("parallel_mode")
            shape = [
                given["out_features"] // (ranks if mode == "column" else 1),
                given["in_features"] // (ranks if mode == "row" else 1),
            ]
            place = {"dtype": given["params_dtype"], "device": given["device"]}
            self.weight = torch.nn.Parameter(torch.empty(shape, **place))
            given["init_method"](self.weight)
            self.returns_bias = given.get("return_bias", False)
            has_bias = given.get("bias", True)
            self.bias = torch.nn.Parameter(torch.zeros(shape[0], **place)) if has_bias else None
            self.parallel_mode = mode
            self.kept: torch.Tensor | None = None

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = log.bind("Linear.forward", *args, **kwargs)
            x, weight, first = given["inp"], self.weight, given.get("is_first_microbatch")
            log.products.append((str(self.parallel_mode), Quantisation.enabled))
            if Quantisation.enabled:
                x, low = rounded(x), rounded(weight)
                if first is False and self.kept is not None:
                    low = weight + (self.kept - weight).detach()
                self.kept = low.detach().clone()
                weight = low
            out = F.linear(x, weight, None if self.returns_bias else self.bias)
            return (out, self.bias) if self.returns_bias else out

    class DotProductAttention(torch.nn.Module):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__()
            given = log.bind("DotProductAttention.__init__", *args, **kwargs)
            self.ranks = given.get("cp_group")
            if self.ranks is not None:
                assert given["cp_comm_type"] == "p2p" and given["cp_stream"] is not None
                assert list(given["cp_global_ranks"]) == torch.distributed.get_process_group_ranks(self.ranks)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            given = log.bind("DotProductAttention.forward", *args, **kwargs)
            assert given["attention_mask"] is None and given["attn_mask_type"] == "causal"
            heads = [given[f"{name}_layer"].permute(1, 2, 0, 3) for name in ("query", "key", "value")]
            if self.ranks is not None:
                return self.over_ranks(*heads).permute(2, 0, 1, 3).flatten(2)
            out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            return out.permute(2, 0, 1, 3).flatten(2)

        def over_ranks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            """Rank r of N holds chunks r and 2 N - 1 - r of 2 N, as the real ring wants it."""
            size, half = self.ranks.size(), query.shape[2] // 2
            places = [[rank * half + n for n in range(half)] for rank in range(2 * size)]
            held = [torch.tensor(places[rank] + places[2 * size - 1 - rank]) for rank in range(size)]
            keys, values = (torch.cat(tuple(Gathered.apply(part, self.ranks)), 2) for part in (key, value))
            seen = held[self.ranks.rank()][:, None] >= torch.cat(held)[None, :]
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, *args: Any, **kwargs: Any):
            given = log.bind("FusedAdam.__init__", *args, **kwargs)
            super().__init__(given["params"], **{name: given[name] for name in ("lr", "betas", "eps", "weight_decay")})

    def general_gemm(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None, None, None]:
        """``out = B op(A)`` in the column-major order of cuBLAS: TN is ``B A^T``, NN is ``B A``, NT is ``B^T A``."""
        given = log.bind("general_gemm", *args, **kwargs)
        a, b = given["A"], given["B"]
        layout = given.get("layout", "TN")
        a = a.t() if layout[0] == "T" else a.flatten(0, -2)
        b = b.flatten(0, -2) if layout[1] == "N" else b.flatten(0, -2).t()
        return (b.to(given["out_dtype"]) @ a.to(given["out_dtype"]), None, None, None)

    def nothing(*_: Any) -> None:
        return None

    return {
        "Linear": Linear,
        "DotProductAttention": DotProductAttention,
        "FusedAdam": FusedAdam,
        "general_gemm": general_gemm,
        "get_workspace": nothing,
        "get_multi_stream_cublas_workspace": nothing,
    }


def _fp8(log: Log) -> dict[str, Any]:
    class fp8_autocast:
        def __init__(self, *args: Any, **kwargs: Any):
            given = log.bind("fp8_autocast", *args, **kwargs)
            self.after = (given.get("enabled", True), given.get("fp8_recipe"), given.get("fp8_group"))

        def __enter__(self) -> None:
            state = Quantisation
            self.before = (state.enabled, state.recipe, state.group)
            state.enabled, state.recipe, state.group = self.after

        def __exit__(self, *_: Any) -> None:
            Quantisation.enabled, Quantisation.recipe, Quantisation.group = self.before

    class FP8GlobalStateManager:
        @classmethod
        def is_fp8_enabled(cls) -> bool:
            return Quantisation.enabled

        @classmethod
        def get_fp8_recipe(cls) -> Any:
            return Quantisation.recipe

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, function: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.function, ctx.fp8, ctx.recipe = function, Quantisation.enabled, Quantisation.recipe
            ctx.save_for_backward(x)
            with torch.no_grad():
                return function(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor | None]:
            (x,) = ctx.saved_tensors
            x = x.detach().requires_grad_()
            with torch.enable_grad(), fp8_autocast(enabled=ctx.fp8, fp8_recipe=ctx.recipe):
                out = ctx.function(x)
            torch.autograd.backward(out, grad)
            return None, x.grad

    def checkpoint(*args: Any, **kwargs: Any) -> torch.Tensor:
        """The second pass has the recipe of the first, as Transformer Engine's has."""
        given = log.bind("checkpoint", *args, **kwargs)
        assert set(given["kwargs"]) == {"distribute_saved_activations", "get_rng_state_tracker", "tp_group"}
        assert given["kwargs"]["distribute_saved_activations"] is False and len(given["args"]) == 1
        return Again.apply(given["function"], *given["args"])

    return {
        "fp8_autocast": fp8_autocast,
        "FP8GlobalStateManager": FP8GlobalStateManager,
        "checkpoint": checkpoint,
        **{name: lambda: (True, "") for name in NAMES["pytorch.fp8"] if name.startswith("check_")},
    }


def _recipes(log: Log) -> dict[str, Any]:
    class Format:
        E4M3, HYBRID = "E4M3", "HYBRID"

    def recipe(name: str) -> type:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            self.__dict__.update(log.bind(name, *args, **kwargs))

        return type(name, (), {"__init__": __init__})

    return {"Format": Format, **{name: recipe(name) for name in RECIPES}}
