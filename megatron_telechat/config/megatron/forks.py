"""Flags of programs that grew from Megatron-LM, as far as they say which model or batch a command is about.

Read for the planner only: the training refuses them as unknown. Sources, each in the program's argument parser:
MindSpeed-LLM (noop-layers: layers that do nothing and fill the pipeline up, n-shared-experts, first-k-dense-replace,
moe-intermediate-size, qk-rope-head-dim),
Pai-Megatron-Patch (extra-vocab-size, intermediate-size, n-head-kv, shared-moe-ffn-hidden-size), BigScience's
Megatron-DeepSpeed (glu-activation, pad-vocab-size-to), FlagScale (multiple-of, hidden-dim-multiplier).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NUMBERS: Mapping[str, str] = {
    "intermediate-size": "ffn_hidden_size",
    "moe-intermediate-size": "moe_ffn_hidden_size",
    "shared-moe-ffn-hidden-size": "moe_shared_expert_intermediate_size",
    "shared-expert-intermediate-size": "moe_shared_expert_intermediate_size",
    "n-head-kv": "num_query_groups",
    "num-key-value-heads": "num_query_groups",
    "qk-rope-head-dim": "qk_pos_emb_head_dim",
    "qk-nope-head-dim": "qk_head_dim",
    "pad-vocab-size-to": "vocab_size",
}
"""Flag of a fork → our field of the same meaning, a number."""
PATCHED: tuple[tuple[str, int | None, int], ...] = (
    ("Qwen", None, 151643),
    ("LLama3", None, 128000),
    ("DeepSeekV2", 2400, 100000),
    ("DeepSeekV2", None, 128813),
    ("LLama", None, 32000),
    ("Mi", None, 32000),
)
"""Beginning of the value of --patch-tokenizer-type, and --extra-vocab-size where it tells two apart → tokens without
the extra ones, which Pai-Megatron-Patch adds without padding."""
OTHERS = (
    *("first-k-dense-replace", "n-shared-experts", "glu-activation", "multiple-of", "hidden-dim-multiplier"),
    *("extra-vocab-size", "tokenizer-name-or-path", "shared-expert-gate", "noop-layers", "geglu", "gated-gelu"),
    *("apply-layernorm-rms", "patch-tokenizer-type"),
)
"""Flags of forks that are read in other ways: below, and for the vocabulary."""
READ = frozenset((*NUMBERS, *OTHERS, "moe-layer-freq"))
"""Flags of forks that change what is planned; all others of them are left out."""


@dataclass(frozen=True)
class Taken:
    """A value that flags of a fork give a field."""

    value: Any
    flag: str


def read_forks(given: Mapping[str, tuple[str, ...]], values: Mapping[str, Any]) -> dict[str, Taken]:
    """Field → what flags of a fork say of it.

    Args:
        given: flag without its hyphens, with hyphens inside → its values.
        values: field → value, of what else is given.
    """
    found = {
        field: Taken(number, f"--{flag}")
        for flag, field in NUMBERS.items()
        if (number := _number(given, flag)) is not None
    }
    noop = [number for word in given.get("noop-layers", ()) for number in word.split(",") if number.isdigit()]
    if noop:
        found["num_layers"] = Taken(max((values.get("num_layers") or 0) - len(noop), 0), "--noop-layers")
    layers = found["num_layers"].value if noop else values.get("num_layers") or 0
    dense = _number(given, "first-k-dense-replace")
    every = _number(given, "moe-layer-freq") or 1
    if dense is not None and 0 < dense <= layers:
        later = [int(layer % max(every, 1) == 0) for layer in range(dense, layers)]
        text = f"[0]*{dense}+[1]*{layers - dense}" if all(later) else f"[0]*{dense}+{later}"
        found["moe_layer_pattern"] = Taken(text, "--first-k-dense-replace")
    shared = _number(given, "n-shared-experts")
    width = found.get("moe_ffn_hidden_size", Taken(values.get("moe_ffn_hidden_size"), "")).value
    if shared and width:
        found["moe_shared_expert_intermediate_size"] = Taken(shared * width, "--n-shared-experts")
    if "shared-expert-gate" in given:
        found["moe_shared_expert_gate"] = Taken(True, "--shared-expert-gate")
    glu = (given.get("glu-activation") or ("",))[0]
    if glu in ("swiglu", "geglu"):
        found["activation"] = Taken("swiglu" if glu == "swiglu" else "quick_geglu", "--glu-activation")
    if {"geglu", "gated-gelu"} & set(given):
        found["activation"] = Taken("quick_geglu", "--geglu" if "geglu" in given else "--gated-gelu")
    if "apply-layernorm-rms" in given:
        found["normalization"] = Taken("RMSNorm", "--apply-layernorm-rms")
    patched, extra = (given.get("patch-tokenizer-type") or ("",))[0], _number(given, "extra-vocab-size")
    base = next((size for name, more, size in PATCHED if patched.startswith(name) and more in (None, extra)), None)
    if base is not None and extra is not None:
        found["vocab_size"] = Taken(base + extra, "--extra-vocab-size")
    multiple, hidden = _number(given, "multiple-of"), values.get("hidden_size")
    if multiple and hidden and not values.get("ffn_hidden_size"):
        text = (given.get("hidden-dim-multiplier") or ("1",))[0]
        factor = float(text) if re.fullmatch(r"\d{1,3}(\.\d{1,6})?", text) else 1.0
        ffn = int(factor * int(4 * hidden * 2 / 3))
        found["ffn_hidden_size"] = Taken(-(-ffn // multiple) * multiple, "--multiple-of")
    replaced = ("num_layers", "moe_layer_pattern")
    return {name: taken for name, taken in found.items() if values.get(name) is None or name in replaced}


def _number(given: Mapping[str, tuple[str, ...]], flag: str) -> int | None:
    text = (given.get(flag) or ("",))[0]
    return int(text) if re.fullmatch(r"-?\d{1,12}", text) else None
