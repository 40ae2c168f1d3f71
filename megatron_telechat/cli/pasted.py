"""A Megatron-LM command or its launch script as words of our configuration: the flags behind the program, and the ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional, Sequence

from megatron_telechat.cli.launcher import WHERE, Launch, read_launch, slurm_variables
from megatron_telechat.cli.shell import Command, read_script, shown, slurm_lines, unknown, unknown_names
from megatron_telechat.config.answers import Alias, Ignored
from megatron_telechat.config.fields import FieldInfo, fields_by_name
from megatron_telechat.config.megatron_flags import ANSWERS
from megatron_telechat.errors import ConfigError, Problem


@dataclass(frozen=True)
class Pasted:
    """A command, read.

    Attributes:
        words: flags of the run, those of the ranks first.
        notes: what was taken for what, and what was left out.
    """

    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_pasted(script: Optional[str], command: Sequence[str], others: Sequence[str]) -> Pasted:
    """The flags of a launch script, or of a command given as words.

    Args:
        script: text of the script; None where there is none.
        command: words of a command; with a script, flags to add to its own.
        others: flags given beside it, which must not contradict its launcher.

    Raises:
        ConfigError: no training in it, or several; variables whose value it does not say; ranks that it does not say, or
            that `others` contradict.
    """
    notes: tuple[str, ...] = ()
    if script is None:
        launch = read_launch([Command(tuple(_mark(word) for word in command), {}, {})])
    else:
        slurm = slurm_lines(script)
        read = read_script(script, slurm_variables(slurm))
        launch = read_launch(read.commands, slurm)
        launch = Launch((*launch.flags, *command), launch.ranks, launch.per_node, launch.why)
        taken = [f"{name}={value}" for name, value in read.defaults.items() if value.isdigit()]
        notes = (f"defaults of the script: {' '.join(taken)}; its variables would be taken from the environment",) * bool(taken)
    flags, dropped = _known(launch.flags)
    return Pasted((*_ranks(launch, [*flags, *others]), *flags), (*notes, *dropped))


def _mark(word: str) -> str:
    """A word of a command line with the variables that the shell left in it, as unknown; a script in one word stays as it is."""
    return word if re.search(r"\s", word) else re.sub(r"\$\{?([A-Za-z_]\w*)[^}$\s]*\}?", lambda name: unknown(name[1]), word)


# ---- ranks -------------------------------------------------------------------------------------


def _ranks(launch: Launch, flags: Sequence[str]) -> tuple[str, ...]:
    """--world-size and --ranks-per-node as the launcher says them."""
    said = {name: _last(flags, name) for name in ("--world-size", "--ranks-per-node")}
    if launch.ranks is None:
        if said["--world-size"] is None:
            what = f"the number of ranks is not known: {launch.why}"
            raise ConfigError(what, WHERE, "say it: --world-size N, with --ranks-per-node N where a node has not 8")
        return ()
    found = {"--world-size": launch.ranks, "--ranks-per-node": launch.per_node}
    for name, number in found.items():
        if number is not None and said[name] not in (None, str(number)):
            what = f"{name} {said[name]}, but the launcher's words start {launch.ranks} ranks"
            what += f", {number} on a node" if name == "--ranks-per-node" else ""
            raise ConfigError(what, f"flag; {WHERE}", f"leave {name} out, or change the launcher's words")
    return tuple(word for name, number in found.items() if number is not None and said[name] is None for word in (name, str(number)))


def _last(flags: Sequence[str], name: str) -> Optional[str]:
    """The value of the last flag of this name."""
    value = None
    for at, word in enumerate(flags):
        flag, equals, inline = word.partition("=")
        if flag.replace("_", "-") == name:
            value = inline if equals else "".join(flags[at + 1 : at + 2])
    return value


# ---- unknown variables in flags ----------------------------------------------------------------


def _known(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags without those whose value is not known and not needed to plan, and notes that name them.

    Raises:
        ConfigError: with every flag whose value is needed, and every word that may be any flag.
    """
    out: list[str] = []
    dropped: list[str] = []
    problems: list[Problem] = []
    last = ""
    for word in flags:
        name, equals, value = word.partition("=")
        if name.startswith("--") and not unknown_names(name):
            last = name
        if not unknown_names(word):
            out.append(word)
            continue
        inline = bool(equals) and name == last
        info = _field(last) if inline or out[-1:] == [last] or _many(last) else None
        if info is not None and info.kind is str and not info.choices:
            out.append(shown(word))  # a name of something; no rule of planning reads it
        elif (inline or out[-1:] == [last]) and not _needed(last):
            dropped.append(f"{last} {shown(value if inline else word)}: not known, and not needed to plan")
            if not inline:
                out.pop()
        else:
            of = f" of {last}" if inline or info is not None or (out[-1:] == [last] and not _is_switch(last)) else ""
            names = ", ".join(unknown_names(word))
            what = f"the value{of} is not known: {names}" if of else f"what {names} holds is not known"
            problems.append(Problem(what, WHERE, "write the value in its place; only what the script itself sets is read"))
    if problems:
        raise ConfigError(problems)
    return out, dropped


def _field(flag: str) -> Optional[FieldInfo]:
    """The field that a flag sets with a value of its own."""
    name = flag[2:].replace("_", "-")
    info = fields_by_name().get(name.replace("-", "_"))
    answer = ANSWERS.get(name)
    if info is None and isinstance(answer, Alias) and answer.value is None:
        info = fields_by_name()[answer.fields[0]]
    return info


def _many(flag: str) -> bool:
    info = _field(flag)
    return info is not None and info.many


def _is_switch(flag: str) -> bool:
    """Whether what follows the flag cannot be its value."""
    info, answer = _field(flag), ANSWERS.get(flag[2:].replace("_", "-"))
    return info.kind is bool if info is not None else isinstance(answer, Alias) or flag[2:5] == "no-"


def _needed(flag: str) -> bool:
    """Whether a plan depends on the flag's value, or on whether what follows is its value at all."""
    info = _field(flag)
    if info is None:
        return not isinstance(ANSWERS.get(flag[2:].replace("_", "-")), Ignored)
    aside = info.section not in ("model", "parallel", "training") or info.name in ("train_iters", "exit_interval", "seed")
    return info.kind is bool or not aside
