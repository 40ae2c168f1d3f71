"""``tools/inspect_data.py``: what an indexed dataset holds; documents by number, as ids and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_telechat.cli.tool import ToolParser, natural, positive, purpose, run_tool
from megatron_telechat.errors import EXIT_OK, ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done, 2 arguments, 3 the dataset is damaged)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    parser = ToolParser(prog="tools/inspect_data.py", description=purpose(__doc__))
    add = parser.add_argument
    add("dataset", help="prefix, .idx or .bin file")
    add("--document", nargs="+", type=natural, default=[], metavar="N", help="documents to show, from 0")
    add("--tokenizer-model", help="decodes them")
    add("--tokenizer-type", help="type of --tokenizer-model; default: detected from the file")
    add("--vocab-size", type=positive(int), help="ids of a NullTokenizer")
    add("--tokens", type=positive(int), default=400, help="tokens shown of each document (default: 400)")
    args = parser.parse_args(argv)
    from megatron_telechat.data.indexed.dataset import IndexedDataset
    from megatron_telechat.data.tokenizers import build_tokenizer

    data = IndexedDataset(args.dataset)
    print(
        f"{data.prefix}: {data.documents:,} documents, {len(data):,} sequences, {data.num_tokens:,} tokens of "
        f"{data.dtype.name}"
    )
    tokenizer = None
    if args.tokenizer_model or args.tokenizer_type:
        tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, vocab_size=args.vocab_size)
    for number in args.document:
        if number >= data.documents:
            raise ConfigError(f"there is no document {number}", "--document", f"0 to {data.documents - 1}")
        _show(data, number, tokenizer, args.tokens)
    return EXIT_OK


def _show(data: Any, number: int, tokenizer: Any, most: int) -> None:
    sequences = range(int(data.document_indices[number]), int(data.document_indices[number + 1]))
    total = sum(int(data.sequence_lengths[sequence]) for sequence in sequences)
    print(f"document {number}: {len(sequences)} sequences, {total:,} tokens")
    for sequence in sequences:
        tokens = data[sequence]
        shown = tokens[:most].tolist()
        more = f" ... {tokens.size - most:,} more" if tokens.size > most else ""
        print(f"  sequence {sequence}, {tokens.size:,} tokens: {' '.join(map(str, shown))}{more}")
        if tokenizer is not None:
            print("\n".join(f"  | {line}" for line in tokenizer.decode(shown).split("\n")))
