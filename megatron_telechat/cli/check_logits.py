"""``tools/check_logits.py``: our forward on a Hugging Face folder against a file of reference logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.cli.tool import ToolParser, positive, run_tool
from megatron_telechat.device_kinds import DEVICE_CHOICES, HOST
from megatron_telechat.errors import EXIT_CHECKPOINT, EXIT_OK


def build_parser() -> ToolParser:
    """The arguments of tools/check_logits.py."""
    parser = ToolParser(
        prog="tools/check_logits.py",
        description="Compare our forward pass on a Hugging Face folder with reference logits; exit 0 within the "
        "tolerance, else 4.",
    )
    parser.add_argument("--hf", type=Path, required=True, help="folder with config.json and the weights")
    parser.add_argument(
        "--golden",
        type=Path,
        required=True,
        help="safetensors file with pairs input_ids_S [batch, S] and logits_S [batch, S, vocab]",
    )
    parser.add_argument(
        "--rotary-table-dtype",
        choices=("fp16", "fp32"),
        help="fp16: round the rotary tables as the published modelling file does (default: as config.json says, which "
        "is fp32 where it says nothing)",
    )
    parser.add_argument(
        "--tolerance",
        type=positive(float),
        help="largest allowed error of a logit (default 1e-4 with fp16 tables, 5e-2 with fp32 ones)",
    )
    parser.add_argument("--device", choices=DEVICE_CHOICES, default=HOST, help="default cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 within the tolerance, 2 arguments, 4 above it or unusable files)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    from megatron_telechat.huggingface.golden import TOLERANCE, compare, read_golden
    from megatron_telechat.huggingface.model import hf_model
    from megatron_telechat.huggingface.weights import HfWeights

    described = HfWeights(args.hf).model
    tables = args.rotary_table_dtype or described.rotary_table_dtype
    tolerance = args.tolerance or TOLERANCE[tables]
    pairs = read_golden(args.golden, described.vocab_size)
    with hf_model(args.hf, device=args.device, rotary_table_dtype=tables, seq_length=max(pairs)) as model:
        results = compare(model, pairs)
    for found in results:
        verdict = "ok" if found.within(tolerance) else "ABOVE"
        print(
            f"{found.name}  {list(found.shape)}  largest error {found.error:.3e}  "
            f"(largest logit {found.largest:.3g})  {verdict}"
        )
    passed = all(found.within(tolerance) for found in results)
    print(f"{'PASS' if passed else 'FAIL'}: tolerance {tolerance:g}, {tables} rotary tables")
    return EXIT_OK if passed else EXIT_CHECKPOINT
