"""``tools/generate.py --chat``: a dialog in a terminal, or of the lines of standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_telechat.errors import EXIT_OK, DataError

if TYPE_CHECKING:
    from megatron_telechat.huggingface.chat import Chat
    from megatron_telechat.huggingface.generation import Place, Sampling

EXIT, CLEAR = "/exit", "/clear"
_PROMPT = "> "


def talk(
    folder: Path, template: str | None, system: str | None, max_new_tokens: int, sampling: Sampling, place: Place
) -> int:
    """Answer one question after another until the input ends; returns the exit code.

    The first rank reads and prints; all ranks take part in every answer.

    Args:
        folder: with config.json, weights and tokenizer.
        template: None: as the folder's tokenizer says.

    Raises:
        UserError: as `Chat`, `hf_model` and `template_of_folder`; input that is not UTF-8.
    """
    from megatron_telechat.huggingface.chat import Chat, template_of_folder
    from megatron_telechat.huggingface.files import CONFIG, read_json
    from megatron_telechat.huggingface.generation import end_tokens_of
    from megatron_telechat.huggingface.model import hf_model

    template = template or template_of_folder(folder)
    ends = end_tokens_of(folder, read_json(folder / CONFIG), None)
    _use_utf8()
    with hf_model(folder, device=place.device, precision=place.compute, ranks=place.ranks) as model:
        chat = Chat(model, folder, template, system, ends, sampling, max_new_tokens)
        if model.is_first_rank and sys.stdin.isatty():
            print(f"{folder.resolve().name}, template {template}. {CLEAR} begins a new dialog, {EXIT} ends.")
        while (question := _next_line(model.is_first_rank)) is not None:
            command = question.strip()
            if command == EXIT:
                break
            if command == CLEAR:
                chat.clear()
            elif command:
                _answer(chat, question, model.is_first_rank)
    return EXIT_OK


def _use_utf8() -> None:
    """Read and write UTF-8 whatever the locale says; what a terminal cannot show becomes a question mark."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace")):
        reconfigure = getattr(stream, "reconfigure", None)  # a test may have put another kind of stream there
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors=errors)


def _answer(chat: Chat, question: str, prints: bool) -> None:
    for piece in chat.answer(question):
        if prints:
            print(piece, end="", flush=True)
    if prints:
        print(flush=True)


def _next_line(reads: bool) -> str | None:
    """The next line, without its end, on all ranks; None where there is none."""
    from megatron_telechat.parallel.agreement import gather_objects, together

    line = None
    with together():
        if reads:
            line = _read_line()
    return gather_objects(line)[0]


def _read_line() -> str | None:
    try:
        if sys.stdin.isatty():
            return input(_PROMPT)
        line = sys.stdin.readline()
    except EOFError:
        print()
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"a line is not UTF-8: {error}", "standard input", "convert the input to UTF-8") from error
    return line.rstrip("\r\n") if line else None
