"""One virtual rank: builds the model of its place, takes one step, writes what happened; a process of its own."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psutil

from megatron_telechat.errors import EXIT_BUG, EXIT_OK, UserError
from megatron_telechat.parallel.topology import Topology
from megatron_telechat.virtual.launch import RANK_LIMIT_S, STANDING_LIMIT_S, Order
from megatron_telechat.virtual.records import RankRecord
from megatron_telechat.virtual.shim import load_shim

if TYPE_CHECKING:
    from megatron_telechat.config.schema import RunConfig
    from megatron_telechat.data.samples import TokenDataset
    from megatron_telechat.virtual.record import Memory, Record

_NOT_PLAYED = ("transformer_engine", "apex")
"""Packages whose kernels would be started on tensors without memory; to Python they are not installed."""
END_OF_DOCUMENT = 200
"""Token that ends a document: of the made-up ones, about one in a thousand."""


def main(argv: Sequence[str] | None = None) -> int:
    """Play the ranks that the orders describe, one after another, each in a fork of this process, which has torch
    loaded. Prints the name of each order when its rank has ended, well or not. Returns the exit code.

    Args:
        argv: the files of the orders.
    """
    files = sys.argv[1:] if argv is None else argv
    orders = [Order.read(Path(file)) for file in files]
    warnings.filterwarnings("ignore")
    for name in _NOT_PLAYED:
        sys.modules[name] = None  # type: ignore[assignment]
    with ExitStack() as stack:
        try:
            load_shim()
            memory, record = _load_program(orders[0], stack)
        except Exception as error:
            for order in orders:
                _tell(order, error)
            return EXIT_BUG
        for order in orders:
            _await(order, _fork(order, memory, record))
            print(order.name, flush=True)
    return EXIT_OK


def _load_program(order: Order, stack: ExitStack) -> tuple[Memory, Record]:
    """Import what every rank needs, once for all forks: it takes longer than a step of a small model."""
    from megatron_telechat.virtual.record import Memory, Record
    from megatron_telechat.virtual.stand_ins import VirtualBackend, virtual_cuda

    memory, record = Memory(), Record()
    stack.enter_context(virtual_cuda(order.rank, order.run.parallel, memory, record))
    VirtualBackend(memory).install()
    import megatron_telechat.training.build  # noqa: F401 - megatron-core comes with it

    return memory, record


def _fork(order: Order, memory: Memory, record: Record) -> int:
    """The process that plays this rank."""
    child = os.fork()
    if child:
        return child
    code = EXIT_BUG
    try:
        _play(order, memory, record)
        code = EXIT_OK
    except BaseException as error:
        _tell(order, error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _await(order: Order, child: int) -> None:
    """Wait for a rank to end, for as long as it may take; one that was killed has told nothing itself.

    Counted is the processor's time, since other work may slow it down; a rank that uses none stands: nothing that it
    does waits for another process.
    """
    process, used, moved = psutil.Process(child), 0.0, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        times = process.cpu_times()
        if times.user + times.system > used:
            used, moved = times.user + times.system, time.monotonic()
        if used > RANK_LIMIT_S or time.monotonic() > moved + STANDING_LIMIT_S:
            process.kill()
            os.waitpid(child, 0)
            stands = "" if used > RANK_LIMIT_S else f", and it stands for {STANDING_LIMIT_S:g} s"
            _tell(order, TimeoutError(f"not done after {used:.0f} s of the processor{stands}"))
            return
        time.sleep(0.02)
    if not Path(order.record).exists() and not Path(order.error).exists():
        code = os.waitstatus_to_exitcode(status)
        _tell(order, RuntimeError(f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"))


def _tell(order: Order, error: BaseException) -> None:
    """Write what went wrong where the launcher looks for it."""
    text = error.render() if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    told = {"kind": type(error).__name__, "text": text.strip(), "user": isinstance(error, UserError)}
    Path(order.error).write_text(json.dumps(told), encoding="utf-8")


def _play(order: Order, memory: Memory, record: Record) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_telechat.data.loader import batches
    from megatron_telechat.model.attention import Segments
    from megatron_telechat.parallel.state import initialize
    from megatron_telechat.training.averages import Averages
    from megatron_telechat.training.build import build_trained
    from megatron_telechat.training.optimizer import set_learning_rate
    from megatron_telechat.training.step import data_iterators
    from megatron_telechat.virtual.record import Recorder
    from megatron_telechat.virtual.routing import virtual_routing
    from megatron_telechat.virtual.stand_ins import VirtualBackend, numbers_of_host, on_host, virtual_cuda

    run = order.run
    begin = time.perf_counter()
    with virtual_cuda(order.rank, run.parallel, memory, record):
        backend = VirtualBackend(memory)
        backend.install()
        if run.training.deterministic:
            backend.use_deterministic_algorithms()
        state = initialize(run, backend)
        dataset = _documents(run)
        iterators = data_iterators(
            lambda: batches(dataset, run, state, 0), run.parallel.num_virtual_stages_per_pipeline_rank, run, state
        )
        read = [None if iterator is None else numbers_of_host(iterator) for iterator in iterators]
        borders = patch.object(Segments, "of", staticmethod(on_host(Segments.of)))
        with borders, virtual_routing(), FakeTensorMode(allow_non_fake_inputs=True), Recorder(memory, record):
            trained = build_trained(run, state, backend)
            averages = Averages(trained.optimizer, trained.shards, run.average)
            averages.begin(0, {})
            set_learning_rate(trained.optimizer, run, run.optimizer.lr)
            # The moments and master weights are made by the first step; it needs no forward.
            trained.optimizer.prepare_grads()
            trained.optimizer.step_with_ready_grads()
            step = _virtual_step(trained, run, state, backend, memory, record)
            _mark_scopes(trained.virtual_stages, record)
            record.clear()
            memory.restart()
            step(read, 0)
            averages.follow(1, taken=True)
    _write(order, memory, record, time.perf_counter() - begin)


def _documents(run: RunConfig) -> TokenDataset:
    """Made-up documents of about a thousand tokens, whose borders are kept apart where the run does so."""
    from megatron_telechat.data.mock import MockSamples
    from megatron_telechat.data.samples import TokenDataset

    size, vocabulary = 4 * run.training.global_batch_size, run.model.vocab_size
    source = MockSamples(size, run.training.seq_length, vocabulary, run.training.seed, 0)
    return TokenDataset(
        source,
        size,
        vocabulary,
        min(END_OF_DOCUMENT, vocabulary - 1),
        eod_mask_loss=run.data.eod_mask_loss,
        reset_position_ids=run.data.reset_position_ids,
        reset_attention_mask=run.data.reset_attention_mask,
        tell_padding=run.routers_read_masks,
    )


def _virtual_step(trained: Any, run: Any, state: Any, backend: Any, memory: Any, record: Any) -> Any:
    """The step of the training; where the host would decide by a number, a common one is put in its place."""
    from megatron_telechat.training.step import TrainStep

    class VirtualStep(TrainStep):
        def forward_backward(self, iterators: Any) -> Any:
            record.scope = "between layers"
            with memory.during("forward and backward"):
                return super().forward_backward(iterators)

        def _reduce(self, local: Any, requests: Any) -> Any:
            record.scope = "optimizer"
            super()._reduce(local, requests)
            tokens = float(run.training.global_batch_size * run.training.seq_length)
            return [tokens, tokens], False, False

        def _clip(self, grad_norm: float) -> None:
            super()._clip(2 * run.optimizer.clip_grad)  # a norm that has to be cut

        def __call__(self, iterators: Any, step: int, requests: Any = (False, False)) -> Any:
            with memory.during("optimizer"):
                return super().__call__(iterators, step, requests)

    return VirtualStep(trained.virtual_stages, trained.optimizer, trained.shards, run, state, backend)


def _mark_scopes(virtual_stages: Sequence[Any], record: Any) -> None:
    """Say in the record which layer is at work. In the backward a layer begins where the gradient of its output is
    complete."""
    from megatron_telechat.model.layer import DecoderLayer

    def enter(scope: str, *_: Any) -> None:
        record.scope = scope

    def leave(number: int, module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(partial(enter, f"layer {number} backward"))
        record.scope = "between layers"

    for stage in virtual_stages:
        for module in stage.modules():
            if isinstance(module, DecoderLayer):
                number = module.layer_number - 1
                module.register_forward_pre_hook(partial(enter, f"layer {number} forward"))
                module.register_forward_hook(partial(leave, number))
        finalize = stage.config.finalize_model_grads_func

        def finalize_in_scope(*args: Any, finalize: Any = finalize, **kwargs: Any) -> Any:
            record.scope = "end of the step"
            return finalize(*args, **kwargs)

        stage.config.finalize_model_grads_func = finalize_in_scope


def _write(order: Order, memory: Memory, record: Record, seconds: float) -> None:
    place = Topology.from_config(order.run.parallel).coordinates(order.rank)
    RankRecord(
        rank=order.rank,
        stage=place.pp,
        microbatches=order.run.num_microbatches,
        resident_bytes=memory.now,
        peaks=dict(memory.peaks),
        work=dict(record.work),
        calls=tuple(call for call in record.calls if call.size > 1),
        syncs=tuple((what, place, count) for (what, place), count in sorted(record.syncs.items())),
        seconds=seconds,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    ).write(Path(order.record))


if __name__ == "__main__":
    sys.exit(main())
