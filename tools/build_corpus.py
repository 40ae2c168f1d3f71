#!/usr/bin/env python3
"""A small English, Chinese and code corpus out of what this machine has. See docs/data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.build_corpus import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
