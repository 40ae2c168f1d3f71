"""Exports in transformers, through our modelling file, in a process without megatron_telechat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_telechat.checkpoint.manifest import MANIFEST, read_manifest
from megatron_telechat.config.yaml_io import run_config_from_yaml
from megatron_telechat.errors import ConfigError
from megatron_telechat.huggingface import export_hf, import_hf
from megatron_telechat.huggingface.config import model_config_from_hf
from megatron_telechat.huggingface.generation import Sampling, generate
from megatron_telechat.huggingface.model import hf_model
from megatron_telechat.huggingface.weights import hf_tensor_shapes
from tests.huggingface.folders import all_tensors, calm, telechat_config, telechat_shapes, write_folder
from tests.huggingface.plain_telechat import forward

pytestmark = pytest.mark.heavy

STANDALONE = Path(__file__).with_name("standalone.py")
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LENGTHS = (5, 32, 33, 70)
"""Of rows: below and at training_seqlen (32), one above it, and where NTK-aware scaling has changed theta again."""
PROMPT, NEW = list(range(4, 29)), 45
"""25 tokens, and new ones past 32 and 64."""

NOT_IN_THE_REFERENCE = ("fp16 tables", "own fields")
"""What `plain_telechat.forward` does not compute."""
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": telechat_config(4, None, layers=2, head_dim=8),
    "gqa": telechat_config(8, 2, layers=2, head_dim=8),
    "moe": telechat_config(8, 2, layers=2, head_dim=8, num_experts=4, num_experts_per_tok=2),
    "no expert bias": telechat_config(4, 4, layers=2, head_dim=8, num_experts=4, num_experts_per_tok=3),
    "fp16 tables": telechat_config(8, 2, layers=2, head_dim=8, rotary_table_dtype="fp16"),
    # what no published model has: a shared expert, a dense layer between, wide heads, no bias, no scaling
    "own fields": telechat_config(4, 2, layers=3, head_dim=8)
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layer_freq": 2,
        "shared_expert_intermediate_size": 16,
        "head_dim": 16,
        "attention_output_bias": False,
        "mlp_output_bias": False,
        "training_seqlen": None,
        "base_seqlen": None,
    },
    "long": telechat_config(4, 2, layers=2, head_dim=8, rope_theta=1e6, base_seqlen=16),
}


EVERYTHING = ("gqa", "moe")
"""Models that are asked for more than logits, tokens and losses."""


def ask(work: Path, requests: Mapping[str, tuple[str, Path, dict[str, Any]]]) -> dict[str, Any]:
    """Answers of one process that has torch and transformers, and not us."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "requests.json").write_text(json.dumps({n: [w, str(f), a] for n, (w, f, a) in requests.items()}))
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_MODULES_CACHE"] = str(work / "modules")
    done = subprocess.run(
        [sys.executable, str(STANDALONE), str(work / "requests.json")],
        cwd=work, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def export(work: Path, name: str) -> Path:
    """A random model as our export writes it."""
    config = CONFIGS[name]
    shapes = telechat_shapes(config, expert_bias=name != "no expert bias")
    if name == "own fields":
        shapes = dict(hf_tensor_shapes(model_config_from_hf(config)))
    source = write_folder(work / "hf", config, shapes)
    import_hf(calm(source), work / "checkpoints")
    return export_hf(work / "checkpoints", work / "out", modeling="ours").path


def asked(folder: Path, work: Path, ids: str, name: str) -> dict[str, tuple[str, Path, dict[str, Any]]]:
    """What every model is asked, by the name of the request."""
    some = {"prompt": PROMPT, "new": NEW}
    rows = {"prompts": [PROMPT, PROMPT[:7], [*PROMPT, 40, 41, 42, 43, 44, 45, 46, 47]], "new": 12}
    wanted = {
        "logits": ("logits", {"ids": ids, "out": str(work / "logits.safetensors")}),
        "greedy": ("generate", some),
        "greedy without cache": ("generate", {**some, "use_cache": False}),
        "batch": ("generate_batch", rows),
        "losses": ("losses", {"ids": ids}),
    }
    if name in EVERYTHING:
        half = {"ids": ids, "out": str(work / "half.safetensors"), "dtype": "bfloat16" if name == "moe" else "float16"}
        wanted |= {
            "beams": ("beams", {**some, "new": 16, "use_cache": True}),
            "beams without cache": ("beams", {**some, "new": 16, "use_cache": False}),
            "half": ("half", half),
            "train": ("train", {"prompt": PROMPT, "steps": 4, "checkpointing": False}),
            "train, recomputed": ("train", {"prompt": PROMPT, "steps": 4, "checkpointing": True}),
            "packed": ("packed", {"rows": [PROMPT[:5], PROMPT[5:8], PROMPT[8:20]]}),
            "refusals": ("refusals", {}),
            "balance": ("balance", {"topk": 3}),
            "saved again": ("saved_again", {"out": str(work / "again")}),
        }
    return {f"{name}: {key}": (what, folder, said) for key, (what, said) in wanted.items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By model: its folder, and what the process without us said."""
    work = tmp_path_factory.mktemp("exported")
    generator = torch.Generator().manual_seed(3)
    ids = {f"ids_{n}": torch.randint(4, 64, (2, n), generator=generator) for n in LENGTHS}
    save_file(ids, work / "ids.safetensors")
    folders = {name: export(work / name, name) for name in CONFIGS}
    requests: dict[str, tuple[str, Path, dict[str, Any]]] = {}
    for name, folder in folders.items():
        requests |= asked(folder, work / name, str(work / "ids.safetensors"), name)
    said = ask(work / "process", requests)
    return {
        name: {"folder": folder, "ids": ids, "work": work / name}
        | {key.partition(": ")[2]: value for key, value in said.items() if key.startswith(f"{name}: ")}
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_ours_and_those_of_the_published_rules(answers, name):
    found = answers[name]
    logits = load_file(found["work"] / "logits.safetensors")
    weights = all_tensors(found["folder"])
    if name == "no expert bias":
        absent = [key.replace("weight", "bias") for key in weights if "local_experts" in key and "down_proj" in key]
        assert not any(key in weights for key in absent)
        weights |= {key: torch.zeros(32) for key in absent}
    with hf_model(found["folder"]) as ours:
        for key, ids in found["ids"].items():
            assert (logits[key] - ours.logits(ids)).abs().max() < 1e-4, key
            if name not in NOT_IN_THE_REFERENCE:
                assert (logits[key] - forward(CONFIGS[name], weights, ids)).abs().max() < 1e-4, key
    assert max(tensor.abs().max() for tensor in logits.values()) > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_ours_with_and_without_the_cache(answers, name):
    found = answers[name]
    with hf_model(found["folder"]) as ours:
        wanted = generate(ours, PROMPT, NEW, frozenset(), Sampling())
    assert found["greedy"] == found["greedy without cache"] == wanted
    assert len(set(wanted)) > 3, "a text that says one thing tells little"


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(answers, name):
    found = answers[name]
    with hf_model(found["folder"]) as ours:
        for prompt, row in zip(
            [PROMPT, PROMPT[:7], [*PROMPT, 40, 41, 42, 43, 44, 45, 46, 47]], found["batch"], strict=True
        ):
            assert row == generate(ours, prompt, 12, frozenset(), Sampling())


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_the_cross_entropy_of_the_logits(answers, name):
    found, config = answers[name], CONFIGS[name]
    logits = load_file(found["work"] / "logits.safetensors")
    for key, ids in found["ids"].items():
        wanted = torch.nn.functional.cross_entropy(logits[key][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert found["losses"][key] == pytest.approx(wanted.item(), abs=1e-5)
        more = found["losses"][f"{key} with routers"] - found["losses"][key]
        # the balancing loss of a layer is 1 when the experts are evenly loaded, and its coefficient 0.01
        layers = 2 if config.get("num_experts") else 0  # both of two, or the outer ones of three
        assert 0.009 * layers < more < 0.03 * layers if layers else more == 0


@pytest.mark.parametrize("name", EVERYTHING)
def test_beams_reorder_the_cache(answers, name):
    assert answers[name]["beams"] == answers[name]["beams without cache"]


@pytest.mark.parametrize("name", EVERYTHING)
def test_it_trains_and_is_read_in_sixteen_bits_and_saved_again(answers, name):
    found = answers[name]
    *losses, without_gradient = found["train"]
    assert losses[-1] < losses[0] and losses == pytest.approx(found["train, recomputed"][:-1], abs=1e-4)
    # an expert that no token chose has no gradient
    assert without_gradient == 0 or name == "moe"
    assert found["half"] == ("torch.bfloat16" if name == "moe" else "torch.float16")
    exact, half = (load_file(found["work"] / f"{file}.safetensors") for file in ("logits", "half"))
    assert all((exact[key] - half[key]).abs().mean() < 0.3 for key in exact)
    assert found["packed"] < 1e-4
    assert "[1, 3]" in found["refusals"]["mask"] and "contradict" in found["refusals"]["positions"]
    assert "never computed" in found["refusals"]["attentions"]
    assert "modeling_megatron_telechat.py" in found["saved again"]
    ours, theirs = found["balance"]
    assert 3 * ours == pytest.approx(theirs, rel=1e-6), "transformers does not divide by the experts of a token"


def test_the_golden_checkpoint_of_the_published_file(tmp_path):
    """Logits that the published modelling file gave, past its training length, with its rounded tables."""
    folder = GOLDEN / "telechat2_tiny_mha"
    import_hf(folder, tmp_path / "checkpoints")
    out = export_hf(tmp_path / "checkpoints", tmp_path / "out", modeling="ours").path
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rotary_table_dtype": "fp16"}))
    golden = load_file(folder / "golden.safetensors")
    ids = {key: value for key, value in golden.items() if key.startswith("input_ids")}
    save_file(ids, tmp_path / "ids.safetensors")
    arguments = {"ids": str(tmp_path / "ids.safetensors"), "out": str(tmp_path / "logits.safetensors")}
    ask(tmp_path / "process", {"logits": ("logits", out, arguments)})
    for key, logits in load_file(tmp_path / "logits.safetensors").items():
        assert (logits - golden[key.replace("input_ids", "logits")]).abs().max() < 1e-4


def test_whose_modelling_file_an_export_has(tmp_path):
    config = CONFIGS["gqa"] | {"auto_map": {"AutoModelForCausalLM": "modeling_telechat.X", "AutoTokenizer": "t.T"}}
    source = write_folder(tmp_path / "hf", config, telechat_shapes(config))
    import_hf(source, tmp_path / "checkpoints")
    kept = export_hf(tmp_path / "checkpoints", tmp_path / "kept")
    assert (kept.path / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert sorted(p.name for p in kept.path.iterdir()) == sorted(p.name for p in source.iterdir())
    ours = export_hf(tmp_path / "checkpoints", tmp_path / "ours", modeling="ours")
    assert any("takes the place of modeling_telechat.py" in note for note in ours.notes)
    assert not (ours.path / "modeling_telechat.py").exists()
    written = json.loads((ours.path / "config.json").read_text())
    assert written["auto_map"]["AutoTokenizer"] == "t.T" and written["architectures"] == ["TeleChat2ForCausalLM"]
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_megatron_telechat.MegatronTelechatForCausalLM"
    assert model_config_from_hf(written) == model_config_from_hf(config)
    without_import(tmp_path / "checkpoints")
    fresh = export_hf(tmp_path / "checkpoints", tmp_path / "fresh")
    assert (fresh.path / "modeling_megatron_telechat.py").is_file()
    bare = export_hf(tmp_path / "checkpoints", tmp_path / "bare", modeling="keep")
    assert {p.name for p in bare.path.iterdir()} == {"config.json", "model.safetensors"}
    assert any("--modeling ours" in note for note in bare.notes)


def test_mixtral_has_no_modelling_file_of_ours(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    tiny = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(tiny).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="our modelling file is of TeleChat2"):
        export_hf(tmp_path / "checkpoints", tmp_path / "ours", modeling="ours")
    without_import(tmp_path / "checkpoints")
    out = export_hf(tmp_path / "checkpoints", tmp_path / "out").path
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}


def without_import(root: Path) -> None:
    """Make the checkpoint one that no Hugging Face folder was the beginning of: nothing of it is carried along."""
    from dataclasses import replace

    folder = root / "iter_0000000"
    manifest = read_manifest(folder)
    assert run_config_from_yaml(manifest.config).model.num_layers
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("hf/")}
    (folder / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())
    for path in (folder / "hf").iterdir():
        path.unlink()
    (folder / "hf").rmdir()
