#!/usr/bin/env python3
"""Compare the experts that two runs chose, token by token. See docs/moe.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.compare_routing import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
