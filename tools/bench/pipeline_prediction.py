#!/usr/bin/env python3
"""Predicted and measured iteration times of pipeline layouts of a small model: two CPU ranks over gloo.

    python tools/bench/pipeline_prediction.py [--quick] [--moe] [--rounds 9] [--json FILE]

Every layout (even, uneven, interleaved, recomputed, context parallel) is a Trainer on two ranks of its own; one more
pair of ranks calibrates the pipelines, another one what two context-parallel ranks share. All take their turns, round
after round, so that whatever else the machine does hits all of them alike; while one pair works the others wait. What
all layouts of a round have in common is taken out. The cost model then gets the calibrations and nothing else. Printed
are both times of every layout, the median error, and whether the order agrees wherever two layouts differ by more than
the noise.
With --replan NAME the times are fitted to what the run of that layout logged, too, as `--from RUN_DIR` does; the errors
of the others whose layers are the same are then those of a plan that is made again from a run.

One core a rank is needed: ranks that share a core are no pipeline. Each rank is bound to a core of its own (--unbound:
not; two ranks that wake at once may then start on the same one).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from processes import pipes  # noqa: E402

from megatron_telechat.config.recompute import recompute_plan  # noqa: E402
from megatron_telechat.config.schema import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_telechat.costs.devices import DeviceSpec, Measured  # noqa: E402
from megatron_telechat.planner.from_run import SeenRun, fit_to_run  # noqa: E402
from megatron_telechat.planner.predict import predict  # noqa: E402

RANKS = 2
POLISHES = 10
CALIBRATION = "calibration"
# Freed memory stays with the process. Else glibc gives it back and every step pays for its pages anew, the more the
# more micro-batches are in flight: a cost of the allocator, which a calibration of single layers does not see.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}


@dataclass(frozen=True)
class Layout:
    """One arm: layers of every virtual stage, what they recompute, and ranks that share a row; these are a stage."""

    name: str
    counts: tuple[int, ...]
    recompute: str | None = None
    context: int = 1


LAYOUTS = (
    Layout("even", (6, 6)),
    Layout("head light", (7, 5)),
    Layout("uneven", (8, 4)),
    Layout("uneven the other way", (4, 8)),
    Layout("two chunks", (3, 3, 3, 3)),
    Layout("two uneven chunks", (4, 3, 3, 2)),
    Layout("three chunks", (2, 2, 2, 2, 2, 2)),
    Layout("full recompute", (6, 6), "full*6|full*6"),
    Layout("first stage recomputes", (6, 6), "full*4,none*2|none*6"),
    Layout("block recompute", (6, 6), "block*6|block*6"),
    Layout("context", (12,), context=2),
    Layout("context full recompute", (12,), "full*12", context=2),
    Layout("context some recompute", (12,), "full*5,block*4,none*3", context=2),
)
KINDS = ("full", "mlp")


def make_run(layout: Layout, moe: bool, quick: bool, folder: str) -> RunConfig:
    """The run of one arm; twelve layers whatever the layout."""
    width, length = (128, 128) if quick else (256, 256)
    experts: dict[str, Any] = dict(num_experts=8, moe_ffn_hidden_size=2 * width, moe_router_topk=2) if moe else {}
    stages = list(layout.counts)
    text = "|".join(f"t*{count}" for count in stages)
    recompute = layout.recompute and layout.recompute.replace("block", "moe" if moe else "mlp")
    pipeline = RANKS // layout.context
    return RunConfig(
        model=ModelConfig(
            name="bench",
            num_layers=sum(stages),
            hidden_size=width,
            ffn_hidden_size=4 * width,
            num_attention_heads=8,
            vocab_size=2048,
            **experts,
        ),
        parallel=ParallelConfig(
            world_size=RANKS,
            ranks_per_node=RANKS,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=layout.context,
            cp_comm_type="p2p",
            num_virtual_stages_per_pipeline_rank=len(stages) // pipeline,
            pipeline_model_parallel_layout=f"E{text}L",
        ),
        training=TrainingConfig(
            device="cpu",
            precision="fp32",
            seq_length=length,
            micro_batch_size=2,
            global_batch_size=8 if quick else 12,
            train_iters=10**6,
            recompute_layout=recompute,
        ),
        data=DataConfig(mock_data=True),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(run_dir=f"{folder}/{layout.name.replace(' ', '_')}"),
    )


# ---- a rank ---------------------------------------------------------------------------------


def serve(spec: dict[str, Any]) -> None:
    """A rank of one arm: one JSON line on the original stdout for every line on stdin."""
    if spec["core"] is not None:
        os.sched_setaffinity(0, {spec["core"]})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the trainer prints must not mix with the answers
    layout = Layout(spec["name"], tuple(spec["counts"]), spec["recompute"], spec["context"])
    run = make_run(layout, spec["moe"], spec["quick"], spec["folder"])
    if layout.name.startswith(CALIBRATION):
        step, result = calibration_arm(run, spec["probes"])
    else:
        step, result = training_arm(run)

    def say(answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say("ready")
    for line in sys.stdin:
        say(result() if line.strip() == "result" else step())


def calibration_arm(run: RunConfig, rounds: int):
    from megatron_telechat.training.calibrate import Calibration

    probe = Calibration(run, KINDS)
    probe.warm_up()

    def turn() -> None:
        probe.warm_up(1)  # a step has twelve micro-batches, of which one finds the caches full of another arm's data
        for _ in range(rounds):
            probe.round()

    return turn, lambda: asdict(probe.result())


def training_arm(run: RunConfig):
    from megatron_telechat.backend import get_backend

    get_backend("cpu").install()
    import torch.distributed as dist

    from megatron_telechat.training.loop import Trainer

    trainer = Trainer(run)
    iterators = trainer.training_iterators()

    def step() -> tuple[float, float]:
        dist.barrier()
        trainer.timers.clock.take_s()
        start = time.perf_counter()
        trainer.take_step(iterators)
        return time.perf_counter() - start, trainer.timers.clock.take_s()

    return step, lambda: None


# ---- the bench ------------------------------------------------------------------------------


class Arm:
    """The ranks of one layout, as processes that wait for their turn."""

    def __init__(self, layout: Layout, options: argparse.Namespace, folder: str):
        import torch.distributed as dist

        self.layout = layout
        self.malloc = MALLOC if options.malloc == "keep" else {}
        # Public, and missing in torch's __all__.
        self.store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        bound = not options.unbound and len(cores) >= RANKS
        spec = {"moe": options.moe, "quick": options.quick, "folder": folder, "probes": options.probes}
        spec |= asdict(layout)
        self.ranks = [
            self._start(rank, json.dumps({**spec, "core": cores[rank] if bound else None}), folder)
            for rank in range(RANKS)
        ]

    def _start(self, rank: int, spec: str, folder: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "OMP_NUM_THREADS": "1",
            **self.malloc,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        command = [sys.executable, "-W", "ignore", __file__, "--serve", spec]
        with open(f"{folder}/{self.layout.name.replace(' ', '_')}.{rank}.log", "wb") as log:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    def answers(self) -> list[Any]:
        lines = [pipes(rank)[1].readline() for rank in self.ranks]
        if not all(lines):
            raise SystemExit(f"a rank of the arm '{self.layout.name}' ended; its log is in the bench's folder")
        return [json.loads(line) for line in lines]

    def ask(self, what: str) -> list[Any]:
        for rank in self.ranks:
            requests, _ = pipes(rank)
            requests.write(what + "\n")
            requests.flush()
        return self.answers()

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


def measure(
    layouts: Sequence[Layout], options: argparse.Namespace, folder: str
) -> tuple[tuple[Measured, ...], dict[str, list[float]], dict[str, list[list[float]]]]:
    """Calibrations, and of every layout the seconds of every step and of the compute of its ranks, taken in turn and
    without what all had in common in a round; the warm-up is left out."""
    probes = [
        Layout(f"{CALIBRATION} {layout.context}", layout.counts, None, layout.context)
        for layout in {each.context: each for each in layouts}.values()
    ]
    arms = []
    try:
        for layout in (*probes, *layouts):
            arms.append(Arm(layout, options, folder))
            arms[-1].answers()  # started one after the other: two cores
        calibrations = arms[: len(probes)]
        seconds: dict[str, list[float]] = {layout.name: [] for layout in layouts}
        compute: dict[str, list[list[float]]] = {layout.name: [] for layout in layouts}
        for number in range(options.rounds + options.warm_up):
            for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
                answer = arm.ask("step")
                if arm not in calibrations and number >= options.warm_up:
                    seconds[arm.layout.name].append(max(one for one, _ in answer))
                    compute[arm.layout.name].append([one for _, one in answer])
        for number, pace in enumerate(paces(list(seconds.values()))):
            for name in seconds:
                seconds[name][number] /= pace
                compute[name][number] = [one / pace for one in compute[name][number]]
        return tuple(Measured(**arm.ask("result")[0]) for arm in calibrations), seconds, compute
    finally:
        for arm in arms:
            arm.close()


def paces(rows: Sequence[Sequence[float]]) -> list[float]:
    """Of every round, what all arms took in it over what they took in the median round (Tukey's median polish)."""
    found = [1.0] * len(rows[0])
    for _ in range(POLISHES):
        own = [statistics.median(time / pace for time, pace in zip(row, found, strict=True)) for row in rows]
        shares = [[time / one for time in row] for row, one in zip(rows, own, strict=True)]
        found = [statistics.median(of_round) for of_round in zip(*shares, strict=True)]
        found = [pace / statistics.median(found) for pace in found]
    return found


def replanned(
    name: str, device: DeviceSpec, seconds: list[float], compute: list[list[float]], options, folder: str
) -> DeviceSpec:
    """The device with the times that the run of one layout logged."""
    (layout,) = [layout for layout in LAYOUTS if layout.name == name]
    stages = tuple(statistics.median(of_rank) for of_rank in zip(*compute, strict=True))
    seen = SeenRun(statistics.median(seconds), stages, f"the run of layout '{name}'")
    fitted = fit_to_run(make_run(layout, options.moe, options.quick, folder), device, seen)
    ranks = " and ".join(f"{one:.3f} s" for one in stages)
    print(
        f"{seen.source}: {seen.iteration_s:.3f} s, of which its ranks computed {ranks}; layers {fitted.layers:.3f}, "
        f"ends {fitted.ends:.3f} of the calibration's times"
    )
    return fitted.device


def compare(
    layouts: Sequence[Layout], device: DeviceSpec, seconds: dict[str, list[float]], options, folder: str
) -> dict[str, Any]:
    """Predicted beside measured, with errors and the agreement of the orders."""
    steady = replace(device, measured=tuple(replace(entry, alone=1.0, jitter=0.0) for entry in device.measured))
    rows = []
    for layout in layouts:
        run = make_run(layout, options.moe, options.quick, folder)
        assert len(recompute_plan(run)) == run.model.num_layers
        times = seconds[layout.name]
        measured = statistics.median(times)
        prediction, by_medians = predict(run, device), predict(run, steady)
        rows.append(
            {
                "layout": layout.name,
                "counts": layout.counts,
                "recompute": run.training.recompute_layout,
                "predicted_s": prediction.iteration,
                "measured_s": measured,
                "best_s": min(times),
                "times_s": times,
                "error": prediction.iteration / measured - 1,
                "error_by_medians": by_medians.iteration / measured - 1,
                "makespan_s": prediction.simulation.makespan,
                # half the width of the middle of the times, relative: what two medians may differ by without a reason
                "noise": _spread(times) / measured,
            }
        )
    pairs = agree = 0
    for one, other in combinations(rows, 2):
        difference = one["measured_s"] / other["measured_s"] - 1
        if abs(difference) > one["noise"] + other["noise"]:
            pairs += 1
            agree += (difference > 0) == (one["predicted_s"] > other["predicted_s"])
    return {
        "rows": rows,
        "median_error": statistics.median(abs(row["error"]) for row in rows),
        "pairs": pairs,
        "pairs_in_order": agree,
        "measured": [asdict(entry) for entry in device.measured],
    }


def _spread(times: Sequence[float]) -> float:
    if len(times) < 3:
        return max(times) - min(times)
    quarters = statistics.quantiles(times, n=4)
    return (quarters[2] - quarters[0]) / 2


def _range(rows: Sequence[dict[str, Any]], key: str) -> str:
    return f"{min(row[key] for row in rows):+.1%} to {max(row[key] for row in rows):+.1%}"


def show(result: dict[str, Any]) -> None:
    for entry in result["measured"]:
        ranks = entry["conditions"]["context_parallel_size"]
        rates = f"alone {entry['alone']:.2f}, jitter {entry['jitter']:.2f}" if ranks == 1 else (
            f"gradients {entry['gradient_gb_s']:.2f} GB/s"
        )  # fmt: skip
        for kind, times in entry["layers"].items():
            parts = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in times.items())
            print(f"{kind} layer{f' of {ranks} context-parallel ranks' * (ranks > 1)}: {parts}; {rates}")
    print(f"{'layout':24}{'layers':>16}{'predicted':>11}{'measured':>10}{'error':>8}{'noise':>7}")
    for row in sorted(result["rows"], key=lambda row: row["measured_s"]):
        counts = " ".join(map(str, row["counts"]))
        print(
            f"{row['layout']:24}{counts:>16}{row['predicted_s']:>10.3f}s{row['measured_s']:>9.3f}s"
            f"{row['error']:>+8.1%}{row['noise']:>7.1%}"
        )
    print(
        f"errors {_range(result['rows'], 'error')} with alone and jitter, {_range(result['rows'], 'error_by_medians')} "
        f"without"
    )
    print(
        f"median error {result['median_error']:.1%}; order agrees in {result['pairs_in_order']} of "
        f"{result['pairs']} pairs that differ by more than the noise"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: does it run at all")
    parser.add_argument("--moe", action="store_true", help="every layer a MoE layer of eight experts")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--probes", type=int, default=3, help="calibration rounds in each turn, behind one to warm up")
    parser.add_argument("--unbound", action="store_true", help="ranks run on any core")
    parser.add_argument(
        "--malloc", choices=("keep", "default"), default="keep", help="keep: freed memory stays with the process"
    )
    parser.add_argument("--layouts", help="only these, by name, commas between them")
    parser.add_argument("--replan", metavar="NAME", help="fit the times to the run of this layout too")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve is not None:
        serve(options.serve)
        return 0
    if options.quick:
        options = argparse.Namespace(**{**vars(options), "rounds": 3, "warm_up": 2})
    known = {layout.name: layout for layout in LAYOUTS}
    names = options.layouts.split(",") if options.layouts else list(known)
    if set(names) - set(known):
        parser.error(f"--layouts: choose from {', '.join(known)}")
    if options.replan and options.replan not in names:
        parser.error(f"--replan: choose from {', '.join(names)}")
    layouts = [known[name] for name in names]
    with tempfile.TemporaryDirectory(prefix="pipeline_prediction_") as folder:
        try:
            entries, seconds, compute = measure(layouts, options, folder)
        except SystemExit:
            for log in sorted(Path(folder).glob("*.log")):
                text = log.read_text(errors="replace").strip()
                if "Error" in text:
                    print(f"--- {log.name}\n" + "\n".join(text.splitlines()[-15:]), file=sys.stderr)
            raise
        device = DeviceSpec("this machine", measured=entries)
        result = compare(layouts, device, seconds, options, folder)
        show(result)
        if options.replan:
            again = replanned(options.replan, device, seconds[options.replan], compute[options.replan], options, folder)
            others = [
                layout
                for layout in layouts
                if layout.name != options.replan and layout.context == known[options.replan].context
            ]
            result["replanned"] = compare(others, again, seconds, options, folder)
            show(result["replanned"])
    if options.json:
        options.json.write_text(
            json.dumps(
                {"options": {"moe": options.moe, "quick": options.quick, "malloc": options.malloc}, **result}, indent=1
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
