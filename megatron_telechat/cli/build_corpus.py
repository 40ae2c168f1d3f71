"""``tools/build_corpus.py``: a small English, Chinese and code corpus out of what this machine has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.cli.tool import ToolParser, add_overwrite, keep_what_is_there, positive, purpose, run_tool
from megatron_telechat.errors import EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    parser = ToolParser(prog="tools/build_corpus.py", description=purpose(__doc__))
    parser.add_argument("--output", required=True, type=Path, help="folder for en.jsonl, zh.jsonl and code.jsonl")
    parser.add_argument("--max-mb", type=positive(float), default=8.0, help="megabytes of text at most (default: 8)")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    from megatron_telechat.data.text.sample_corpus import SHARES, build_corpus

    keep_what_is_there([args.output / f"{name}.jsonl" for name in SHARES], "--output", args.overwrite)

    for part in build_corpus(args.output, args.max_mb):
        print(f"{part.path}: {part.documents:,} documents, {part.size_bytes / 1e6:.2f} MB")
    return EXIT_OK
