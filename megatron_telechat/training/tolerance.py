"""Errors of what a run writes beside its checkpoints: one warning each, and the training goes on."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from megatron_telechat.errors import UserError

_warned: set[str] = set()


def warn_once(name: str, text: str) -> None:
    """A warning on stderr, the first time that something of this name fails in this process."""
    if name in _warned:
        return
    _warned.add(name)
    # A full disk under the output itself, or a closed terminal.
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: rank {os.environ.get('RANK', '0')}: {text}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """An error in a few words."""
    text = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if not isinstance(error, OSError) else str(text)


@contextlib.contextmanager
def tolerated(name: str, *errors: type[Exception]) -> Iterator[None]:
    """Around the writing of something the training does not need.

    Args:
        name: of the file, for the warning.
        errors: that are taken so; OSError where none are named. Never a `UserError`, which says what to do.
    """
    taken = errors or (OSError,)
    try:
        yield
    except UserError:
        raise
    except taken as error:
        warn_once(name, f"{name} could not be written ({reason(error)}); the training goes on without it")
