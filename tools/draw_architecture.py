#!/usr/bin/env python3
"""Draw the rooms of the package and the arrows between them, from the imports, as docs/images/architecture.svg."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_telechat.cli.draw_architecture import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
