"""``tools/convert_checkpoint.py``: Hugging Face folders to checkpoints and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.checkpoint.averages import KINDS
from megatron_telechat.cli.text import gib
from megatron_telechat.cli.tool import ToolParser, add_overwrite, folder, natural, run_tool
from megatron_telechat.errors import EXIT_OK
from megatron_telechat.locations import location


def build_parser() -> ToolParser:
    """The arguments of tools/convert_checkpoint.py, with its commands import and export."""
    parser = ToolParser(prog="tools/convert_checkpoint.py", description="Hugging Face folders to checkpoints and back.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ToolParser)
    into = commands.add_parser("import", help="a Hugging Face folder to a checkpoint of weights only")
    into.add_argument("--hf", type=folder, required=True, help="folder with config.json and the weights")
    into.add_argument(
        "--output",
        type=location,
        required=True,
        help="folder or URL of checkpoints; one of step 0 is made in it (for --pretrained-checkpoint)",
    )
    into.add_argument("--write-config", type=Path, metavar="FILE", help="write the shape of the model, for --config")
    add_overwrite(into)
    out = commands.add_parser("export", help="a checkpoint to a Hugging Face folder")
    out.add_argument(
        "--checkpoint",
        type=location,
        required=True,
        help="a checkpoint, or a folder or URL of them (the newest is taken)",
    )
    out.add_argument("--step", type=natural, help="the checkpoint of this step")
    out.add_argument("--output", type=folder, required=True, help="a new folder")
    out.add_argument(
        "--hf-template",
        type=folder,
        help="folder whose config.json, modelling and tokenizer files are copied unchanged; "
        "default: those that the import kept",
    )
    out.add_argument(
        "--tokenizer", type=folder, help="tokenizer file or folder to copy into the output; default: the run's own"
    )
    out.add_argument(
        "--modeling",
        choices=("auto", "ours", "keep"),
        default="auto",
        help="modelling file for transformers: ours, the one that came with the weights (keep), or ours where the "
        "export writes config.json itself (auto, default)",
    )
    out.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        default="keep",
        help="keep: as stored (default); fp32: the master weights, if there are any",
    )
    out.add_argument(
        "--values",
        choices=("weights", *KINDS),
        default="weights",
        help="the weights (default), or an average that the run has kept of them (docs/merging.md)",
    )
    out.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default 5GB)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done, 2 arguments, 3 tokenizer, 4 checkpoint or weights, 6 disk)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    from megatron_telechat.huggingface.convert import export_hf, import_hf, parse_size

    if args.command == "import":
        done = import_hf(args.hf, args.output, args.overwrite, args.write_config)
    else:
        done = export_hf(
            args.checkpoint,
            args.output,
            template=args.hf_template,
            tokenizer=args.tokenizer,
            modeling=args.modeling,
            dtype=args.dtype,
            values=args.values,
            max_shard_bytes=parse_size(args.max_shard_size),
            step=args.step,
        )
    for note in done.notes:
        print(f"note: {note}")
    print(f"{args.command}ed {done.tensors} tensors, {gib(done.size_bytes)} GiB: {done.path}")
    return EXIT_OK
