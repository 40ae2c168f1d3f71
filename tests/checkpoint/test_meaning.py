"""What tensors mean is compared before the start and in the dry run, without torch: heads, groups, experts, rotary,
norm, tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_telechat.checkpoint import CheckpointWriter
from megatron_telechat.checkpoint.lineage import Branch
from megatron_telechat.checkpoint.manifest import read_manifest
from megatron_telechat.checkpoint.meaning import TOKENIZER, tokenizer_of
from megatron_telechat.checkpoint.names import MANIFEST
from megatron_telechat.checkpoint.start import require_start
from megatron_telechat.config import load_run_config
from megatron_telechat.config.run_stages import RunStages
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.yaml_io import dump_run_config
from megatron_telechat.errors import CheckpointError
from megatron_telechat.huggingface import import_hf
from tests.data.material import huggingface_tokenizer
from tests.harness import ROOT

GOLDEN = ROOT / "tests" / "golden"
MOE = "--preset telechat2-tiny-moe --mock-data --train-iters 100 --device cpu".split()


def start_of(run: RunConfig):
    """Where a run without stages begins."""
    return require_start(RunStages.of(run))


def configured(*flags: str):
    return load_run_config([*MOE, *flags], {}).run


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of telechat2-tiny-moe with lengths of rotary scaling, as a run saves it."""
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    run = configured("--rotary-training-seqlen", "2048")
    with CheckpointWriter(root, step=5, config=dump_run_config(run), branch=Branch()) as writer:
        writer.add("model/a", (4,), (0,), torch.zeros(4))
    return root


SAME = ["--rotary-training-seqlen", "2048"]
HARD = {
    "heads": ("--num-attention-heads 4 --num-query-groups 4", "num_attention_heads"),
    "groups": ("--num-query-groups 2", "num_query_groups"),
    "head size": ("--kv-channels 8", "kv_channels"),
    "experts": ("--num-experts 4", "num_experts"),
    "which layers": ("--moe-layer-freq 2 --num-layers 4", "moe_layer_freq"),
    "a shared expert": ("--moe-shared-expert-intermediate-size 32", "moe_shared_expert_intermediate_size"),
    "bias of the attention": ("--no-attention-output-bias", "attention_output_bias"),
    "bias of the experts": ("--no-mlp-output-bias", "mlp_output_bias"),
    "vocabulary": ("--vocab-size 512", "vocab_size"),
}
SOFT = {
    "top-k": ("--moe-router-topk 3", "moe_router_topk"),
    "norm": ("--norm-epsilon 1e-6", "norm_epsilon"),
    "rotary base": ("--rotary-base 1000000", "rotary_base"),
    "scaling off": ("--rotary-training-seqlen none --rotary-base-seqlen none", "rotary_training_seqlen"),
    "length it counts from": ("--rotary-base-seqlen 1024", "rotary_base_seqlen"),
}


@pytest.mark.parametrize("door", ["--load", "--pretrained-checkpoint"])
@pytest.mark.parametrize("name", [*HARD, *SOFT])
def test_another_meaning_is_refused(saved, tmp_path, name, door):
    flags, field = {**HARD, **SOFT}[name]
    line = [*SAME, *flags.split(), door, str(saved), "--run-dir", str(tmp_path)]
    with pytest.raises(CheckpointError, match=rf"{field} is .* in the checkpoint and .* in the run") as caught:
        start_of(configured(*line))
    assert caught.value.problems[0].fix.startswith("--")
    if name in SOFT:
        assert "--allow-model-change" in str(caught.value)
        start, _ = start_of(configured(*line, "--allow-model-change"))
        assert any(field in note for note in start.notes)
    else:
        with pytest.raises(CheckpointError):
            start_of(configured(*line, "--allow-model-change"))


@pytest.mark.parametrize(
    "flags",
    [
        "--moe-aux-loss-coeff 0.5",
        "--init-method-std 0.1",
        "--hidden-dropout 0.1",
        "--rotary-table-dtype fp16",
        "--name other",
        "--rotary-base-seqlen 256",
        "--ffn-hidden-size 64",
    ],
)
def test_what_changes_no_meaning_is_free(saved, flags):
    start, found = start_of(configured(*SAME, *flags.split(), "--load", str(saved)))
    assert found is not None and found.step == 5 and start.opens is not None


def test_values_of_another_release_are_passed_over(tmp_path):
    text = dump_run_config(configured()).replace("model:\n", "model:\n  moe_newer_thing: 3\n", 1) + "newer:\n  x: 1\n"
    with CheckpointWriter(tmp_path, step=5, config=text) as writer:
        writer.add("model/a", (4,), (0,), torch.zeros(4))
    start_of(configured("--load", str(tmp_path)))
    with pytest.raises(CheckpointError, match="num_query_groups"):
        start_of(configured("--load", str(tmp_path), "--num-query-groups", "2"))


def test_another_tokenizer_is_refused_by_what_it_does_not_by_its_path(tmp_path):
    trained_with = huggingface_tokenizer(tmp_path)
    content = json.loads(trained_with.read_text())
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(json.dumps({**content, "truncation": None}, indent=7))
    words = content["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    other.write_text(json.dumps(content))

    def run(path: Path, *flags: str):
        return configured(
            "--vocab-size", "4096", "--tokenizer-model", str(path), "--load", str(tmp_path / "saved"), *flags
        )

    trained = configured("--vocab-size", "4096", "--tokenizer-model", str(trained_with))
    for extra in ({TOKENIZER: tokenizer_of(trained)}, {}):  # older checkpoints name the file only
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        with CheckpointWriter(tmp_path / "saved", step=5, config=dump_run_config(trained), extra=extra) as writer:
            writer.add("model/a", (4,), (0,), torch.zeros(4))
        start_of(run(trained_with))
        start_of(run(same))
        with pytest.raises(CheckpointError, match="gives other ids than the tokenizer"):
            start_of(run(other))
        start_of(run(other, "--allow-model-change"))


def test_an_import_is_held_against_the_run_and_its_folder_is_named_where_it_was_forgotten(tmp_path):
    source = GOLDEN / "telechat2_tiny_gqa"
    root = import_hf(source, tmp_path / "w").path.parent
    import megatron_telechat.huggingface.weights as hf

    model = hf.HfWeights(source).model
    fitting = [
        word
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "vocab_size",
            "norm_epsilon",
            "rotary_base",
            "rotary_training_seqlen",
            "rotary_base_seqlen",
        )
        for word in (f"--{name}", str(getattr(model, name)))
    ]
    line = [
        "--architecture",
        "telechat2",
        "--mock-data",
        "--train-iters",
        "10",
        *fitting,
        "--run-dir",
        str(tmp_path / "run"),
    ]
    start_of(load_run_config([*line, "--pretrained-checkpoint", str(root)], {}).run)
    with pytest.raises(CheckpointError, match="rotary_base is"):
        start_of(load_run_config([*line, "--rotary-base", "77", "--finetune", "--load", str(root)], {}).run)
    with pytest.raises(CheckpointError, match="(?s)a Hugging Face folder.*convert_checkpoint.py import --hf"):
        start_of(load_run_config([*line, "--pretrained-checkpoint", str(source)], {}).run)


def test_loss_scales_that_have_parted_are_refused_before_the_start(saved, tmp_path):
    """An older release kept one for the dense and one for the expert parameters."""
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    folder = root / "iter_0000005"
    pair = {
        name: {"scale": scale, "growth_tracker": 0, "hysteresis_tracker": 2}
        for name, scale in (("dense", 2048.0), ("expert", 134217728.0))
    }
    manifest = replace(read_manifest(folder), optimizer={"step": 5, "grad_scaler": pair})
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    line = [*SAME, "--load", str(root), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(CheckpointError, match="two loss scales, 2048 of the dense and 1.34218e\\+08 of the expert"):
        start_of(configured(*line))
    for way_out in (["--no-load-optim"], ["--finetune"]):
        start_of(configured(*line, *way_out))


@pytest.mark.heavy
def test_the_dry_run_looks_and_torch_stays_out(saved, tmp_path):
    code = (
        "import sys; from megatron_telechat.cli.pretrain import main; code = main(sys.argv[1:]); print('torch' in "
        "sys.modules); sys.exit(code)"
    )

    def dry(*flags: str):
        return subprocess.run(
            [sys.executable, "-c", code, *MOE, *SAME, "--dry-run", "--run-dir", str(tmp_path), *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )

    good = dry("--load", str(saved))
    assert (
        good.returncode == 0 and good.stdout.endswith("False\n") and f"{saved}/iter_0000005: step 5" in good.stdout
    ), good.stderr
    bad = dry("--load", str(saved), "--num-attention-heads", "4", "--num-query-groups", "2")
    assert bad.returncode == 4 and bad.stdout == "False\n"
    assert "checkpoint error: 3 problems" in bad.stderr and "Traceback" not in bad.stderr
