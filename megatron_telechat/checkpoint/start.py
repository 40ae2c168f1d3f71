"""Where a run begins: its own newest checkpoint, the one that the command names, other weights, or none. No torch.

A command may be given again (a requeued job gives the same one each time), so ``--load`` and ``--load-step`` say where
a branch *begins*. They are obeyed once: as soon as the run's folder holds a checkpoint that says it began there, the
run resumes from its newest one. The manifests record it (``lineage.py``), not a separate file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_telechat.checkpoint.folders import committed_folders, folders_aside
from megatron_telechat.checkpoint.lineage import Began, Saved, folder_of_step, look_at, saved_in
from megatron_telechat.checkpoint.loss_scale import require_one_scale
from megatron_telechat.checkpoint.meaning import require_meaning, saved_values
from megatron_telechat.checkpoint.names import MANIFEST
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.config.run_stages import Position, RunStages
from megatron_telechat.config.schema import RunConfig, TrainingConfig
from megatron_telechat.data.order import saved_tokens
from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.locations import Location, location

_OTHER_FOLDER = "name another --run-dir (or --save) for a new branch"


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        root: folder to load from, a checkpoint or a folder of them; None: initial weights.
        step: of the checkpoint in ``root``; None: the newest.
        weights_only: a run that begins at step 0 with these weights.
        opens: the folder that the command named, where this start opens a branch; None where the run goes on.
        began: the beginnings that the run's own checkpoints name so far.
        notes: what a person should know.
    """

    root: Location | None
    step: int | None = None
    weights_only: bool = False
    opens: str | None = None
    began: tuple[Began, ...] = ()
    notes: tuple[str, ...] = ()


def find_start(run: RunConfig) -> Start:
    """Decide where a run begins; reads names and the first part of manifests only.

    Raises:
        CheckpointError: nothing is where the command says, or its folder holds a run that began elsewhere.
    """
    settings = run.checkpoint
    save = run.save_dir
    source, step = _within(run.load_dir, settings.load_step, save)
    own = saved_in(save)
    head = own[-1] if own else None
    if _same(source, save) and step is None:
        return _go_on(run, save, head)
    began = head.lineage.began if head is not None else ()
    known = _known(began, source, step, elsewhere=not _same(source, save))
    if known is not None and head is not None:
        named = f"--load-step {step}" if _same(source, save) else f"--load {settings.load}"
        note = (
            f"{named} was applied when this branch began, at step {known.step} of {known.folder}; the run continues "
            f"from its newest checkpoint"
        )
        return Start(save, began=began, notes=(note,))
    if not _same(source, save) and committed_folders(save):
        raise _other_run(save, source, head, settings.load_step)
    chosen = _chosen(source, step)
    later = [str(saved.step) for saved in own if saved.step > chosen.step]
    notes = (
        (f"steps {', '.join(later)} are set aside (renamed, not deleted) once this branch has saved",) if later else ()
    )
    return Start(source, step, opens=store_of(source).identity(source), began=began, notes=notes)


def checkpoint_of(start: Start) -> Saved | None:
    """The checkpoint that a start will most likely load; None for initial weights. A load that meets damage takes an
    older one.

    Raises CheckpointError when there is none.
    """
    return None if start.root is None else _chosen(start.root, start.step)


def position_of(saved: Saved) -> Position:
    """The place in its run that a checkpoint was saved at. Raises CheckpointError."""
    length = int(saved_values(saved.config).get("seq_length", TrainingConfig.seq_length))
    tokens = saved_tokens(saved.extra, saved.consumed_samples, length, str(saved.path))
    return Position(saved.step, saved.consumed_samples, tokens)


def require_start(stages: RunStages) -> tuple[Start, Saved | None]:
    """What a run begins with, its model held against that of the stage that saved it or goes on, its optimizer sound;
    before any process group, and in the dry run.

    Raises CheckpointError.
    """
    run = stages.stages[0].run
    start = find_start(run)
    saved = checkpoint_of(start)
    if saved is None:
        return start, None
    if not start.weights_only and not run.checkpoint.no_load_optim:
        require_one_scale(saved.optimizer, saved.path)
    position = Position() if start.weights_only else position_of(saved)
    here, before = stages.at(position).run, stages.before(position).run
    notes = require_meaning(saved.config, saved.extra, here, saved.path, before)
    return replace(start, notes=(*start.notes, *notes)), saved


def _go_on(run: RunConfig, save: Location, head: Saved | None) -> Start:
    """A command that names no beginning but, maybe, weights."""
    if committed_folders(save):
        return Start(save, began=head.lineage.began if head is not None else ())
    aside = folders_aside(save)
    if aside:
        raise CheckpointError(
            f"only checkpoints that were set aside are there: {', '.join(path.name for path in aside)}",
            str(save),
            f"rename one of them back to iter_…, or name one with --load and {_OTHER_FOLDER}",
        )
    if run.checkpoint.pretrained_checkpoint:
        return Start(location(run.checkpoint.pretrained_checkpoint), weights_only=True)
    return Start(None)


def _within(load: Location, step: int | None, save: Location) -> tuple[Location, int | None]:
    """--load of one checkpoint of the run's own folder is --load-step of that one."""
    if not store_of(load).is_file(load / MANIFEST):
        return load, step
    saved = look_at(load)
    if step not in (None, saved.step):
        raise CheckpointError(
            f"--load {load} is the checkpoint of step {saved.step}, not of --load-step {step}",
            "load_step",
            "drop --load-step, or name the folder that holds the checkpoints",
        )
    if not _same(load.parent, save):
        return load, None
    if all(not _same(own.path, load) for own in saved_in(save)):
        raise CheckpointError(
            f"{load.name} was set aside by a roll-back", str(save), f"{_OTHER_FOLDER} that begins with it"
        )
    return save, saved.step


def _same(a: Location, b: Location) -> bool:
    return store_of(a).identity(a) == store_of(b).identity(b)


def _known(began: tuple[Began, ...], source: Location, step: int | None, elsewhere: bool) -> Began | None:
    """The beginning in a branch's history that is the one a command names, if it is there.

    A roll-back in the run's own folder counts only as the last one: after --load-step 50 and --load-step 30 the 50 is
    another checkpoint. Another folder may have been moved: then its checkpoint tells.
    """
    for one in reversed(began if elsewhere else began[-1:]):
        if step not in (None, one.step):
            continue
        if one.folder == store_of(source).identity(source) or (elsewhere and _holds(source, one)):
            return one
    return None


def _holds(source: Location, one: Began) -> bool:
    try:
        named = store_of(source).is_file(source / MANIFEST)
        return look_at(source if named else folder_of_step(source, one.step)).digest == one.digest
    except CheckpointError:
        return False


def _other_run(save: Location, source: Location, head: Saved | None, step: int | None) -> CheckpointError:
    if head is None or not head.lineage.number:
        origin = "does not record where it began (an older release saved it, or it is an import)"
    elif head.lineage.began:
        last = head.lineage.began[-1]
        origin = f"began at step {last.step} of {last.folder}"
    else:
        origin = "began with initial or pretrained weights"
    newest = f" of step {head.step}" if head is not None else ""
    wanted = f"--load {source}" + (f" --load-step {step}" if step is not None else "")
    return CheckpointError(
        f"{save} holds a checkpoint{newest} of a run that {origin}; {wanted} names another starting point",
        "load",
        f"leave --load and --load-step out to continue that run, or {_OTHER_FOLDER}",
    )


def _chosen(source: Location, step: int | None) -> Saved:
    """The checkpoint of a step, or the newest. Raises CheckpointError."""
    if store_of(source).is_file(source / MANIFEST):
        return look_at(source)
    own = saved_in(source)
    if step is not None:
        for saved in own:
            if saved.step == step:
                return saved
        return look_at(folder_of_step(source, step))
    if own:
        return own[-1]
    problems: list[Problem] = []
    for _, folder in reversed(committed_folders(source)):
        try:
            look_at(folder)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    if store_of(source).is_file(source / "config.json"):
        raise CheckpointError(
            "this is a Hugging Face folder, not a checkpoint",
            str(source),
            f"tools/convert_checkpoint.py import --hf {source} --output FOLDER, and name that FOLDER",
        )
    raise CheckpointError(
        f"no complete checkpoint in {source}",
        "load",
        "point --load at the folder that holds iter_* folders, or leave it out to start a new run",
    )
