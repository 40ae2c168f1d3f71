"""Pretrain a TeleChat2 model; --help lists the flags.

torchrun --nproc-per-node 4 pretrain/pretrain_telechat2.py --preset telechat2-tiny-moe --tensor-model-parallel-size 2
...
"""

import sys
from pathlib import Path

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_telechat.cli.pretrain import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
