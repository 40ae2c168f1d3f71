"""Rows of the bench: all arms in turn over one link, medians of the slowest rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from turns import Arm, agree_on_errors, rates, reshape, slowest, take_turns

from context.arms import Arms, AttentionArm, Chooser
from context.peers import Gathered, ReversedRing, WholeShards, per_document_zigzag
from context.problem import largest, on_one_rank
from context.stand_in import StandIn
from context.summary import (
    ALL_GATHER,
    AUTO,
    CONTROL,
    DOCUMENT_REVERSED,
    DOCUMENT_ZIGZAG,
    KEEP,
    PARTS,
    PIECES,
    REVERSED_RING,
    SHARDS_RING,
    TORCH_GATHER,
    TORCH_ROTATE,
    TWO_D,
    ULYSSES,
    ZIGZAG_RING,
    pieces_name,
    summary,
)
from context.torchs import ALL_GATHER as TORCH_GATHERS
from context.torchs import ALL_TO_ALL as TORCH_ROTATES
from megatron_telechat.parallel.context.layout import (
    Layout,
    best_layout,
    contiguous,
    dealt,
    whole_documents,
)

CONTROL_PIECES = 2
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative, against one rank; the arms differ in the order of sums."""
CALIBRATION_ROUNDS = 3


@dataclass(frozen=True)
class Choice:
    """What `auto` came to.

    Attributes:
        pieces, keep: of the transfers.
        layout: of the row.
        reason: for a person.
    """

    pieces: int
    keep: bool
    layout: Layout
    reason: str


class Bench:
    """The rows of one run.

    Args:
        arms: of the problem.
        chooser: of what `auto` is.
        rounds: of the arms' turns.
        set_rate: reshapes the links to so many Mbit/s, None: no limit. None where nothing can be reshaped.
        say: prints a line on rank 0.
    """

    def __init__(
        self,
        arms: Arms,
        chooser: Chooser,
        rounds: int,
        set_rate: Callable[[float | None], None] | None,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.arms, self.chooser = arms, chooser
        self.rounds, self.set_rate, self.say = rounds, set_rate, say
        self.problem = arms.problem
        documents, ranks = self.problem.documents, self.problem.ranks
        self.usual = dealt(documents, ranks) if self.problem.packed else self.problem.zigzag()
        """Layout whose link/computation ratio the rows aim at."""

    # ---- before the time is taken --------------------------------------------------------------

    def verify(self) -> dict[str, float]:
        """Largest relative error of every arm against one rank, over the ranks. Collective.

        Raises:
            ArmsDisagree: on all ranks, with the arm and what differs.
        """
        problem = self.problem
        kernel = StandIn(float("inf")) if self.arms.stand_in else self.arms.kernel
        whole = on_one_rank(problem.inputs, problem.documents, kernel)
        limit, errors = TOLERANCE[problem.dtype], {}
        for name, arm in self._all(Choice(1, False, self.usual, "")).items():
            if isinstance(arm, AttentionArm):
                found = arm.result().errors(whole.of_rows(arm.positions))
                errors[name] = largest(found)
                if not errors[name] <= limit:
                    self.say(f"{name}: relative errors against one rank {found}")
        return agree_on_errors(errors, limit, "one rank")

    def wire(self) -> dict[str, float]:
        """Bytes that the messages of ours carry away from the rank that sends most, beside the formula."""

        values = []
        for keep in (False, True):
            arm = self.arms.ours(2, keep, self.usual)
            sent = arm.way.record(arm.inputs).sent_bytes
            values += [sent, self._formula(keep)]
        counted, formula, counted_keep, formula_keep = slowest(torch.tensor(values, dtype=torch.float64)).tolist()
        return {"counted": counted, "formula": formula, "counted keep": counted_keep, "formula keep": formula_keep}

    def _formula(self, keep: bool) -> int:
        """Bytes that leave this rank in a step."""
        rank, ranks = self.arms.rank, self.problem.ranks
        if self.problem.packed:
            plan = self.arms.ours(1, layout=self.usual).way.plan
            leave, arrive = (sum(getattr(step, rows) for step in plan.steps) for rows in ("rows_out", "rows_in"))
        else:
            # Zigzag: a later rank sees the first half of an earlier one's tokens, an earlier one all of a later one's.
            half = self.problem.length // ranks // 2
            leave = half * (ranks - 1 - rank) + 2 * half * rank
            arrive = half * rank + 2 * half * (ranks - 1 - rank)
        return ((1 if keep else 2) * leave + arrive) * self.problem.row_bytes()

    # ---- rows ---------------------------------------------------------------------------------

    def rates(self, ratios: Sequence[float]) -> dict[float, float]:
        """Mbit/s for which the link takes so many times as long as the computation, both alone and in one piece."""
        return rates(self._ratio, ratios)

    def _ratio(self, mbit: float) -> float:
        reshape(self.set_rate, mbit)
        times = take_turns(self._parts(self.usual), CALIBRATION_ROUNDS)
        compute, link = (median(run[2] for run in times[name]) for name in PARTS)
        self.say(f"at {mbit:.0f} Mbit/s: link {link * 1e3:.0f} ms, computation {compute * 1e3:.0f} ms")
        return link / compute

    def _parts(self, layout: Layout) -> dict[str, Arm]:
        return dict(zip(PARTS, self.arms.alone(1, layout), strict=True))

    def row(self, label: str, mbit: float | None = None, target: float | None = None) -> dict[str, Any]:
        """Time all arms on one link. Collective.

        Args:
            label: of the row.
            mbit: reshape the links to this; None: no limit.
            target: link/computation ratio that the rate was chosen for.
        """
        reshape(self.set_rate, mbit)
        choice = self._choose()
        times = take_turns(self._all(choice), self.rounds)
        auto = {"pieces": choice.pieces, "keep": choice.keep, "layout": choice.layout.name, "reason": choice.reason}
        return {"label": label, "mbit": mbit, "target_ratio": target, "auto": auto, **summary(times)}

    def _choose(self) -> Choice:
        setting, problem = self.chooser.choose(), self.problem
        layout = best_layout(problem.documents, problem.ranks, setting.costs) if problem.packed else self.usual
        return Choice(setting.pieces, setting.keep, layout, setting.message)

    def _all(self, choice: Choice) -> dict[str, Arm]:
        arms: dict[str, Arm] = {AUTO: self.arms.ours(choice.pieces, choice.keep, choice.layout)}
        arms |= self._packed(choice) if self.problem.packed else self._one_document(choice)
        if self.problem.groups % self.problem.ranks == 0:
            arms[ULYSSES] = self.arms.ours(1, heads=self.problem.ranks)
        return arms | self._parts(choice.layout)

    def _one_document(self, choice: Choice) -> dict[str, Arm]:
        made = self.arms
        arms: dict[str, Arm] = {pieces_name(pieces): made.ours(pieces) for pieces in PIECES}
        arms[KEEP] = made.ours(choice.pieces, True)
        arms[CONTROL] = made.control(CONTROL_PIECES)
        if self.problem.ranks == 4 and self.problem.groups % 2 == 0:
            arms[TWO_D] = made.ours(choice.pieces, heads=2)
        arms |= {ZIGZAG_RING: made.peer(WholeShards), REVERSED_RING: made.peer(ReversedRing)}
        arms[ALL_GATHER] = made.peer(Gathered)
        return arms | {TORCH_GATHER: made.torch(TORCH_GATHERS), TORCH_ROTATE: made.torch(TORCH_ROTATES)}

    def _packed(self, choice: Choice) -> dict[str, Arm]:
        made, documents, ranks = self.arms, self.problem.documents, self.problem.ranks
        arms: dict[str, Arm] = {}
        for layout in (
            self.problem.zigzag(),
            contiguous(self.problem.length, ranks),
            dealt(documents, ranks),
            whole_documents(documents, ranks),
        ):
            arms[f"ours {layout.name}"] = made.ours(choice.pieces, layout=layout)
        arms[CONTROL] = made.control(CONTROL_PIECES, self.usual)
        each = per_document_zigzag(documents, ranks)
        arms |= {DOCUMENT_ZIGZAG: made.peer(WholeShards, each), DOCUMENT_REVERSED: made.peer(ReversedRing, each)}
        arms[SHARDS_RING] = made.peer(WholeShards)
        arms[ALL_GATHER] = made.peer(Gathered)
        return arms
