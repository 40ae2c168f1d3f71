"""``tools/train_tokenizer.py``: a byte-level BPE tokenizer with TeleChat2's special tokens."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Optional, Sequence

from megatron_telechat.errors import EXIT_OK, UserError


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tools/train_tokenizer.py", description=__doc__.split(": ", 1)[1], allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help="jsonl files, globs or folders")
    parser.add_argument("--vocab-size", type=int, default=8192, help="ids, special tokens included (default: 8192)")
    parser.add_argument("--output", type=Path, default=Path("tokenizer.json"), help="default: tokenizer.json")
    parser.add_argument("--json-key", default="text", help="key of the text (default: text)")
    args = parser.parse_args(argv)
    from megatron_telechat.data.tokenizer_training import train_tokenizer

    begin = time.monotonic()
    try:
        size = train_tokenizer(args.input, args.vocab_size, args.output, args.json_key)
    except UserError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    print(f"{args.output}: {size:,} ids in {time.monotonic() - begin:.1f} s")
    if size < args.vocab_size:
        print(f"the text holds too few pairs for {args.vocab_size:,} ids; the model may keep vocab_size {args.vocab_size:,}")
    return EXIT_OK
