"""Runs of many layouts held to that of one rank: losses and gradient norms, first gradients, last weights, experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron_telechat.config.routing import read_recording
from megatron_telechat.tensors.table import tensor_table
from megatron_telechat.training.routing_compare import common_steps, differences
from tests.harness import run_cases
from tests.training.runs import assemble, load

TOLERANCE = 1e-5
TIE = 1e-4
"""Of logits around 0.1. Sums in another order move them by 1e-8 in the first step and, through Adam, by up to 1e-6 in
the last."""
WEIGHT_TOLERANCE = 1e-3
"""Adam divides by the size of a gradient: where that is next to nothing, rounding decides the direction of a step."""
FOLDER, SLOW = "RUNS_DIR", "RUNS_SLOW"
"""Environment variables of a worker: where its runs go, and whether it takes its slow layouts or the others."""


class Launches:
    """Results by world size, its slow layouts apart; each is launched once, on first use.

    Args:
        worker: its layouts are named MODEL_...; MODEL_one is that of one rank.
        models: flags of each model.
    """

    def __init__(self, worker: Path, models: Mapping[str, Sequence[str]], folder: Path):
        self._worker, self._models, self.folder = worker, models, folder
        self._done: dict = {}

    def __call__(self, world: int, slow: bool = False):
        if (world, slow) not in self._done:
            if world != 1:
                self(1)  # records the choices that the others replay
            environment = {FOLDER: str(self.folder), SLOW: "1" if slow else ""}
            self._done[world, slow] = run_cases(self._worker, world, timeout=600, env=environment)
        return self._done[world, slow]

    def require_equal(self, world: int, name: str, slow: bool, tmp: Path) -> None:
        """The run of a layout is that of one rank."""
        model = name.split("_")[0]
        expected, by_rank = self(1).check(f"{model}_one")[0], self(world, slow).check(name)
        losses = [(found["loss"], found["grad_norm"]) for found in by_rank]
        assert all(found == losses[0] for found in losses), "the ranks report different losses"
        assert by_rank[0]["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        assert by_rank[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * TOLERANCE)
        shapes = {key: spec.shape for key, spec in tensor_table(load(self._models[model], tmp).model).items()}
        for of, limit in (("", TOLERANCE), (".weights", WEIGHT_TOLERANCE)):
            ours, theirs = (
                assemble(sorted(self.folder.glob(f"{one}{of}.rank*.safetensors")), shapes)
                for one in (name, f"{model}_one")
            )
            errors = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs}
            worst = max(errors, key=errors.__getitem__)
            assert errors[worst] <= limit, f"{of or '.gradient'} of {worst}: relative error {errors[worst]:.2e}"

    def require_choices(self, world: int, name: str, slow: bool) -> None:
        """Its routers would have chosen what those of one rank did, up to ties."""
        reference = f"{name.split('_')[0]}_one"
        self(1).check(reference)
        self(world, slow).check(name)
        recordings = [read_recording(self.folder / f"{run}.routing") for run in (name, reference)]
        steps = common_steps(*recordings)
        assert steps == tuple(range(1, 21))
        parted = list(differences(*recordings, steps, TIE))
        assert not [layer for layer in parted if layer.beyond_ties]
        assert sum(layer.different for layer in parted) <= 20, "so many ties are none"
