"""Starts virtual ranks, each in a process of its own, and collects what they report; needs no torch itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.yaml_io import dump_run_config, run_config_from_yaml
from megatron_telechat.costs import DeviceSpec, device_spec
from megatron_telechat.device_kinds import planned_device
from megatron_telechat.errors import ConfigError, ResourceError, UserError
from megatron_telechat.parallel.topology import Topology
from megatron_telechat.virtual.records import RankRecord

RANK_LIMIT_S = 1800.0
"""Seconds of the processor after which a rank is given up; the largest that were tried took some minutes."""
STANDING_LIMIT_S = 120.0
"""Seconds after which a rank that uses no processor is given up."""
PROGRAM = "megatron_telechat.virtual.rank"


def played_device() -> DeviceSpec:
    """The device that virtual ranks play."""
    spec = device_spec("h100-80g")
    assert spec is not None, "a device file of the package"
    return spec


@dataclass(frozen=True)
class Order:
    """What one virtual rank is to do.

    Attributes:
        config: the run, as YAML.
        rank: its number.
        record, error: files for what it did, and for what went wrong.
    """

    config: str
    rank: int
    record: str
    error: str

    @cached_property
    def run(self) -> RunConfig:
        """The run of :attr:`config`."""
        return run_config_from_yaml(self.config)

    @property
    def name(self) -> str:
        """What tells it from the other orders of a process."""
        return Path(self.record).stem

    @classmethod
    def read(cls, path: Path) -> Order:
        """From the file that :func:`execute` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def executable(run: RunConfig) -> RunConfig:
    """The run as virtual ranks execute it: made-up data, and as many micro-batches as fill the pipeline.

    Raises:
        ConfigError: a run that is not for CUDA, or one that needs Transformer Engine.
    """
    kind = planned_device(run.training.device)
    if kind.torch_cuda != "native":
        raise ConfigError(
            f"virtual ranks play CUDA devices, the run is for {kind.name}",
            "--execute",
            "add --device cuda" if kind.torch_cuda != "absent" else "a CPU run needs no virtual rank: start it",
        )
    if run.training.fp8_format is not None:
        raise ConfigError(
            "virtual ranks play no Transformer Engine, which computes FP8", "--execute", "--no-fp8-format"
        )
    parallel = run.parallel
    if parallel.cp_implementation != "own":
        raise ConfigError(
            f"virtual ranks play no Transformer Engine, and so not cp_implementation={parallel.cp_implementation}",
            "--execute",
            "--cp-implementation own",
        )
    stages = parallel.pipeline_model_parallel_size
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    enough = parallel.microbatch_group + stages if interleaved else stages + 1
    count = min(run.num_microbatches, enough)
    batch = run.training.global_batch_size // run.num_microbatches * count
    chunks = 1 if parallel.moe_input_chunks == "auto" else parallel.moe_input_chunks
    return replace(
        run,
        training=replace(run.training, global_batch_size=batch, train_iters=8, device=kind.name),
        parallel=replace(parallel, moe_input_chunks=chunks),
        # Made-up data has no pairs: what is executed is the cross entropy that their loss is computed from.
        data=replace(run.data, num_workers=0, dpo=False),
    )


def one_of_each_stage(run: RunConfig) -> list[int]:
    """A rank of every pipeline stage: the first of each."""
    return [group[0] for group in Topology.from_config(run.parallel).groups("tp-cp-dp")]


def execute(
    run: RunConfig, ranks: Sequence[int], done: Callable[[RankRecord], None] = lambda record: None
) -> list[RankRecord]:
    """Execute these ranks of a run, as many at a time as the machine has processors.

    Args:
        run: as :func:`executable` gives it.
        ranks: which ones.
        done: called with each record as soon as it is there.

    Raises:
        ConfigError: a rank outside of the world.
        VirtualRankError: a rank failed.
    """
    (records,) = execute_several([(run, ranks)], done)
    return records


def execute_several(
    runs: Sequence[tuple[RunConfig, Sequence[int]]],
    done: Callable[[RankRecord], None] = lambda record: None,
    program: str = PROGRAM,
) -> list[list[RankRecord]]:
    """Execute ranks of several runs. The program is loaded once a processor, which takes longer than a small run.

    Args:
        runs: runs and which ranks of each.
        done: called with each record as soon as it is there.
        program: module that plays the ranks; tests break one on purpose.

    Returns:
        The records of each run, in the order of its ranks.

    Raises:
        ConfigError: a rank outside of a world.
        VirtualRankError: a rank failed.
    """
    for run, ranks in runs:
        world = run.parallel.world_size
        outside = [rank for rank in ranks if not 0 <= rank < world]
        if outside:
            raise ConfigError(f"rank {outside[0]} of {world}", "--execute-ranks", f"ranks from 0 to {world - 1}")
    with tempfile.TemporaryDirectory(prefix="megatron_telechat-virtual-") as folder:
        orders: list[Order] = []
        for number, (run, ranks) in enumerate(runs):
            config = dump_run_config(replace(run, logging=replace(run.logging, run_dir=folder)))
            for rank in ranks:
                place = str(Path(folder) / f"run{number}-rank{rank}")
                orders.append(Order(config, rank, f"{place}.json", f"{place}.error"))
                Path(f"{place}.order").write_text(json.dumps(asdict(orders[-1])), encoding="utf-8")
        workers = max(1, min(len(orders), os.cpu_count() or 1))
        shares = [orders[number::workers] for number in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            played = pool.map(lambda share: _run(share, done, program), shares)
            found = {name: record for share in played for name, record in share.items()}
    records = iter([found[order.name] for order in orders])
    return [[next(records) for _ in ranks] for _, ranks in runs]


def _run(orders: Sequence[Order], done: Callable[[RankRecord], None], program: str) -> dict[str, RankRecord]:
    """Play some ranks in one process, one after another: name of the order → record."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    files = [str(Path(order.record).with_suffix(".order")) for order in orders]
    waiting = {order.name: order for order in orders}
    records: dict[str, RankRecord] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", program, *files],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                order = waiting.pop(line.strip(), None)
                if order is None:
                    continue
                if not Path(order.record).exists():
                    raise _failure(order, said)
                records[order.name] = RankRecord.read(Path(order.record))
                done(records[order.name])
        finally:
            process.kill()
            process.wait()
        for order in waiting.values():
            raise _failure(order, said)
    return records


def _failure(order: Order, said: IO[str]) -> UserError:
    """What the rank said, or the end of its output where it said nothing."""
    error = Path(order.error)
    if error.exists():
        told = json.loads(error.read_text(encoding="utf-8"))
        last = told["text"].splitlines()[0 if told["user"] else -1]
        return VirtualRankError(f"virtual rank {order.rank}: {last}", details=told["text"])
    said.seek(0)
    lines = said.read().strip().splitlines()
    return VirtualRankError(f"virtual rank {order.rank}: {lines[-1] if lines else 'no word'}", "\n".join(lines))


class VirtualRankError(ResourceError):
    """A virtual rank did not come to its end.

    Attributes:
        details: its traceback.
    """

    def __init__(self, what: str, details: str):
        super().__init__(what, "--execute", "see its traceback above")
        self.details = details
