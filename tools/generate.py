#!/usr/bin/env python3
"""Continue a prompt with a Hugging Face folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.generate import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
