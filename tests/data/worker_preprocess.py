"""One run of preprocess, its tokenizer with a helper, that journals often; ``--die-at N`` ends it without a word at its
N-th rename (0: never)."""

from __future__ import annotations

import os
import sys
from contextlib import closing

from megatron_telechat.data.text import readers
from megatron_telechat.data.text.preprocess import preprocess
from megatron_telechat.data.text.tokenizer_process import TokenizerBeside
from megatron_telechat.data.tokenizers import build_tokenizer


def main(source: str, prefix: str, model: str, die_at: str, on_error: str = "skip") -> None:
    readers.BLOCK_BYTES = 100_000
    left, replace = [int(die_at)], os.replace

    def dying(*arguments):
        left[0] -= 1
        if left[0] == 0:
            os._exit(137)
        return replace(*arguments)

    if left[0]:
        os.replace = dying
    with closing(build_tokenizer(None, model, huggingface=TokenizerBeside)) as tokenizer:
        preprocess(
            source.split(","),
            prefix,
            tokenizer,
            json_keys=("text", "title"),
            append_eod=True,
            workers=2,
            on_error=on_error,
            log_interval=0,
            journal_seconds=0.0,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
