#!/usr/bin/env python3
"""Draw loss, gradient norm, throughput and expert load of one or more runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.plot_run import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
