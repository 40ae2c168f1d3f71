"""The checkpoints that lie in a folder, by the names and the store alone. No torch."""

from __future__ import annotations

from megatron_telechat.checkpoint.names import is_replaced, step_of
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.locations import Location


def committed_folders(root: Location) -> list[tuple[int, Location]]:
    """(step, folder) of every committed checkpoint under ``root``, by step; those set aside are not among them.

    There are two of a step where a save was killed right behind the commit of the second one. One that was to make
    room for another of its step is left out as soon as that one is there.
    """
    found = [(step, path) for path in store_of(root).folders(root) if (step := step_of(path)) is not None]
    settled = {step for step, path in found if not is_replaced(path)}
    return sorted(
        ((step, path) for step, path in found if not (is_replaced(path) and step in settled)),
        key=lambda one: (one[0], one[1].name),
    )


def folders_aside(root: Location) -> list[Location]:
    """Folders that roll-backs have set aside, by name."""
    return store_of(root).aside(root)
