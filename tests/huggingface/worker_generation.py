"""Generation over two tensor-parallel ranks."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

from tests.harness import Cases

cases = Cases()
PROMPT, NEW = list(range(4, 29)), 45
"""25 tokens, and new ones past the training length of 32 and past 64, where theta changes again."""
WORK = Path(os.environ.get("GENERATION_FOLDERS", "."))


def tokens(name: str, cached: bool, temperature: float = 0.0) -> list[int]:
    from megatron_telechat.huggingface.generation import Sampling, new_tokens
    from megatron_telechat.huggingface.model import hf_model
    from megatron_telechat.model.key_value_cache import KeyValueCache

    with hf_model(WORK / name, ranks=2) as model:
        cache = KeyValueCache() if cached else None
        return list(new_tokens(model, PROMPT, NEW, frozenset(), Sampling(temperature, seed=5), cache))


for _name in ("dense", "moe", "odd moe", "mixtral"):
    cases.add(_name, lambda name=_name: [tokens(name, True), tokens(name, False)])


@cases.case
def sampled() -> list[int]:
    return tokens("dense", True, 1.5)


@cases.case
def indivisible() -> str:
    from megatron_telechat.errors import ConfigError
    from megatron_telechat.huggingface.model import hf_model

    try:
        with hf_model(WORK / "one group", ranks=2):
            return "built"
    except ConfigError as error:
        return str(error)


@cases.case
def chat() -> list[Any]:
    """The tool itself; the first rank has the input."""
    from megatron_telechat.cli.generate import main

    first = os.environ["RANK"] == "0"
    sys.stdin = io.StringIO("hi\n\nhow\n/clear\nhi\n/exit\nnever\n" if first else "")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--hf", str(WORK / "chat"), "--chat", "--max-new-tokens", "9", "--device", "cpu"])
    return [code, out.getvalue(), err.getvalue()]


@cases.case
def chat_with_input_that_is_no_text() -> list[Any]:
    """What the first rank cannot read ends all ranks."""
    from megatron_telechat.cli.generate import main

    sys.stdin = io.TextIOWrapper(io.BytesIO(b"hi\n\xff\xfe\n"), encoding="utf-8", errors="strict")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--hf", str(WORK / "chat"), "--chat", "--max-new-tokens", "2", "--device", "cpu"])
    return [code, err.getvalue()]


def keep_the_connection() -> None:
    """Every case takes its model down; the ranks stay connected, since they meet at one store that remembers the
    first time."""
    from megatron_telechat.huggingface import model
    from megatron_telechat.parallel.state import destroy

    model.destroy = lambda: destroy(keep_world=True)


if __name__ == "__main__":
    keep_the_connection()
    cases.main()
