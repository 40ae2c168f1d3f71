"""Runs a tool of a Megatron-LM checkout as it is: ``python preprocess_megatron.py CHECKOUT TOOL.py ARGUMENTS``.

The checkout stands before the installed megatron-core, and Python 3.11 gets the one name of 3.12 that it imports.
"""

from __future__ import annotations

import runpy
import sys
import typing


def main() -> None:
    checkout, tool = sys.argv[1:3]
    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined]
    sys.path[0] = checkout
    sys.argv = [tool, *sys.argv[3:]]
    runpy.run_path(f"{checkout}/tools/{tool}", run_name="__main__")


if __name__ == "__main__":
    main()
