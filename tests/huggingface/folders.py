"""Random Hugging Face folders of every family, written with the safetensors package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PRESET_HEADS = ((24, 24), (32, 32), (48, 48), (64, 8))


def telechat_config(heads: int, groups: int | None, layers: int = 5, head_dim: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "telechat",
        "architectures": ["TelechatForCausalLM"],
        "n_layer": layers,
        "n_head": heads,
        "hidden_size": heads * head_dim,
        "num_key_value_heads": groups,
        "ffn_hidden_size": 40,
        "vocab_size": 64,
        "layer_norm_epsilon": 1e-5,
        "training_seqlen": 32,
        "base_seqlen": 32,
        "tie_word_embeddings": False,
        **more,
    }


def telechat_shapes(config: Mapping[str, Any], expert_bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Written out from the published names, apart from the map under test."""
    h, f, v, heads = (config[k] for k in ("hidden_size", "ffn_hidden_size", "vocab_size", "n_head"))
    groups, experts = config["num_key_value_heads"] or heads, config.get("num_experts")
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (v, h)}
    for i in range(config["n_layer"]):
        p = f"transformer.h.{i}."
        shapes[p + "input_layernorm.weight"] = (h,)
        shapes[p + "self_attention.query.weight"] = (h, h)
        shapes[p + "self_attention.key_value.weight"] = (2 * groups * (h // heads), h)
        shapes[p + "self_attention.dense.weight"] = (h, h)
        shapes[p + "self_attention.dense.bias"] = (h,)
        shapes[p + "post_attention_layernorm.weight"] = (h,)
        folders = [p + "mlp."] if experts is None else [p + f"mlp.local_experts.{e}." for e in range(experts)]
        if experts is not None:
            shapes[p + "mlp.router.weight"] = (experts, h)
        for folder in folders:
            shapes[folder + "gate_proj.weight"] = (f, h)
            shapes[folder + "up_proj.weight"] = (f, h)
            shapes[folder + "down_proj.weight"] = (h, f)
            if experts is None or expert_bias:
                shapes[folder + "down_proj.bias"] = (h,)
    shapes["transformer.ln_f.weight"] = (h,)
    shapes["lm_head.weight"] = (v, h)
    return shapes


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Callable[[str], torch.dtype] = lambda name: torch.float32,
) -> Path:
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype(name)) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    (folder / "modeling_telechat.py").write_text("# the user's own\n")
    return folder


def calm(folder: Path, scale: float = 0.3) -> Path:
    """Scale the random weights of a folder: small embeddings and sharp attention, so that greedy choices follow from
    what was said before, and no logit is large."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            tensor *= 0.02 if "embed" in name else scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        found.update(load_file(file))
    return found


def assert_same_folder(folder: Path, other: Path) -> None:
    """Byte-equal tensors, same names, shapes, dtypes; all other files byte-equal."""
    a, b = all_tensors(folder), all_tensors(other)
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].contiguous().view(-1).view(torch.uint8).equal(b[name].contiguous().view(-1).view(torch.uint8)), (
            name
        )
    for file in folder.iterdir():
        if file.suffix not in (".safetensors", ".bin") and not file.name.endswith(".index.json"):
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name
