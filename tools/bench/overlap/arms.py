"""What is timed: one forward and backward each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from turns import Sample, Stopwatch, interface_bytes

from overlap.channels import Message, RecordingChannel, ReplayChannel, WaitingChannel, counting_all_to_alls
from overlap.layers import Shape, block_gradients, core_gradients


@dataclass(frozen=True)
class Results:
    """What must be the same for all arms."""

    output: Tensor
    tensors: dict[str, Tensor]

    def errors(self, expected: Results) -> dict[str, float]:
        """Norm of the difference over the norm, by name; for what both have."""
        pairs = {name: (self.tensors[name], value) for name, value in expected.tensors.items() if name in self.tensors}
        pairs["output"] = (self.output, expected.output)
        return {name: float((a.double() - b.double()).norm() / b.double().norm()) for name, (a, b) in pairs.items()}


class LayerArm:
    """A layer in training: forward through autograd, backward with a fixed gradient.

    Args:
        layer: module that takes [s, b, h].
        data: tokens and gradient of the output.
        prepare: sets up the layer, before the time is taken.
        exposed: seconds of waiting since it was last asked.
    """

    def __init__(
        self,
        layer: Any,
        data: tuple[Tensor, Tensor],
        prepare: Callable[[], None] = lambda: None,
        exposed: Callable[[], float] = lambda: 0.0,
    ):
        self.layer, self.prepare, self.exposed = layer, prepare, exposed
        self.tokens, self.direction = data
        self.last: tuple[Tensor | None, Tensor | None] = (None, None)

    def run(self, keep: bool = False) -> Sample:
        """One forward and backward; with `keep` output and input gradient are in :attr:`last`."""
        self.prepare()
        self.layer.zero_grad(set_to_none=True)
        self.exposed()
        inputs = self.tokens.clone().requires_grad_()
        watch = Stopwatch()
        output, _ = self.layer(inputs)
        watch.forward_ends()
        output.backward(self.direction)
        sample = watch.sample(self.exposed)
        if keep:
            self.last = (output.detach(), inputs.grad)
        return sample


class LinkArm:
    """The transfers of the block, in their order, and nothing else."""

    def __init__(self, channel: Any, messages: Sequence[Message]):
        self.channel = channel
        half = len(messages) // 2
        self.passes = (messages[:half], messages[half:])

    def run(self) -> Sample:
        sent, times = interface_bytes(), []
        for messages in self.passes:
            begin = time.perf_counter()
            started = [self.channel.start(message.sent, message.send, message.receive) for message in messages]
            for transfer in started:
                transfer.wait()
            times.append(time.perf_counter() - begin)
        return Sample(times[0], times[1], sum(times), interface_bytes() - sent)


class Arms:
    """Makes the arms around one block and one layer of megatron-core.

    Args:
        shape: of the layer.
        block: ours, as :func:`overlap.layers.build_block` makes it.
        layer: megatron-core's.
        data: tokens and gradient of the output.
    """

    def __init__(self, shape: Shape, block: Any, layer: Any, data: tuple[Tensor, Tensor]):
        self.shape, self.block, self.layer, self.data = shape, block, layer, data
        self.channel = block.link
        self._records: dict[int, list[Message]] = {}

    def chunks(self, k: int, channel: Any | None = None) -> LayerArm:
        def prepare() -> None:
            self.block.num_chunks, self.block.link = k, channel or self.channel

        return LayerArm(self.block, self.data, prepare, self.block.clock.take_exposed_s)

    def core(self) -> LayerArm:
        return LayerArm(self.layer, self.data)

    def control(self, k: int) -> LayerArm:
        return self.chunks(k, WaitingChannel(self.channel))

    def compute(self, k: int) -> LayerArm:
        return self.chunks(k, ReplayChannel(self.channel, self.record(k)))

    def link(self, k: int) -> LinkArm:
        return LinkArm(self.channel, self.record(k))

    def record(self, k: int) -> list[Message]:
        """The transfers of a step with k chunks; the first call makes one, a collective."""
        if k not in self._records:
            recording = RecordingChannel(self.channel)
            self.chunks(k, recording).run()
            self._records[k] = recording.messages
        return self._records[k]

    def forget(self) -> None:
        """The experts were changed: what was recorded does not belong to them."""
        self._records.clear()

    def wire_bytes(self, k: int | None) -> int:
        """Bytes that leave this rank in a step, from the split sizes; None: of megatron-core's layer. Collective.

        Ours includes the choice of experts, a byte each, that every rank tells every other; megatron-core's exchange of
        counts is left out.
        """
        if k is None:
            counter = [0]
            with counting_all_to_alls(counter):
                self.core().run()
            return counter[0]
        rank, others = self.channel.rank, self.channel.size - 1
        choices = self.shape.tokens * self.shape.topk * others
        return choices + sum(message.wire_bytes(rank) for message in self.record(k))

    def results(self, arm: LayerArm) -> Results:
        """Output and gradients of one step."""
        arm.run(keep=True)
        output, input_gradient = arm.last
        assert output is not None and input_gradient is not None, "run(keep=True) keeps both"
        arm.last = (None, None)
        found = core_gradients(self.layer) if arm.layer is self.layer else block_gradients(self.block)
        return Results(output, {"input": input_gradient, **found})
