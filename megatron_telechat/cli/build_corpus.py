"""``tools/build_corpus.py``: a small English, Chinese and code corpus out of what this machine has."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from megatron_telechat.errors import EXIT_OK, ConfigError, UserError


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tools/build_corpus.py", description=__doc__.split(": ", 1)[1], allow_abbrev=False)
    parser.add_argument("--output", required=True, type=Path, help="folder for en.jsonl, zh.jsonl and code.jsonl")
    parser.add_argument("--max-mb", type=float, default=8.0, help="megabytes of text at most (default: 8)")
    args = parser.parse_args(argv)
    from megatron_telechat.data.corpus import build_corpus

    try:
        if args.max_mb <= 0:
            raise ConfigError(f"--max-mb {args.max_mb:g} leaves no room", "command line", "--max-mb 8")
        for part in build_corpus(args.output, args.max_mb):
            print(f"{part.path}: {part.documents:,} documents, {part.size_bytes / 1e6:.2f} MB")
    except UserError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    return EXIT_OK
