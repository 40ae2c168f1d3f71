"""The evaluations of a run: the weights and each average of them on the same data, in one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_telechat.backend import Backend
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.loader import BatchIterator
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.averages import Averages
from megatron_telechat.training.console import preference_parts
from megatron_telechat.training.param_gather import gathered_parameters
from megatron_telechat.training.step import Evaluation, close_iterators, evaluate

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


@dataclass(frozen=True)
class Losses:
    """Mean cross entropy in nats (or mean loss of pairs), the same on every rank; None: the loss mask leaves no token.

    Attributes:
        weights: of the weights.
        averages: of each average, by kind.
        details: what else the objective reports of the weights.
    """

    weights: float | None
    averages: Mapping[str, float | None]
    details: Mapping[str, float] = field(default_factory=dict)

    def record(self, step: int, key: str) -> dict[str, Any]:
        """For metrics.jsonl: ``key`` for the weights, ``key_ema`` and so on for the averages; details begin as ``key``
        does."""
        of = key.removesuffix("loss")
        details = {f"{of}{name}": value for name, value in self.details.items()}
        return {
            "step": step,
            key: self.weights,
            **details,
            **{f"{key}_{kind}": loss for kind, loss in self.averages.items()},
        }

    def lines(self, step: int, name: str) -> str:
        """For the console.

        Args:
            name: of the data.
        """
        nothing = f"none: the loss mask leaves no token of the {name} data"
        named = {"": self.weights, **{f" ({kind})": loss for kind, loss in self.averages.items()}}
        shown = ((of, nothing if loss is None else f"{loss:.4f}") for of, loss in named.items())
        lines = [f"step {step}  {name} loss{of} {text}" for of, text in shown]
        return "\n".join(["  ".join([lines[0], *preference_parts(self.details)]), *lines[1:]])


class Evaluations:
    """Evaluates what a rank trains.

    Args:
        averages: evaluated in place of the weights, one after another.
        iterators: micro-batches of a dataset from its first sample on, for each virtual stage.
        settled: waits until the weights may change: no save copies them any more.
        stop: whether some rank was asked to stop; a collective.
    """

    def __init__(
        self,
        virtual_stages: Sequence[DistributedDataParallel],
        averages: Averages,
        iterators: Callable[[Any], list[BatchIterator | None]],
        run: RunConfig,
        state: ParallelState,
        backend: Backend,
        settled: Callable[[], None],
        stop: Callable[[], bool],
    ):
        self._virtual_stages, self._averages, self._iterators = virtual_stages, averages, iterators
        self._run, self._state, self._backend = run, state, backend
        self._settled, self._stop = settled, stop

    def losses(self, dataset: Any) -> Losses | None:
        """The loss over ``eval_iters`` batches; None: a stop request cut an evaluation off. Collective.

        Raises:
            NumericsError: on every rank, where a loss is not finite.
        """
        averages: dict[str, float | None] = {}
        with gathered_parameters(self._virtual_stages):
            weights = self._evaluate(dataset)
            for kind in self._averages.ready if weights.complete else ():
                self._settled()
                with self._averages.in_place_of_weights(kind, self._virtual_stages):
                    average = self._evaluate(dataset)
                if not average.complete:
                    return None
                averages[kind] = average.loss
        return Losses(weights.loss, averages, weights.details) if weights.complete else None

    def _evaluate(self, dataset: Any) -> Evaluation:
        """Of the parameters as they are."""
        iterators = self._iterators(dataset)
        batches, where = self._run.evaluation.eval_iters, (self._run, self._state, self._backend)
        evaluation = evaluate(self._virtual_stages, iterators, batches, *where, self._stop)
        close_iterators(iterators)
        return evaluation
