"""What the expert block asks of whatever carries its rows between ranks.

:class:`megatron_telechat.parallel.channel.Channel` is the real link. Measurements and tests put others in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatron_telechat.parallel.transfer import Transfer


class Link(Protocol):
    """All-to-alls among the ranks that share the experts of a layer."""

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Transfer:
        """Start one all-to-all, and return before it is over.

        Every rank of the group starts the same transfers in the same order, empty ones too. Transfers are carried out
        in the order of their starts. Any number of them may be under way: the block starts one for each chunk before
        it waits for the first.

        Args:
            rows: [sum(send), ...], contiguous, in the order of the receiving ranks; unchanged until the wait.
            send: rows for each rank of the group; 0 is allowed.
            receive: rows from each rank of the group.
        """
        ...
