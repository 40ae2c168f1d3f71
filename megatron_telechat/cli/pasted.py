"""A Megatron-LM command or its launch script as words of our configuration: the flags behind the program, and the
ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_telechat.cli.launcher import WHERE, Launch, read_launch, slurm_variables
from megatron_telechat.cli.sandbox import Ran, Script, run_script, unmarked
from megatron_telechat.cli.shell import MAYBE, Command, Value, read_script, shown, slurm_lines, unknown, unknown_names
from megatron_telechat.cli.shell import Script as ScriptRead
from megatron_telechat.config.fields import FieldInfo, fields_by_name
from megatron_telechat.config.megatron.answers import Alias, Always, Answer, Ignored, Refused
from megatron_telechat.config.megatron.flags import ANSWERS
from megatron_telechat.config.megatron.forks import READ
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


TOKENIZERS = ("--vocab-file", "--merge-file", "--tokenizer-name-or-path")
"""Flags whose being there says which tokenizer is meant, also where their file is not known."""


@dataclass(frozen=True)
class Pasted:
    """A command, read.

    Attributes:
        words: flags of the run, those of the ranks first.
        notes: what was taken for what, and what was left out.
    """

    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_pasted(
    script: str | None, command: Sequence[str], others: Sequence[str], variables: Mapping[str, Value] | None = None
) -> Pasted:
    """The flags of a launch script that is read without running it, or of a command given as words.

    Args:
        script: text of the script; None where there is none.
        command: words of a command; with a script, flags to add to its own.
        others: flags given beside it, which must not contradict its launcher.
        variables: known before the first line of the script, its arguments ("1", "@") among them.

    Raises:
        ConfigError: no training in it, several, or one of no GPT model; variables whose value it does not say; ranks
            that it does not say, or that `others` contradict.
    """
    if script is None:
        return _pasted(read_launch([Command(tuple(_mark(word) for word in command), {}, {})]), others)
    slurm = slurm_lines(script)
    read = read_script(script, {**slurm_variables(slurm), **(variables or {})})
    launch = read_launch(read.commands, slurm)
    return _pasted(replace(launch, flags=(*launch.flags, *command)), others, _defaults(read))


def read_launch_script(script: Script, command: Sequence[str], others: Sequence[str]) -> Pasted:
    """The flags of a launch script, which runs in a sandbox where there is one (`cli.sandbox`), else is read.

    Args:
        command: flags to add to its own.
        others: flags given beside it, which must not contradict its launcher.

    Raises:
        ConfigError: as `read_pasted`.
    """
    slurm = slurm_lines(script.text)
    started = {name: str(value) for name, value in slurm_variables(slurm).items()}
    ran = run_script(replace(script, environment={**started, **script.environment}))
    if ran is not None:
        try:
            launch = read_launch(ran.commands, ran.job or slurm)
        except ConfigError:
            launch = None
        if launch is not None:
            return _pasted(replace(launch, flags=(*launch.flags, *command)), others, _notes_of_run(ran, script), True)
    arguments: dict[str, Value] = {str(number): word for number, word in enumerate(script.arguments, 1)}
    known: dict[str, Value] = {**script.environment, **arguments, "@": list(script.arguments)}
    found = read_pasted(script.text, command, others, known)
    where = "no sandbox on this machine" if ran is None else "it started no training in the sandbox"
    return replace(found, notes=(f"the script was read, not run: {where}", *found.notes))


def _defaults(read: ScriptRead) -> tuple[str, ...]:
    taken = [f"{name}={value}" for name, value in read.defaults.items() if value.isdigit()]
    return (f"defaults of the script: {' '.join(taken)} (the environment may say otherwise)",) * bool(taken)


def _notes_of_run(ran: Ran, script: Script) -> tuple[str, ...]:
    """How the script was understood, where that is not a matter of course."""
    try:
        notes = list(_defaults(read_script(script.text)))
    except ConfigError:  # bash reads more than the reader
        notes = []
    if ran.counts_devices:
        notes.append(f"the script counts the devices of its machine: {script.devices} taken (--ranks-per-node N)")
    if ran.missing:
        notes.append(f"not here, and passed over: {', '.join(map(_unmarked_text, ran.missing[:5]))}")
    if ran.stops:
        notes.append(
            f"a check of the script would have stopped it here (exit {', '.join(ran.stops)}), and was passed over"
        )
    if ran.timed_out:
        notes.append("the script was ended after its time limit; what it started until then was read")
    return tuple(notes)


def _unmarked_text(text: str) -> str:
    return shown(unmarked(text))


def _pasted(launch: Launch, others: Sequence[str], notes: tuple[str, ...] = (), fresh: bool = False) -> Pasted:
    """The flags of a launch, those of its ranks first; `fresh`: it ran in a fresh shell.

    Raises:
        ConfigError: as `read_pasted`.
    """
    _refuse_other_families(launch.program)
    found = _Flags(fresh)
    for word in launch.flags:
        found.take(word)
    try:
        ranks, said = _ranks(launch, [*found.out, *others])
    except ConfigError as error:
        raise ConfigError([*error.problems, *found.problems]) from None
    if found.problems:
        raise ConfigError(found.problems)
    return Pasted((*ranks, *found.out), (*notes, *said, *found.dropped))


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


def _ranks(launch: Launch, flags: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """--world-size and --ranks-per-node as the launcher says them, and a note where its ranks cannot hold the model."""
    said = {name: last_value(flags, name) for name in ("--world-size", "--ranks-per-node")}
    if launch.ranks is None:
        if said["--world-size"] is None:
            what = f"the number of ranks is not known: {launch.why}"
            raise ConfigError(what, WHERE, "give --world-size N (and --ranks-per-node N if a node does not have 8)")
        return (), ()
    found = {"--world-size": launch.ranks, "--ranks-per-node": launch.per_node}
    notes: tuple[str, ...] = ()
    unit = _model_ranks(flags)
    if launch.ranks % unit:
        # A published script often starts one node, for the reader to change.
        found["--world-size"] = -(-launch.ranks // unit) * unit
        if launch.per_node and found["--world-size"] % launch.per_node:
            found["--ranks-per-node"] = None
        if said["--world-size"] is not None:
            found["--world-size"] = None
        else:
            more = f"planned for {found['--world-size']}; --world-size N plans for others"
            notes = (f"the launcher starts {launch.ranks} ranks, and one copy of the model takes {unit}: {more}",)
    for name, number in found.items():
        if number is not None and said[name] not in (None, str(number)):
            what = f"{name} {said[name]}, but the launcher starts {launch.ranks} ranks"
            what += f", {number} on a node" if name == "--ranks-per-node" else ""
            raise ConfigError(what, f"flag; {WHERE}", f"leave {name} out, or change the launcher's flags")
    words = tuple(
        word
        for name, number in found.items()
        if number is not None and said[name] is None
        for word in (name, str(number))
    )
    return words, notes


def _model_ranks(flags: Sequence[str]) -> int:
    """Ranks that one copy of the model takes, its experts included; 1 where the flags do not say it in numbers."""

    def size(*names: str, default: int = 1) -> int:
        found = next((value for name in names if (value := last_value(flags, f"--{name}"))), "")
        return int(found) if re.fullmatch(r"[1-9]\d{0,6}", found) else default

    tensor = size("tensor-model-parallel-size", "model-parallel-size")
    dense = tensor * size("context-parallel-size")
    experts = size("expert-model-parallel-size") if last_value(flags, "--num-experts") else 1
    routed = experts * (size("expert-tensor-parallel-size", default=tensor) if experts > 1 else 1)
    return size("pipeline-model-parallel-size") * math.lcm(dense, routed)


def last_value(flags: Sequence[str], name: str) -> str | None:
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
        fresh: whether the command ran in a fresh shell, where a variable that nobody sets adds no words.
        out: the flags.
        dropped: notes that name what was left out.
        problems: flags whose value is needed, and words that may be any flag.
    """

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
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
        if takes and self.last.replace("_", "-") in TOKENIZERS:
            self.out.append(shown(word))  # the name of a file
        elif takes and not _plans(self.last) and not (info is not None and info.kind is str):
            self.dropped.append(f"{self.last} {shown(value if inline else word)}: not known, and not needed to plan")
            if not inline and not isinstance(answer, Refused):
                self.out.pop()
        elif (takes or _is_many(self.last)) and info is not None and info.kind is str and not info.choices:
            self.out.append(shown(word))  # the name of something
        elif self.fresh and not takes and re.fullmatch(r"\x00[^\x01]*\x01", word):
            self.dropped.append(f"{shown(word)} is not set, and adds no flags")
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
        known = flag[2:].replace("_", "-") in ANSWERS or flag[2:].replace("_", "-") in READ
        return known and not isinstance(_answer(flag), (Ignored, Refused))
    return info.section in ("model", "parallel", "training") and info.name not in (
        "train_iters",
        "exit_interval",
        "seed",
    )
