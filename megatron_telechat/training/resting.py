"""AdamW whose state rests on the host, or in 16 bits, and is brought to the device, in fp32, for each step.

The device updates it by the kernel that a run without this takes, bucket by bucket, so the numbers are the same bit for
bit. See docs/offload.md for why not on the host's cores.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_telechat.backend import Backend
from megatron_telechat.checkpoint.optimizer_state import (
    MASTER,
    MOMENTS,
    Leaf,
    leaf_optimizers,
    leaves_of,
    steps_per_parameter,
)
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.optimizer_state import BUCKET_ELEMENTS, MASTER_BYTES, moment_bytes, offloaded_fraction
from megatron_telechat.errors import ResourceError
from megatron_telechat.parallel.agreement import gather_objects
from megatron_telechat.training.shelves import Bucket, Passage, Piece, Rows, Shelf

if TYPE_CHECKING:
    from megatron_telechat.training.chain import ModelOptimizer

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rests_elsewhere(run: RunConfig) -> bool:
    """Whether a run keeps state of its optimizer elsewhere than where it is stepped on."""
    kept = {run.optimizer.exp_avg_dtype, run.optimizer.exp_avg_sq_dtype}
    return offloaded_fraction(run) > 0 or kept != {"fp32"}


def require_host_memory(run: RunConfig, optimizer: ModelOptimizer, backend: Backend) -> None:
    """Ask every node whether it has the memory for the state of its ranks; a collective where a run offloads.

    Raises:
        ResourceError: on every rank, naming the node.
    """
    fraction = offloaded_fraction(run)
    if not fraction:
        return
    leaves = [offloaded(list(leaves_of(part)), fraction) for part in leaf_optimizers(optimizer)]
    moments = moment_bytes(run.optimizer)
    mine = sum(
        leaf.stepped.numel() * (moments + (0 if leaf.own_master else MASTER_BYTES)) for each in leaves for leaf in each
    )
    needed: Counter[str] = Counter()
    free: dict[str, int] = {}
    for node, wanted, available in gather_objects((platform.node(), mine, backend.host_bytes_free())):
        needed[node] += wanted
        free[node] = min(free.get(node, available), available)
    tight = max(needed, key=lambda node: needed[node] - free[node])
    if needed[tight] > free[tight]:
        raise ResourceError(
            f"the optimizer state of the ranks of node {tight} takes {needed[tight] / 2**30:.2f} GiB of host memory, "
            f"{free[tight] / 2**30:.2f} GiB are free",
            "--optimizer-cpu-offload",
            f"--optimizer-offload-fraction {0.9 * fraction * free[tight] / needed[tight]:.2f}, or more data-parallel "
            "ranks with --use-distributed-optimizer, which share the state",
        ).on_every_rank()


def let_state_rest(optimizer: ModelOptimizer, run: RunConfig, backend: Backend) -> None:
    """Give every optimizer of the chain a `RestingAdam`, where the run asks for one.

    Raises:
        ResourceError: no host memory.
    """
    if rests_elsewhere(run):
        for part in leaf_optimizers(optimizer):
            part.optimizer = RestingAdam(part, run, backend, BUCKET_ELEMENTS)
            # A step copies master weights to the parameters bucket by bucket; afterwards they are not there any more.
            part._copy_main_params_to_model_params = _nothing


def _nothing() -> None:
    pass


class RestingAdam:
    """In the place of the optimizer inside one of megatron-core's.

    What is stepped on keeps its shape, its attributes and its gradient on the device, so that norm, clipping and loss
    scale work as ever. Where its master weight is on the host, its values are one NaN: whoever reads them finds out.

    Args:
        part: megatron-core's optimizer, as it was built.
        run: where the state rests.
        backend: the device.
        bucket_elements: largest size of a bucket.

    Attributes:
        inner: the optimizer that computes. It also keeps the state that stays where it is stepped on.
        steps: steps taken.
        moment_types: in which the moments rest.
    """

    def __init__(self, part: Any, run: RunConfig, backend: Backend, bucket_elements: int):
        self.inner: torch.optim.Optimizer = part.optimizer
        self.steps = 0
        kept = (run.optimizer.exp_avg_dtype, run.optimizer.exp_avg_sq_dtype)
        self.moment_types: Mapping[str, torch.dtype] = {
            name: _TYPES[kind] for name, kind in zip(MOMENTS, kept, strict=True)
        }
        self._device = backend.device
        leaves = list(leaves_of(part))
        self._groups = {id(one): number for number, group in enumerate(self.param_groups) for one in group["params"]}
        away = offloaded(leaves, offloaded_fraction(run))
        narrow = {name for name, kind in self.moment_types.items() if kind != torch.float32}
        near = [leaf for leaf in leaves if id(leaf) not in {id(one) for one in away}]
        self._staying = [] if narrow else near
        self._shelves = list(self._fill(away, near if narrow else [], backend, bucket_elements))
        largest = max((bucket.stop - bucket.start for shelf in self._shelves for bucket in shelf.buckets), default=0)
        self._wide = {name: torch.empty(largest, device=self._device) for name in narrow}
        pieces = max((len(bucket.pieces) for shelf in self._shelves for bucket in shelf.buckets), default=0)
        self._counts = torch.zeros(pieces, device=self._device)
        self._passages = {
            id(shelf): Passage(
                {name: row.dtype for name, row in shelf.rows.items()},
                max(bucket.stop - bucket.start for bucket in shelf.buckets),
                run.parallel.overlap_cpu_optimizer_d2h_h2d,
                backend,
            )
            for shelf in self._shelves
            if shelf.on_host
        }

    def _fill(
        self, away: Sequence[Leaf], near: Sequence[Leaf], backend: Backend, bucket_elements: int
    ) -> Iterator[Shelf]:
        """Shelves of what goes to the host, with its master weights, and of what stays on the device."""
        moments = self.moment_types
        for own_master in (False, True):
            leaves = [leaf for leaf in away if leaf.own_master == own_master]
            types = moments if own_master else {**moments, MASTER: torch.float32}
            if leaves:
                shelf = Shelf(leaves, types, True, backend, bucket_elements)
                if not own_master:
                    _move_masters(shelf)
                yield shelf
        if near:
            yield Shelf(near, moments, False, backend, bucket_elements)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of ``inner``, with all that is stepped on."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Give ``inner`` others."""
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The state that does not rest elsewhere."""
        return self.inner.state

    def at_rest(self, stepped: torch.Tensor) -> Rows | None:
        """See `checkpoint.optimizer_state.Resting`."""
        return next((views for shelf in self._shelves if (views := shelf.views(stepped)) is not None), None)

    def settle(self) -> None:
        """Wait until the state is where it rests."""
        for passage in self._passages.values():
            passage.settle()

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it holds: shelves, places on the way, and the state that stays."""
        for shelf in self._shelves:
            yield from shelf.rows.values()
        for passage in self._passages.values():
            yield from passage.tensors()
        yield from self._wide.values()
        yield self._counts

    # ---- a step -----------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """One step of all parameters, from the gradients of what is stepped on; the parameters get their new values."""
        first = self._shelves[0] if self._shelves else None
        fetched = self._fetch_first(first) if first is not None else 0
        self._step_staying()  # while the first buckets come
        for shelf in self._shelves:
            self._step_shelf(shelf, fetched if shelf is first else self._fetch_first(shelf))
        self.steps += 1
        for group in self.param_groups:
            if not steps_per_parameter(self.inner):
                group["step"] = self.steps

    def _fetch_first(self, shelf: Shelf) -> int:
        passage = self._passages.get(id(shelf))
        if passage is None:
            return 0
        count = min(len(passage), len(shelf.buckets))
        for number in range(count):
            passage.fetch(number, shelf.rows_of(shelf.buckets[number]))
        return count

    def _step_shelf(self, shelf: Shelf, fetched: int) -> None:
        passage = self._passages.get(id(shelf))
        for number, bucket in enumerate(shelf.buckets):
            if passage is None:
                self._step_bucket(bucket, shelf.rows_of(bucket))
                continue
            self._step_bucket(bucket, passage.taken(number, bucket.stop - bucket.start))
            passage.put(number, shelf.rows_of(bucket))
            if number + fetched < len(shelf.buckets):
                passage.fetch(number + fetched, shelf.rows_of(shelf.buckets[number + fetched]))

    def _step_staying(self) -> None:
        groups: dict[int, list[torch.Tensor]] = {}
        for leaf in self._staying:
            groups.setdefault(self._groups[id(leaf.stepped)], []).append(leaf.stepped)
        self._adam(groups)
        moved = [leaf for leaf in self._staying if not leaf.own_master]
        if moved:
            weights = [_weights(leaf, 0, leaf.stepped.numel()) for leaf in moved]
            _copy_all(weights, [leaf.stepped.detach().view(-1) for leaf in moved])

    def _step_bucket(self, bucket: Bucket, rows: Rows) -> None:
        """A step of one bucket.

        Args:
            rows: its state on the device, in the types of rest; changed in place.
        """
        elements = bucket.stop - bucket.start
        wide = dict(rows) | {name: self._wide[name][:elements].copy_(rows[name]) for name in self._wide}
        counts = self._counts[: len(bucket.pieces)].fill_(self.steps).unbind()
        groups: dict[int, list[torch.Tensor]] = {}
        stepped: list[torch.Tensor] = []
        for piece, count in zip(bucket.pieces, counts, strict=True):
            tensor, state = _with_state(piece, wide)
            if steps_per_parameter(self.inner):
                state["step"] = count
            self.inner.state[tensor] = state
            groups.setdefault(self._groups[id(piece.leaf.stepped)], []).append(tensor)
            stepped.append(tensor)
        self._adam(groups)
        for tensor in stepped:
            del self.inner.state[tensor]
        for name in self._wide:
            rows[name].copy_(wide[name])  # to the nearest, ties to even
        pairs = zip(bucket.pieces, stepped, strict=True)
        moved = [(_weights(one.leaf, one.start, one.stop), new) for one, new in pairs if not one.leaf.own_master]
        if moved:
            _copy_all([old for old, _ in moved], [new for _, new in moved])

    def _adam(self, groups: Mapping[int, list[torch.Tensor]]) -> None:
        """A step of ``inner`` on these tensors alone: number of a group → tensors."""
        if not groups:
            return
        whole = self.inner.param_groups
        self.inner.param_groups = [{**whole[number], "params": tensors} for number, tensors in groups.items()]
        if hasattr(self.inner, "param_groups_master"):
            # apex pairs groups with a list of its own, which it makes anew where there is none.
            self.inner.param_groups_master = None  # pyright: ignore[reportAttributeAccessIssue] (apex's)
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = whole


def offloaded(leaves: Sequence[Leaf], fraction: float) -> list[Leaf]:
    """Parameters whose state goes to the host: from the first one on, so that their bytes come nearest to this share of
    all."""
    sizes = [(2 if leaf.own_master else 3) * leaf.stepped.numel() for leaf in leaves]
    limit, before, away = fraction * sum(sizes), 0, []
    for leaf, size in zip(leaves, sizes, strict=True):
        if before + size / 2 < limit:
            away.append(leaf)
        before += size
    return away


def _move_masters(shelf: Shelf) -> None:
    """Take the master weights to the shelf, and leave NaN where they were."""
    absent = None
    for leaf in shelf.leaves:
        views = shelf.views(leaf.stepped)
        assert views is not None, "its own shelf"
        views[MASTER].copy_(leaf.stepped.detach().view(-1))
        if absent is None:
            absent = torch.full((), float("nan"), device=leaf.stepped.device)
        leaf.stepped.data = absent.expand(leaf.stepped.shape)


def _with_state(piece: Piece, wide: Rows) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What is stepped on for a piece, with its gradient, and its moments; views on the rows of a bucket."""
    leaf, at = piece.leaf, slice(piece.at, piece.at + piece.stop - piece.start)
    gradient = leaf.stepped.grad
    assert gradient is not None, "every parameter has a gradient buffer"
    tensor = wide[MASTER][at] if MASTER in wide else leaf.stepped.detach().view(-1)[piece.start : piece.stop]
    tensor.grad = gradient.view(-1)[piece.start : piece.stop]
    return tensor, {name: wide[name][at] for name in MOMENTS}


def _weights(leaf: Leaf, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of what is stepped on, in the parameter."""
    return leaf.parameter.detach().view(-1)[leaf.start + start : leaf.start + stop]


def _copy_all(to: list[torch.Tensor], of: list[torch.Tensor]) -> None:
    """Each into its place, in a few kernels."""
    torch._foreach_copy_(to, of)  # pyright: ignore[reportPrivateImportUsage] (torch has no public name for it)
