"""Mixtral: what we export is transformers' model as it stands, and computes what ours computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_telechat.cli.check_logits import main as check_logits
from megatron_telechat.huggingface import export_hf, import_hf
from megatron_telechat.huggingface.config import model_config_from_hf
from megatron_telechat.huggingface.generation import Sampling, generate
from megatron_telechat.huggingface.model import hf_model
from megatron_telechat.huggingface.weights import hf_tensor_shapes
from tests.harness import run_cases
from tests.huggingface.folders import all_tensors, assert_same_folder, calm, write_folder
from tests.huggingface.test_exported_model import NEW, PROMPT, ask, without_import
from tests.huggingface.worker_mixtral import LAYOUTS, LENGTH

pytestmark = pytest.mark.heavy


def config_of(hidden: int, heads: int, groups: int, ffn: int, layers: int, vocab: int = 64) -> dict[str, Any]:
    return {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6,
        "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip


def trained_from_scratch(work: Path, config: dict[str, Any], scale: float = 0.3) -> Path:
    """An export of weights that no Hugging Face folder was the beginning of."""
    source = write_folder(work / "hf", config, dict(hf_tensor_shapes(model_config_from_hf(config))))
    calm(source, scale)
    import_hf(source, work / "checkpoints")
    without_import(work / "checkpoints")
    return export_hf(work / "checkpoints", work / "out").path


def test_an_export_is_transformers_own_model(tmp_path, capsys):
    out = trained_from_scratch(tmp_path, config_of(32, 4, 2, 24, 2))
    ids = {f"input_ids_{n}": torch.randint(4, 64, (2, n), generator=torch.Generator().manual_seed(n)) for n in (9, 70)}
    save_file(ids, tmp_path / "ids.safetensors")
    logits = {"ids": str(tmp_path / "ids.safetensors"), "out": str(tmp_path / "logits.safetensors")}
    said = ask(
        tmp_path / "process",
        {
            "logits": ("logits", out, logits),
            "greedy": ("generate", out, {"prompt": PROMPT, "new": NEW}),
            "saved again": ("saved_again", out, {"out": str(tmp_path / "again")}),
        },
    )
    with hf_model(out) as ours:
        assert said["greedy"] == generate(ours, PROMPT, NEW, frozenset(), Sampling())
    found = load_file(tmp_path / "logits.safetensors")
    golden = {**ids, **{key.replace("input_ids", "logits"): value for key, value in found.items()}}
    save_file(golden, tmp_path / "golden.safetensors")
    assert (
        check_logits(["--hf", str(out), "--golden", str(tmp_path / "golden.safetensors"), "--tolerance", "1e-4"]) == 0
    )
    assert "largest error" in capsys.readouterr().out
    # what transformers writes of it has the same names and bytes, and comes back byte-equal
    ours, theirs = all_tensors(out), all_tensors(tmp_path / "again")
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    import_hf(tmp_path / "again", tmp_path / "second")
    assert_same_folder(tmp_path / "again", export_hf(tmp_path / "second", tmp_path / "third").path)
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["MixtralForCausalLM"] and "auto_map" not in written


@pytest.mark.gloo
@pytest.mark.slow
def test_logits_over_pipeline_stages(tmp_path):
    """Weights of a Hugging Face folder, imported, in a training's layout of four ranks."""
    source = write_folder(
        tmp_path / "hf", config := config_of(32, 4, 2, 24, 4), dict(hf_tensor_shapes(model_config_from_hf(config)))
    )
    calm(source)
    import_hf(source, tmp_path / "checkpoints", config=tmp_path / "model.yaml")
    ids = torch.randint(4, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    save_file({f"input_ids_{LENGTH}": ids}, tmp_path / "ids.safetensors")
    logits = {"ids": str(tmp_path / "ids.safetensors"), "out": str(tmp_path / "logits.safetensors")}
    ask(tmp_path / "process", {"logits": ("logits", source, logits)})
    found = load_file(tmp_path / "logits.safetensors")[f"input_ids_{LENGTH}"]
    save_file({f"input_ids_{LENGTH}": ids, f"logits_{LENGTH}": found}, tmp_path / "golden.safetensors")
    report = run_cases(
        Path(__file__).with_name("worker_mixtral.py"), 4, timeout=300, env={"MIXTRAL_DIR": str(tmp_path)}
    )
    for name in LAYOUTS:
        errors = report.check(name)
        assert 0 < max(errors) < 1e-4, name


@pytest.mark.slow
def test_logits_at_the_real_widths(tmp_path, capsys):
    """One layer of Mixtral-8x7B with random weights, 1.4 billion parameters in fp32 (6 GB of memory and of disk)."""
    out = trained_from_scratch(tmp_path, config_of(4096, 32, 8, 14336, 1, vocab=512), scale=0.02)
    (tmp_path / "hf" / "model.safetensors").unlink()
    ids = torch.randint(4, 512, (1, 48), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids_48": ids}, tmp_path / "ids.safetensors")
    logits = {"ids": str(tmp_path / "ids.safetensors"), "out": str(tmp_path / "logits.safetensors")}
    ask(tmp_path / "process", {"logits": ("logits", out, logits)})
    found = load_file(tmp_path / "logits.safetensors")["input_ids_48"]
    save_file({"input_ids_48": ids, "logits_48": found}, tmp_path / "golden.safetensors")
    code = check_logits(["--hf", str(out), "--golden", str(tmp_path / "golden.safetensors"), "--tolerance", "1e-4"])
    with capsys.disabled():
        print(capsys.readouterr().out)
    assert code == 0
