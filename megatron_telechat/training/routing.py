"""Recording the experts' choices of a run, and replaying them in another layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_telechat.config.routing import Recording, is_recording, read_recording, shape_of
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.trace import trace_steps
from megatron_telechat.data import fingerprint_differences
from megatron_telechat.data.loader import micro_batch_samples
from megatron_telechat.errors import ConfigError, DataError
from megatron_telechat.model.context_attention import ContextPlace
from megatron_telechat.moe import MoEBlock, moe_blocks
from megatron_telechat.moe.choices import RoutingTape
from megatron_telechat.parallel.agreement import gather_objects, together
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.routing_files import Box, StepReader, begin_step, commit_step, write_box, write_manifest


def _layer(block: MoEBlock) -> int:
    """Zero-based number of the layer that a block belongs to."""
    assert block.layer_number is not None, "a layer of a model numbers its block"
    return block.layer_number - 1


def routed_stretches(run: RunConfig, state: ParallelState) -> list[tuple[int, int]]:
    """Positions of a sample that the routers of this rank see, ascending, as stretches ``start .. stop``."""
    positions = np.arange(run.training.seq_length)
    if state.cp_size > 1:
        place = ContextPlace.of(state.process_groups.context)
        positions = place.positions(place.whole_rows(run.training.seq_length, 1))[0]
    split = run.parallel.sequence_parallel_size
    mine = np.split(positions, split)[state.tp_rank if split > 1 else 0]
    runs = np.split(mine, np.flatnonzero(np.diff(mine) != 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


class StepRouting:
    """Gives the routers their tapes for the steps that ``--moe-routing-record`` and ``--moe-routing-replay`` ask for.

    What is recorded is what a router would choose by itself, also where a replay gives it other choices: a recording
    made during a replay shows what this layout would have changed under the same routing. Evaluations are never
    recorded or replayed.

    Args:
        virtual_stages: those of this rank.
        fingerprint: of the data, on rank 0.
        first_step: number of the first step to be taken, from 1.

    Raises:
        UserError: on all ranks, if the recording does not fit, or cannot be read or written.
    """

    def __init__(
        self,
        virtual_stages: Sequence[nn.Module],
        run: RunConfig,
        state: ParallelState,
        fingerprint: Mapping[str, Any] | None,
        first_step: int,
    ):
        logging = run.logging
        self._routers = {_layer(block): block.router for block in moe_blocks(virtual_stages)}
        self._run, self._state = run, state
        self._record = Path(logging.moe_routing_record) if logging.moe_routing_record and run.model.is_moe else None
        self._replay = Path(logging.moe_routing_replay) if logging.moe_routing_replay and run.model.is_moe else None
        self._steps = trace_steps(logging.moe_routing_steps) if logging.moe_routing_steps else None
        if self._replay is not None:
            with together(state):
                self._require_fit(read_recording(self._replay), fingerprint, first_step)
        if self._record is not None:
            with together(state):
                if state.rank == 0:
                    self._begin_recording(self._record, fingerprint)
        self._boxes = self._own_boxes()

    def about(self) -> list[str]:
        """Lines for a person; none where nothing is recorded or replayed."""
        which = f"of steps {self._steps[0]} to {self._steps[-1]}" if self._steps is not None else "of all steps"
        lines = []
        if self._replay is not None:
            rest = "; in other steps the routers choose" if self._steps is not None else ""
            lines.append(f"moe_routing_replay: the experts {which} are those of {self._replay}{rest}")
        if self._record is not None:
            own = ", what the routers would choose themselves" if self._replay is not None else ""
            lines.append(f"moe_routing_record: the experts {which}{own}, go to {self._record}")
        return lines

    def _own_boxes(self) -> list[Box]:
        """What this rank routes in a step, a box for each stretch of positions; samples in the order of its
        micro-batches."""
        run, state = self._run, self._state
        samples = tuple(
            sample
            for number in range(run.num_microbatches)
            for sample in micro_batch_samples(number, state.dp_rank, state.dp_size, run.training.micro_batch_size, 0)
        )
        name, layers = f"rank_{state.rank:05d}", tuple(sorted(self._routers))
        return [
            Box(f"{name}{f'.{number}' if number else ''}.safetensors", layers, samples, start, stop)
            for number, (start, stop) in enumerate(routed_stretches(run, state))
        ]

    def _require_fit(self, recording: Recording, fingerprint: Mapping[str, Any] | None, first_step: int) -> None:
        """What the rules could not see: the data, the step at which a resumed run goes on, another run's layers."""
        differences = recording.differences(self._run)
        if differences:
            what = f"the recording does not fit the run: {'; '.join(differences)}"
            raise ConfigError(what, str(recording.path), "a recording of this run")
        if fingerprint is not None and recording.data is not None:
            differences = fingerprint_differences(dict(recording.data), dict(fingerprint))
            if differences:
                raise DataError(
                    f"the data is not the data of the recording: {'; '.join(differences[:3])}",
                    str(recording.path),
                    "give the data, seed and seq_length of the recorded run",
                )
        last = self._run.training.train_iters
        wanted = [step for step in self._steps or range(first_step, last + 1) if first_step <= step <= last]
        missing = sorted(set(wanted) - set(recording.steps()))
        if missing:
            raise ConfigError(
                f"the recording does not hold step {missing[0]}, which is to be replayed",
                str(recording.path),
                "a recording of all these steps, or --moe-routing-steps with those that it holds",
            )

    def _begin_recording(self, path: Path, fingerprint: Mapping[str, Any] | None) -> None:
        """A new manifest, or the one of the run that this one goes on with."""
        replayed = self._replay is not None
        if not is_recording(path):
            write_manifest(path, shape_of(self._run), replayed, fingerprint)
            return
        there = read_recording(path)
        differences = there.differences(self._run)
        if fingerprint is not None and there.data is not None:
            differences += fingerprint_differences(dict(there.data), dict(fingerprint))
        if differences or there.replayed != replayed:
            why = "; ".join(differences[:3]) or "one of the two is a replay"
            what = f"{path} holds the recording of another run: {why}"
            raise ConfigError(what, "moe_routing_record", "another folder, or delete that one")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the forwards and backwards of the step with this number, from 1; collective over all ranks if it takes
        part.

        Raises:
            UserError: on all ranks, if one cannot read or write its file.
        """
        if (self._record is None and self._replay is None) or (self._steps is not None and number not in self._steps):
            yield
            return
        given: dict[int, list[Tensor] | None] = dict.fromkeys(self._routers)
        if self._replay is not None:
            with together(self._state):
                reader = StepReader(self._replay, number)
                given = {layer: self._given(reader, layer) for layer in self._routers}
        tapes = {layer: RoutingTape(given[layer], self._record is not None) for layer in self._routers}
        for layer, router in self._routers.items():
            router.tape = tapes[layer]
        try:
            yield
        finally:
            for router in self._routers.values():
                router.tape = None
        routed = {tape.calls for tape in tapes.values()} - {self._run.num_microbatches}
        assert not routed, f"a router was called {routed} times, not once a micro-batch"
        if self._record is not None:
            self._write(self._record, number, tapes)

    def _given(self, reader: StepReader, layer: int) -> list[Tensor]:
        """For every micro-batch of this rank the recorded experts of a layer, [positions * samples, k]."""
        router = self._routers[layer]
        experts = np.concatenate(
            [reader.read("experts", layer, box.samples, box.start, box.stop) for box in self._boxes], axis=1
        )
        ordered = np.sort(experts.astype(np.int64), -1)
        inside = experts.shape[-1] == router.topk and ordered.min() >= 0 and ordered.max() < router.num_experts
        if not inside or (np.diff(ordered) == 0).any():
            what = f"layer {layer} holds an invalid choice of {router.topk} of {router.num_experts} experts"
            raise DataError(what, str(reader.folder), "record the step again")
        parts = torch.from_numpy(experts).to(router.weight.device).split(self._run.training.micro_batch_size)
        # a router sees [positions, samples] of a micro-batch, flattened
        return [part.transpose(0, 1).reshape(-1, router.topk) for part in parts]

    def _write(self, recording: Path, number: int, tapes: Mapping[int, RoutingTape]) -> None:
        state = self._state
        with together(state):
            if state.rank == 0:
                begin_step(recording, number)
        with together(state):
            experts, gaps = {}, {}
            for layer, tape in tapes.items():
                experts[layer] = self._rows([noted.experts for noted in tape.noted])
                gaps[layer] = self._rows([noted.gap for noted in tape.noted])
            begin = 0
            for box in self._boxes if tapes else []:
                end = begin + box.stop - box.start
                parts = ({layer: array[:, begin:end] for layer, array in kind.items()} for kind in (experts, gaps))
                write_box(recording, number, box, *parts)
                begin = end
        boxes = [box for of_rank in gather_objects(self._boxes) for box in of_rank]
        with together(state):
            if state.rank == 0:
                commit_step(recording, number, [one for one in boxes if one.layers])

    def _rows(self, noted: Sequence[Tensor]) -> np.ndarray:
        """[samples, positions, ...] of all micro-batches from the [positions * samples, ...] that the router saw of
        each."""
        length, size = sum(box.stop - box.start for box in self._boxes), self._run.training.micro_batch_size
        return torch.cat([part.view(length, size, *part.shape[1:]).transpose(0, 1) for part in noted]).cpu().numpy()
