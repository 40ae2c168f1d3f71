"""``tools/train_tokenizer.py``: a byte-level BPE tokenizer with TeleChat2's special tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.cli.tool import ToolParser, add_overwrite, keep_what_is_there, positive, purpose, run_tool
from megatron_telechat.errors import EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    parser = ToolParser(prog="tools/train_tokenizer.py", description=purpose(__doc__))
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="jsonl files, globs or folders")
    add("--vocab-size", type=positive(int), default=8192, help="ids, special tokens included (default: 8192)")
    add("--output", type=Path, default=Path("tokenizer.json"), help="default: tokenizer.json")
    add("--json-key", default="text", help="key of the text (default: text)")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    beside = [args.output.with_name("tokenizer_config.json")] if args.output.name == "tokenizer.json" else []
    keep_what_is_there([args.output, *beside], "--output", args.overwrite)
    from megatron_telechat.data.text.tokenizer_training import train_tokenizer

    begin = time.monotonic()
    size = train_tokenizer(args.input, args.vocab_size, args.output, args.json_key)
    print(f"{args.output}: {size:,} ids in {time.monotonic() - begin:.1f} s")
    if size < args.vocab_size:
        print(
            f"the text holds too few pairs for {args.vocab_size:,} ids; the model may keep vocab_size "
            f"{args.vocab_size:,}"
        )
    return EXIT_OK
