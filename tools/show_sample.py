#!/usr/bin/env python3
"""Show one sample of a run, token by token, with what is learned of it. See docs/finetuning.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.show_sample import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
