"""``tools/preprocess_data.py``: jsonl to indexed datasets, with Megatron's flags."""

from __future__ import annotations

import os
import sys
import time
from typing import Optional, Sequence

from megatron_telechat.cli.tool import ToolParser, natural, positive, run_tool
from megatron_telechat.errors import EXIT_OK, ConfigError

# Flags of Megatron's tool that are not taken over, and what to do in their place.
REFUSED = {
    "--partitions": "one run reads all files; give --workers and several --input",
    "--split-sentences": "sentence splitting serves BERT; GPT-style training reads documents",
    "--keep-newlines": "newlines are always kept",
    "--lang": "it goes with --split-sentences, which serves BERT",
    "--find-optimal-num-workers": "--workers equal to the number of cores is the optimum",
    "--keep-sequential-samples": "the order of the input is always kept",
    "--vocab-file": "give --tokenizer-model tokenizer.json",
    "--merge-file": "give --tokenizer-model tokenizer.json",
}


def build_parser() -> ToolParser:
    parser = ToolParser(prog="tools/preprocess_data.py", description=__doc__.split(": ", 1)[1])
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="jsonl files (also .gz), globs or folders")
    add("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx")
    add("--json-keys", nargs="+", default=["text"], help="keys of the texts (default: text)")
    add("--tokenizer-type", help="HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer, NullTokenizer; "
        "unset: told by the file")
    add("--tokenizer-model", help="file or folder of the tokenizer")
    add("--vocab-size", type=positive(int), help="ids of a NullTokenizer")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--workers", type=positive(int), default=os.cpu_count() or 1, help="threads (default: the cores of this machine)")
    add("--on-error", choices=("fail", "skip"), default="fail", help="what a bad line does (default: fail)")
    add("--log-interval", type=natural, default=10000, help="documents between progress lines; 0: none")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tool; returns the exit code (0 done, 2 arguments, 3 data, 6 disk)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    for word in argv:
        flag = word.split("=")[0].replace("_", "-")
        if word.startswith("--") and flag in REFUSED:
            raise ConfigError(f"{flag} is refused", "command line", REFUSED[flag])
    args = build_parser().parse_args(argv)
    from megatron_telechat.data.preprocess import preprocess
    from megatron_telechat.data.tokenizers import build_tokenizer

    begin = time.monotonic()
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, vocab_size=args.vocab_size)
    report = preprocess(
        args.input,
        args.output_prefix,
        tokenizer,
        json_keys=args.json_keys,
        append_eod=args.append_eod,
        workers=args.workers,
        on_error=args.on_error,
        log_interval=args.log_interval,
    )
    elapsed = time.monotonic() - begin
    for line in report.bad:
        print(f"skipped {line}", file=sys.stderr)
    if report.skipped > len(report.bad):
        print(f"skipped {report.skipped - len(report.bad):,} more", file=sys.stderr)
    print(f"documents: {report.documents_in:,} in = {report.documents_out:,} out + {report.skipped:,} skipped")
    for key, tokens in report.tokens.items():
        print(f"{args.output_prefix}_{key}_document: {tokens:,} tokens")
    print(f"{report.input_bytes / 1e6:.1f} MB in {elapsed:.1f} s ({report.input_bytes / 1e6 / elapsed:.1f} MB/s)")
    return EXIT_OK
