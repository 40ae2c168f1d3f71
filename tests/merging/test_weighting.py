"""Weights by decay shape, by loss and by layer against what the papers say, worked by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from megatron_telechat.errors import ConfigError
from megatron_telechat.merging.weighting import decay_weights, loss_weights, read_layer_weights, settled


def test_latest_is_the_last_checkpoint_and_linear_is_the_mean():
    assert decay_weights("latest", 4) == (0, 0, 0, 1)
    assert decay_weights("mean", 4) == decay_weights("linear", 4) == (0.25, 0.25, 0.25, 0.25)
    assert decay_weights("1-sqrt", 1) == decay_weights("mean", 1) == (1,)


def test_one_minus_sqrt_by_hand():
    # factors of the three updates between four checkpoints: 1 - sqrt(1/4), 1 - sqrt(2/4), 1 - sqrt(3/4)
    first, second, third = 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)
    wanted = (1 - first, first - second, second - third, third)
    assert decay_weights("1-sqrt", 4) == pytest.approx(wanted, abs=1e-15)
    assert math.fsum(decay_weights("1-sqrt", 4)) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("shape", ["mean", "linear", "1-sqrt", "latest"])
def test_the_average_is_the_end_of_a_run_whose_updates_decay(shape):
    """WSM's theorem on numbers: checkpoints are sums of updates, and the average keeps of each update its factor."""
    updates = [3.0, -1.0, 0.5, 2.0]
    checkpoints = list(itertools.accumulate(updates, initial=7.0))
    weights = decay_weights(shape, 5)
    average = math.fsum(w * c for w, c in zip(weights, checkpoints, strict=True))
    factor = {"latest": lambda x: 1, "mean": lambda x: 1 - x, "linear": lambda x: 1 - x}.get(
        shape, lambda x: 1 - math.sqrt(x)
    )
    decayed = 7.0 + sum(factor(i / 5) * update for i, update in enumerate(updates, 1))
    assert average == pytest.approx(decayed, abs=1e-14)


def test_loss_weights_are_a_softmax_of_minus_the_loss_in_any_order():
    losses, temperature = (2.5, 1.25, 3.75, 0.1), 0.7
    powers = [math.exp(-loss / temperature) for loss in losses]
    wanted = {loss: power / sum(powers) for loss, power in zip(losses, powers, strict=True)}
    for order in itertools.permutations(losses):
        found = loss_weights(order, temperature)
        assert found == pytest.approx([wanted[loss] for loss in order], abs=1e-15)
        assert dict(zip(order, found, strict=True)) == dict(zip(losses, loss_weights(losses, temperature), strict=True))
    # halves for equal losses, and no overflow for large ones
    assert loss_weights((1e5, 1e5), 1.0) == (0.5, 0.5)


def test_sums_of_weights():
    assert settled((0.5, 0.3, 0.2), "one", "--weights") == (0.5, 0.3, 0.2)
    assert settled((2, 6), "normalize", "--weights") == (0.25, 0.75)
    assert settled((1, 1), "any", "--weights") == (1, 1)
    third = settled((0.333333, 0.333333, 0.333334), "one", "--weights")
    assert Fraction(third[0]) == Fraction(0.333333 / math.fsum((0.333333, 0.333333, 0.333334)))
    for weights, how in (((0.5, 0.4), "one"), ((1, -1), "normalize"), ((math.nan, 1), "any")):
        with pytest.raises(ConfigError):
            settled(weights, how, "--weights")


GOOD = """
weights: [0.5, 0.5]
rules:
  - tensors: "*.router.weight"
    weights: [1, 0]
  - layers: 0-1,3
    weights: [0.25, 0.75]
  - layers: 3
    tensors: "*layernorm*"
    weights: [0, 1]
"""


def test_the_first_rule_that_fits_counts(tmp_path):
    (tmp_path / "w.yaml").write_text(GOOD)
    found = read_layer_weights(tmp_path / "w.yaml", 2, "one")
    wanted = {
        "embedding.word_embeddings.weight": (0.5, 0.5),
        "decoder.layers.2.mlp.linear_fc1.weight": (0.5, 0.5),
        "decoder.layers.2.mlp.router.weight": (1, 0),
        "decoder.layers.1.mlp.router.weight": (1, 0),
        "decoder.layers.1.mlp.linear_fc1.weight": (0.25, 0.75),
        "decoder.layers.3.input_layernorm.weight": (0.25, 0.75),
    }
    assert {key: found.of(key) for key in wanted} == wanted
    with pytest.raises(ConfigError, match="rule 3.*|rule 1"):
        found.require_use(["decoder.layers.0.mlp.linear_fc2.weight"])


@pytest.mark.parametrize(
    "text, says",
    [
        ("- 1", "not a mapping"),
        ("rules: []", "not a mapping"),
        ("weights: [1, 0]\nrules: 3", "rules is not a list"),
        ("weights: [1]", "a list of 2 numbers"),
        ("weights: [0.5, 0.4]", "add up to 0.9"),
        ("weights: [1, 0]\nrules: [{weights: [1, 0]}]", "with layers, tensors, or both"),
        ("weights: [1, 0]\nrules: [{layers: x, weights: [1, 0]}]", "0-3,7"),
        ("weights: [1, 0]\nrules: [{tensor: x, weights: [1, 0]}]", "not a mapping"),
        ("weights: [1, 0]\nrules: [{tensors: 3, weights: [1, yes]}]", "not a pattern"),
        ("weights: [", "cannot read"),
    ],
)
def test_odd_files_are_refused(tmp_path, text, says):
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(ConfigError, match="w.yaml") as error:
        read_layer_weights(tmp_path / "w.yaml", 2, "one")
    assert says in str(error.value)
