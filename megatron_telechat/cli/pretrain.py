"""The door of a training run: read the configuration, then describe the run or start it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import megatron_telechat
from megatron_telechat.config import LoadedConfig, load_run_config
from megatron_telechat.config.flags import Actions, read_command_line
from megatron_telechat.config.show import config_table, config_yaml, help_text, list_presets
from megatron_telechat.errors import EXIT_BUG, EXIT_OK, EXIT_SIGNAL, ConfigError, StopAtStart, UserError
from megatron_telechat.parallel.cluster import rank_variables, require_started_ranks
from megatron_telechat.tensors.frozen import frozen_keys


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pretraining command and return its exit code.

    Args:
        argv: arguments behind the program's name; unset: those of this process.

    A user's mistake is printed on stderr, by rank 0 alone where there are several ranks; a traceback means a bug of
    ours.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        os.environ.update(rank_variables(os.environ))
        return _run(arguments, os.environ)
    except UserError as error:
        _report(error, os.environ)
        return _leave(error.exit_code)
    except StopAtStart:
        _say_stopped("stopped before the first step: nothing was trained or saved; run the same command to start again")
        return _leave(EXIT_SIGNAL)
    except KeyboardInterrupt:
        _say_stopped("interrupted while no training was under way")
        return _leave(EXIT_SIGNAL)
    except Exception:
        traceback.print_exc()
        _tell_torchrun(traceback.format_exc(), os.environ)
        return _leave(EXIT_BUG)


def _report(error: UserError, environ: Mapping[str, str]) -> None:
    """Print the error once: rank 0 for all where they all have it, else the rank that met it."""
    _tell_torchrun(error.render(), environ)
    if _speaks(environ):
        print(error.render(), file=sys.stderr)
    elif not error.agreed and "torch.distributed" in sys.modules:
        print(f"rank {environ['RANK']}: {error.render()}", file=sys.stderr)


def _tell_torchrun(text: str, environ: Mapping[str, str]) -> None:
    """Write the error where torchrun looks for the cause of a failure: its last lines then hold it.

    The form is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
    """
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):  # the error was said already; a full disk must not hide it
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}), encoding="utf-8")


def _say_stopped(text: str) -> None:
    if _speaks(os.environ):
        print(text, file=sys.stderr)


def _leave(code: int) -> int:
    """The code; but among several ranks the process ends here, because an orderly end would wait in the
    destructors of the process groups for a rank that may be gone."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _load(argv: list[str], environ: Mapping[str, str]) -> LoadedConfig:
    """The configuration, its notes printed; those about flags also where it has problems, so that each flag has its
    answer."""
    try:
        loaded = load_run_config(argv, environ)
        frozen_keys(loaded.run)
    except ConfigError:
        _print_notes(read_command_line(argv).notes, environ)
        raise
    _print_notes(loaded.notes, environ)
    return loaded


def _print_notes(notes: Sequence[str], environ: Mapping[str, str]) -> None:
    if _speaks(environ):
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


def _run(argv: list[str], environ: Mapping[str, str]) -> int:
    # Asked for before anything is checked: a person who asks for help has no valid configuration yet.
    actions = read_command_line(argv).actions
    if actions.help or actions.version or actions.list_presets:
        if _speaks(environ):
            _say(_information(actions))
        return EXIT_OK
    loaded = _load(argv, environ)
    if loaded.actions.print_config:
        if _speaks(environ):
            _say(config_yaml(loaded) if loaded.actions.print_config == "yaml" else config_table(loaded))
        return EXIT_OK
    _require_host_memory(loaded)
    if loaded.actions.dry_run:
        from megatron_telechat.cli.dry_run import report

        if _speaks(environ):
            _say(report(loaded))
            if loaded.actions.executes:
                _execute(loaded)
        return EXIT_OK
    require_started_ranks(environ)
    from megatron_telechat.checkpoint.reference import reference_of
    from megatron_telechat.checkpoint.start import require_start
    from megatron_telechat.training import train

    # Every rank looks for itself: all come to one answer, before a process group in which one would wait for another.
    reference_of(loaded.run, *require_start(loaded.stages))
    if loaded.run.needs_transformer_engine:
        from megatron_telechat.backend import get_backend
        from megatron_telechat.model.transformer_config import require_transformer_engine

        require_transformer_engine(loaded.run, get_backend(loaded.run.training.device).traits)
    return train(loaded.stages, loaded.actions.steal_lock)


def _require_host_memory(loaded: LoadedConfig) -> None:
    """Refuse a run whose optimizer state is said not to fit into the memory of the hosts."""
    from megatron_telechat.costs.memory import host_memory_problem

    problems = [host_memory_problem(stage.run) for stage in loaded.stages.stages]
    found = list(dict.fromkeys(problem for problem in problems if problem is not None))
    if found:
        raise ConfigError(found)


def _execute(loaded: LoadedConfig) -> None:
    """Virtual ranks of the run, of each of its stages."""
    from megatron_telechat.cli.execute import execute_report

    stages = loaded.stages
    if stages.several and loaded.actions.execute_json:
        raise ConfigError(
            f"--execute-json writes what one run did, and this one has {len(stages.stages)} stages",
            "--execute-json",
            "leave it out, or give a configuration of one stage",
        )
    for stage in stages.stages:
        if stages.several:
            _say(f"\n=== {stage.title} ===")
        _say(execute_report(replace(loaded, run=stage.run)))


def _information(actions: Actions) -> str:
    if actions.version:
        return f"megatron_telechat {megatron_telechat.__version__}"
    return list_presets() if actions.list_presets else help_text()


def _say(text: str) -> None:
    """Print; a reader that closes the pipe early (head) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _speaks(environ: Mapping[str, str]) -> bool:
    return environ.get("RANK", "0") == "0"
