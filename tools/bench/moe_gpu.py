#!/usr/bin/env python3
"""The expert block on one GPU: its products, its gathers, and its schedule over an emulated link.

    python tools/bench/moe_gpu.py [--json FILE] [--trace FOLDER]     on a CUDA device
    python tools/bench/moe_gpu.py --device cpu --quick               does it run: its figures say nothing about a GPU

One process plays one rank of two that hold equal tokens: 16 experts, top-4, bf16. What is measured:

    products     grouped_mm of the experts' three matrices at k=1 and k=4, against one dense product of the same FLOPs
    gathers      index_select and sum_bags, bytes read and written, against a copy on the device
    schedule     forward and backward at k=1, 2, 4, 8 over a stand-in link: a copy from pinned memory on a communication
                 stream in place of every transfer, sized to 0.5, 1 and 2 times the experts' forward;
                 against the model of events
    memory       peak of a forward and backward, k=4 over k=1; host synchronisations of both
    trace        one step in torch's profiler, as a Chrome trace, and a picture of its streams (matplotlib)
    layer        our block against megatron-core's MoELayer, one rank, no exchange

The schedule is real, the link is emulated: a copy engine does not share the network's path, and ranks are never late.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

CHUNKS = (1, 2, 4, 8)
LINKS = (0.5, 1.0, 2.0)


def products(rank: Any, rounds: int) -> dict[str, float]:
    """TFLOP/s of the experts' forward products by chunks, and of one dense product."""
    import torch
    import torch.nn.functional as F

    shape, device, weights = rank.shape, rank.device, rank.weights
    found = {}
    total = 0
    for k in (1, 4):
        plans = _arrivals(rank, k)
        total = sum(plan.num_rows for plan in plans)
        inputs = [
            torch.randn(plan.num_rows, shape.hidden, device=device.device).to(shape.torch_dtype) for plan in plans
        ]
        hidden = [torch.randn(plan.num_rows, shape.ffn, device=device.device).to(shape.torch_dtype) for plan in plans]
        fc1, fc2 = weights.flat_fc1.transpose(1, 2), weights.fc2.transpose(1, 2)

        def run() -> None:
            for plan, x, y in zip(plans, inputs, hidden, strict=True):
                F.grouped_mm(x, fc1, offs=plan.offsets)
                F.grouped_mm(y, fc2, offs=plan.offsets)

        found[f"grouped k={k}"] = 6 * total * shape.hidden * shape.ffn / device.time_ms(run, rounds) / 1e9
    x = torch.randn(total, shape.hidden, device=device.device).to(shape.torch_dtype)
    dense = torch.randn(shape.hidden, 3 * shape.ffn, device=device.device).to(shape.torch_dtype)
    found["dense"] = 6 * total * shape.hidden * shape.ffn / device.time_ms(lambda: x @ dense, rounds) / 1e9
    return found


def gathers(rank: Any, rounds: int) -> dict[str, float]:
    """GB/s, read and written, of the block's data movement, of a copy, and of torch's kernel for sums."""
    import torch
    import torch.nn.functional as F

    from megatron_telechat.moe.engine import sum_bags

    (plan,) = _arrivals(rank, 1)
    device, shape = rank.device, rank.shape
    source = torch.randn(sum(plan.receive_tokens), shape.hidden, device=device.device).to(shape.torch_dtype)
    rows = source.index_select(0, plan.token_rows)
    row_bytes = shape.hidden * source.element_size()
    other = torch.empty_like(rows)
    moved = {
        "copy": (lambda: other.copy_(rows), 2 * len(rows)),
        "index_select": (lambda: source.index_select(0, plan.token_rows), 2 * len(rows)),
        "embedding_bag": (
            lambda: F.embedding_bag(plan.bags, rows, plan.bag_starts, mode="sum"),
            len(rows) + len(source),
        ),
        "sum_bags": (lambda: sum_bags(rows, plan.bags, plan.bag_starts), len(rows) + len(source)),
    }
    return {name: count * row_bytes / device.time_ms(run, rounds) / 1e6 for name, (run, count) in moved.items()}


def schedule(rank: Any, rounds: int, chunks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Times over links of several lengths, with what the model of events makes of the computation and the link
    alone."""
    from overlap.one_device import StandInChannel, copy_rate

    from megatron_telechat.moe.overlap_model import PassCosts, backward_ms, forward_ms

    rate = copy_rate(rank.device, rounds) if rank.device.cuda else 0.0
    free = StandInChannel(rank.device, rank.shape, 0.0)
    compute = {k: rank.times_ms(k, free, rounds) for k in chunks}
    (plan,) = _arrivals(rank, 1)
    rows = sum(plan.receive) + sum(plan.receive_tokens)  # of a forward; as many go as come
    for ratio in LINKS:
        link = ratio * compute[1][0]
        channel = StandInChannel(rank.device, rank.shape, link / rows, rate)
        for k in chunks:
            forward, backward = rank.times_ms(k, channel, rounds)
            ideal = forward_ms(PassCosts(compute[k][0], 0.0, link, 0.0), k) + backward_ms(
                PassCosts(compute[k][1], 0.0, link, 0.0), k
            )
            yield {
                "link_over_ffn": ratio,
                "k": k,
                "forward_ms": forward,
                "backward_ms": backward,
                "compute_ms": sum(compute[k]),
                "ideal_ms": ideal,
                "over_ideal": (forward + backward) / ideal,
            }


def trace(rank: Any, folder: Path, rounds: int) -> list[str]:
    """Profile one step at k=4 over a link as long as the experts' forward; returns the files written."""
    from overlap.one_device import StandInChannel, copy_rate
    from torch.profiler import ProfilerActivity, profile

    rate = copy_rate(rank.device, rounds) if rank.device.cuda else 0.0
    compute = rank.times_ms(1, StandInChannel(rank.device, rank.shape, 0.0), rounds)[0]
    (plan,) = _arrivals(rank, 1)
    channel = StandInChannel(rank.device, rank.shape, compute / (sum(plan.receive) + sum(plan.receive_tokens)), rate)
    rank.times_ms(4, channel, 1)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if rank.device.cuda else [])
    with profile(activities=activities) as profiler:
        rank.backward(*rank.forward(4, channel))
        rank.device.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "moe_gpu_trace.json"
    profiler.export_chrome_trace(str(path))
    picture = folder / "moe_gpu_trace.png"
    return [str(path), *([str(picture)] if rank.device.cuda and draw(path, picture) else [])]


def draw(path: Path, picture: Path) -> bool:
    """The kernels and copies of a trace, one row a stream; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no picture of the trace: pip install matplotlib")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    events = [
        e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    streams = sorted({event["args"]["stream"] for event in events})
    begin = min(event["ts"] for event in events)
    figure, axes = pyplot.subplots(figsize=(11, 1 + 0.6 * len(streams)))
    for row, stream in enumerate(streams):
        bars = [((e["ts"] - begin) / 1e3, e["dur"] / 1e3) for e in events if e["args"]["stream"] == stream]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=f"C{row}")
    axes.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
    axes.set(xlabel="ms", title="One forward and backward in 4 chunks; the link is a copy")
    figure.tight_layout()
    figure.savefig(picture, dpi=130)
    return True


def layers(shape: Any, name: str, device: Any, rounds: int) -> dict[str, Any]:
    """Forward and backward of whole layers that hold all experts, ms."""
    import torch
    from overlap.layers import build_block, build_core, random_weights, transformer_config

    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import RunConfig

    backend = get_backend(name)
    backend.install()
    state = parallel.initialize(RunConfig(), backend)
    try:
        config, weights = transformer_config(shape, 1), random_weights(shape)
        tokens = torch.randn(shape.tokens, 1, shape.hidden).to(device.device, shape.torch_dtype)
        found: dict[str, Any] = {}
        for label, build in (("ours", build_block), ("megatron-core", build_core)):
            with device.device:
                layer = build(shape, config, state.process_groups, weights).to(device.device)

            def run() -> None:
                layer.zero_grad(set_to_none=True)
                inputs = tokens.clone().requires_grad_()
                layer(inputs)[0].backward(tokens)

            found[label] = device.time_ms(run, rounds)
        return found
    finally:
        parallel.destroy()


def _arrivals(rank: Any, k: int) -> Any:
    dispatch = rank.dispatch(k)
    dispatch.lay_out_arrivals()
    return dispatch.arrivals


def report(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from overlap.layers import Shape
    from overlap.one_device import Device, OneDevice, StandInChannel

    shape = Shape(options.tokens, options.hidden, options.ffn, options.experts, options.topk, options.dtype)
    device = Device(options.device)
    rank = OneDevice(shape, device)
    name = torch.cuda.get_device_name() if device.cuda else "cpu"
    warning = "" if device.cuda else " NOT A GPU: this shows that the bench runs, and nothing else"
    print(f"{name}; {asdict(shape)}; link emulated by copies.{warning}", flush=True)
    result: dict[str, Any] = {"device": name, "shape": asdict(shape), "link": "emulated"}
    result["tflops"] = products(rank, options.rounds)
    result["gathers_gb_s"] = gathers(rank, options.rounds)
    for title, values in (("products, TFLOP/s", result["tflops"]), ("gathers, GB/s", result["gathers_gb_s"])):
        print(f"{title}: " + ", ".join(f"{what} {value:.3g}" for what, value in values.items()), flush=True)
    print(f"{'link/FFN':>9}{'k':>4}{'forward':>10}{'backward':>10}{'total ms':>10}{'ideal(k)':>10}{'/ ideal':>9}")
    result["schedule"] = []
    for line in schedule(rank, options.rounds, CHUNKS):
        result["schedule"].append(line)
        total = line["forward_ms"] + line["backward_ms"]
        print(
            f"{line['link_over_ffn']:>9}{line['k']:>4}{line['forward_ms']:>10.2f}{line['backward_ms']:>10.2f}{total:>10.2f}"
            f"{line['ideal_ms']:>10.2f}{line['over_ideal']:>9.2f}",
            flush=True,
        )
    free = StandInChannel(device, shape, 0.0)
    result["peak_bytes"] = {k: rank.peak_bytes(k, free) for k in (1, 4)}
    result["host_syncs"] = {k: rank.host_syncs(k, free) for k in (1, 4)}
    print(f"peak bytes by k: {result['peak_bytes']}; host syncs (forward, backward) by k: {result['host_syncs']}")
    if options.trace:
        result["trace"] = trace(rank, options.trace, options.rounds)
        print("trace: " + ", ".join(result["trace"]))
    result["layer_ms"] = layers(shape, options.device, device, options.rounds)
    print("whole layer, ms: " + ", ".join(f"{what} {value:.2f}" for what, value in result["layer_ms"].items()))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of a rank; 4096 rows an expert, 1024 in a chunk of four"
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small shapes and two rounds")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="write a Chrome trace and a picture of it here")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(tokens=256, hidden=64, ffn=96, rounds=2)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("moe_gpu: no CUDA device here; --device cpu --quick shows that the bench runs", file=sys.stderr)
        return 2
    result = report(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
