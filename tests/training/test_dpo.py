"""DPO is the loss of the papers, with a reference that is computed once: held against a plain loop, in every layout,
and across stops, with a cache that is whole, damaged or gone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from megatron_telechat.config import load_run_config
from megatron_telechat.data import build_datasets
from megatron_telechat.huggingface import export_hf, import_hf
from tests.data.chat_material import letters_tokenizer, write_lines
from tests.data.material import Rank
from tests.harness import reports_by_ranks
from tests.huggingface.folders import telechat_config, telechat_shapes
from tests.training import worker_dpo
from tests.training.plain_dpo import Plain, pairs, plain_dpo
from tests.training.worker_dpo import ONE_MORE, PEAK, RUNS, SEQ, STEPS

WORKER = Path(__file__).with_name("worker_dpo.py")
BETA = 0.5
PAIRS = pairs(90)
SHAPE = {"layers": 4, "head_dim": 8, "vocab_size": 288, "training_seqlen": SEQ, "base_seqlen": SEQ}
MODELS = {
    "dense": telechat_config(8, 4, **SHAPE),
    "moe": telechat_config(8, 4, num_experts=4, num_experts_per_tok=2, **SHAPE),
}

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Both models as Hugging Face folders and as checkpoints, a tokenizer, and pairs."""
    folder = tmp_path_factory.mktemp("dpo")
    letters_tokenizer(folder)
    write_lines(folder / "pairs.jsonl", PAIRS)
    for name, config in MODELS.items():
        generator = torch.Generator().manual_seed(3)
        (folder / name / "hf").mkdir(parents=True)
        tensors = {
            key: torch.ones(shape) if "norm" in key or "ln_f" in key else torch.randn(shape, generator=generator) / 12
            for key, shape in telechat_shapes(config).items()
        }
        save_file(tensors, folder / name / "hf" / "model.safetensors", {"format": "pt"})
        (folder / name / "hf" / "config.json").write_text(json.dumps(config))
        import_hf(folder / name / "hf", folder / name / "weights", config=folder / name / "model.yaml")
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return reports_by_ranks(WORKER, timeout=420, env={"DPO_DIR": str(folder)})


def datasets_of(folder: Path, monkeypatch, text: str = "", valid: str = ""):
    """The rows of a run; how they are packed is shown in tests/data/test_pairs.py."""
    monkeypatch.setattr(worker_dpo, "FOLDER", folder)
    flags = [*worker_dpo.flags_of("dense", text), "--run-dir", str(folder / "rows")]
    if valid:
        flags[flags.index("--data-path")] = "--train-data-path"
        flags += ["--valid-data-path", str(folder / valid)]
    return build_datasets(load_run_config(flags, {}).run, Rank())


def ids_of(folder: Path):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda words: tokenizer.encode(words, add_special_tokens=False).ids


def sigmoid(found: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    gains = found - reference
    return -torch.nn.functional.logsigmoid(BETA * (gains[0] - gains[1]))


def ipo(found: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    gains = (found - reference) / tokens
    return (gains[0] - gains[1] - 1 / (2 * BETA)) ** 2


def smoothed_rpo(found: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    h = BETA * ((found[0] - reference[0]) - (found[1] - reference[1]))
    preferred = -0.8 * torch.log(torch.sigmoid(h)) - 0.2 * torch.log(torch.sigmoid(-h))
    return preferred - 0.3 * found[0] / tokens[0]


def plain(
    folder: Path, monkeypatch, model: str = "dense", text: str = "", steps: int = STEPS, loss_of=sigmoid
) -> Plain:
    rows = datasets_of(folder, monkeypatch, text).train.source
    batches = [[n for row in range(8 * step, 8 * step + 8) for n in rows.packed(row)] for step in range(steps)]
    return plain_dpo(folder / model / "hf", PAIRS, ids_of(folder), batches, PEAK, loss_of)


@pytest.fixture(scope="module")
def plain_run(folder) -> Plain:
    """The plain loop over the packed rows, once."""
    with pytest.MonkeyPatch.context() as patch:
        return plain(folder, patch)


def column(records: list[dict], key: str) -> list[float]:
    return [record[key] for record in records if key in record]


def log_probs_of(run: Path) -> Path:
    """The table in the cache of a run."""
    [table] = (run / "cache").glob("dpo-*/log_probs.npy")
    return table


def require_plain(records: list[dict], expected: Plain) -> None:
    assert column(records, "loss") == pytest.approx(expected.loss, rel=1e-6)
    assert column(records, "grad_norm") == pytest.approx(expected.grad_norm, rel=1e-5)


def test_it_is_a_plain_loop(runs, folder, plain_run):
    found, expected = runs(1).check("dense_packed")[0], plain_run
    assert found["code"] == 0 and len(expected.loss) == STEPS >= 10
    require_plain(found["records"], expected)
    margins = [value / BETA for value in column(found["records"], "reward_margin")]
    assert margins == pytest.approx(expected.margin, rel=1e-4, abs=1e-5)
    # At the first step all margins are nothing but rounding.
    assert column(found["records"], "reward_accuracy")[1:] == pytest.approx(expected.accuracy[1:])
    assert expected.loss[0] == pytest.approx(np.log(2)) and expected.loss[-1] < 0.6
    table = np.load(log_probs_of(folder / "dense_packed"))
    assert table == pytest.approx(np.array(expected.reference), rel=1e-6)


def test_so_are_its_first_gradients_and_its_last_weights(runs, folder, plain_run):
    runs(1).check("first_gradients")
    expected = plain_run
    trained = export_hf(folder / "dense_packed" / "checkpoints", folder / "exported").path
    for name, tensor in load_file(trained / "model.safetensors").items():
        assert float((tensor - expected.weights[name]).norm() / tensor.norm()) < 1e-5, name
    gradients = load_file(folder / "gradients.safetensors")
    for ours, theirs in (
        ("output_layer.weight@0,0", "lm_head.weight"),
        ("embedding.word_embeddings.weight@0,0", "transformer.word_embeddings.weight"),
        ("decoder.final_layernorm.weight@0", "transformer.ln_f.weight"),
        ("decoder.layers.0.mlp.linear_fc2.weight@0,0", "transformer.h.0.mlp.down_proj.weight"),
    ):
        wanted = expected.gradients[theirs]
        assert float((gradients[ours] - wanted).norm() / wanted.norm()) < 2e-6, theirs


OTHERS = {
    "dense_alone": ("dense", STEPS, sigmoid),
    "dense_ipo": ("dense", 2, ipo),
    "dense_rpo": ("dense", 2, smoothed_rpo),
    "moe_packed": ("moe", 4, sigmoid),
}


@pytest.mark.parametrize("name", OTHERS)
def test_so_are_other_rows_losses_and_models(runs, folder, monkeypatch, name):
    model, steps, loss_of = OTHERS[name]
    rows = RUNS[1][name] if "sft-packing" in RUNS[1][name] else ""
    require_plain(runs(1).check(name)[0]["records"], plain(folder, monkeypatch, model, rows, steps, loss_of))


def require_same(found: list[dict], expected: list[dict]) -> None:
    assert found and len(found) == len(expected)
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("rewards_chosen", 1e-3), ("reward_margin", 1e-3)):
        assert column(found, key) == pytest.approx(column(expected, key), rel=tolerance, abs=1e-5), key


LAYOUTS = [(1, "dense_chunks"), *((2, name) for name in RUNS[2])]
WIDE = [name for name in RUNS[4] if "fp16" not in name]


def one_rank(name: str) -> str:
    """The run on one rank that another one must be the same as."""
    return "dense_frozen" if "frozen" in name else "moe_aux" if name.startswith("moe") else "dense_packed"


@pytest.mark.parametrize("world,name", LAYOUTS, ids=[name for _, name in LAYOUTS])
def test_every_layout_is_one_rank(runs, world, name):
    for found in runs(world).check(name):
        assert found["code"] == 0
        require_same(found["records"], runs(1).check(one_rank(name))[0]["records"])


def test_stages_of_a_run_have_one_reference(runs):
    for found in runs(2).check("dense_stages"):
        assert found["code"] == 0 and found["tables"] == 1
        require_same(found["records"], runs(1).check("dense_packed")[0]["records"])


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_so_is_every_layout_of_four(runs, name):
    for found in runs(4).check(name):
        assert found["code"] == 0
        require_same(found["records"], runs(1).check(one_rank(name))[0]["records"])


@pytest.mark.slow
def test_half_precision_comes_near(runs):
    one = column(runs(1).check("dense_fp16")[0]["records"], "loss")
    assert one == pytest.approx(column(runs(1).check("dense_packed")[0]["records"], "loss")[:3], rel=5e-3)
    assert column(runs(4).check("dense_fp16_pp2")[0]["records"], "loss") == pytest.approx(one, rel=2e-3)


def test_the_loss_of_the_routers_keeps_its_strength(runs):
    """Pairs are fewer than tokens, and the schedules divide by them."""
    of_tokens, of_pairs = runs(1).check("router_gradients")[0]
    assert of_tokens.keys() == of_pairs.keys() and len(of_tokens) == SHAPE["layers"]
    for name, wanted in of_tokens.items():
        assert max(map(abs, wanted)) > 1e-3
        assert of_pairs[name] == pytest.approx(wanted, rel=1e-3, abs=1e-5), name


def test_an_evaluation_is_the_same_loss(runs, folder, monkeypatch):
    found = runs(1).check("evaluated")[0]
    datasets = datasets_of(folder, monkeypatch, "--no-sft-packing --eval-interval 1 --eval-iters 6", "valid.jsonl")
    numbers = [number for row in range(6 * 8) for number in datasets.valid.source.packed(row)]
    batches = [
        [n for row in range(8 * step, 8 * step + 8) for n in datasets.train.source.packed(row)] for step in (0, 1)
    ]
    lines = [*PAIRS, ONE_MORE]
    expected = plain_dpo(folder / "dense" / "hf", lines, ids_of(folder), batches, PEAK, sigmoid, numbers).valid
    assert found["code"] == 0 and len(expected) == 2 and len(numbers) == 48
    for place, (key, scale) in enumerate((("loss", 1), ("reward_margin", BETA), ("reward_accuracy", 1))):
        wanted = [scale * of_step[place] for of_step in expected]
        assert column(found["records"], f"valid_{key}") == pytest.approx(wanted, rel=1e-6 if place == 0 else 1e-4)


def test_a_validation_without_a_pair_is_none(runs):
    found = runs(1).check("no_pair_to_validate_on")[0]
    assert found["code"] == 0 and len(found["records"]) == 1 and "valid_loss" not in found["records"][0]


def test_the_reference_is_that_of_the_begin_whatever_became_of_the_cache(runs):
    found, whole = runs(1).check("stopped_and_gone_on")[0], runs(1).check("dense_packed")[0]
    for name in ("resumed", "damaged", "gone"):
        assert found[name]["code"] == 0 and found[name]["same"], name
        assert found[name]["records"] == whole["records"], name
    assert found["resumed"]["untouched"] and not found["damaged"]["untouched"]
    assert found["other"].startswith("4 ") and "is not the one that the run began with" in found["other"]
    assert found["another_model"].startswith("4 ") and "num_experts is 4 in the checkpoint" in found["another_model"]
    assert found["without_weights"] == 0
    assert found["lost"].startswith("4 ") and "is gone" in found["lost"]


def test_a_run_may_go_on_from_other_weights_than_the_reference(runs):
    found, before = runs(1).check("another_reference")[0], runs(1).check("dense_packed")[0]["records"]
    assert found["code"] == 0
    # The trained answers have gained over the reference from the first step on.
    assert column(found["records"], "reward_margin")[0] > 0.5 * column(before, "reward_margin")[-1] > 0.01
