"""``tools/verify_data.py``: check indexed datasets: headers, every entry, checksums, token ids."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_telechat.cli.tool import ToolParser, positive, purpose, run_tool
from megatron_telechat.errors import EXIT_OK, DataError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 all whole, 2 arguments, 3 something is damaged)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    parser = ToolParser(prog="tools/verify_data.py", description=purpose(__doc__))
    add = parser.add_argument
    add("datasets", nargs="+", metavar="DATASET", help="prefixes, .idx or .bin files, globs or folders")
    add("--vocab-size", type=positive(int), help="each token id must be below this")
    add("--tokenizer-model", help="each token id must be one of this tokenizer")
    add("--tokenizer-type", help="type of --tokenizer-model; default: detected from the file")
    add("--write-checksums", action="store_true", help="write DATASET.sums for whole datasets that have none")
    args = parser.parse_args(argv)
    from megatron_telechat.data.indexed.verify import add_checksums, find_datasets, verify_dataset
    from megatron_telechat.data.tokenizers import build_tokenizer

    vocab_size = args.vocab_size
    if args.tokenizer_model:
        vocab_size = build_tokenizer(args.tokenizer_type, args.tokenizer_model).vocab_size
    problems = []
    for prefix in find_datasets(args.datasets):
        verdict = verify_dataset(prefix, vocab_size)
        problems.extend(verdict.problems)
        if verdict.problems:
            print(f"{prefix}: DAMAGED", file=sys.stderr)
            continue
        if args.write_checksums and not verdict.checksums:
            add_checksums(prefix)
        known = (
            "checksums right"
            if verdict.checksums
            else "checksums written"
            if args.write_checksums
            else "no checksums: tokens not checked"
        )
        print(
            f"{prefix}: {verdict.documents:,} documents, {verdict.sequences:,} sequences, {verdict.tokens:,} tokens, "
            f"{known}"
        )
    if problems:
        raise DataError(problems)
    return EXIT_OK
