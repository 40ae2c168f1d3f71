#!/usr/bin/env python3
"""Join the shards of a preprocess_data run, or any datasets of one tokenizer. See docs/data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.merge_data import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
