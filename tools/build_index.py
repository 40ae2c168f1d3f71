#!/usr/bin/env python3
"""Build the sample index of a run offline. See docs/data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.build_index import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
