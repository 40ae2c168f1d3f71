#!/usr/bin/env python3
"""What this machine has, what each thing enables, and the line that fixes what is missing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.doctor import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
