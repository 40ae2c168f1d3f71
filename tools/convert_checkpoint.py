#!/usr/bin/env python3
"""Hugging Face folders to checkpoints and back. See docs/checkpoints.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.convert_checkpoint import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
