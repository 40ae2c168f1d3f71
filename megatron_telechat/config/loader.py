"""From a command line to a resolved run: preset < YAML < flags < stages, the origin of each value, all problems at
once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_telechat.config.derive import derive
from megatron_telechat.config.fields import make_run
from megatron_telechat.config.flags import Actions, read_command_line
from megatron_telechat.config.merging import Merge
from megatron_telechat.config.origins import DERIVED, Check, apply_rules
from megatron_telechat.config.rules import ALL_RULES, VALUE_RULES
from megatron_telechat.config.rules.run_stages import notes_on_stages, notes_once, problems_of_stages, problems_once
from megatron_telechat.config.run_stages import SCHEDULE_FIELDS, RunStage, RunStages
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.yaml_io import StageEntry, dump_stages
from megatron_telechat.errors import ConfigError, Problem


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration without problems.

    Attributes:
        run: every value, the derived ones filled in.
        origins: field name → ``default``, ``derived``, ``preset NAME``, ``FILE:LINE``, ``flag`` or ``torchrun``.
        actions: what the door is asked to do.
        notes: what a person should know that stops nothing.
        preset: name of the preset, if one was named.
        given: every flag without its hyphens, with hyphens inside → its values; the last of equal ones.
        stages: the stages of the run; ``run`` and ``origins`` are those of the first.
        missing: of a run that is only described, files and folders that are not on this machine.
    """

    run: RunConfig
    origins: dict[str, str]
    actions: Actions
    notes: tuple[str, ...]
    preset: str | None
    given: Mapping[str, tuple[str, ...]]
    stages: RunStages
    missing: tuple[Problem, ...] = ()


def load_run_config(
    argv: Sequence[str],
    environ: Mapping[str, str],
    planning: bool = False,
    described: bool = False,
    changes: Sequence[str] = (),
    stage: int | None = None,
) -> LoadedConfig:
    """Read flags, files and preset, merge them, fill in what follows, and hold every rule.

    Args:
        argv: arguments behind the program's name.
        environ: environment variables; torchrun's WORLD_SIZE and LOCAL_WORLD_SIZE are read.
        planning: described, and layout and recompute are still open: given ones are dropped, an even split stands in.
        described: the run is one to be told about, not one of our training: flags of Megatron-LM that our training
            refuses are noted as not modelled, models that it does not build are taken, data and checkpoints are not
            looked at.
        changes: flags of ours that a planner tries in place of what `argv` says; with a number of virtual stages
            among them, what `argv` says of virtual stages and split is dropped, which was said of other sizes.
        stage: number of the one stage that a planner asks for, of a run that has several. Plan files are not read.

    Raises:
        ConfigError: with all problems.
    """
    line, tried = read_command_line(argv), read_command_line(changes).said

    def merged_for(stages: tuple[StageEntry, ...]) -> Merge:
        merged = Merge(line, environ, planning, described or planning, tried, stages)
        merged.run()
        return merged

    base = merged_for(())
    entries = base.entries
    if described or planning:
        asked = _asked_for(entries, stage)
        base, entries = (merged_for(asked), ()) if asked else (base, ())
    merges = [merged_for(entries[:number]) for number in range(1, len(entries) + 1)] or [base]
    _one_world(merges)
    found = [_checked(merged) for merged in merges]
    checks = [check for check, _ in found]
    if len(found) == 1:
        problems, notes = found[0][1], tuple(checks[0].notes)
    else:
        titles = [entry.title for entry in entries]
        problems = problems_once([problems for _, problems in found], titles)
        notes = notes_once([check.notes for check in checks], titles)
    missing = [one for one in problems if one.missing] if line.actions.starts_nothing else []
    problems = [one for one in problems if one not in missing]
    if not problems:
        stages = _stages(base, entries, checks)
        problems = list(problems_of_stages(stages, entries))
    if problems:
        raise ConfigError(problems)
    first = checks[0]
    return LoadedConfig(
        first.run, first.origins, line.actions, (*notes, *notes_on_stages(stages)), base.preset, line.given, stages,
        tuple(missing),
    )  # fmt: skip


def _asked_for(entries: tuple[StageEntry, ...], stage: int | None) -> tuple[StageEntry, ...]:
    """The entries up to the stage that a planner asks for.

    Raises:
        ConfigError: there is no such stage, or nobody says which.
    """
    if stage is None and len(entries) > 1:
        raise ConfigError(
            f"the run has {len(entries)} stages, and a plan is for one of them", "stages", "--stage N, from 1"
        )
    if stage is not None and not 1 <= stage <= len(entries):
        there = f"has {len(entries)} stages" if entries else "has no stages"
        raise ConfigError(f"--stage {stage}: the run {there}", "command line", "--config FILE.yaml with stages:")
    return entries[: stage or 1]


def _checked(merged: Merge) -> tuple[Check, list[Problem]]:
    """One run, or one stage of it, with what follows from its values, and all that is wrong with it."""
    check = Check(
        make_run(merged.values), merged.origins, merged.unreadable, merged.line.actions.starts_nothing, merged.notes,
        meaning=merged.meaning, described=merged.described, staged=merged.staged,
    )  # fmt: skip
    problems = [*merged.problems, *apply_rules(VALUE_RULES, check)]
    derive(check)
    problems += merged.plan_problems(check)
    problems += apply_rules(ALL_RULES, check)
    return check, problems


def _one_world(merges: Sequence[Merge]) -> None:
    """Ranks that hold the model in every stage, where nobody says their number."""
    if len(merges) > 1 and all(merged.origins["world_size"] == DERIVED for merged in merges):
        world = math.lcm(*(merged.values["world_size"] for merged in merges))
        for merged in merges:
            merged.values["world_size"] = world


def _stages(base: Merge, entries: tuple[StageEntry, ...], checks: Sequence[Check]) -> RunStages:
    """The stages of a run that have no problems by themselves."""
    if len(entries) < 2:
        return RunStages.of(checks[0].run, checks[0].origins)
    found = []
    for entry, check in zip(entries, checks, strict=True):
        own = entry.number == 1 or any(one.name in SCHEDULE_FIELDS for one in entry.said)
        found.append(RunStage(entry.number, entry.start, check.run, check.origins, own))
    return RunStages(tuple(found), dump_stages(base.values, entries))
