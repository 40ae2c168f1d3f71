"""What Transformer Engine's releases take: the functions and classes that this package and megatron-core call.

Facts, read from the published packages. `SIGNATURES` holds for each the parameters from a release on; `NAMES` where a
name can be imported from. `read_signature` and `read_names` find the same in the sources of a release, so that
``test_transformer_engine.py`` can hold the table to them.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megatron_telechat.backend.core_versions import numbers

RELEASES = (
    *("2.4.0", "2.5.0", "2.6.0", "2.7.0", "2.8.0", "2.9.0", "2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.0", "2.14.1"),
    *("2.15.0", "2.16.0", "2.16.1", "2.17.0", "2.17.1", "2.18.0", "2.19.0", "2.20.2"),
)
"""The releases that were read; those of PyPI from the oldest that the extra ``te`` allows."""

_GROUPED = "layout= m_splits= gelu= grad= accumulate= bias= use_bias= use_split_accumulator= D_dtype= single_output="
_GEMM = "layout= out= bias= use_split_accumulator= grad= ub= ub_type= extra_output= bulk_overlap="
_GEMM_TYPES = "out_dtype= quantization_params= gelu= gelu_in="
_LINEAR = (
    "in_features out_features sequence_parallel= fuse_wgrad_accumulation= tp_group= tp_size= get_rng_state_tracker= "
    "rng_tracker_name= init_method= bias= return_bias= params_dtype= parallel_mode= parameters_split= device= "
    "ub_overlap_ag= ub_overlap_rs= ub_overlap_rs_dgrad= ub_bulk_dgrad= ub_bulk_wgrad= ub_name= delay_wgrad_compute= "
    "symmetric_ar_type="
)
_HEADS = "num_attention_heads kv_channels num_gqa_groups= attention_dropout= qkv_format= attn_mask_type= window_size="
_HEADS_RANKS = (
    "sequence_parallel= tp_size= get_rng_state_tracker= tp_group= layer_number= attention_type= cp_group= "
    "cp_global_ranks= cp_stream= cp_comm_type= softmax_scale="
)
_ATTEND = (
    "attention_mask= qkv_format= cu_seqlens_q= cu_seqlens_kv= cu_seqlens_q_padded= cu_seqlens_kv_padded= max_seqlen_q= "
    "max_seqlen_kv= attn_mask_type= window_size="
)
_ATTEND_REST = (
    "checkpoint_core_attention= core_attention_bias_type= core_attention_bias= alibi_slopes= fast_zero_fill= "
    "inference_params= pad_between_seqs="
)
_QKV, _QKV_OPTIONAL = "query_layer key_layer value_layer", "query_layer= key_layer= value_layer="
_SCORES = "score_mod= score_mod_bprop= score_mod_tensors= score_mod_bprop_tensors="
_DELAYED = (
    "margin= fp8_format= amax_history_len= amax_compute_algo= scaling_factor_compute_algo= reduce_amax= fp8_dpa= "
    "fp8_mha="
)
_PRODUCTS = "fp8_gemm_fprop= fp8_gemm_dgrad= fp8_gemm_wgrad= fp8_dpa= fp8_mha="
_BLOCKS = f"use_f32_scales= fp8_format= x_block_scaling_dim= w_block_scaling_dim= grad_block_scaling_dim= {_PRODUCTS}"
_MX = "margin= fp8_format= fp8_dpa= fp8_mha="

SIGNATURES: dict[str, tuple[tuple[str, str | None], ...]] = {
    "general_grouped_gemm": (
        ("2.4.0", f"A B out out_dtype workspaces {_GROUPED}"),
        ("2.10.0", f"A B out out_dtype {_GROUPED}"),
        ("2.11.0", f"A B out quantization_params out_dtype {_GROUPED}"),
    ),
    "general_gemm": (
        ("2.4.0", f"A B workspace {_GEMM_TYPES} accumulate= {_GEMM}"),
        ("2.7.0", f"A B workspace {_GEMM_TYPES} alpha= beta= accumulate= {_GEMM}"),
        ("2.10.0", f"A B {_GEMM_TYPES} alpha= beta= accumulate= {_GEMM}"),
    ),
    "get_workspace": (("2.4.0", ""), ("2.10.0", None)),
    "get_multi_stream_cublas_workspace": (("2.4.0", ""), ("2.10.0", None)),
    "Linear.__init__": (("2.4.0", f"{_LINEAR} name="), ("2.6.0", f"{_LINEAR} save_original_input= name=")),
    "Linear.forward": (("2.4.0", "inp is_first_microbatch= fp8_output= fp8_grad="),),
    "DotProductAttention.__init__": (
        ("2.4.0", f"{_HEADS} {_HEADS_RANKS}"),
        ("2.8.0", f"{_HEADS} {_HEADS_RANKS} softmax_type="),
        ("2.9.0", f"{_HEADS} {_HEADS_RANKS} softmax_type= return_max_logit="),
        ("2.12.0", f"{_HEADS} bottom_right_diagonal= {_HEADS_RANKS} softmax_type= return_max_logit="),
        ("2.16.0", f"{_HEADS} bottom_right_diagonal= {_HEADS_RANKS} softmax_type= return_max_logit= name="),
        ("2.20.0", f"{_HEADS} bottom_right_diagonal= softcap= {_HEADS_RANKS} softmax_type= return_max_logit= name="),
    ),
    "DotProductAttention.forward": (
        ("2.4.0", f"{_QKV} {_ATTEND} {_ATTEND_REST}"),
        ("2.8.0", f"{_QKV} {_ATTEND} {_ATTEND_REST} fp8_output="),
        ("2.10.0", f"{_QKV} {_ATTEND} {_ATTEND_REST} fp8_output= num_splits="),
        ("2.12.0", f"{_QKV} {_ATTEND} bottom_right_diagonal= {_ATTEND_REST} fp8_output= num_splits="),
        ("2.17.0", f"{_QKV} {_ATTEND} bottom_right_diagonal= {_ATTEND_REST} fp8_output= num_splits= {_SCORES}"),
        (
            "2.19.0",
            f"{_QKV_OPTIONAL} {_ATTEND} bottom_right_diagonal= {_ATTEND_REST} fp8_output= bf16_backward= num_splits= "
            f"{_SCORES} qkv_layer= kv_layer= qkv_interleave_dim=",
        ),
        (
            "2.20.0",
            f"{_QKV_OPTIONAL} {_ATTEND} bottom_right_diagonal= softcap= {_ATTEND_REST} fp8_output= bf16_backward= "
            f"num_splits= {_SCORES} qkv_layer= kv_layer= qkv_interleave_dim= thd_attention_policies= "
            "thd_attention_policy_dispatch=",
        ),
    ),
    "checkpoint": (("2.4.0", "function *args **kwargs"),),
    "fp8_autocast": (("2.4.0", "enabled= calibrating= fp8_recipe= fp8_group= _graph="),),
    "check_fp8_support": (("2.4.0", ""),),
    "check_fp8_block_scaling_support": (("2.4.0", ""),),
    "check_mxfp8_support": (("2.4.0", ""),),
    "DelayedScaling": (("2.4.0", _DELAYED), ("2.15.0", f"{_DELAYED} backward_override=")),
    "Float8CurrentScaling": (
        ("2.4.0", f"fp8_format= {_PRODUCTS}"),
        ("2.8.0", f"use_power_2_scales= fp8_format= {_PRODUCTS}"),
        ("2.15.0", f"use_power_2_scales= fp8_format= {_PRODUCTS} backward_override="),
    ),
    "Float8BlockScaling": (("2.4.0", _BLOCKS), ("2.15.0", f"{_BLOCKS} backward_override=")),
    "MXFP8BlockScaling": (
        ("2.4.0", _MX),
        ("2.15.0", f"{_MX} backward_override="),
        ("2.19.0", f"{_MX} backward_override= enable_2d_quantization="),
    ),
    "FusedAdam.__init__": (
        (
            "2.4.0",
            "params lr= betas= eps= weight_decay= amsgrad= * bias_correction= adam_w_mode= capturable= "
            "master_weights= master_weight_dtype= exp_avg_dtype= exp_avg_sq_dtype= use_decoupled_grad= "
            "store_param_remainders= set_grad_none=",
        ),
    ),
}
"""Callable → (release, its parameters from there on, without ``self``; None: it is gone). ``name=`` has a default, what
follows ``*`` is named only. Of a recipe (a pydantic dataclass) its fields: other keywords are *ignored* by it."""

RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")

DEFINED_IN: dict[str, tuple[str, ...]] = {
    "general_grouped_gemm": ("pytorch/cpp_extensions/gemm.py",),
    "general_gemm": ("pytorch/cpp_extensions/gemm.py",),
    "get_workspace": ("pytorch/module/base.py",),
    "get_multi_stream_cublas_workspace": ("pytorch/module/base.py",),
    "Linear": ("pytorch/module/linear.py",),
    "DotProductAttention": ("pytorch/attention/dot_product_attention/dot_product_attention.py",),
    "checkpoint": ("pytorch/distributed.py",),
    "FusedAdam": ("pytorch/optimizers/fused_adam.py",),
    **{
        name: ("pytorch/quantization.py", "pytorch/fp8.py")
        for name in ("fp8_autocast", "check_fp8_support", "check_fp8_block_scaling_support", "check_mxfp8_support")
    },
    **{name: ("common/recipe/__init__.py",) for name in RECIPES},
}
"""Name → files below ``transformer_engine/`` that may define it; the first one that does counts."""

_ROUTER = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
NAMES: dict[str, dict[str, tuple[str, str | None]]] = {
    module: {name: span for names, span in groups for name in names.split()}
    for module, groups in {
        "common.recipe": ((f"Format {' '.join(RECIPES)}", ("2.4.0", None)),),
        "pytorch": (
            (
                "DotProductAttention GroupedLinear LayerNorm LayerNormLinear Linear RMSNorm fp8_autocast "
                "fp8_model_init",
                ("2.4.0", None),
            ),
        ),
        "pytorch.cpp_extensions": (("general_gemm general_grouped_gemm", ("2.4.0", None)),),
        "pytorch.distributed": (("CudaRNGStatesTracker activation_recompute_forward checkpoint", ("2.4.0", None)),),
        "pytorch.fp8": (
            (
                "FP8GlobalStateManager check_fp8_block_scaling_support check_fp8_support check_mxfp8_support "
                "fp8_autocast fp8_model_init",
                ("2.4.0", None),
            ),
        ),
        "pytorch.module.base": (
            ("get_dummy_wgrad", ("2.4.0", None)),
            ("get_multi_stream_cublas_workspace get_workspace", ("2.4.0", "2.10.0")),
        ),
        "pytorch.ops": (("FusibleOperation Sequential", ("2.4.0", None)),),
        "pytorch.optimizers": (
            ("FusedAdam FusedSGD multi_tensor_applier multi_tensor_l2norm multi_tensor_scale", ("2.4.0", None)),
        ),
        "pytorch.router": ((" ".join(_ROUTER), ("2.6.0", None)),),
        "pytorch.tensor": (("QuantizedTensor", ("2.4.0", None)),),
    }.items()
}
"""Module below ``transformer_engine`` → name → (first release that has it, first one that has it no more): what our
code and the import of megatron-core's extension need."""


def names_of(module: str, release: str) -> set[str]:
    """What this table says that a module of a release has."""
    return {
        name
        for name, (since, until) in NAMES[module].items()
        if numbers(since) <= numbers(release) and (until is None or numbers(release) < numbers(until))
    }


def parameters(name: str, release: str) -> str | None:
    """The parameters of a callable in a release; None where it is gone."""
    return [text for since, text in SIGNATURES[name] if numbers(since) <= numbers(release)][-1]


@cache
def signature(name: str, release: str) -> inspect.Signature:
    """The signature to bind a call to. A recipe takes every keyword, as the real one does."""
    text = parameters(name, release)
    assert text is not None, f"{name} is not in {release}"
    return inspect.Signature([*_read(text), *_read("**ignored" if name in RECIPES else "")])


def _read(text: str) -> Iterator[inspect.Parameter]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for word in text.split():
        if word == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
        elif word.startswith("**"):
            yield inspect.Parameter(word[2:], inspect.Parameter.VAR_KEYWORD)
        elif word.startswith("*"):
            yield inspect.Parameter(word[1:], inspect.Parameter.VAR_POSITIONAL)
        else:
            default = None if word.endswith("=") else inspect.Parameter.empty
            yield inspect.Parameter(word.removesuffix("="), kind, default=default)


# ---- the same, from sources ------------------------------------------------------------------


def read_signature(folder: Path, name: str) -> str | None:
    """The parameters of a callable in unpacked sources; None where nothing of that name is defined.

    Args:
        folder: holds ``transformer_engine/``.
    """
    owner, _, method = name.partition(".")
    for file in DEFINED_IN[owner]:
        path = folder / "transformer_engine" / file
        if not path.exists():
            continue
        for node in _tree(path).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name != owner:
                continue
            if isinstance(node, ast.FunctionDef):
                return _text(node.args)
            if not method:
                return _fields(node)
            found = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == method]
            return _text(found[0].args, skip=1)
    return None


def _text(arguments: ast.arguments, skip: int = 0) -> str:
    plain = [*arguments.posonlyargs, *arguments.args]
    first_default = len(plain) - len(arguments.defaults)
    words = [part.arg + "=" * (number >= first_default) for number, part in enumerate(plain)][skip:]
    if arguments.vararg is not None:
        words.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        words.append("*")
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    words += [part.arg + "=" * (default is not None) for part, default in named]
    return " ".join([*words, *([f"**{arguments.kwarg.arg}"] if arguments.kwarg is not None else [])])


def _fields(node: ast.ClassDef) -> str:
    return " ".join(
        part.target.id + "=" * (part.value is not None)
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    )


def read_names(folder: Path, module: str) -> set[str]:
    """Every name that a module of unpacked sources binds at its top, star imports within the package included."""
    base = folder / "transformer_engine" / module.replace(".", "/")
    package = f"transformer_engine.{module}"
    if base.is_dir():
        return _bound(base / "__init__.py", package, folder)
    path = base.with_suffix(".py")
    return _bound(path, package.rpartition(".")[0], folder) if path.exists() else set()


def _bound(path: Path, package: str, folder: Path) -> set[str]:
    found: set[str] = set()
    for node in _at_the_top(_tree(path).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names if alias.name != "*"}
            if any(alias.name == "*" for alias in node.names):
                parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
                source = f"{parent}.{node.module}" if parent else node.module or ""
                if source.startswith("transformer_engine."):
                    found |= read_names(folder, source.removeprefix("transformer_engine."))
    return found


def _at_the_top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _at_the_top(node.body)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
