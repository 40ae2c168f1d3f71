"""A virtual rank whose program was broken on purpose, in the way that the environment variable BREAK names."""

from __future__ import annotations

import os
import sys
from typing import Any

from megatron_telechat.virtual import rank


def cpu_tensor() -> None:
    """A layer adds a tensor that somebody forgot to put on the device."""
    import torch

    from megatron_telechat.model.layer import DecoderLayer

    whole = DecoderLayer._forward

    def forward(self: Any, hidden: torch.Tensor, **rest: Any) -> torch.Tensor:
        return whole(self, hidden, **rest) + torch.zeros(hidden.shape[-1], device="cpu")

    DecoderLayer._forward = forward


def misaligned() -> None:
    """A grouped product whose rows do not begin at multiples of 16 bytes."""
    import torch.nn.functional as F

    whole = F.grouped_mm
    F.grouped_mm = lambda a, b, **rest: whole(a[:, :-1].contiguous(), b[:, :-1], **rest)


def dropped() -> None:
    """One rank leaves out a collective of its tensor group."""
    from megatron_telechat.moe import router

    class Quiet:
        def __getattr__(self, name: str) -> Any:
            if name == "all_reduce" and os.environ["RANK"] == "1":
                return lambda *_, **__: None
            return getattr(whole, name)

    whole, router.dist = router.dist, Quiet()  # pyright: ignore[reportAttributeAccessIssue]


def waiting() -> None:
    """A layer asks for a number of the device."""
    from megatron_telechat.model.layer import DecoderLayer

    whole = DecoderLayer._forward

    def forward(self: Any, hidden: Any, **rest: Any) -> Any:
        out = whole(self, hidden, **rest)
        out.sum().item()
        return out

    DecoderLayer._forward = forward


if __name__ == "__main__":
    load = rank._load_program

    def load_and_break(*arguments: Any) -> Any:
        loaded = load(*arguments)
        globals()[os.environ["BREAK"]]()
        return loaded

    rank._load_program = load_and_break
    sys.exit(rank.main())
