"""Seconds that the parts of a model take on one rank for one micro-batch.

A part is arithmetic over the reached share of the peak, plus the bytes of its element-wise work over the reached memory
bandwidth, plus the communication nothing hides; docs/planner.md has the equations. Where the device file holds times
that were measured for these very shapes, those are taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.activations import BYTES, loss_chunks, tokens_of
from megatron_telechat.costs.communication import (
    Links,
    expert_exchange_seconds,
    p2p_seconds,
    tensor_exchange_seconds,
    tied_embedding_seconds,
)
from megatron_telechat.costs.conditions import conditions, nearest
from megatron_telechat.costs.context import ContextExchange
from megatron_telechat.costs.devices import DeviceSpec, Measured
from megatron_telechat.costs.flops import attention_products, layer_forward_flops
from megatron_telechat.costs.memory import optimizer_shards
from megatron_telechat.costs.optimizer_state import AVERAGE_BYTES, rest_bytes, travel_parts
from megatron_telechat.costs.parameters import LocalCount, local_count
from megatron_telechat.costs.software import Software
from megatron_telechat.errors import ConfigError
from megatron_telechat.tensors.table import expert_ffn_hidden_size, layer_table, stage_table

GEMM_BACKWARD = 2.0
"""Each product of the forward has two in the backward."""
FLASH_BACKWARD = 2.5
"""A flash attention makes five products in its backward, one of them again (arXiv 2307.08691, section 3.1)."""


UNFUSED_SHARE = 0.52
"""Products of single heads reach so much of what those of a layer do."""
UNFUSED_PASSES = 1.9
"""Passes over the scores, each of which reads and writes them: scale, mask and softmax in one kernel, and dropout."""
FP8_CAST_BYTES = 3
"""An input in 16 bits is read, and written in 8, before its product."""
PLAIN_PASSES = 3.1
"""Times that PyTorch's own kernels, one for each operation, read and write what fused ones do once."""
SHARDS_EXPOSED = 0.4
"""Share of the gathers and reductions of sharded parameters that is lost beside a compute that could hide them."""
EXPERTS_EXPOSED = 0.74
"""Share of the expert exchange that is exposed where nothing is meant to hide it: its kernels overlap at their ends."""


@dataclass(frozen=True)
class PartTime:
    """Seconds of one part for one micro-batch."""

    forward: float
    backward: float

    def __add__(self, other: PartTime) -> PartTime:
        return PartTime(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer for one micro-batch; `extra` is what its recompute adds to the backward."""

    forward: float
    backward: float
    extra: float


def mode_name(modes: Iterable[str]) -> str:
    """Recompute modes of a layer as one word: none, full, core_attn+mlp, …"""
    return "+".join(modes) or "none"


class TimeModel:
    """Times of a run's parts on a device.

    Args:
        software: what the training program hides of its communication; unset: what our own does (`Software.of`).

    Raises:
        ConfigError: the device has neither the figures for an estimate nor times measured for these shapes.
    """

    def __init__(self, run: RunConfig, device: DeviceSpec, software: Software | None = None):
        self.run, self.device, self.software = run, device, software or Software.of(run)
        self.measured: Measured | None = next(
            (entry for entry in device.measured if dict(entry.conditions) == conditions(run)), None
        )
        peak = device.peak(run.training.precision)
        if self.measured is None and not (peak and device.hbm_bandwidth_gb_s):
            raise ConfigError(
                f"nothing is known of the speed of {device.name} at these shapes in {run.training.precision}"
                + nearest(device, conditions(run)),
                f"device {device.name}",
                "measure it: tools/plan_pipeline.py --calibrate; or name a device whose file has figures",
            )
        self._peak = (peak or float("inf")) * 1e12
        self._fp8 = run.training.fp8_format is not None
        self._memory = (device.hbm_bandwidth_gb_s or float("inf")) * 1e9 * device.efficiency.get("hbm", 1.0)
        self._tokens = tokens_of(run)
        self._size = BYTES[run.training.precision]

    @cached_property
    def links(self) -> Links:
        """Bandwidths and latencies between the ranks of each group; inside a node as measured, if that was."""
        links, measured = Links.of(self.run, self.device), self.measured
        if measured is None or measured.gradient_gb_s is None:
            return links
        return replace(links, intra=measured.gradient_gb_s * 1e9)

    # ---- what the planner asks --------------------------------------------------------------

    def layer(self, layer: int, modes: tuple[str, ...]) -> LayerTime:
        """Forward and backward of the zero-based `layer`, and what recompute with these modes adds."""
        if self.measured is not None:
            return self._measured_layer(layer, modes)
        parts, count = self.layer_parts(layer), self._layer_count(layer)
        whole = sum(parts.values(), PartTime(0.0, 0.0))
        extra = sum(parts[name].forward for name in repeated_parts(modes))
        if "moe" in modes and "full" not in modes:
            extra += self._experts_again()
        # every parameter's gradient is added to its sum: read both, write one
        whole += PartTime(0.0, self._accumulate(count))
        shards = self._sharded(count, whole)
        return LayerTime(*(self._stack(part) for part in (shards.forward, shards.backward, extra)))

    def embedding(self) -> PartTime:
        """A look-up, and the scatter of its output over the sequence."""
        if self.measured is not None:
            return PartTime(self.measured.embedding["forward"], self.measured.embedding["backward"])
        bytes_moved = 2 * self._size * self.run.model.hidden_size * self._tokens.whole
        exchange = tensor_exchange_seconds(self.run, self.links) / 2
        table = stage_table(self.run.model, (), has_embedding=True, has_loss=False)
        count = local_count(table, self.run.parallel)
        forward = self._bytes(bytes_moved) + exchange
        return self._end(count, PartTime(forward, forward + self._accumulate(count)))

    def output_layer(self) -> PartTime:
        """Final norm, logits and cross entropy; where the loss is computed in chunks the backward makes the logits and
        their exponentials again, and each chunk adds to the weight's gradient."""
        if self.measured is not None:
            return PartTime(self.measured.output_layer["forward"], self.measured.output_layer["backward"])
        tokens, model = self._tokens, self.run.model
        product = self._product(tokens.whole, model.vocab_size / tokens.tensor, model.hidden_size, fp8=False)
        logits = model.vocab_size * tokens.whole / tokens.tensor
        # forward: cast to fp32, maximum, exponent and sum in fp32; backward: scaled softmax, cast back
        norm = self._norm()
        exchange = tensor_exchange_seconds(self.run, self.links) / 2
        forward = product + self._bytes(logits * (2 * self._size + 16)) + norm.forward + exchange
        count = local_count(stage_table(model, (), has_embedding=False, has_loss=True), self.run.parallel)
        backward = GEMM_BACKWARD * product + self._bytes(logits * (8 + self._size)) + norm.backward + exchange
        chunks = loss_chunks(self.run)
        if chunks:
            backward += product + self._bytes(logits * (2 * self._size + 8)) + (chunks - 1) * self._accumulate(count)
        for _ in range(model.mtp_num_layers or 0):
            block = sum(self.layer_parts(model.num_layers - 1).values(), PartTime(0.0, 0.0))
            joined = self._product(tokens.whole, model.hidden_size / tokens.tensor, 2 * model.hidden_size)
            forward += block.forward + joined + product + self._bytes(logits * (2 * self._size + 16))
            backward += block.backward + GEMM_BACKWARD * (joined + product) + self._bytes(logits * (8 + self._size))
        return self._end(count, PartTime(forward, backward + self._accumulate(count)))

    def p2p(self) -> float:
        """Hidden states of one micro-batch, from one stage to the next."""
        if self.measured is not None:
            return self.measured.p2p
        return self._stack(p2p_seconds(self.run, self.links, in_pieces=self.software.message_pieces))

    def optimizer_step(self, count: LocalCount) -> float:
        """Seconds of norm, clipping and AdamW on a rank that holds these parameters, once an iteration."""
        return max(self.optimizer_step_parts(count))

    def optimizer_step_parts(self, count: LocalCount) -> tuple[float, ...]:
        """What `optimizer_step` is the longest of; each is a sum over the parameters of the rank.

        Bytes: gradients zeroed, and read for the norm (4 each); of the rank's share gradient read, moments and master
        weight read and written, weight written; of each average of the weights, where one enters, the weight read and
        the average read and written. State on the host also passes the link to it and back.
        """
        sharded, own = self.software.sharding != "none", self.own_parameters(count)
        if self.measured is not None:
            return travel_parts(self.run, own, self.device, self.measured.optimizer_per_parameter * own)
        gradient = self.software.gradient_bytes
        held = own if sharded else count.total
        average = self.run.average
        averages = ((average.ema_decay is not None) + (average.average_window_steps is not None)) * 3 * AVERAGE_BYTES
        a_parameter = gradient + 2 * rest_bytes(self.run) + self._size + averages / average.average_interval
        seconds = self._stack(self._bytes(2 * gradient * held + a_parameter * own))
        return travel_parts(self.run, own, self.device, seconds)

    def own_parameters(self, count: LocalCount) -> float:
        """Parameters that the optimizer of a rank steps on, of those that the rank holds."""
        sharded = self.software.sharding != "none"
        dense, expert = self.run.parallel.gradient_ranks if sharded else optimizer_shards(self.run)
        return count.dense / dense + count.expert / expert

    def gradient_reduction(self, count: LocalCount) -> float:
        """Seconds of reducing the gradients over the data-parallel ranks, once a step; without the distributed
        optimizer of an all-reduce. Sharded parameters have it in each micro-batch (`layer`)."""
        if self.software.sharding != "none":
            return 0.0
        software = self.software
        once = self.run.parallel.use_distributed_optimizer and not software.all_reduces
        seconds = self._over_data(count, software.gradient_bytes * (1 if once else 2))
        return seconds / software.reduction_share

    def parameter_gather(self, count: LocalCount) -> float:
        """Seconds of gathering the weights that the distributed optimizer has updated, once a step."""
        if self.software.sharding != "none" or not self.run.parallel.use_distributed_optimizer:
            return 0.0
        return self._over_data(count, self._size) / self.software.reduction_share

    def _over_data(self, count: LocalCount, element: float) -> float:
        """A gather or a reduce-scatter of `element` bytes for each parameter, over the ranks that hold the same."""
        parallel = self.run.parallel
        expert, expert_tensor = parallel.expert_sizes
        dense, routed = parallel.gradient_ranks
        seconds = sum(
            self.links.gather(element * number, size, stride)
            for number, size, stride in (
                (count.dense, dense, parallel.tensor_model_parallel_size),
                (count.expert, routed, expert * expert_tensor),
            )
        )
        return self._stack(seconds)

    def tied_embedding(self) -> float:
        """Seconds of adding up, once a step, the gradients of a matrix that the first and the last stage share."""
        return self._stack(tied_embedding_seconds(self.run, self.links))

    def step_constant(self) -> float:
        """The rest of an iteration, whatever its size; known only where it was measured."""
        return self.measured.step if self.measured is not None else 0.0

    # ---- parts of a layer -------------------------------------------------------------------

    def layer_parts(self, layer: int) -> dict[str, PartTime]:
        """Estimated times of the parts of a layer: norms, projections, core_attn, block (its MLP or its experts)."""
        model, tokens = self.run.model, self._tokens
        flops = layer_forward_flops(model, layer, self.run.training.seq_length)
        share = tokens.whole / tokens.tensor
        query, key = model.query_width, model.key_width
        shapes = attention_products(model, tokens.whole, tokens.split, tokens.tensor)
        products = sum(self._product(*shape) for shape in shapes)
        rotated = self._passes(2 * self._size * (query + key + model.value_width) * share)
        rotary = rotated if model.rotates else 0.0
        residual = self._passes(3 * self._size * model.hidden_size * tokens.split)
        exchange = self._exposed_tensor()
        norms = self._norm() + self._norm()
        if model.qk_layernorm:
            norms += self._norm_of((query + key) * share)
        return {
            "norms": norms,
            "projections": PartTime(
                products + rotary + residual + exchange,
                GEMM_BACKWARD * products + rotary + residual / 3 + exchange,
            ),
            "core_attn": self._core_attention(flops.core_attention * share),
            "block": self._experts() if model.layer_is_moe(layer) else self._dense(model.ffn_hidden_size),
        }

    def _core_attention(self, flops: float) -> PartTime:
        """Scores and their product with V, beside what context-parallel ranks exchange.

        The work of the ranks is equal (zigzag). Each piece that arrives adds its output to the one so far: both are
        read and the sum written, in fp32; three quarters of the queries see a piece.
        """
        core = self._attention_products(flops)
        if self.run.parallel.context_parallel_size == 1:
            return core
        exchange = ContextExchange.of(self.run)
        outputs = exchange.output / self._size
        sums = self._bytes((8 + self._size) * 0.75 * outputs * (exchange.ring - 1) * exchange.pieces)
        forward = exchange.forward_seconds(self.links, core.forward + sums)
        return PartTime(forward, exchange.backward_seconds(self.links, core.backward + sums))

    def _attention_products(self, flops: float) -> PartTime:
        """The products of the attention whose causal half has `flops`, by the program's kernel.

        unfused (Megatron-LM's core attention before flash): the whole square as plain products, no mask left out; each
        pass over the scores (scale and mask, softmax, dropout) reads and writes them.
        """
        kernel = self.software.attention
        if kernel == "unfused":
            scores = flops / (2 * self.run.model.head_dim)  # the half of them; the products do 4 d for each
            square = 2 * flops / (self._peak * self._efficiency("gemm") * UNFUSED_SHARE)
            passes = self._bytes(UNFUSED_PASSES * 2 * scores * self._size)
            return PartTime(square + passes, GEMM_BACKWARD * (square + passes))
        fused = self._efficiency("attention")
        forward = fused if kernel == "fused" else self.device.efficiency.get("attention_flash2", fused)
        backward = forward if kernel != "ordered" else self.device.efficiency.get("attention_flash2_ordered", forward)
        return PartTime(flops / (self._peak * forward), FLASH_BACKWARD * flops / (self._peak * backward))

    def _dense(self, width: int) -> PartTime:
        """An MLP of this width, and the residual sum behind it."""
        model, tokens = self.run.model, self._tokens
        share = tokens.whole / tokens.tensor
        inner = width / tokens.tensor
        product = self._product(tokens.whole, (2 if model.is_gated else 1) * inner, model.hidden_size)
        product += self._product(tokens.whole, model.hidden_size, inner)
        element = self._size * width * share
        forward, backward = self._activation_passes
        residual = self._passes(self._size * model.hidden_size * tokens.split)
        exchange = self._exposed_tensor()
        return PartTime(
            product + self._passes(forward * element) + 3 * residual + exchange,
            GEMM_BACKWARD * product + self._passes(backward * element) + residual + exchange,
        )

    @property
    def _activation_passes(self) -> tuple[int, int]:
        """Arrays as wide as the MLP that its activation reads and writes, forward and backward: gate, up and product,
        then those, the gradient and two of it; without a gate input and output, then input, gradient and its
        gradient."""
        return (3, 5) if self.run.model.is_gated else (2, 3)

    def _experts(self) -> PartTime:
        """Router, dispatch, grouped products, way back; a shared expert as a dense one."""
        model, tokens = self.run.model, self._tokens
        width = expert_ffn_hidden_size(model) / tokens.expert_tensor
        hidden, rows = model.hidden_size, tokens.routed * self.software.moe_imbalance
        local = (model.num_experts or 1) / tokens.expert
        gate_up = self._grouped(rows, (2 if model.is_gated else 1) * width, hidden, local)
        product = gate_up + self._grouped(rows, hidden, width, local)
        element, row = self._size * width * rows, self._size * hidden * rows
        # the rows are copied out, sorted where they arrive, put back and summed: four passes that read and write
        moves = self._bytes(8 * row)
        router = 2 * hidden * (model.num_experts or 0) * tokens.split / (self._peak * self._efficiency("gemm"))
        exchange = (
            expert_exchange_seconds(self.run, self.links, self.software.expert_by_node) * self.software.moe_imbalance
        )
        read, again = self._activation_passes
        forward, backward = (
            product + self._passes(read * element),
            GEMM_BACKWARD * product + self._passes(again * element),
        )
        exposed = PartTime(self._exposed_experts(exchange, forward), self._exposed_experts(exchange, backward))
        block = PartTime(router + moves + forward, GEMM_BACKWARD * router + moves + backward)
        width = model.moe_shared_expert_intermediate_size
        if not width:
            return block + exposed
        shared = self._dense(width)
        if self.software.shared_overlap:
            return block + PartTime(max(exposed.forward, shared.forward), max(exposed.backward, shared.backward))
        return block + exposed + shared

    def _experts_again(self) -> float:
        """What recompute ``moe`` repeats: gate and up of the routed experts, all of a shared one, no exchange."""
        model, tokens = self.run.model, self._tokens
        rows = tokens.routed * self.software.moe_imbalance
        width = expert_ffn_hidden_size(model) / tokens.expert_tensor
        local = (model.num_experts or 1) / tokens.expert
        again = self._grouped(rows, (2 if model.is_gated else 1) * width, model.hidden_size, local)
        shared = model.moe_shared_expert_intermediate_size
        return again + (self._dense(shared).forward if shared else 0.0)

    def _exposed_experts(self, exchange: float, compute: float) -> float:
        """What is left of the exchange: beside another micro-batch a share of it; when the block runs in chunks the
        first dispatch, the last way back, and whatever the experts' compute does not cover of the rest."""
        chunks = self.software.moe_chunks
        left = exchange * EXPERTS_EXPOSED * (1 - self.software.expert_overlap)
        return left / chunks + max(0.0, left - compute) * (chunks - 1) / chunks

    def _norm(self) -> PartTime:
        return self._norm_of(self.run.model.hidden_size * self._tokens.split)

    def _norm_of(self, elements: float) -> PartTime:
        element = self._passes(self._size * elements)
        return PartTime(
            2 * element, 4 * element
        )  # read, write; input and gradient read, gradient written, weight's sum

    def _exposed_tensor(self) -> float:
        return tensor_exchange_seconds(self.run, self.links) * (1 - self.software.tensor_overlap)

    # ---- arithmetic, bytes, measured --------------------------------------------------------

    def _efficiency(self, name: str) -> float:
        return self.device.efficiency.get(name, 1.0)

    def _product(self, rows: float, columns: float, depth: float, *, fp8: bool = True) -> float:
        """Seconds of one product [rows, depth] x [depth, columns] of this rank; each of the two of its backward takes
        as long.

        A share of the peak that falls towards narrow and shallow products (tiles at the edges, waves that do not fill
        the device), the operands through memory, and a start. In FP8 where the run has it (`fp8`: and this product).
        """
        return self._products(rows, columns, depth, 1, "gemm", fp8 and self._fp8)

    def _grouped(self, rows: float, columns: float, depth: float, experts: float) -> float:
        """The same of `rows` in all that lie on so many experts, each with a matrix of its own."""
        fp8 = self._fp8 and self.software.experts_in_fp8
        return self._products(rows, columns, depth, experts, "grouped_gemm", fp8)

    def _products(self, rows: float, columns: float, depth: float, matrices: float, kind: str, fp8: bool) -> float:
        peak, share = self._peak, self._efficiency(kind)
        if fp8:
            peak = (self.device.peak("fp8") or 0.0) * 1e12 or peak
            share = self.device.efficiency.get("fp8_gemm", share)
        edges = 1 + self.device.gemm_edge * (1 / columns + 1 / depth)
        element = 1 if fp8 else self._size
        moved = element * (rows * depth + matrices * depth * columns) + self._size * rows * columns
        moved += FP8_CAST_BYTES * rows * depth * fp8
        operands = self._bytes(moved) if self.device.gemm_edge else 0.0
        return 2 * rows * columns * depth * edges / (peak * share) + operands + self.device.gemm_start_s

    def _sharded(self, count: LocalCount, part: PartTime) -> PartTime:
        """A part with these parameters whose weights are gathered for each of its passes, and whose gradients are
        reduced in each micro-batch, beside its compute."""
        if self.software.sharding == "none":
            return part
        gather = self._over_data(count, self._size)
        backward = self._over_data(count, self.software.gradient_bytes) + gather * (self.software.sharding == "full")
        return PartTime(_beside(part.forward, gather), _beside(part.backward, backward))

    def _end(self, count: LocalCount, part: PartTime) -> PartTime:
        shards = self._sharded(count, part)
        return PartTime(self._stack(shards.forward), self._stack(shards.backward))

    def _stack(self, seconds: float) -> float:
        """What the rest of the program makes of them: `efficiency.stack`."""
        return seconds / self._efficiency("stack")

    def _bytes(self, count: float) -> float:
        return count / self._memory

    def _passes(self, count: float) -> float:
        """Element-wise work: norms, rotary, activation, residual sums."""
        return self._bytes(count * (PLAIN_PASSES if self.software.plain_kernels else 1.0))

    def _accumulate(self, count: LocalCount) -> float:
        return self._bytes((self._size + 2 * self.software.gradient_bytes) * count.total)

    def _layer_count(self, layer: int) -> LocalCount:
        return local_count(layer_table(self.run.model, layer), self.run.parallel)

    def _measured_layer(self, layer: int, modes: tuple[str, ...]) -> LayerTime:
        assert self.measured is not None
        kind = "moe" if self.run.model.layer_is_moe(layer) else "dense"
        times = self.measured.layers.get(kind, {})
        name = mode_name(modes)
        if "forward" not in times or (name != "none" and f"extra.{name}" not in times):
            raise ConfigError(
                f"the device file has no time of a {kind} layer with recompute {name}",
                f"device {self.device.name}",
                "calibrate again with this recompute kind among those asked for",
            )
        return LayerTime(times["forward"], times["backward"], times.get(f"extra.{name}", 0.0))


def _beside(compute: float, exchange: float) -> float:
    """Seconds of both where they run at once: the longer one, and a part of the other that nothing hides."""
    return max(compute, exchange) + SHARDS_EXPOSED * min(compute, exchange)


def repeated_parts(modes: tuple[str, ...]) -> tuple[str, ...]:
    """Parts of a layer whose whole forward a backward repeats under these modes; ``moe`` repeats less than its
    block."""
    if "full" in modes:
        return ("norms", "projections", "core_attn", "block")
    parts = ["norms"] * ("layernorm" in modes) + ["core_attn"] * ("core_attn" in modes)
    return tuple(parts + ["block"] * ("mlp" in modes))
