#!/usr/bin/env python3
"""Our forward on a Hugging Face folder against a file of reference logits. See docs/checkpoints.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.check_logits import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
