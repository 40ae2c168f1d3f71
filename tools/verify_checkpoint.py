#!/usr/bin/env python3
"""Read every byte of checkpoints and say what is not as it was saved. See docs/checkpoints.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.verify_checkpoint import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
