"""Which tensors patterns name, and the mistakes that are told before a run begins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.costs.memory import checkpoint_bytes, stage_memory, staging_bytes
from megatron_telechat.costs.parameters import count_parameters
from megatron_telechat.errors import ConfigError
from megatron_telechat.tensors.frozen import frozen_keys, frozen_parameters
from megatron_telechat.tensors.patterns import TensorPattern
from megatron_telechat.tensors.table import tensor_table


def a_run(*flags: str, preset: str = "telechat2-tiny"):
    argv = ["--preset", preset, "--mock-data", "--train-iters", "80", *flags]
    return load_run_config(argv, {"WORLD_SIZE": "4"}).run


@pytest.mark.parametrize(
    "text,key,fits",
    [
        ("embedding.*", "embedding.word_embeddings.weight", True),
        ("*.router.weight", "decoder.layers.3.mlp.router.weight", True),
        ("decoder.layers.0-2,7.*", "decoder.layers.7.mlp.linear_fc1.weight", True),
        ("decoder.layers.0-2,7.*", "decoder.layers.3.mlp.linear_fc1.weight", False),
        ("decoder.layers.1.*", "decoder.layers.11.input_layernorm.weight", False),
        ("decoder.layers.0-9.linear_fc1.weight", "decoder.layers.1.mlp.linear_fc1.weight", False),
        ("decoder.layers.0-9.*.bias", "decoder.layers.1.mlp.linear_fc2.bias", True),
        ("decoder.layers.0-9.*", "decoder.final_layernorm.weight", False),
        ("Embedding.*", "embedding.word_embeddings.weight", False),
    ],
)
def test_a_pattern(text, key, fits):
    assert TensorPattern.of(text).fits(key) is fits


def test_what_freeze_names_and_freeze_except_spares():
    assert frozen_keys(a_run()) == frozenset()
    below = frozen_keys(a_run("--freeze", "embedding.*", "decoder.layers.0-1.*"))
    assert below == {
        key
        for key in tensor_table(a_run().model)
        if key.startswith(("embedding.", "decoder.layers.0.", "decoder.layers.1."))
    }
    spared = frozen_keys(a_run("--freeze", "decoder.layers.0-1.*", "--freeze-except", "*layernorm*"))
    assert spared == {key for key in below if "layernorm" not in key and key.startswith("decoder")}
    run = a_run("--freeze-except", "output_layer.weight")
    assert frozen_keys(run) == set(tensor_table(run.model)) - {"output_layer.weight"}
    assert frozen_parameters(run) == count_parameters(run.model).total - run.model.vocab_size * run.model.hidden_size


def test_every_mistake_is_told_at_once():
    run = a_run("--freeze", "decoder.layers.3-1.*", "encoder.*", "--freeze-except", "decoder.layers.99.*")
    with pytest.raises(ConfigError) as caught:
        frozen_keys(run)
    text = caught.value.render()
    assert "names no layers: the range 3-1 is empty" in text and "'encoder.*' names no tensor" in text
    assert "freeze_except: 'decoder.layers.99.*' names no tensor of the model that is frozen" in text
    with pytest.raises(ConfigError, match="there is nothing to train"):
        frozen_keys(a_run("--freeze", "*"))
    with pytest.raises(ConfigError, match="there is nothing to train"):
        frozen_keys(a_run("--freeze", "embedding.*", "decoder.*", "output_layer.*"))


@pytest.mark.parametrize("preset", ["telechat2-tiny", "telechat2-tiny-moe"])
def test_frozen_parameters_take_weights_alone(preset):
    layout = ["--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"]
    whole, run = a_run(*layout, preset=preset), a_run(*layout, "--freeze", "decoder.*", preset=preset)
    for before, after in zip(stage_memory(whole), stage_memory(run), strict=True):
        assert after.parameters_bytes == before.parameters_bytes
        matrix = run.model.vocab_size * run.model.hidden_size
        # fp32 throughout: gradients, and two moments over the data-parallel ranks. The final norm is of the decoder.
        assert after.gradients_bytes == 4 * matrix and after.optimizer_bytes == 8 * matrix / 2
        assert after.activations_bytes == before.activations_bytes
    total = count_parameters(run.model).total
    assert checkpoint_bytes(whole, total) - checkpoint_bytes(run, total) == 8 * frozen_parameters(run)
    assert staging_bytes(run) < staging_bytes(whole)
    kept = replace(run, checkpoint=replace(run.checkpoint, no_save_optim=True))
    assert staging_bytes(kept) == staging_bytes(replace(whole, checkpoint=kept.checkpoint))
