"""Qwen3-MoE: Mixtral's layer with a norm on queries and keys, under names of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_telechat.cli.check_logits import main as check_logits
from megatron_telechat.errors import CheckpointError
from megatron_telechat.huggingface import export_hf, import_hf
from megatron_telechat.huggingface.config import hf_config_of, model_config_from_hf
from tests.huggingface.folders import assert_same_folder

QWEN3: dict[str, Any] = {
    # of the published config.json of Qwen3-30B-A3B, narrower
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
    "attention_bias": False, "mlp_only_layers": [], "decoder_sparse_step": 1, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "sliding_window": None, "use_sliding_window": False, "rope_scaling": None, "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.001, "hidden_act": "silu", "max_position_embeddings": 40960,
}  # fmt: skip


@pytest.mark.heavy
def test_it_is_what_transformers_saves_and_computes(tmp_path, capsys):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(5)
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**QWEN3, "initializer_range": 0.3})).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "norm" in name:  # all of them 1 otherwise, and none missed
                tensor.add_(0.3 * torch.randn_like(tensor))
    theirs.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "checkpoints")
    assert_same_folder(tmp_path / "hf", export_hf(tmp_path / "checkpoints", tmp_path / "exported").path)
    ids = torch.randint(4, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        save_file({"input_ids_40": ids, "logits_40": theirs(ids).logits}, tmp_path / "golden.safetensors")

    def check(folder: Path) -> int:
        return check_logits(["--hf", str(folder), "--golden", str(tmp_path / "golden.safetensors")])

    assert check(tmp_path / "hf") == 0, capsys.readouterr().out
    # with a config.json of ours, as of a model that was trained from scratch
    ours = hf_config_of(model_config_from_hf(json.loads((tmp_path / "hf" / "config.json").read_text())), "fp32")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(ours))
    assert check(tmp_path / "hf") == 0, capsys.readouterr().out
    with torch.no_grad():
        again = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
        assert torch.equal(again(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"attention_bias": True}, "biases on queries, keys and values"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"norm_topk_prob": None}, "norm_topk_prob"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ({"tie_word_embeddings": True}, "tied embeddings"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window 4096"),
        ({"hidden_act": "gelu"}, "only silu"),
    ],
)
def test_another_kind_is_refused(change, message):
    assert model_config_from_hf(QWEN3).qk_layernorm
    with pytest.raises(CheckpointError, match=message):
        model_config_from_hf({name: value for name, value in {**QWEN3, **change}.items() if value is not None})
