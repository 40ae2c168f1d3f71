"""``tools/preprocess_data.py``: jsonl to indexed datasets, with Megatron's flags."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_telechat.cli.tool import ToolParser, natural, positive, purpose, run_tool
from megatron_telechat.errors import EXIT_OK, EXIT_SIGNAL, ConfigError

# Flags of Megatron's tool that are not taken over, and what to do in their place.
REFUSED = {
    "--partitions": "one run reads all files; use --workers, or --shard I/N on several machines",
    "--split-sentences": "sentence splitting serves BERT; GPT-style training reads documents",
    "--keep-newlines": "newlines are always kept",
    "--lang": "it goes with --split-sentences, which serves BERT",
    "--find-optimal-num-workers": "--workers equal to the number of cores is the optimum",
    "--keep-sequential-samples": "the order of the input is always kept",
    "--vocab-file": "give --tokenizer-model tokenizer.json",
    "--merge-file": "give --tokenizer-model tokenizer.json",
}


def build_parser() -> ToolParser:
    """The arguments of tools/preprocess_data.py, which are Megatron's and our own."""
    parser = ToolParser(prog="tools/preprocess_data.py", description=purpose(__doc__))
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="jsonl (also .gz, .zst) and parquet files, globs or folders")
    add("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx")
    add("--json-keys", nargs="+", default=["text"], help="keys of the texts (default: text)")
    add(
        "--tokenizer-type",
        help="HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer, NullTokenizer; default: detected",
    )
    add("--tokenizer-model", help="file or folder of the tokenizer")
    add("--vocab-size", type=positive(int), help="ids of a NullTokenizer")
    add("--append-eod", action="store_true", help="append the end-of-document token to each document")
    add(
        "--special-tokens-in-text",
        action="store_true",
        help="turn the name of a special token in a text (<_end>) into that token, as Megatron's tool does; "
        "default: it stays text",
    )
    add(
        "--workers",
        type=positive(int),
        default=os.cpu_count() or 1,
        help="threads (default: the cores of this machine)",
    )
    add(
        "--on-error",
        choices=("fail", "skip", "quarantine"),
        default="fail",
        help="a bad line ends the run, is skipped and listed, or is skipped and also saved (default: fail)",
    )
    add(
        "--engine",
        default="auto",
        help="auto, gigatoken, tiktoken or reference (default: the fastest that gives the tokenizer's own ids)",
    )
    add(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="part I of N (from 0), for several machines; join them with tools/merge_data.py",
    )
    add("--log-interval", type=natural, default=10000, help="documents between progress lines; 0: none")
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not index.isdigit() or not count.isdigit() or not int(index) < int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part I/N with 0 <= I < N")
    return int(index), int(count)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done, 2 arguments, 3 data, 6 disk, 75 stopped by a signal)."""
    return run_tool(_run, argv)


class _Signals:
    """SIGTERM and SIGINT ask for a stop at the next block; a second one ends the process at once."""

    def __init__(self):
        self.seen = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _take(self, number: int, frame: Any) -> None:
        self.seen = True
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _run(argv: list[str]) -> int:
    for word in argv:
        flag = word.split("=")[0].replace("_", "-")
        if word.startswith("--") and flag in REFUSED:
            raise ConfigError(f"{flag} is refused", "command line", REFUSED[flag])
    args = build_parser().parse_args(argv)
    from megatron_telechat.data.text.preprocess import Interrupted, preprocess
    from megatron_telechat.data.text.tokenizer_process import TokenizerBeside
    from megatron_telechat.data.tokenizers import build_tokenizer

    begin = time.monotonic()
    with _Signals() as signals, ExitStack() as at_end:

        def beside(file: Path) -> TokenizerBeside:
            return at_end.enter_context(closing(TokenizerBeside(file, args.special_tokens_in_text)))

        fast = args.workers > 1 and args.engine in ("auto", "gigatoken") and find_spec("gigatoken")
        tokenizer = build_tokenizer(
            args.tokenizer_type,
            args.tokenizer_model,
            vocab_size=args.vocab_size,
            huggingface=beside if fast else None,
            special_tokens_in_text=args.special_tokens_in_text,
        )
        if args.special_tokens_in_text and not getattr(tokenizer, "special_tokens_in_text", False):
            print(
                f"--special-tokens-in-text changes nothing: a {type(tokenizer).__name__} never takes them from a text",
                file=sys.stderr,
            )
        try:
            report = preprocess(
                args.input,
                args.output_prefix,
                tokenizer,
                json_keys=args.json_keys,
                append_eod=args.append_eod,
                workers=args.workers,
                on_error=args.on_error,
                log_interval=args.log_interval,
                engine=args.engine,
                shard=args.shard,
                stop=lambda: signals.seen,
            )
        except Interrupted:
            print("stopped by a signal; run the same command again to continue", file=sys.stderr)
            return EXIT_SIGNAL
    _print(report, time.monotonic() - begin)
    return EXIT_OK


def _print(report: Any, elapsed: float) -> None:
    for line in report.bad:
        print(f"skipped {line}", file=sys.stderr)
    if report.skipped > len(report.bad):
        print(
            f"skipped {report.skipped - len(report.bad):,} more; the full list is next to the output", file=sys.stderr
        )
    print(f"documents: {report.documents_in:,} in = {report.documents_out:,} out + {report.skipped:,} skipped")
    for output, tokens in zip(report.outputs, report.tokens.values(), strict=True):
        print(f"{output}: {tokens:,} tokens")
    done = report.input_bytes - report.resumed_bytes
    print(f"{done / 1e6:.1f} MB in {elapsed:.1f} s ({done / 1e6 / elapsed:.1f} MB/s, engine {report.engine})")
