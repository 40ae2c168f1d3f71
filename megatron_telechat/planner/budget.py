"""How much a search may do: until a time, or a number of linear programs, which is the same on every machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field


@dataclass
class Budget:
    """Of one search.

    Attributes:
        deadline: of `time.perf_counter`.
        most: linear programs it may solve; below 0: none.
        work: linear programs it has solved.
    """

    deadline: float
    most: float = math.inf
    work: int = 0
    started: float = field(default_factory=time.perf_counter)

    def left(self, share: float = 1.0) -> float:
        """Seconds of this share of it that are left; below 0 where more is used up."""
        return self.started + share * (self.deadline - self.started) - time.perf_counter()

    def over(self, share: float = 1.0) -> bool:
        """Whether this share of it is used up."""
        return self.work > share * self.most or self.left(share) < 0
