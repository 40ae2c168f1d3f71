"""tools/merge_checkpoints.py from files to files: identity, order, layouts, refusals, provenance."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.cli.convert_checkpoint import main as convert
from megatron_telechat.cli.merge_checkpoints import main
from megatron_telechat.config.schema import DataConfig, RunConfig
from megatron_telechat.merging import sums
from megatron_telechat.merging.inputs import PROVENANCE
from tests.data.chat_material import letters_tokenizer
from tests.huggingface.folders import all_tensors, assert_same_folder
from tests.merging.material import DENSE, MODEL, MOE, SHARDED, checkpoint, hf_folder, random_state

pytestmark = pytest.mark.heavy


def merge(*argv: object, code: int = 0) -> None:
    assert main([str(word) for word in argv]) == code


def same(a: Path, b: Path) -> None:
    """Equal folders but for what tells how they were made."""
    for folder in (a, b):
        (folder / PROVENANCE).unlink(missing_ok=True)
    assert_same_folder(a, b)


def stored(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(next(path.glob("iter_*")), verify=True)
    return {key: reader.read(key) for key in reader.entries}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and a[key].equal(b[key]) for key in a)


def mixed(name: str) -> torch.dtype:
    """Tensors of one global tensor, and of one model, that differ in dtype."""
    kinds = {"router": torch.float32, "up_proj": torch.float16, "layernorm": torch.float32}
    return next((dtype for part, dtype in kinds.items() if part in name), torch.bfloat16)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_one_input_is_the_identity_bit_for_bit(tmp_path, config):
    source = hf_folder(tmp_path / "a", 1, config, mixed)
    other = hf_folder(tmp_path / "b", 2, config)
    merge(source, "--output", tmp_path / "alone")
    same(source, tmp_path / "alone")
    merge(other, source, "--weights", "0,1", "--output", tmp_path / "one hot")
    same(source, tmp_path / "one hot")
    merge(source, "--method", "task-arithmetic", "--base", source, "--output", tmp_path / "task")
    same(source, tmp_path / "task")
    # through a checkpoint and back
    merge(source, "--format", "checkpoint", "--output", tmp_path / "c")
    assert convert(["export", "--checkpoint", str(tmp_path / "c"), "--output", str(tmp_path / "back")]) == 0
    same(source, tmp_path / "back")


def test_a_checkpoint_alone_is_copied_with_its_optimizer(tmp_path):
    state = random_state(1)
    source = checkpoint(tmp_path / "a", state, SHARDED["tp2 ep2"])
    merge(source, "--optimizer", "average", "--output", tmp_path / "out")
    assert equal(stored(tmp_path / "out"), state)
    manifest = CheckpointReader(tmp_path / "out" / "iter_0000010").manifest
    assert (manifest.consumed_samples, manifest.optimizer) == (80, {"step": 10, "grad_scaler": {}})


METHODS = {
    "linear": ["--weights", None],
    "slerp": [],
    "task-arithmetic": ["--scale", "0.3"],
    "ties": ["--density", "0.4"],
    "dare": ["--drop", "0.6", "--seed", "4"],
    "dare-ties": ["--drop", "0.6"],
}
WEIGHTS = (0.55, 0.25, 0.2)


@pytest.mark.parametrize("method", METHODS)
def test_neither_order_nor_layout_nor_pieces_change_a_bit(tmp_path, method, monkeypatch):
    base = checkpoint(tmp_path / "base", random_state(4, optimizer=False))
    on_base = [] if method in ("linear", "slerp") else ["--base", base]
    numbers = range(2 if method == "slerp" else 3)
    states = [random_state(seed, optimizer=False) for seed in (1, 2, 3)]
    plain = [checkpoint(tmp_path / f"plain{i}", states[i]) for i in numbers]
    sharded = [checkpoint(tmp_path / f"sharded{i}", states[i], list(SHARDED.values())[i]) for i in numbers]

    def merged(name: str, paths: list[Path], order: tuple[int, ...]) -> Path:
        more = METHODS[method]
        if None in more:
            more = ["--weights", ",".join(str(WEIGHTS[i]) for i in order)]
        inputs = [paths[i] for i in order]
        merge(*inputs, "--method", method, *more, *on_base, "--format", "hf", "--output", tmp_path / name)
        return tmp_path / name

    wanted = merged("wanted", plain, tuple(numbers))
    orders = list(itertools.permutations(numbers))
    for number, order in enumerate(orders if method == "linear" else orders[-1:]):
        same(wanted, merged(f"order{number}", sharded, order))
    monkeypatch.setattr(sums.pieces, "__defaults__", (256,))
    monkeypatch.setattr(sums, "CHUNK", 100)
    same(wanted, merged("pieces", sharded, tuple(numbers)))


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare"])
def test_no_read_is_larger_than_a_piece(tmp_path, monkeypatch, method):
    paths = [checkpoint(tmp_path / str(seed), random_state(seed, optimizer=False)) for seed in (1, 2, 3)]
    sizes, read = [], CheckpointReader.read

    def noted(self, key, offset=None, shape=None):
        values = read(self, key, offset, shape)
        sizes.append(values.numel())
        return values

    monkeypatch.setattr(CheckpointReader, "read", noted)
    monkeypatch.setattr(sums.pieces, "__defaults__", (1000,))
    inputs = paths[:2] if method in ("linear", "slerp") else [*paths[:2], "--base", paths[2]]
    merge(*inputs, "--method", method, "--output", tmp_path / "out")
    assert max(sizes) <= 1000 < 16 * sum(sizes)


def test_the_average_of_sharded_checkpoints_is_the_plain_one(tmp_path):
    states = [random_state(seed) for seed in (1, 2)]
    places = list(SHARDED.values())
    paths = [checkpoint(tmp_path / str(i), state, places[i]) for i, state in enumerate(states)]
    merge(*paths, "--weights", "0.3,0.7", "--output", tmp_path / "out", "--optimizer", "average")
    found = stored(tmp_path / "out")
    for key in states[0]:
        name = key.removeprefix("model/") if key.startswith("model/") else None
        a, b = (s[f"optimizer/master/{name}" if name else key].double() for s in states)
        assert found[key].equal((0.3 * a + 0.7 * b).to(states[0][key].dtype)), key
    # weights as stored, where that is asked for, and where an input has no masters
    merge(*paths, "--values", "weights", "--output", tmp_path / "weights", "--dtype", "fp32")
    key = "model/decoder.layers.0.mlp.experts.linear_fc1.weight"
    a, b = (state[key].double() for state in states)
    assert stored(tmp_path / "weights")[key].equal((0.5 * a + 0.5 * b).float())


def test_folders_and_checkpoints_go_together_and_give_the_same(tmp_path):
    a, b = (hf_folder(tmp_path / name, seed, MOE) for seed, name in enumerate("ab"))
    assert convert(["import", "--hf", str(b), "--output", str(tmp_path / "c")]) == 0
    merge(a, b, "--weights", "1,3", "--normalize", "--output", tmp_path / "folders", "--max-shard-size", "20KB")
    merge(a, tmp_path / "c", "--weights", "0.25,0.75", "--output", tmp_path / "mixed")
    same(tmp_path / "folders", tmp_path / "mixed")
    assert (tmp_path / "folders" / "model.safetensors.index.json").is_file()
    x, y, z = (all_tensors(tmp_path / name) for name in ("a", "b", "mixed"))
    assert all(z[name].equal((0.25 * x[name].double() + 0.75 * y[name].double()).bfloat16()) for name in z)


def test_weights_by_layer(tmp_path):
    a, b = (hf_folder(tmp_path / name, seed) for seed, name in enumerate("ab"))
    (tmp_path / "w.yaml").write_text("weights: [0, 1]\nrules: [{layers: 1-2, weights: [1, 0]}]")
    merge(a, b, "--layer-weights", tmp_path / "w.yaml", "--output", tmp_path / "out")
    x, y, z = (all_tensors(tmp_path / name) for name in ("a", "b", "out"))
    for name in z:
        assert z[name].equal((x if ".h.1." in name or ".h.2." in name else y)[name]), name
    (tmp_path / "w.yaml").write_text("weights: [0, 1]\nrules: [{layers: 7, weights: [1, 0]}]")
    merge(a, b, "--layer-weights", tmp_path / "w.yaml", "--output", tmp_path / "no", code=2)


def test_a_window_of_one_run(tmp_path, capsys):
    states = {step: random_state(step, optimizer=False) for step in (10, 20, 30, 40, 45)}
    for step, state in states.items():
        checkpoint(tmp_path / "run", state, step=step)
    key = "model/output_layer.weight"

    def found(*more: object) -> torch.Tensor:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        merge(tmp_path / "run", "--output", tmp_path / "out", "--values", "weights", *more)
        return stored(tmp_path / "out")[key]

    def average(*weights: tuple[int, float]) -> torch.Tensor:
        return sum(w * states[step][key].double() for step, w in weights).bfloat16()

    third = (1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5)
    assert found("--window", 2).equal(average((40, 0.5), (45, 0.5)))
    assert found("--window", 3, "--decay", "latest").equal(states[45][key])
    by_hand = average((20, 1 - third[0]), (30, third[0] - third[1]), (40, third[1]))
    assert found("--steps", "40,20,30", "--decay", "1-sqrt").sub(by_hand).abs().max() < 1e-2
    assert equal({"x": found("--steps", "10,20", "--decay", "linear")}, {"x": average((10, 0.5), (20, 0.5))})
    capsys.readouterr()
    for code, *more in (
        (2, "--window", 3, "--decay", "1-sqrt"),  # 30, 40, 45
        (4, "--window", 6),
        (4, "--steps", "10,15"),
    ):
        merge(tmp_path / "run", "--output", tmp_path / "no", *more, code=code)
        assert "fix:" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_provenance_tells_what_was_merged(tmp_path):
    a = checkpoint(tmp_path / "a", random_state(1))
    b = tmp_path / "b"
    assert convert(["export", "--checkpoint", str(a), "--output", str(b)]) == 0
    merge(a, b, "--weights", "0.5,0.5", "--output", tmp_path / "one")
    told = json.loads((tmp_path / "one" / PROVENANCE).read_text())
    assert told["method"] == {"name": "linear"} and told["values"] == "weights"
    assert told["command"][:3] == ["tools/merge_checkpoints.py", str(a), str(b)]
    first, second = told["inputs"]
    assert first["manifest_digest"] == CheckpointReader(a).manifest.digest and first["weight"] == 0.5
    assert set(second["sha256"]) == {"config.json", "model.safetensors"}
    # it travels through checkpoints and exports, and a merge of merges quotes it
    merge(tmp_path / "one", tmp_path / "one", "--format", "checkpoint", "--output", tmp_path / "two")
    assert convert(["export", "--checkpoint", str(tmp_path / "two"), "--output", str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / PROVENANCE).read_text())["inputs"][0]["merged_from"] == told


def tokenizer_extra(digest: str) -> dict:
    return {"tokenizer": {"kind": "HuggingFaceTokenizer", "digest": digest}}


def test_models_that_differ_are_refused_by_name(tmp_path, capsys):
    a = checkpoint(tmp_path / "a", random_state(1, optimizer=False), extra=tokenizer_extra("x"))

    def other(name: str, **changes: object) -> Path:
        model = replace(MODEL, **changes)  # type: ignore[arg-type]
        return checkpoint(tmp_path / name, random_state(2, model, optimizer=False), model=model)

    always = {
        "layers": ({"num_layers": 3}, "num_layers is 1 in"),
        "vocabulary": ({"vocab_size": 64}, "vocab_size is 48"),
        "heads": ({"num_attention_heads": 8}, "num_attention_heads is 4"),
        "experts": ({"moe_ffn_hidden_size": 20}, "moe_ffn_hidden_size is 16"),
    }
    for name, (changes, says) in always.items():
        path = other(name, **changes)
        merge(a, path, "--output", tmp_path / "no", "--allow-model-change", code=4)
        assert says in (told := capsys.readouterr().err) and str(path) in told, told
    rotary = other("rotary", rotary_base=20000.0)
    strange = checkpoint(tmp_path / "t", random_state(3, optimizer=False), extra=tokenizer_extra("y"))
    for path, says in ((rotary, "rotary_base is 10000"), (strange, "gives other ids")):
        merge(a, path, "--output", tmp_path / "no", code=4)
        assert says in (told := capsys.readouterr().err) and "--allow-model-change" in told, told
        merge(a, path, "--output", tmp_path / f"allowed {path.parent.name}", "--allow-model-change")
        assert "note: " in (told := capsys.readouterr().out) and says in told
    assert not (tmp_path / "no").exists()


def test_tokenizers_are_compared_by_content(tmp_path, capsys):
    a, b = (hf_folder(tmp_path / name, seed) for seed, name in enumerate("ab"))
    letters_tokenizer(a)
    letters_tokenizer(b)
    (b / "tokenizer.json").write_text(json.dumps(json.loads((b / "tokenizer.json").read_text()), indent=3))
    merge(a, b, "--output", tmp_path / "same")
    letters_tokenizer(b, without=["<_sep>"])
    merge(a, b, "--output", tmp_path / "no", code=4)
    assert f"the tokenizer of {b} gives other ids" in capsys.readouterr().err
    run = RunConfig(model=MODEL, data=DataConfig(tokenizer_model=str(b)))  # named in a configuration only
    c = checkpoint(tmp_path / "c", random_state(1, optimizer=False), run=run)
    d = checkpoint(tmp_path / "d", random_state(1, optimizer=False), extra=tokenizer_extra("x"))
    merge(c, d, "--output", tmp_path / "no", code=4)


def test_damaged_inputs_are_refused_by_name(tmp_path, capsys):
    a = checkpoint(tmp_path / "a", random_state(1))
    b = checkpoint(tmp_path / "b", random_state(2))
    file = next(b.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    merge(a, b, "--output", tmp_path / "no", code=4)
    assert str(file) in capsys.readouterr().err
    merge(a, b, "--output", tmp_path / "trusted", "--no-verify")
    file.write_bytes(whole[:-1])
    merge(a, b, "--output", tmp_path / "no", "--no-verify", code=4)
    assert str(file) in capsys.readouterr().err
    merge(a, tmp_path, "--output", tmp_path / "no", code=4)
    assert "neither a checkpoint nor" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_damaged_newest_of_a_folder_is_passed_over_for_the_sound_one_before_it(tmp_path, caplog):
    a = checkpoint(tmp_path / "a", random_state(1))
    older = checkpoint(tmp_path / "b", random_state(2), step=10)
    newer = checkpoint(tmp_path / "b", random_state(3), step=20)
    file = next(newer.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    merge(a, older, "--output", tmp_path / "expected")
    caplog.clear()
    merge(a, tmp_path / "b", "--output", tmp_path / "merged")
    assert "passed over" in caplog.text and str(file) in caplog.text
    assert equal(stored(tmp_path / "merged"), stored(tmp_path / "expected"))


@pytest.mark.parametrize("form", ["hf", "checkpoint"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare", "slerp"])
def test_values_that_are_not_finite_are_named_and_nothing_is_left(tmp_path, capsys, form, method):
    a, b, base = (hf_folder(tmp_path / name, seed) for seed, name in enumerate(("a", "b", "base")))
    tensors = all_tensors(b)
    tensors["transformer.h.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, b / "model.safetensors")
    more = ["--base", base] if method in ("ties", "dare") else []
    before = sorted(tmp_path.iterdir())
    merge(a, b, "--method", method, *more, "--format", form, "--output", tmp_path / "out", code=5)
    told = capsys.readouterr().err
    assert "model/decoder.layers.1.mlp.linear_fc2.weight" in told and str(b) in told
    assert sorted(tmp_path.iterdir()) == before


def test_a_result_that_does_not_fit_its_dtype_is_named(tmp_path, capsys):
    a, b = (hf_folder(tmp_path / name, seed, scale=3e4) for seed, name in enumerate("ab"))
    merge(a, b, "--dtype", "fp16", "--any-sum", "--weights", "1,1", "--output", tmp_path / "out", code=5)
    assert "float16 after merging" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_output_must_be_new_and_must_fit(tmp_path, capsys, monkeypatch):
    a = hf_folder(tmp_path / "a", 1)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    for form in ("hf", "checkpoint"):
        merge(a, "--format", form, "--output", tmp_path / "there", code=4)
        assert "already exists" in capsys.readouterr().err
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
            merge(a, "--format", form, "--output", tmp_path / "out", code=6)
        assert "GiB free" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["A", "B", "--weights", "1"],
        ["A", "B", "--weights", "0.5,0.6"],
        ["A", "B", "--weights", "0.5,x"],
        ["A", "B", "--weights", "0.5,0.5", "--layer-weights", "x.yaml"],
        ["A", "B", "--window", "2"],
        ["A", "--window", "2", "--steps", "1,2"],
        ["A", "--decay", "mean"],
        ["A", "B", "--method", "ties"],
        ["A", "B", "--base", "A"],
        ["A", "B", "A", "--method", "slerp"],
        ["A", "B", "--method", "slerp", "--optimizer", "average"],
        ["A", "B", "--method", "ties", "--base", "A", "--weights", "1,-1"],
        ["A", "B", "--normalize", "--any-sum"],
        ["A", "B", "--method", "dare", "--base", "A", "--drop", "1"],
        ["A", "B", "--method", "ties", "--base", "A", "--density", "0"],
        ["A", "B", "--layer-weights", "absent.yaml"],
        ["A", "B", "--scale", "inf"],
    ],
    ids=" ".join,
)
def test_arguments_that_do_not_go_together(tmp_path, capsys, words, folders):
    merge(*(folders.get(word, word) for word in words), "--output", tmp_path / "out", code=2)
    assert capsys.readouterr().err.startswith("config error") and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments")
    return {name: hf_folder(folder / name, seed) for seed, name in enumerate("AB")}


def test_optimizer_states_are_averaged_or_refused(tmp_path, capsys):
    a = checkpoint(tmp_path / "a", random_state(1), step=10)
    b = checkpoint(tmp_path / "b", random_state(2), step=20)
    bare = checkpoint(tmp_path / "c", random_state(3, optimizer=False))
    merge(b, a, "--optimizer", "average", "--output", tmp_path / "out")
    manifest = CheckpointReader(tmp_path / "out" / "iter_0000020").manifest
    assert manifest.optimizer == {"step": 20, "grad_scaler": {}} and manifest.consumed_samples == 160
    merge(a, bare, "--optimizer", "average", "--output", tmp_path / "no", code=4)
    assert "no optimizer state" in capsys.readouterr().err
    merge(a, b, "--optimizer", "average", "--format", "hf", "--output", tmp_path / "no", code=2)
    merge(a, b, "--optimizer", "average", "--weights", "1.5,-0.5", "--output", tmp_path / "no", code=2)
    merge(a, bare, "--values", "master", "--output", tmp_path / "no", code=4)
    merge(a, b, "--output", tmp_path / "weights")  # none unless asked for
    assert all(key.startswith("model/") for key in stored(tmp_path / "weights"))
