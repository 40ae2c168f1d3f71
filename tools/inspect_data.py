#!/usr/bin/env python3
"""What an indexed dataset holds; documents by number, as ids and as text. See docs/data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.inspect_data import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
