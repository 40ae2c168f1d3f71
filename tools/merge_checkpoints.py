#!/usr/bin/env python3
"""Merge checkpoints and Hugging Face folders into one set of weights. See docs/merging.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.merge_checkpoints import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
