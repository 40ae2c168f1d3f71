"""``tools/show_sample.py``: one sample of a run, token by token, with what is learned of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_telechat.cli.build_index import described_run
from megatron_telechat.cli.tool import ToolParser, natural, purpose, run_tool
from megatron_telechat.errors import EXIT_OK, ConfigError

EPILOG = "All other flags are those of the training command; the sample is the one that the run with them would read."
# Two shades each, so that neighbouring tokens can be told apart.
_LEARNED = ("\033[97;48;5;28m", "\033[97;48;5;34m")
_CONTEXT = ("\033[38;5;250;48;5;236m", "\033[38;5;250;48;5;239m")
_BORDER = "\033[1;36m"
_END = "\033[0m"


@dataclass(frozen=True)
class ShownToken:
    """One token of a sample.

    Attributes:
        learned: whether it is learned where it is the label.
        position: its position id; None for the last one, which is a label only.
        piece: name of the document or dialog that begins with it, if one does.
    """

    token: int
    text: str
    learned: bool
    position: int | None
    piece: str | None


def build_parser() -> ToolParser:
    """The arguments of tools/show_sample.py; all others belong to the training."""
    parser = ToolParser(prog="tools/show_sample.py", description=purpose(__doc__).capitalize(), epilog=EPILOG)
    parser.add_argument("--sample", type=natural, default=0, help="number of the sample, from 0 (default 0)")
    parser.add_argument("--of", choices=("train", "valid", "test"), default="train", help="which split (default train)")
    parser.add_argument(
        "--view", choices=("text", "table"), help="running text, or one line a token (default: text on a terminal)"
    )
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: on a terminal")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done, 2 flags, 3 data, 6 the cache cannot be written)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    args, rest = build_parser().parse_known_args(argv)
    loaded = described_run(rest)
    run = loaded.run
    if run.data.tokenizer_model is None and run.data.tokenizer_type is None:
        raise ConfigError(
            "the tokens are shown as text, for which a tokenizer is needed", "tokenizer_model", "--tokenizer-model PATH"
        )
    from megatron_telechat.data import build_datasets, build_tokenizer
    from megatron_telechat.training.length import counted_for_tool
    from megatron_telechat.training.progress import saved_progress

    stage, progress = saved_progress(counted_for_tool(loaded.stages))
    run = stage.run
    dataset = getattr(build_datasets(run, _Alone(), progress), args.of)
    if dataset is None:
        raise ConfigError(f"the run has no {args.of} data", "command line", "--eval-interval N and a share in --split")
    if args.sample >= len(dataset):
        raise ConfigError(
            f"--sample {args.sample}: the run reads {len(dataset):,} samples",
            "command line",
            f"a number below {len(dataset)}, or more --train-iters",
        )
    tokenizer = build_tokenizer(run.data.tokenizer_type, run.data.tokenizer_model, vocab_size=run.model.vocab_size)
    tokens = list(shown_tokens(dataset, args.sample, tokenizer))
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    text = args.view == "text" or (args.view is None and sys.stdout.isatty())
    print(headline(dataset, args.sample, args.of, tokens))
    print(as_text(tokens, color) if text else as_table(tokens, color))
    return EXIT_OK


@dataclass(frozen=True)
class _Alone:
    """One process, as ``build_datasets`` asks for it."""

    rank: int = 0
    dp_rank: int = 0
    dp_size: int = 1


def shown_tokens(dataset, sample: int, tokenizer) -> Iterator[ShownToken]:
    """The seq_length + 1 tokens of a sample: the inputs, and the last label."""
    from megatron_telechat.data.chat.template import token_texts

    read = dataset[sample]
    tokens = [*read["tokens"].tolist(), int(read["labels"][-1])]
    learned = [False, *(mask > 0 for mask in read["loss_mask"].tolist())]
    positions = [*read["position_ids"].tolist(), None]
    pieces = dict(dataset.source.pieces(sample))
    for number, found in enumerate(zip(tokens, token_texts(tokenizer, tokens), learned, positions, strict=True)):
        yield ShownToken(*found, pieces.get(number))


def headline(dataset, sample: int, split: str, tokens: Sequence[ShownToken]) -> str:
    """Number, counts, and what the attention sees."""
    learned = sum(token.learned for token in tokens)
    pieces = [token.piece for token in tokens if token.piece is not None]
    apart = "each attends to itself only" if dataset.reset_attention_mask else "each attends to those before it too"
    return (
        f"sample {sample} of {split}: {len(tokens) - 1} tokens, {learned} learned, "
        f"{sum(piece != 'padding' for piece in pieces)} documents or dialogs, {apart}"
    )


def as_text(tokens: Sequence[ShownToken], color: bool) -> str:
    """Running text. In colour learned tokens lie on green, the others on grey; without, learned ones stand between [[
    ]]."""
    out: list[str] = []
    inside = padding = False
    for number, token in enumerate(tokens):
        if token.piece is not None:
            out.append(("]]" if inside else "") + _rule(token, number, color))
            inside, padding = False, token.piece == "padding"
            if padding:
                out.append(f"{len(tokens) - number} x {token.text}")
        if padding:
            continue
        if color:
            shade = (_LEARNED if token.learned else _CONTEXT)[number % 2]
            out.append(shade + token.text.replace("\n", f"⏎{_END}\n{shade}") + _END)
            continue
        if token.learned != inside:
            out.append("[[" if token.learned else "]]")
            inside = token.learned
        out.append(token.text)
    return "".join(out) + ("]]" if inside else "")


def _rule(token: ShownToken, number: int, color: bool) -> str:
    line = f"── {token.piece} " + "─" * 8
    return ("\n" if number else "") + (f"{_BORDER}{line}{_END}" if color else line) + "\n"


def as_table(tokens: Sequence[ShownToken], color: bool) -> str:
    """One line a token: place, position id, id, whether it is learned, text."""
    lines = ["place position     id learned text"]
    for number, token in enumerate(tokens):
        if token.piece is not None:
            lines.append(_rule(token, 0, color).rstrip("\n"))
        position = "-" if token.position is None else str(token.position)
        line = f"{number:5d} {position:>8} {token.token:6d} {'yes' if token.learned else '  .'}     {token.text!r}"
        lines.append(f"{_LEARNED[0]}{line}{_END}" if color and token.learned else line)
        if token.piece == "padding":
            lines.append(f"      … {len(tokens) - number - 1} more of padding")
            break
    return "\n".join(lines)
