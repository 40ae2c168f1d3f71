"""The balance problem: layers with times and bytes, a pipeline schedule, a memory limit; no FLOPs here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from megatron_telechat.errors import ConfigError, Problem

MAX_OPS = 2_000_000
"""Forwards and backwards of one iteration that the simulator takes; a slip such as m = 1e9 must not eat the memory."""


@dataclass(frozen=True)
class Mode:
    """What one layer keeps for its backward.

    Attributes:
        extra_b: time that recompute adds to the backward of the layer.
        act: bytes kept for a micro-batch from the start of its forward to the end of its backward.
        ws: transient bytes; a running backward is charged the largest `ws` of its layers once.
    """

    name: str
    extra_b: float
    act: float
    ws: float


@dataclass(frozen=True)
class LayerGroup:
    """`count` identical decoder layers, adjacent in the model. `w`: resident bytes of one; modes[0] is no recompute."""

    count: int
    f: float
    b: float
    w: float
    modes: tuple[Mode, ...]


@dataclass(frozen=True)
class Block:
    """The embedding, the head or the multi-token-prediction block: a layer without modes.

    Attributes:
        ws: transient bytes, as of a `Mode`: its stage is charged the largest of its layers and blocks once.
    """

    f: float = 0.0
    b: float = 0.0
    w: float = 0.0
    act: float = 0.0
    ws: float = 0.0


@dataclass(frozen=True)
class DeviceCost:
    """Seconds of a device that follow from what it holds: a sum.

    Attributes:
        constant: on any device.
        layers: for each layer, by its group.
        embed, head: where these blocks are.
        forward, backward: shares of the time of one micro-batch through the device, in each direction.
    """

    constant: float
    layers: tuple[float, ...]
    embed: float = 0.0
    head: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class BalanceProblem:
    """Which virtual stage holds which layers, and what each recomputes, for the shortest iteration that fits.

    Times are in any one unit, bytes in any one unit. Virtual stage c of all is number c // P of device c % P. The
    embedding is on virtual stage 0, the head on the last; `mtp` (if any) goes where the solver puts it: on the last
    virtual stage of a device, not on virtual stage 0, with no decoder layer after it.

    Attributes:
        P: devices of the pipeline.
        V: virtual stages of a device.
        m: micro-batches.
        group_size: of them, those that a device takes through one virtual stage at a time, of several; unset: P.
        mem_limit: bytes of each device; `const_mem` of them are always in use.
        p2p: latency between two different devices; it occupies neither.
        min_layers: fewest layers of a virtual stage; the first and the last have their own; a stage at or after
            the MTP block may be empty.
        slow_stage: share by which any one device may run slower. Above 0 the makespan that is minimised is that of the
            worst case: each device in turn slower by this share, or none.
        rest: seconds of an iteration beside the pipeline: of each entry the largest of its costs, over all devices;
            the entries are added up. With them the makespan that is minimised is that of the whole iteration. They are
            of problems that come from a run, and not in the JSON form.
    """

    P: int
    V: int
    m: int
    mem_limit: float
    const_mem: float
    p2p: float
    groups: tuple[LayerGroup, ...]
    embed: Block = Block()
    head: Block = Block()
    mtp: Block | None = None
    min_layers: int = 1
    min_layers_first: int = 0
    min_layers_last: int = 0
    group_size: int | None = None
    slow_stage: float = 0.0
    rest: tuple[tuple[DeviceCost, ...], ...] = ()

    def __post_init__(self) -> None:
        _check_values(self)

    @property
    def schedule(self) -> tuple[int, int, int, int]:
        """What the order of the ops depends on: P, V, m, micro-batches of a group."""
        return self.P, self.V, self.m, self.group_size or self.P

    @property
    def num_stages(self) -> int:
        """Virtual stages."""
        return self.P * self.V

    @property
    def num_layers(self) -> int:
        """Decoder layers of all groups."""
        return sum(group.count for group in self.groups)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Embedding, head, and the MTP block where there is one."""
        return (self.embed, self.head) if self.mtp is None else (self.embed, self.head, self.mtp)

    @property
    def integral(self) -> bool:
        """Whether every time is an integer, so that every makespan is one too."""
        if self.rest or self.slow_stage:
            return False
        times = [self.p2p]
        for block in self.blocks:
            times += [block.f, block.b]
        for group in self.groups:
            times += [group.f, group.b, *(mode.extra_b for mode in group.modes)]
        return all(float(time).is_integer() for time in times)

    def mtp_places(self) -> tuple[int | None, ...]:
        """Virtual stages where the MTP block may be; (None,) without one; empty if there is no place for it."""
        if self.mtp is None:
            return (None,)
        return tuple(range(max((self.V - 1) * self.P, 1), self.num_stages))

    def fewest_layers(self, mtp_stage: int | None) -> tuple[int, ...]:
        """Fewest layers of each virtual stage, with the MTP block at `mtp_stage`."""
        fewest = [self.min_layers] * self.num_stages
        fewest[0], fewest[-1] = self.min_layers_first, self.min_layers_last
        if self.num_stages == 1:
            fewest[0] = max(self.min_layers_first, self.min_layers_last)
        if mtp_stage is not None:
            fewest[mtp_stage:] = [0] * (self.num_stages - mtp_stage)
        return tuple(fewest)

    def fixed_block(self, stage: int, mtp_stage: int | None) -> Block:
        """The blocks without modes (embedding, head, MTP) on a virtual stage as one: sums, and the largest `ws`."""
        found = [self.embed] * (stage == 0) + [self.head] * (stage == self.num_stages - 1)
        if self.mtp is not None and stage == mtp_stage:
            found.append(self.mtp)
        sums = (math.fsum(getattr(block, key) for block in found) for key in ("f", "b", "w", "act"))
        return Block(*sums, ws=max((block.ws for block in found), default=0.0))

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str, where: str = "balance problem") -> BalanceProblem:
        """Read a problem from parsed JSON or its text.

        Raises:
            ConfigError: naming each key that is missing, unknown or wrong, and how to fix it.
        """
        if isinstance(data, str):
            try:
                data = json.loads(data)
            except ValueError as err:
                raise ConfigError(f"not JSON: {err}", where, "the format is in docs/planner.md") from None
        return _Reader(where).problem(data)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        out: dict[str, Any] = {key: getattr(self, key) for key in ("P", "V", "m", "mem_limit", "const_mem", "p2p")}
        out["groups"] = [
            {**_values(group, ("count", "f", "b", "w")),
             "modes": [_values(mode, ("name", "extra_b", "act", "ws")) for mode in group.modes]}
            for group in self.groups
        ]  # fmt: skip
        for key in ("embed", "head", "mtp"):
            block = getattr(self, key)
            if block is not None:
                out[key] = _values(block, ("f", "b", "w", "act", "ws"))
        if self.group_size is not None:
            out["group_size"] = self.group_size
        if self.slow_stage:
            out["slow_stage"] = self.slow_stage
        return {**out, **{key: getattr(self, key) for key in _MIN_LAYERS}}


_MIN_LAYERS = ("min_layers", "min_layers_first", "min_layers_last")


def _values(item: object, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: getattr(item, key) for key in keys}


def _check_values(problem: BalanceProblem) -> None:
    """What a reader cannot see key by key; also for problems that are built in Python.

    Raises:
        ConfigError: all that is wrong, in one error.
    """
    found: list[Problem] = []

    def check(good: bool, what: str, fix: str) -> None:
        if not good:
            found.append(Problem(what, "balance problem", fix))

    for key, least in (("P", 1), ("V", 1), ("m", 1), *((key, 0) for key in _MIN_LAYERS)):
        value = getattr(problem, key)
        check(_is_whole(value) and value >= least, f"{key} = {value!r}", f"an integer, at least {least}")
    for key in ("mem_limit", "const_mem", "p2p", "slow_stage"):
        value = getattr(problem, key)
        check(_is_amount(value), f"{key} = {value!r}", "a finite number, at least 0")
    check(len(problem.groups) > 0, "groups is empty", "at least one group of layers")
    for number, group in enumerate(problem.groups):
        name = f"groups[{number}]"
        check(_is_whole(group.count) and group.count >= 1, f"{name}.count = {group.count!r}", "an integer, at least 1")
        for key in ("f", "b", "w"):
            value = getattr(group, key)
            check(_is_amount(value), f"{name}.{key} = {value!r}", "a finite number, at least 0")
        check(len(group.modes) > 0, f"{name}.modes is empty", "at least mode 0, which recomputes nothing")
        for at, mode in enumerate(group.modes):
            for key in ("extra_b", "act", "ws"):
                value = getattr(mode, key)
                check(_is_amount(value), f"{name}.modes[{at}].{key} = {value!r}", "a finite number, at least 0")
    for name in ("embed", "head", "mtp"):
        block = getattr(problem, name)
        for key in ("f", "b", "w", "act", "ws") if block is not None else ():
            value = getattr(block, key)
            check(_is_amount(value), f"{name}.{key} = {value!r}", "a finite number, at least 0")
    for costs in problem.rest:
        sizes = {len(cost.layers) for cost in costs}
        check(sizes == {len(problem.groups)}, "rest: costs without a value for each group", "one value a group")
        check(problem.mtp is None, "rest with an MTP block", "an MTP block that is part of the head")
    if not found:
        check(problem.P > 1 or problem.V == 1, f"V = {problem.V} with P = 1", "V = 1: virtual stages need a pipeline")
        size = problem.group_size
        good = size is None or _is_whole(size) and problem.P <= size <= problem.m and problem.V > 1
        fix = f"an integer from P = {problem.P} to m = {problem.m} where V > 1; or leave it out, which means P"
        check(good, f"group_size = {size!r} with V = {problem.V}", fix)
        ops = 2 * problem.P * problem.V * problem.m
        check(ops <= MAX_OPS, f"P*V*m makes {ops} operations", f"fewer micro-batches (m): at most {MAX_OPS} operations")
        check(problem.num_layers <= 100_000, f"{problem.num_layers} layers", "at most 100000 layers")
    if found:
        raise ConfigError(found)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_amount(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


class _Reader:
    """Reads the JSON of a problem; every complaint names its key."""

    def __init__(self, where: str):
        self.where = where

    def problem(self, data: Any) -> BalanceProblem:
        names = ("P", "V", "m", "mem_limit", "const_mem", "p2p", "groups", "embed", "head")
        data = self._object(data, "the problem", names, ("mtp", "group_size", "slow_stage", *_MIN_LAYERS))
        groups = data["groups"]
        if not isinstance(groups, (list, tuple)) or not groups:
            raise self._error(f"groups = {groups!r}", "a list with at least one group of layers")
        values: dict[str, Any] = {key: self._whole(data, key, "", 1) for key in ("P", "V", "m")}
        values |= {key: self._amount(data, key, "") for key in ("mem_limit", "const_mem", "p2p")}
        values["groups"] = tuple(self._group(group, f"groups[{number}]") for number, group in enumerate(groups))
        for key in ("embed", "head", "mtp"):
            if data.get(key) is not None:
                values[key] = self._block(data[key], key)
            elif key != "mtp":
                raise self._error(f"{key} = null", "an object with f, b, w and act")
        values |= {key: self._whole(data, key, "", 0) for key in _MIN_LAYERS if key in data}
        if data.get("group_size") is not None:
            values["group_size"] = self._whole(data, "group_size", "", 1)
        if "slow_stage" in data:
            values["slow_stage"] = self._amount(data, "slow_stage", "")
        try:
            return BalanceProblem(**values)
        except ConfigError as err:
            raise ConfigError([Problem(item.what, self.where, item.fix) for item in err.problems]) from None

    def _group(self, data: Any, name: str) -> LayerGroup:
        data = self._object(data, name, ("count", "f", "b", "w", "modes"))
        modes = data["modes"]
        if not isinstance(modes, (list, tuple)) or not modes:
            raise self._error(f"{name}.modes = {modes!r}", "a list with at least mode 0, which recomputes nothing")
        return LayerGroup(
            count=self._whole(data, "count", f"{name}.", 1),
            **{key: self._amount(data, key, f"{name}.") for key in ("f", "b", "w")},
            modes=tuple(self._mode(mode, f"{name}.modes[{number}]") for number, mode in enumerate(modes)),
        )

    def _mode(self, data: Any, name: str) -> Mode:
        data = self._object(data, name, ("name", "extra_b", "act", "ws"))
        if not isinstance(data["name"], str):
            raise self._error(f"{name}.name = {data['name']!r}", 'a text, such as "full"')
        return Mode(data["name"], *(self._amount(data, key, f"{name}.") for key in ("extra_b", "act", "ws")))

    def _block(self, data: Any, name: str) -> Block:
        data = self._object(data, name, ("f", "b", "w", "act"), ("ws",))
        given = (key for key in ("f", "b", "w", "act", "ws") if key in data)
        return Block(**{key: self._amount(data, key, f"{name}.") for key in given})

    def _object(
        self, data: Any, name: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> Mapping[str, Any]:
        if not isinstance(data, Mapping):
            raise self._error(f"{name} is {type(data).__name__}, not an object", f"an object with {', '.join(needed)}")
        missing = [key for key in needed if key not in data]
        if missing:
            raise self._error(f"{name} lacks {', '.join(missing)}", f"give {name} the keys {', '.join(needed)}")
        unknown = [str(key) for key in data if key not in needed + optional]
        if unknown:
            raise self._error(
                f"{name} has unknown keys: {', '.join(unknown)}", f"its keys are {', '.join(needed + optional)}"
            )
        return data

    def _whole(self, data: Mapping[str, Any], key: str, prefix: str, least: int) -> int:
        value = data[key]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if _is_whole(value) and value >= least:
            return value
        raise self._error(f"{prefix}{key} = {value!r}", f"an integer, at least {least}")

    def _amount(self, data: Mapping[str, Any], key: str, prefix: str) -> float:
        value = data[key]
        if not _is_amount(value):
            raise self._error(f"{prefix}{key} = {value!r}", "a finite number, at least 0")
        return value

    def _error(self, what: str, fix: str) -> ConfigError:
        return ConfigError(what, self.where, fix)
