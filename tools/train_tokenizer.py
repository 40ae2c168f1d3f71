#!/usr/bin/env python3
"""A byte-level BPE tokenizer with TeleChat2's special tokens. See docs/data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.train_tokenizer import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
