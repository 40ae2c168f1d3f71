"""``tools/merge_checkpoints.py``: checkpoints and Hugging Face folders merged into one set of weights."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_telechat.cli.text import gib
from megatron_telechat.cli.tool import ToolParser, natural, positive, run_tool
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.device_kinds import DEVICE_CHOICES, HOST
from megatron_telechat.errors import EXIT_OK, ConfigError
from megatron_telechat.locations import location
from megatron_telechat.merging.request import FORMATS, METHODS, VALUES, Examples, MergeRequest, Window
from megatron_telechat.merging.weighting import DECAYS


def build_parser() -> ToolParser:
    """The arguments of tools/merge_checkpoints.py."""
    parser = ToolParser(
        prog="tools/merge_checkpoints.py",
        description="Merge checkpoints of any layout and Hugging Face folders into one set of weights. No ranks, no "
        "device; one tensor at a time. docs/merging.md has the formulas.",
    )
    parser.add_argument(
        "inputs",
        type=location,
        nargs="+",
        help="checkpoints, folders or URLs of them (the newest is taken), Hugging Face folders",
    )
    parser.add_argument("--output", type=location, required=True, help="a new folder, or URL for a checkpoint")
    parser.add_argument(
        "--format", choices=FORMATS, help="of the output; default: checkpoint where every input is one, else hf"
    )
    parser.add_argument("--method", choices=METHODS, default="linear", help="default linear: the weighted average")
    _add_weights(parser)
    _add_task_vectors(parser)
    _add_examples(parser)
    parser.add_argument(
        "--values",
        choices=VALUES,
        default="auto",
        help="weights as stored, fp32 master weights, or an average that each run has kept (ema, window); auto "
        "(default): the masters where every input has them",
    )
    parser.add_argument(
        "--dtype", choices=("keep", "bf16", "fp16", "fp32"), default="keep", help="of the output; default as stored"
    )
    parser.add_argument(
        "--optimizer",
        choices=("none", "average"),
        default="none",
        help="average: the output has the averaged state of the optimizer too, and a run can go on from it",
    )
    parser.add_argument(
        "--allow-model-change",
        action="store_true",
        help="inputs may differ in rotary base and lengths, norm epsilon, top-k or tokenizer: the first one's are kept",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the checksums of checkpoints before merging"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of a Hugging Face folder (default 5GB)")
    return parser


def _add_weights(parser: ToolParser) -> None:
    group = parser.add_argument_group("weights (default: all alike)")
    group.add_argument("--weights", type=_numbers, metavar="W,W,...", help="one an input, in order")
    group.add_argument("--normalize", action="store_true", help="divide the weights by their sum")
    group.add_argument("--any-sum", action="store_true", help="take the weights as they are; else their sum must be 1")
    group.add_argument("--layer-weights", type=Path, metavar="YAML", help="weights by layer and tensor")
    group.add_argument(
        "--window", type=positive(int), metavar="N", help="the newest N checkpoints of the one run that is named"
    )
    group.add_argument("--steps", type=_steps, metavar="S,S,...", help="or its checkpoints of these steps")
    group.add_argument(
        "--decay",
        choices=tuple(DECAYS),
        help="of a window: the learning-rate decay that the average stands for (WSM); default mean",
    )


def _add_task_vectors(parser: ToolParser) -> None:
    group = parser.add_argument_group("task vectors (task-arithmetic, ties, dare, dare-ties)")
    group.add_argument("--base", type=location, help="the model that the inputs began from")
    group.add_argument("--scale", type=float, default=1.0, help="factor of the merged task vector (default 1)")
    group.add_argument("--density", type=_share, default=0.2, help="ties: share of elements kept (default 0.2)")
    group.add_argument(
        "--trim",
        choices=("model", "tensor"),
        default="model",
        help="ties: rank elements over the whole model (default, the paper's) or in each tensor",
    )
    group.add_argument("--drop", type=_share_below_1, default=0.9, help="dare: share dropped (default 0.9)")
    group.add_argument("--seed", type=natural, default=0, help="dare: of what is dropped (default 0)")


def _add_examples(parser: ToolParser) -> None:
    group = parser.add_argument_group("weights by loss (LM-Cocktail)")
    group.add_argument(
        "--examples", type=Path, metavar="JSONL", help='a few dialogs as for fine-tuning, or {"text": ...}'
    )
    group.add_argument(
        "--temperature", type=positive(float), default=5.0, help="weights are softmax(-loss / temperature); default 5"
    )
    group.add_argument("--tokenizer", type=Path, help="file or folder; default: that of the inputs")
    template, mask = fields_by_name()["sft_template"], fields_by_name()["sft_loss_mask"]
    group.add_argument("--template", choices=template.choices, default=template.default, help="as --sft-template")
    group.add_argument("--loss-mask", choices=mask.choices, default=mask.default, help="as --sft-loss-mask")
    group.add_argument("--device", choices=DEVICE_CHOICES, default=HOST, help="of the forward; default cpu")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default fp32 on the CPU, else bf16")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _steps(text: str) -> tuple[int, ...]:
    return tuple(natural(part) for part in text.split(","))


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _share_below_1(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done, 2 arguments, 3 examples or tokenizer, 4 inputs or output, 5 values
    that are not finite, 6 disk)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    request = _request(args, argv)
    from megatron_telechat.huggingface.convert import parse_size
    from megatron_telechat.merging.merge import merge

    done = merge(replace(request, max_shard_bytes=parse_size(args.max_shard_size)))
    for number, path in enumerate(done.inputs):
        loss = "" if done.losses is None else f"  loss {done.losses[number]:.6f}"
        print(f"{done.weights[number]:.9g}  {path}{loss}")
    for note in done.notes:
        print(f"note: {note}")
    values = {"master": "fp32 master weights", "weights": "weights as stored"}.get(
        done.values, f"average {done.values}"
    )
    print(f"merged {len(done.inputs)} inputs ({args.method}, {values}), {gib(done.size_bytes)} GiB: {done.path}")
    return EXIT_OK


def _request(args: argparse.Namespace, argv: Sequence[str]) -> MergeRequest:
    if not math.isfinite(args.scale):
        raise ConfigError(f"--scale {args.scale} is not finite", "command line", "--scale 1")
    if args.normalize and args.any_sum:
        raise ConfigError("--normalize and --any-sum are two answers", "command line", "one of them")
    if args.window is not None and args.steps is not None:
        raise ConfigError("--window and --steps each name the checkpoints", "command line", "one of them")
    windowed = args.window is not None or args.steps is not None
    if args.decay is not None and not windowed:
        raise ConfigError("--decay without a window", "command line", "--window N or --steps S,S,...")
    examples = None
    if args.examples is not None:
        examples = Examples(
            args.examples, args.temperature, args.tokenizer, args.template, args.loss_mask, args.device, args.precision
        )
    return MergeRequest(
        inputs=tuple(args.inputs),
        output=args.output,
        format=args.format,
        method=args.method,
        weights=args.weights,
        weights_sum="normalize" if args.normalize else "any" if args.any_sum else None,
        layer_weights=args.layer_weights,
        examples=examples,
        window=Window(args.window, args.steps, args.decay or "mean") if windowed else None,
        base=args.base,
        scale=args.scale,
        density=args.density,
        trim=args.trim,
        drop=args.drop,
        seed=args.seed,
        values=args.values,
        dtype=args.dtype,
        optimizer=args.optimizer == "average",
        allow_model_change=args.allow_model_change,
        verify=not args.no_verify,
        command=("tools/merge_checkpoints.py", *argv),
    )
