"""Times of a run's parts on the device at hand, for its device file: layers by recompute kind, both ends, exchange,
step.

Every rank of the machine works at once, as in the run itself: ranks that share a memory bus, a link or, on a CPU, cores
slow one another down in the same way.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date

import torch
import torch.distributed as dist

from megatron_telechat import parallel
from megatron_telechat.backend import get_backend
from megatron_telechat.config.recompute import Modes
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.conditions import conditions
from megatron_telechat.costs.devices import DeviceSpec, Measured
from megatron_telechat.costs.memory import optimizer_shards
from megatron_telechat.costs.parameters import local_count
from megatron_telechat.costs.time import mode_name
from megatron_telechat.data.loader import EVEN_COSTS
from megatron_telechat.errors import ConfigError
from megatron_telechat.model import compute_dtype
from megatron_telechat.model.gpt import TeleChatModel
from megatron_telechat.parallel.context.layout import ZIGZAG
from megatron_telechat.parallel.context.rows import RowSplit
from megatron_telechat.planner.build import DEFAULT_KINDS, of_layer, parse_kind
from megatron_telechat.tensors.table import tensor_table
from megatron_telechat.training.build import build_trained
from megatron_telechat.training.context import set_context
from megatron_telechat.training.step import Batch, forward_step

ROUNDS = 15
WARM_UP = 3
P2P_REPEATS = 5
GRADIENT_BYTES = 4
Times = dict[str, float]
NORMAL_QUARTILES = 1.349
"""Between the quartiles of a normal distribution, in standard deviations."""
_WAYS = (".forward", ".backward")


def _whole(record: Times) -> float:
    """Seconds of a whole micro-batch."""
    return sum(seconds for name, seconds in record.items() if name.endswith(_WAYS))


@dataclass(frozen=True)
class ProbeLayer:
    """One layer of the probe: its type and what it recomputes."""

    is_moe: bool
    modes: Modes

    @property
    def kind(self) -> str:
        """Key of the layer type in a device file: moe or dense."""
        return "moe" if self.is_moe else "dense"


def probe_layers(run: RunConfig, kinds: Sequence[str]) -> list[ProbeLayer]:
    """For each type of layer of the run: none, each kind, and none again; the two types in turn."""
    types = sorted({run.model.layer_is_moe(layer) for layer in range(run.model.num_layers)}, reverse=True)
    wanted = [parse_kind(kind) for kind in kinds]
    modes_of = {
        is_moe: [(), *dict.fromkeys(of_layer(modes, is_moe) for modes in wanted if modes), ()] for is_moe in types
    }
    rows = [[ProbeLayer(is_moe, modes) for modes in modes_of[is_moe]] for is_moe in types]
    return [layer for column in zip(*rows, strict=True) for layer in column]


def probe_run(run: RunConfig, kinds: Sequence[str], world_size: int) -> RunConfig:
    """The run on all ranks at hand as one pipeline stage, with the layers of `probe_layers`.

    Raises:
        ConfigError: the ranks do not hold one stage of the run.
    """
    layers = probe_layers(run, kinds)
    stage = run.parallel.tensor_model_parallel_size * run.parallel.context_parallel_size
    expert, expert_tensor = run.parallel.expert_sizes
    for size, what in ((stage, "tensor x context"), (expert * expert_tensor, "expert x expert-tensor")):
        if world_size % size:
            raise ConfigError(
                f"calibration on {world_size} ranks, but {what} parallel ranks of this run come in {size}s",
                "--calibrate",
                f"torchrun --nproc-per-node {size} (or a multiple of it)",
            )
    freq = 2 if len({layer.is_moe for layer in layers}) == 2 else 1
    training = replace(
        run.training,
        recompute_granularity=None,
        recompute_layout=",".join(mode_name(layer.modes) for layer in layers),
        global_batch_size=run.training.micro_batch_size * (world_size // stage),
    )
    sizes = replace(
        run.parallel,
        world_size=world_size,
        pipeline_model_parallel_size=1,
        num_virtual_stages_per_pipeline_rank=1,
        pipeline_model_parallel_layout=None,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        use_distributed_optimizer=False,
    )
    model = replace(run.model, num_layers=len(layers), moe_layer_freq=freq)
    return replace(run, model=model, parallel=sizes, training=training)


class _Stopwatch:
    """Moments of one forward and backward: hooks on the layers' inputs, and on the gradients of those inputs."""

    def __init__(self, model: TeleChatModel, synchronize: Callable[[], None]):
        self._synchronize = synchronize
        self.forward: list[float] = []
        self.backward: list[float] = []
        places = [*model.decoder.layers, model.decoder.final_layernorm]
        self._handles = [place.register_forward_pre_hook(self._on_input, with_kwargs=True) for place in places]

    def now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _on_input(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.forward.append(self.now())
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden.register_hook(lambda grad: self.backward.append(self.now()))

    def clear(self) -> None:
        self.forward, self.backward = [], []

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Calibration:
    """A probe of the run's parts on all ranks at hand; `round` times them once, `result` gives the medians. Rounds of
    `warm_up` come first, and again after a pause: caches that others have filled make the next round slower.

    Collective: all ranks make the same calls. A layer's backward includes adding its gradients to the fp32 sums, as
    it does in training.

    Raises:
        ConfigError: the ranks do not hold one stage of the run; no model to be had from its configuration.
    """

    def __init__(self, run: RunConfig, kinds: Sequence[str] = DEFAULT_KINDS):
        self.run = run
        self.backend = get_backend(run.training.device)
        self.backend.install()
        self.layers = probe_layers(run, kinds)
        self.probe = probe_run(run, kinds, _world_size())
        self.state = parallel.initialize(self.probe, self.backend)
        built = build_trained(self.probe, self.state, self.backend)
        self.virtual_stages, self.optimizer, self.step = built.virtual_stages, built.optimizer, built.train_step
        set_context(self.virtual_stages, self.probe, self.state, self.backend)
        model = self.virtual_stages[0].module
        assert isinstance(model, TeleChatModel), "what build_trained wrapped"
        self._watch = _Stopwatch(model, self.backend.synchronize)
        self._records: list[Times] = []
        self._batch = self._make_batch()

    def warm_up(self, rounds: int = WARM_UP) -> None:
        """Rounds whose times are not kept."""
        for _ in range(rounds):
            self._timed_round()

    def round(self) -> None:
        """Time one micro-batch, the same in turns, one optimizer step and the exchange."""
        self._records.append(self._timed_round())

    def _timed_round(self) -> Times:
        dist.barrier()
        record = self._micro_batch()
        record["alone"] = self._alone()
        record["optimizer"] = self._optimizer()
        record["p2p"] = self._p2p()
        record["step"] = self._small_reductions()
        record["reduction"] = self._reduction()
        return record

    def result(self) -> Measured:
        """Medians over the rounds, mean over the ranks.

        Raises:
            ConfigError: there was no round.
        """
        records = self._records
        if not records:
            raise ConfigError("no rounds", "calibration", "at least one")
        mine = {name: statistics.median(record[name] for record in records) for name in records[0]}
        of_ranks: list[Times | None] = [None] * self.state.world_size
        dist.all_gather_object(of_ranks, mine)
        mean = {name: statistics.fmean(rank[name] for rank in of_ranks if rank) for name in mine}
        alone = mean["alone"] / _whole(mean)
        passed = self._reduced_bytes()
        return Measured(
            conditions=conditions(self.run),
            layers=self._by_kind(mean),
            embedding={"forward": mean["embedding.forward"], "backward": mean["embedding.backward"]},
            output_layer={"forward": mean["output.forward"], "backward": mean["output.backward"]},
            p2p=mean["p2p"],
            optimizer_per_parameter=mean["optimizer"] / self._own_parameters(),
            step=mean["step"],
            alone=min(alone, 1.0) if alone else 1.0,
            jitter=self._jitter(records),
            gradient_gb_s=passed / mean["reduction"] / 1e9 if passed else None,
            source=f"{date.today()}, {self.backend.device_name()} ({platform.machine()}), {self.state.world_size} "
            f"ranks, medians of {len(records)} rounds",
        )

    def close(self) -> None:
        """Take hooks and process groups down; the default group stays."""
        self._watch.remove()
        parallel.destroy(keep_world=True)

    # ---- what a round times -----------------------------------------------------------------

    def _alone(self) -> float:
        """Seconds of a micro-batch while the ranks of all other stages wait; 0 where experts join them all."""
        expert, expert_tensor = self.run.parallel.expert_sizes
        dense = self.run.parallel.tensor_model_parallel_size * self.run.parallel.context_parallel_size
        sharing = math.lcm(
            dense, expert * expert_tensor
        )  # no group of either kind reaches over the end of such a block
        if sharing == self.state.world_size:
            return 0.0
        seconds = 0.0
        for turn in range(self.state.world_size // sharing):
            dist.barrier()
            if self.state.rank // sharing == turn:
                seconds = _whole(self._micro_batch())
        dist.barrier()
        return seconds

    def _micro_batch(self) -> Times:
        self._watch.clear()
        start = self._watch.now()
        output, loss_of = forward_step(self.backend.device, iter([self._batch]), self.virtual_stages[0])
        assert loss_of is not None, "there was a batch"
        loss = loss_of(output)[0]
        middle = self._watch.now()
        loss.backward()
        end = self._watch.now()
        inputs, gradients = self._watch.forward, self._watch.backward[::-1]
        assert len(inputs) == len(gradients) == len(self.layers) + 1, "every layer's input has a gradient"
        record = {
            "embedding.forward": inputs[0] - start,
            "embedding.backward": end - gradients[0],
            "output.forward": middle - inputs[-1],
            "output.backward": gradients[-1] - middle,
        }
        for number in range(len(self.layers)):
            record[f"{number}.forward"] = inputs[number + 1] - inputs[number]
            record[f"{number}.backward"] = gradients[number] - gradients[number + 1]
        return record

    def _optimizer(self) -> float:
        """What an iteration does once: gradients zeroed, norm, clipping, AdamW."""
        start = self._watch.now()
        self.optimizer.prepare_grads()
        self.step._clip(float(self.optimizer.get_grad_norm()))
        self.optimizer.step_with_ready_grads()
        for stage in self.virtual_stages:
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._watch.now() - start

    def _p2p(self) -> float:
        """One way of the hidden states, from ping-pong between ranks that are a pipeline stage apart; 0 on one rank."""
        size, rank = self.state.world_size, self.state.rank
        if size == 1:
            return 0.0
        training = self.run.training
        sizes = self.run.parallel
        length = training.seq_length // (sizes.context_parallel_size * sizes.sequence_parallel_size)
        shape = (length, training.micro_batch_size, self.run.model.hidden_size)
        there, back = (torch.zeros(shape, dtype=compute_dtype(self.run), device=self.backend.device) for _ in range(2))
        half = size // 2
        dist.barrier()
        if rank >= 2 * half:
            return 0.0
        first, peer = rank < half, (rank + half) % (2 * half)
        start = self._watch.now()
        for _ in range(P2P_REPEATS):
            for sends in (first, not first):
                dist.send(there, peer) if sends else dist.recv(back, peer)
        return (self._watch.now() - start) / (2 * P2P_REPEATS)

    def _small_reductions(self) -> float:
        """The loss, the check of its finiteness and the gradient norm: three small all-reduces."""
        value = torch.zeros(4, device=self.backend.device)
        dist.barrier()
        start = self._watch.now()
        for _ in range(3):
            dist.all_reduce(value)
        return self._watch.now() - start

    def _reduction(self) -> float:
        """The gradients of all ranks that hold the same parameters, as at the end of a step."""
        dist.barrier()
        start = self._watch.now()
        for stage in self.virtual_stages:
            stage.finish_grad_sync()
        return self._watch.now() - start

    # ---- helpers ----------------------------------------------------------------------------

    def _reduced_bytes(self) -> float:
        """What a ring of all-reduces of the probe's gradients lets a rank pass on; 0 where no rank shares any."""
        count = local_count(tensor_table(self.probe.model), self.probe.parallel)
        dense, expert = self.probe.parallel.gradient_ranks
        rings = ((count.dense, dense), (count.expert, expert))
        return sum(2 * GRADIENT_BYTES * number * (size - 1) / size for number, size in rings)

    def _by_kind(self, mean: Times) -> dict[str, dict[str, float]]:
        out: dict[str, dict[str, float]] = {}
        for kind in dict.fromkeys(layer.kind for layer in self.layers):
            own = [(number, layer.modes) for number, layer in enumerate(self.layers) if layer.kind == kind]
            plain = [number for number, modes in own if not modes]
            # every layer's forward does the same work, recomputed or not
            forward = statistics.fmean(mean[f"{number}.forward"] for number in plain)
            backward = statistics.fmean(mean[f"{number}.backward"] for number in plain)
            out[kind] = {"forward": forward, "backward": backward}
            for number, modes in own:
                if modes:
                    whole = mean[f"{number}.forward"] + mean[f"{number}.backward"]
                    out[kind][f"extra.{mode_name(modes)}"] = max(0.0, whole - forward - backward)
        return out

    def _jitter(self, records: Sequence[Times]) -> float:
        """Standard deviation of a pass of all layers over its mean, beside what all ranks have in common at the time;
        from the middle half of the rounds, so that a single interruption says nothing. 0 on one rank."""
        ranks = self.state.world_size
        passes = [[sum(value for name, value in one.items() if name.endswith(way)) for one in records] for way in _WAYS]
        of_ranks: list[list[list[float]] | None] = [None] * ranks
        dist.all_gather_object(of_ranks, passes)
        if ranks == 1 or len(records) < 4:
            return 0.0
        found = []
        for way in range(len(_WAYS)):
            rounds = list(zip(*(rank[way] for rank in of_ranks if rank), strict=True))
            shares = zip(*([time / statistics.fmean(one) for time in one] for one in rounds), strict=True)
            # a rank that is always slower than the others is no jitter
            off = [share - statistics.median(own) for own in map(list, shares) for share in own]
            low, _, high = statistics.quantiles(off, n=4)
            found.append((high - low) / NORMAL_QUARTILES / (1 - 1 / ranks) ** 0.5)
        return statistics.fmean(found)

    def _own_parameters(self) -> float:
        count = local_count(tensor_table(self.probe.model), self.probe.parallel)
        dense, expert = optimizer_shards(self.probe)
        return count.dense / dense + count.expert / expert

    def _make_batch(self) -> Batch:
        training = self.run.training
        shape = (training.micro_batch_size, training.seq_length)
        generator = torch.Generator().manual_seed(training.seed)
        tokens = torch.randint(0, self.run.model.vocab_size, shape, generator=generator)
        whole = {
            "tokens": tokens,
            "labels": tokens,
            "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
            "loss_mask": torch.ones(shape),
        }
        if self.state.cp_size == 1:
            return whole
        return RowSplit(self.run.parallel.context_sizes, self.state.cp_rank, ZIGZAG, EVEN_COSTS)(whole)


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1


@contextmanager
def calibration(run: RunConfig, kinds: Sequence[str] = DEFAULT_KINDS) -> Iterator[Calibration]:
    """A `Calibration` that is closed at the end."""
    probe = Calibration(run, kinds)
    try:
        yield probe
    finally:
        probe.close()


def calibrate(run: RunConfig, kinds: Sequence[str], base: DeviceSpec, rounds: int = ROUNDS) -> DeviceSpec:
    """The device with times of this run measured on the ranks at hand; an entry for the same shapes is replaced.

    Collective; the same result on every rank.

    Raises:
        ConfigError: the ranks do not hold one stage of the run.
    """
    with calibration(run, kinds) as probe:
        probe.warm_up()
        for _ in range(rounds):
            probe.round()
        return with_measured(base, probe.result())


def with_measured(base: DeviceSpec, entry: Measured) -> DeviceSpec:
    """The device with this entry, in place of one for the same shapes."""
    others = tuple(known for known in base.measured if dict(known.conditions) != dict(entry.conditions))
    return replace(base, measured=(*others, entry))
