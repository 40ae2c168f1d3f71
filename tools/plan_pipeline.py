#!/usr/bin/env python3
"""The fastest pipeline layout that fits the memory: layers and recompute of every stage, with a proof."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.plan_pipeline import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
