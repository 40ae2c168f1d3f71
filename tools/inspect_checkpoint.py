#!/usr/bin/env python3
"""What is in a checkpoint, and how two of them differ. See docs/checkpoints.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.inspect_checkpoint import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
