"""Hugging Face weights: import then export gives the same bytes; what does not fit is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_telechat.checkpoint import CheckpointReader
from megatron_telechat.checkpoint.manifest import read_manifest
from megatron_telechat.checkpoint.names import MANIFEST
from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.config.yaml_io import dump_run_config, run_config_from_yaml
from megatron_telechat.errors import CheckpointError, ConfigError, UserError
from megatron_telechat.huggingface import export_hf, import_hf, weight_map
from megatron_telechat.huggingface.config import hf_config_of, model_config_from_hf
from megatron_telechat.huggingface.convert import parse_size
from megatron_telechat.huggingface.weights import HfWeights, hf_tensor_shapes
from megatron_telechat.tensors.table import tensor_table
from tests.huggingface.folders import (
    PRESET_HEADS,
    all_tensors,
    assert_same_folder,
    telechat_config,
    telechat_shapes,
    write_folder,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def round_trip(source: Path, work: Path, **export) -> Path:
    import_hf(source, work / "checkpoints")
    return export_hf(work / "checkpoints", work / "exported", **export).path


@pytest.mark.parametrize("name", ["telechat2_tiny_gqa", "telechat2_tiny_mha"])
def test_golden_checkpoints_come_back_byte_equal(tmp_path, name):
    exported = round_trip(GOLDEN / name, tmp_path)
    assert (exported / "model.safetensors").is_file()
    assert_same_folder(GOLDEN / name, exported)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, groups", [*PRESET_HEADS, (8, None), (8, 1)])
def test_every_head_layout_comes_back_byte_equal(tmp_path, heads, groups, dtype):
    config = telechat_config(heads, groups, layers=2, head_dim=2)
    source = write_folder(tmp_path / "hf", config, telechat_shapes(config), lambda name: dtype)
    assert_same_folder(source, round_trip(source, tmp_path))


def test_moe_comes_back_byte_equal_with_and_without_expert_bias(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = telechat_config(8, 8, layers=2, num_experts=4, num_experts_per_tok=2)
    for bias in (True, False):
        work = tmp_path / str(bias)
        source = write_folder(work / "hf", config, telechat_shapes(config, expert_bias=bias))
        done = import_hf(source, work / "checkpoints")
        assert_same_folder(source, export_hf(work / "checkpoints", work / "exported").path)
        zeros = CheckpointReader(done.path).read("model/decoder.layers.0.mlp.experts.linear_fc2.bias")
        assert bool(zeros.any()) == bias and len(done.notes) == (0 if bias else 2)
    assert "set to zero" in caplog.text


def test_each_tensor_keeps_a_dtype_of_its_own(tmp_path):
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    config = telechat_config(8, 2, layers=2, num_experts=3, num_experts_per_tok=2)
    shapes = telechat_shapes(config)
    order = {name: dtypes[number % 3] for number, name in enumerate(shapes)}
    source = write_folder(tmp_path / "hf", config, shapes, order.__getitem__)
    assert_same_folder(source, round_trip(source, tmp_path))


def test_fused_rows_are_where_megatron_wants_them(tmp_path):
    """Written out from the packing rule: group g is its query heads, then K_g, then V_g."""
    heads, groups, width = 6, 3, 4
    config = telechat_config(heads, groups, layers=1, head_dim=width)
    source = write_folder(tmp_path / "hf", config, telechat_shapes(config))
    path = import_hf(source, tmp_path / "checkpoints").path
    tensors, reader = all_tensors(source), CheckpointReader(path)
    fused = reader.read("model/decoder.layers.0.self_attention.linear_qkv.weight")
    query = tensors["transformer.h.0.self_attention.query.weight"]
    packed = tensors["transformer.h.0.self_attention.key_value.weight"]
    row = 0
    for group in range(groups):
        for head in (2 * group, 2 * group + 1):
            assert fused[row : row + width].equal(query[head * width : (head + 1) * width])
            row += width
        key, value = packed[2 * group * width :][:width], packed[(2 * group + 1) * width :][:width]
        assert fused[row : row + width].equal(key) and fused[row + width : row + 2 * width].equal(value)
        row += 2 * width
    gate_up = reader.read("model/decoder.layers.0.mlp.linear_fc1.weight")
    assert gate_up[0].equal(tensors["transformer.h.0.mlp.gate_proj.weight"])
    assert gate_up[1].equal(tensors["transformer.h.0.mlp.up_proj.weight"])


def test_mixtral_as_transformers_saves_it_comes_back_byte_equal(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    exported = round_trip(tmp_path / "hf", tmp_path)
    assert_same_folder(tmp_path / "hf", exported)


def test_shards_and_their_index_are_those_of_transformers(tmp_path):
    config = telechat_config(8, 2)
    source = write_folder(tmp_path / "hf", config, telechat_shapes(config))
    exported = round_trip(source, tmp_path, max_shard_bytes=30_000)
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((exported / name).stat().st_size < 40_000 for name in shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(source).values())
    assert {name: file for file in shards for name in load_file(exported / file)} == index["weight_map"]
    import_hf(exported, tmp_path / "again")  # and it reads its own shards
    assert_same_folder(source, export_hf(tmp_path / "again", tmp_path / "exported_again").path)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_weights_are_read_without_running_code(tmp_path, legacy):
    config = telechat_config(8, 2)
    source = write_folder(tmp_path / "hf", config, telechat_shapes(config))
    tensors = all_tensors(source)
    names = sorted(tensors)
    halves = {"pytorch_model-1.bin": names[:20], "pytorch_model-2.bin": names[20:]}
    pickled = tmp_path / "pickled"
    shutil.copytree(source, pickled)
    (pickled / "model.safetensors").unlink()
    for file, keys in halves.items():
        torch.save({key: tensors[key] for key in keys}, pickled / file, _use_new_zipfile_serialization=not legacy)
    weight_map_ = {key: file for file, keys in halves.items() for key in keys}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map_}))
    assert_same_folder(source, round_trip(pickled, tmp_path))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    config = telechat_config(8, 2)
    source = write_folder(tmp_path / "hf", config, telechat_shapes(config))
    (source / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        import_hf(source, tmp_path / "checkpoints")
    assert not marker.exists()


def test_every_file_that_is_not_weights_is_carried_over_and_survives(tmp_path):
    config = telechat_config(8, 2)
    source = write_folder(tmp_path / "hf", config, telechat_shapes(config))
    (source / "tokenizer.model").write_bytes(bytes(range(256)))
    (source / "assets").mkdir()
    (source / "assets" / "notes.txt").write_text("n")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("c")
    (source / "golden.safetensors").write_bytes(b"not ours")
    exported = round_trip(source, tmp_path)
    found = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert found == {"config.json", "modeling_telechat.py", "tokenizer.model", "assets/notes.txt", "model.safetensors"}
    assert (exported / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (exported / "tokenizer.model").read_bytes() == bytes(range(256))


def damaged(tmp_path: Path, change_config=None, change_tensors=None) -> Path:
    config = telechat_config(8, 2, layers=1)
    shapes = telechat_shapes(config)
    if change_tensors:
        change_tensors(shapes)
    if change_config:
        change_config(config)
    return write_folder(tmp_path / "hf", config, shapes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda t: t.pop("transformer.h.0.self_attention.dense.bias"),
            "missing: transformer.h.0.self_attention.dense.bias",
        ),
        (lambda t: t.update({"transformer.h.0.odd": (3,)}), "unexpected: transformer.h.0.odd"),
        (
            lambda t: t.update({"transformer.ln_f.weight": (3,)}),
            r"transformer.ln_f.weight \[3\], config.json says \[32\]",
        ),
        (lambda t: t.update({"transformer.word_embeddings_layernorm.weight": (32,)}), "embed_layernorm"),
        (lambda t: (t.pop("lm_head.weight"), t.update({"word_embeddings.weight": (64, 32)})), "TeleChat-7B"),
        (lambda t: t.update({"transformer.wte.weight": (64, 32)}), "TeleChat-52B"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        import_hf(damaged(tmp_path, change_tensors=change), tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(model_type="llama"), "model_type is 'llama'"),
        (lambda c: c.update(mup_scale_factor=32), "TeleChat-52B"),
        (lambda c: c.update(tie_word_embeddings=True), "tied"),
        (lambda c: c.update(embed_layernorm=True), "embed_layernorm"),
        (lambda c: c.update(apply_residual_connection_post_layernorm=True), "post_layernorm"),
        (lambda c: c.update(n_head="many", n_layer=-1), "2 problems"),
        (lambda c: c.update(n_head=7), "does not divide by 7"),
        (lambda c: c.update(num_key_value_heads=3), "do not divide by num_key_value_heads 3"),
        (lambda c: c.update(num_experts=4), "num_experts_per_tok is missing"),
        (lambda c: c.update(num_experts=4, num_experts_per_tok=1), "one expert per token is not supported"),
        (lambda c: c.update(rope_scaling={"type": "dynamic", "factor": 3.0}), "factor 3.0"),
    ],
)
def test_a_config_that_is_not_supported_says_what_is_wrong(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        import_hf(damaged(tmp_path, change_config=change), tmp_path / "checkpoints")


MIXTURES = {
    # The values of the published config.json files.
    "deepseek_v2": (
        {"kv_lora_rank": 512, "first_k_dense_replace": 1, "n_routed_experts": 64, "n_group": 1, "topk_group": 1,
         "norm_topk_prob": False, "routed_scaling_factor": 1.0, "attention_bias": False, "tie_word_embeddings": False},
        ["kv_lora_rank 512", "first_k_dense_replace 1", "norm_topk_prob"],
    ),
    "deepseek_v3": (
        {"kv_lora_rank": 512, "first_k_dense_replace": 3, "n_routed_experts": 256, "n_group": 8, "norm_topk_prob": True,
         "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"},
        ["kv_lora_rank 512", "first_k_dense_replace 3", "n_group 8", "scoring_func", "routed_scaling_factor 2.5"],
    ),
    "qwen2_moe": (
        {"num_experts": 60, "norm_topk_prob": False, "qkv_bias": True, "shared_expert_intermediate_size": 5632,
         "mlp_only_layers": []},
        ["norm_topk_prob", "shared expert", "biases on queries"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXTURES)
def test_other_mixtures_are_refused_with_what_they_would_need(tmp_path, kind):
    config, needed = MIXTURES[kind]
    with pytest.raises(CheckpointError) as caught:
        import_hf(
            damaged(tmp_path, change_config=lambda c: c.update(model_type=kind, **config)), tmp_path / "checkpoints"
        )
    text = caught.value.render()
    assert f"model_type is '{kind}', which is not imported" in text and "docs/checkpoints.md" in text
    assert all(word in text for word in needed) and ("not built here" in text) == bool(needed)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "\x00"])
def test_odd_config_files_are_named(tmp_path, content):
    source = damaged(tmp_path)
    (source / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        import_hf(source, tmp_path / "checkpoints")


def test_damaged_weight_files_and_indexes_are_named(tmp_path):
    source = damaged(tmp_path)
    data = (source / "model.safetensors").read_bytes()
    for cut in (0, 5, 200, len(data) - 1):
        (source / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="model.safetensors"):
            import_hf(source, tmp_path / "checkpoints")
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights there"):
        import_hf(source, tmp_path / "checkpoints")
    for listed, message in (
        ({"a": "../model.safetensors"}, "not a .safetensors file of the folder"),
        ({"a": "gone.safetensors"}, "missing"),
        ({}, "no weight_map"),
    ):
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(CheckpointError, match=message):
            import_hf(source, tmp_path / "checkpoints")
    (source / "part.safetensors").write_bytes(data)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match="not where the index says"):
        import_hf(source, tmp_path / "checkpoints")


def test_absent_keys_have_the_defaults_of_telechat_config():
    model = model_config_from_hf({"model_type": "telechat"})
    assert (model.num_layers, model.num_attention_heads, model.hidden_size, model.ffn_hidden_size) == (
        30,
        32,
        4096,
        12288,
    )
    assert (model.vocab_size, model.norm_epsilon, model.rotary_training_seqlen) == (160256, 1e-5, 8192)
    assert (model.query_groups, model.rotary_base) == (32, 10000.0)
    model = model_config_from_hf(
        {
            "model_type": "telechat",
            "n_embed": 2048,
            "hidden_size": 64,
            "layer_norm_epsilon": 1e-8,
            "rope_theta": 1000000,
            "rope_scaling": {"factor": 1.0, "type": "dynamic"},
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "training_seqlen": 32768,
            "base_seqlen": 4096,
        }
    )
    assert (model.hidden_size, model.norm_epsilon, model.rotary_base) == (2048, 1e-8, 1e6)
    assert (model.num_layers, model.num_attention_heads) == (2, 8)
    assert (model.rotary_training_seqlen, model.rotary_base_seqlen) == (32768, 4096)


MODELS = (
    ModelConfig(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=64,
        rotary_training_seqlen=32,
    ),
    ModelConfig(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=24,
        num_attention_heads=4,
        vocab_size=64,
        num_experts=4,
        moe_ffn_hidden_size=12,
        moe_layer_freq=2,
        rotary_training_seqlen=32,
        moe_shared_expert_intermediate_size=8,
    ),
    ModelConfig(
        architecture="mixtral",
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=24,
        num_attention_heads=4,
        vocab_size=64,
        num_query_groups=2,
        num_experts=4,
        attention_output_bias=False,
        mlp_output_bias=False,
    ),
    ModelConfig(
        architecture="qwen3_moe",
        num_layers=2,
        hidden_size=32,
        moe_ffn_hidden_size=24,
        num_attention_heads=4,
        kv_channels=16,
        vocab_size=64,
        num_query_groups=2,
        num_experts=4,
        qk_layernorm=True,
        attention_output_bias=False,
        mlp_output_bias=False,
    ),
)


@pytest.mark.parametrize("model", MODELS)
def test_the_map_covers_every_element_of_the_model_once(model):
    table = {key: spec.shape for key, spec in tensor_table(model).items()}
    covered = dict.fromkeys(table, 0)
    for link in weight_map(model):
        covered[link.key] += link.box.numel
        assert sum(torch.Size(shape).numel() for shape in link.shapes) == link.box.numel
    assert covered == {key: torch.Size(shape).numel() for key, shape in table.items()}
    names = [name for link in weight_map(model) for name in link.names]
    assert len(names) == len(set(names)) == len(hf_tensor_shapes(model))


@pytest.mark.parametrize("model", MODELS)
def test_a_config_that_we_write_is_read_as_the_same_model(model, tmp_path):
    from megatron_telechat.huggingface.config import config_differences

    again = model_config_from_hf(json.loads(json.dumps(hf_config_of(model, "bf16"))))
    assert config_differences(model, again) == {}
    assert config_differences(replace(model, max_position_embeddings=4096), again) == {}, (
        "rotary positions have no table"
    )
    folder = write_folder(tmp_path / "hf", hf_config_of(model, "fp32"), hf_tensor_shapes(model))
    assert_same_folder(folder, round_trip(folder, tmp_path))
    assert HfWeights(folder).model.num_experts == model.num_experts


def test_a_template_of_another_model_is_refused(tmp_path):
    source = damaged(tmp_path)
    import_hf(source, tmp_path / "checkpoints")
    template = tmp_path / "template"
    template.mkdir()
    other = telechat_config(8, 4, layers=1, layer_norm_epsilon=1e-8)
    (template / "config.json").write_text(json.dumps({**other, "layer_norm_epsilon": 1e-8}))
    with pytest.raises(CheckpointError, match="norm_epsilon: 1e-05 in the checkpoint, 1e-08 in config.json"):
        export_hf(tmp_path / "checkpoints", tmp_path / "out", template=template)
    assert not (tmp_path / "out").exists()


def test_a_config_that_came_with_the_weights_follows_the_positions_and_lengths_of_the_run(tmp_path):
    """An import that a run has trained on at other lengths; everything else of its config.json stays."""
    source = damaged(tmp_path)
    theirs = json.loads((source / "config.json").read_text())
    theirs |= {"seq_length": 16, "seq_len_of_ours": 1, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    (source / "config.json").write_text(json.dumps(theirs))
    import_hf(source, tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "iter_0000000"

    def as_trained(legs: int, **positions: float) -> None:
        manifest = read_manifest(folder)
        run = run_config_from_yaml(manifest.config)
        run = replace(run, model=replace(run.model, **positions), training=replace(run.training, seq_length=128))
        extra = {**manifest.extra, "sample_order": {"legs": [{}] * legs}}
        (folder / MANIFEST).write_bytes(replace(manifest, config=dump_run_config(run), extra=extra).to_bytes())

    as_trained(1)
    export_hf(tmp_path / "checkpoints", tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    as_trained(2)
    export_hf(tmp_path / "checkpoints", tmp_path / "longer")
    length_only = {**theirs, "rope_theta": 1e4, "seq_length": 128}
    length_only["base_seqlen"] = length_only["training_seqlen"]
    assert json.loads((tmp_path / "longer" / "config.json").read_text()) == length_only
    as_trained(2, rotary_base=1e6, rotary_training_seqlen=128, rotary_base_seqlen=128)
    done = export_hf(tmp_path / "checkpoints", tmp_path / "reached")
    assert "config.json has the positions and lengths that the run has reached" in done.notes[0]
    reached = json.loads((tmp_path / "reached" / "config.json").read_text())
    assert reached == {
        **theirs, "rope_theta": 1e6, "training_seqlen": 128, "base_seqlen": 128, "seq_length": 128,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    }  # fmt: skip
    assert model_config_from_hf(reached).rotary_base == 1e6
    with pytest.raises(CheckpointError, match="rotary_base: 1000000.0 in the checkpoint, 10000.0 in config.json"):
        export_hf(tmp_path / "checkpoints", tmp_path / "no", template=source)


def test_nothing_is_written_over(tmp_path):
    source = damaged(tmp_path)
    import_hf(source, tmp_path / "checkpoints")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        export_hf(tmp_path / "checkpoints", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_export_in_another_dtype_and_with_a_tokenizer(tmp_path):
    source = damaged(tmp_path)
    import_hf(source, tmp_path / "checkpoints")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    exported = export_hf(tmp_path / "checkpoints", tmp_path / "out", dtype="bf16", tokenizer=tokenizer).path
    ours, theirs = all_tensors(exported), all_tensors(source)
    assert all(ours[name].equal(theirs[name].bfloat16()) for name in theirs)
    assert (exported / "tokenizer.json").read_text() == "{}"
    with pytest.raises(UserError, match="no tokenizer there"):
        export_hf(tmp_path / "checkpoints", tmp_path / "out2", tokenizer=tmp_path / "nowhere")
    assert not (tmp_path / "out2").exists()


def test_integer_weights_are_refused(tmp_path):
    source = damaged(tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(64, 32, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="not floating point: lm_head.weight"):
        import_hf(source, tmp_path / "checkpoints")


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(text) for text in ("5GB", "200 MB", "1GiB", "4096", "0.5k")] == [
        5 * 10**9,
        2 * 10**8,
        2**30,
        4096,
        500,
    ]
    for text in ("", "GB", "-5GB", "0", "5XB"):
        with pytest.raises(ConfigError):
            parse_size(text)
