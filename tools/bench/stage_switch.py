"""What short samples see of a run whose samples grow longer: their loss after each step, and on both sides of each
switch with the same weights.

    python tools/bench/stage_switch.py --data PREFIX --vocab-size 2048 --json switch.json --plot switch.png

A small model on the tokens of PREFIX, one process, on the CPU; the last twentieth of the documents is held out, and the
short samples are cut from it. Arms: *theta*, another rotary base in each stage, as TeleChat2 was trained (10,000, then
1,000,000, then 40,000,000); *formula*, the NTK formula of the first stage in all of them; *no switch*, the model
trained on at the first length.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BATCH_TOKENS = 4096
SHORT_SAMPLES, HELD_OUT = 64, 0.05
SHOWN_BEFORE = 40
"""Steps before the first switch that are drawn."""
THETAS = (1e4, 1e6, 4e7)
ARMS = ("theta", "formula", "no switch")


def stages_of(arm: str, lengths: list[int], steps: list[int]) -> str:
    """The YAML of an arm: steps of equal tokens, longer samples."""
    lines, start = ["stages:"], 0
    for number, (length, count) in enumerate(zip(lengths, steps, strict=True)):
        length = lengths[0] if arm == "no switch" else length
        theta = THETAS[number] if arm == "theta" else THETAS[0]
        trained = length if arm == "theta" else lengths[0]
        lines += [
            f"  - from_tokens: {start}",
            f"    seq_length: {length}",
            f"    global_batch_size: {BATCH_TOKENS // length}",
            f"    micro_batch_size: {BATCH_TOKENS // length}",
            f"    rotary_base: {theta}",
            f"    rotary_training_seqlen: {trained}",
        ]
        start += count * BATCH_TOKENS
    return "\n".join(lines) + "\n"


def short_samples(prefix: str, length: int) -> Any:
    """int64 [SHORT_SAMPLES, length + 1], from the documents that are held out."""
    import torch

    from megatron_telechat.data import IndexedDataset

    dataset = IndexedDataset(prefix)
    held_out = range(round(len(dataset) * (1 - HELD_OUT)), len(dataset))
    tokens = torch.cat([torch.from_numpy(dataset.get(number, 0, None).astype("int64")) for number in held_out])
    rows = (len(tokens) - 1) // length
    starts = torch.linspace(0, rows - 1, SHORT_SAMPLES).long() * length
    return torch.stack([tokens[start : start + length + 1] for start in starts.tolist()])


def run_arm(arm: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one arm; the loss of the short samples by step, and at each switch before and behind it."""
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config import load_run_config
    from megatron_telechat.training import sequence
    from megatron_telechat.training.loop import Trainer
    from megatron_telechat.training.signals import StopRequests

    path = folder / f"{arm.replace(' ', '-')}.yaml"
    path.write_text(stages_of(arm, args.lengths, args.steps), encoding="utf-8")
    flags = (
        f"--preset telechat2-tiny --vocab-size {args.vocab_size} --data-path {args.data} "
        f"--split {1 - HELD_OUT},{HELD_OUT} --device cpu --fp32 --no-progress --lr 2e-3 --lr-decay-style constant "
        f"--log-interval 20 --train-iters {sum(args.steps)}"
    ).split()
    short = short_samples(args.data, args.lengths[0])
    loaded = load_run_config([*flags, "--config", str(path), "--run-dir", str(folder / path.stem)], os.environ)
    curve: list[tuple[int, int, float]] = []

    class Watched(Trainer):
        """A stage that looks at the short samples before its first step and after each."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            curve.append((self.step, self.stage.number, short_loss(self, short)))

        def take_step(self, iterators: Any) -> Any:
            taken = super().take_step(iterators)
            curve.append((self.step, self.stage.number, short_loss(self, short)))
            return taken

    with patch.object(sequence, "Trainer", Watched):
        stages = sequence.StageSequence(loaded.stages, StopRequests(folder, False), get_backend("cpu"))
        stages.fit()
    parallel.destroy(keep_world=True)
    switches = [
        {"step": step, "before": before, "behind": behind}
        for (step, one, before), (_, other, behind) in zip(curve, curve[1:], strict=False)
        if one != other
    ]
    return {"arm": arm, "curve": [[step, loss] for step, _, loss in curve], "switches": switches}


def short_loss(trainer: Any, rows: Any) -> float:
    """Mean loss of the short samples, by the model as the present stage has it."""
    import torch

    (model,) = trainer.virtual_stages
    losses = []
    model.eval()
    with torch.no_grad():
        for some in rows.split(16):
            tokens, labels = some[:, :-1].contiguous(), some[:, 1:].contiguous()
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            losses.append(model(tokens, positions, labels=labels).double().mean())
    model.train()
    return float(torch.stack(losses).mean())


def draw(found: list[dict[str, Any]], lengths: list[int], output: Path) -> None:
    """The curves of all arms around the switches, which are marked."""
    from megatron_telechat.cli.plot_run import COLORS, new_figure, save_figure

    figure, axes = new_figure([["loss"]], (8, 4), (1,))
    axis, switches = axes["loss"], [switch["step"] for switch in found[0]["switches"]]
    begin, seen = switches[0] - SHOWN_BEFORE, []
    for color, arm in zip(COLORS, found, strict=False):
        steps, losses = zip(*(point for point in arm["curve"] if point[0] >= begin), strict=True)
        axis.plot(steps, losses, color=color, label=arm["arm"], linewidth=1.4)
        seen += [*losses]
    room = 0.12 * (max(seen) - min(seen))
    axis.set(xlabel="step", ylabel=f"loss of samples of {lengths[0]} tokens", ylim=(min(seen) - room, max(seen) + room))
    for length, step in zip(lengths, (begin, *switches), strict=True):
        axis.annotate(f" trains on {length:,}", (step, min(seen) - room / 2), fontsize=9, color="#475569")
    for step in switches:
        axis.axvline(step, color="#94a3b8", linewidth=0.8, linestyle="--")
    axis.legend(frameon=False, loc="upper right")
    save_figure(figure, output, "--plot")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser.add_argument("--lengths", type=numbers, default=[64, 256, 1024], help="of the stages (default 64,256,1024)")
    parser.add_argument("--steps", type=numbers, default=[150, 30, 15], help="of each stage (default 150,30,15)")
    parser.add_argument(
        "--data", required=True, metavar="PREFIX", help="tokens, as tools/preprocess_data.py writes them"
    )
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--arms", default=",".join(ARMS), help=f"default {','.join(ARMS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if len(args.lengths) != len(args.steps) or len(args.lengths) > len(THETAS):
        parser.error(f"--lengths and --steps are as long as each other, {len(THETAS)} at most")
    with tempfile.TemporaryDirectory() as folder:
        found = [run_arm(arm, args, Path(folder)) for arm in args.arms.split(",")]
    print(f"\nloss of {SHORT_SAMPLES} samples of {args.lengths[0]} tokens, the same weights on both sides of a switch")
    print(f"{'arm':<12}{'switch after step':>18}{'before':>10}{'behind':>10}{'moves by':>10}{'10 steps on':>13}")
    for arm in found:
        later = dict(map(tuple, arm["curve"]))
        for switch in arm["switches"]:
            step, before, behind = switch["step"], switch["before"], switch["behind"]
            after = later.get(step + 10)
            print(
                f"{arm['arm']:<12}{step:>18}{before:>10.4f}{behind:>10.4f}{behind - before:>+10.4f}"
                + (f"{after:>13.4f}" if after is not None else "")
            )
    if args.json:
        report = {"lengths": args.lengths, "steps": args.steps, "arms": found}
        args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if args.plot:
        draw(found, args.lengths, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
