"""A Megatron-LM command or its launch script as words of our configuration: the flags behind the program, and the
ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_telechat.cli.launcher import WHERE, Launch, read_launch, slurm_variables
from megatron_telechat.cli.shell import MAYBE, Command, read_script, shown, slurm_lines, unknown, unknown_names
from megatron_telechat.config.fields import FieldInfo, fields_by_name
from megatron_telechat.config.megatron.answers import Alias, Always, Answer, Ignored, Refused
from megatron_telechat.config.megatron.flags import ANSWERS
from megatron_telechat.errors import ConfigError, Problem

OTHER_FAMILIES = (
    "bert",
    "t5",
    "mamba",
    "hybrid",
    "ict",
    "realm",
    "retro",
    "vision",
    "vlm",
    "mimo",
    "multimodal",
    "avlm",
)
"""Words in the names of Megatron-LM's programs for models that are no GPT."""


@dataclass(frozen=True)
class Pasted:
    """A command, read.

    Attributes:
        words: flags of the run, those of the ranks first.
        notes: what was taken for what, and what was left out.
    """

    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_pasted(script: str | None, command: Sequence[str], others: Sequence[str]) -> Pasted:
    """The flags of a launch script, or of a command given as words.

    Args:
        script: text of the script; None where there is none.
        command: words of a command; with a script, flags to add to its own.
        others: flags given beside it, which must not contradict its launcher.

    Raises:
        ConfigError: no training in it, several, or one of no GPT model; variables whose value it does not say; ranks
            that it does not say, or that `others` contradict.
    """
    notes: tuple[str, ...] = ()
    if script is None:
        launch = read_launch([Command(tuple(_mark(word) for word in command), {}, {})])
    else:
        slurm = slurm_lines(script)
        read = read_script(script, slurm_variables(slurm))
        launch = read_launch(read.commands, slurm)
        launch = replace(launch, flags=(*launch.flags, *command))
        taken = [f"{name}={value}" for name, value in read.defaults.items() if value.isdigit()]
        notes = (f"defaults of the script: {' '.join(taken)} (the environment may say otherwise)",) * bool(taken)
    _refuse_other_families(launch.program)
    found = _Flags()
    for word in launch.flags:
        found.take(word)
    try:
        ranks = _ranks(launch, [*found.out, *others])
    except ConfigError as error:
        raise ConfigError([*error.problems, *found.problems]) from None
    if found.problems:
        raise ConfigError(found.problems)
    return Pasted((*ranks, *found.out), (*notes, *found.dropped))


def _refuse_other_families(program: str) -> None:
    """The flags of a program that trains another family of models would be read as those of a GPT.

    Raises:
        ConfigError: it does.
    """
    name = Path(program).stem
    family = next((family for family in OTHER_FAMILIES if family in name.split("_")), None)
    if name.startswith(("pretrain_", "finetune_")) and family is not None:
        raise ConfigError(f"{program} does not train a GPT model", WHERE, "the command of a pretrain_gpt.py")


def _mark(word: str) -> str:
    """A word of a command line with the variables that the shell left in it, as unknown; a script in one word stays as
    it is."""
    return (
        word
        if re.search(r"\s", word)
        else re.sub(r"\$\{?([A-Za-z_]\w*)[^}$\s]*\}?", lambda name: unknown(name[1]), word)
    )


# ---- ranks -------------------------------------------------------------------------------------


def _ranks(launch: Launch, flags: Sequence[str]) -> tuple[str, ...]:
    """--world-size and --ranks-per-node as the launcher says them."""
    said = {name: _last(flags, name) for name in ("--world-size", "--ranks-per-node")}
    if launch.ranks is None:
        if said["--world-size"] is None:
            what = f"the number of ranks is not known: {launch.why}"
            raise ConfigError(what, WHERE, "give --world-size N (and --ranks-per-node N if a node does not have 8)")
        return ()
    found = {"--world-size": launch.ranks, "--ranks-per-node": launch.per_node}
    for name, number in found.items():
        if number is not None and said[name] not in (None, str(number)):
            what = f"{name} {said[name]}, but the launcher starts {launch.ranks} ranks"
            what += f", {number} on a node" if name == "--ranks-per-node" else ""
            raise ConfigError(what, f"flag; {WHERE}", f"leave {name} out, or change the launcher's flags")
    return tuple(
        word
        for name, number in found.items()
        if number is not None and said[name] is None
        for word in (name, str(number))
    )


def _last(flags: Sequence[str], name: str) -> str | None:
    """The value of the last flag of this name."""
    value = None
    for at, word in enumerate(flags):
        flag, equals, inline = word.partition("=")
        if flag.replace("_", "-") == name:
            value = inline if equals else "".join(flags[at + 1 : at + 2])
    return value


# ---- flags that are not known ------------------------------------------------------------------


class _Flags:
    """The flags of a command without those that are not known and not needed to plan.

    Attributes:
        out: the flags.
        dropped: notes that name what was left out.
        problems: flags whose value is needed, and words that may be any flag.
    """

    def __init__(self) -> None:
        self.out: list[str] = []
        self.dropped: list[str] = []
        self.problems: list[Problem] = []
        self.last = ""
        self.skips = False
        """Whether the last flag was left out, and its values with it."""

    def take(self, word: str) -> None:
        maybe, word = word.startswith(MAYBE), word.removeprefix(MAYBE)
        name, equals, value = word.partition("=")
        is_flag = name.startswith("--") and not unknown_names(name)
        behind = self.last != "" and not self.skips and self.out[-1:] == [self.last]
        if is_flag:
            self.last = name
        if maybe and not is_flag and self.skips:
            return
        self.skips = False
        if maybe:
            self.only_maybe(name if is_flag else word)
        elif not unknown_names(word):
            self.out.append(word)
        else:
            self.unknown(word, value, inline=is_flag and bool(equals), behind=behind)

    def only_maybe(self, word: str) -> None:
        """A flag that a condition adds."""
        if not word.startswith("--") or _plans(word):
            self.problem(
                f"whether {shown(word)} is given depends on a condition that the script does not decide",
                "leave it in or out",
            )
        else:
            self.dropped.append(f"{word}: given under a condition, and not needed to plan")
        self.skips = True

    def unknown(self, word: str, value: str, inline: bool, behind: bool) -> None:
        """A word with a variable that is not known; `inline`: behind the = of the last flag, `behind`: next to it."""
        info, answer = _field(self.last), _answer(self.last)
        takes = inline or behind and not _is_switch(self.last)
        if takes and not _plans(self.last) and not (info is not None and info.kind is str):
            self.dropped.append(f"{self.last} {shown(value if inline else word)}: not known, and not needed to plan")
            if not inline and not isinstance(answer, Refused):
                self.out.pop()
        elif (takes or _is_many(self.last)) and info is not None and info.kind is str and not info.choices:
            self.out.append(shown(word))  # the name of something
        else:
            names = ", ".join(unknown_names(word))
            what = f"the value of {self.last} is not known: {names}" if takes else f"what {names} holds is not known"
            self.problem(what, "write its value in its place")

    def problem(self, what: str, fix: str) -> None:
        self.problems.append(Problem(what, WHERE, f"{fix}; only what the script itself sets is read"))


def _answer(flag: str) -> Answer | None:
    return ANSWERS.get(flag[2:].replace("_", "-"))


def _field(flag: str) -> FieldInfo | None:
    """The field that a flag sets."""
    info, answer = fields_by_name().get(flag[2:].replace("-", "_")), _answer(flag)
    return fields_by_name()[answer.fields[0]] if info is None and isinstance(answer, Alias) else info


def _is_many(flag: str) -> bool:
    info = _field(flag)
    return info is not None and info.many


def _is_switch(flag: str) -> bool:
    """Whether what follows the flag cannot be its value."""
    info, answer = _field(flag), _answer(flag)
    if isinstance(answer, Alias):
        return answer.value is not None and not answer.but
    if isinstance(answer, Always):
        return not answer.values
    return flag[2:5] == "no-" if info is None else info.kind is bool


def _plans(flag: str) -> bool:
    """Whether a plan depends on the flag."""
    info = _field(flag[:2] + flag[5:]) if flag[2:5] == "no-" and _answer(flag) is None else _field(flag)
    if info is None:
        return not isinstance(_answer(flag), (Ignored, Refused))
    return info.section in ("model", "parallel", "training") and info.name not in (
        "train_iters",
        "exit_interval",
        "seed",
    )
