#!/usr/bin/env python3
"""Start the ranks of a training on one node or many, and start them again when one is lost. See docs/launching.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.launch import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
