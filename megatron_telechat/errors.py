"""User errors: what is wrong, where it was said, and how to fix it.

Every failure that a person can cause ends in one of these classes. A door
(``pretrain/``, ``tools/``) turns it into one readable message on stderr and the
exit code of its class; a traceback means a bug of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_OK = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_NUMERICS = 5
EXIT_RESOURCE = 6
EXIT_NO_FIT = 3
"""Of the planner, which reads no data: nothing was found that fits the memory. An answer, told apart from a plan."""
EXIT_SIGNAL = 75
EXIT_INTERRUPTED = 130
"""A tool ended by Ctrl-C; what a shell gives such a process."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        what: the complaint, in terms of the user's own names and values.
        where: the origin of the value (``flag``, ``run.yaml:14``, ``preset telechat2-7b``, a path).
        fix: what to type or change instead; empty only if nothing sensible can be said.
        missing: the setting whose file or folder is not on this machine, where that is all that is wrong: a run that is
            only described warns of it, since the machine that trains may have it.
    """

    what: str
    where: str = ""
    fix: str = ""
    missing: str = ""

    def lines(self) -> list[str]:
        """The message with its place, and the fix on a second line if there is one."""
        head = self.what if not self.where else f"{self.what}    ({self.where})"
        return [head] if not self.fix else [head, f"fix: {self.fix}"]


class StopAtStart(BaseException):
    """A stop was asked for before the first step: nothing is lost, the process ends with EXIT_SIGNAL. No error, so that
    no handler of errors takes it for one."""


class UserError(Exception):
    """Base of all errors that the user can fix."""

    exit_code = 1
    kind = "error"
    agreed = False
    """Whether every rank raises the same error, so that one of them is enough to print it."""

    def __init__(self, what: str | Problem | Sequence[Problem], where: str = "", fix: str = ""):
        if isinstance(what, str):
            problems: tuple[Problem, ...] = (Problem(what, where, fix),)
        elif isinstance(what, Problem):
            problems = (what,)
        else:
            problems = tuple(what)
        if not problems:
            raise ValueError("a UserError needs at least one problem")
        self.problems = problems
        super().__init__(self.render())

    def __reduce__(self):
        # The default reduce would pass the rendered text back as `what` and lose the problems.
        return (type(self), (self.problems,), {"agreed": self.agreed})

    def on_every_rank(self) -> UserError:
        """Itself, marked as raised by all ranks alike."""
        self.agreed = True
        return self

    def render(self) -> str:
        """The message as a person reads it: one line for one problem, a numbered list for more."""
        count = len(self.problems)
        if count == 1:
            first, *rest = self.problems[0].lines()
            return "\n".join([f"{self.kind}: {first}", *(f"  {line}" for line in rest)])
        out = [f"{self.kind}: {count} problems"]
        for number, problem in enumerate(self.problems, 1):
            first, *rest = problem.lines()
            out.append(f"  {number}. {first}")
            out.extend(f"     {line}" for line in rest)
        return "\n".join(out)


class ConfigError(UserError):
    """A value, or a combination of values, that no run can start with."""

    exit_code = EXIT_CONFIG
    kind = "config error"


class DataError(UserError):
    """Input text, an indexed dataset, a tokenizer or a blend that cannot be used as it is."""

    exit_code = EXIT_DATA
    kind = "data error"


class CheckpointError(UserError):
    """A checkpoint or a set of weights that is missing, damaged or does not fit the model."""

    exit_code = EXIT_CHECKPOINT
    kind = "checkpoint error"


class LeaseError(UserError):
    """The run folder belongs to another job. Not EXIT_RESOURCE: nothing is gained by trying again."""

    exit_code = EXIT_CHECKPOINT
    kind = "run folder error"


class NumericsError(UserError):
    """A number that is not finite, or too many steps in a row that were not taken; nothing of it was saved."""

    exit_code = EXIT_NUMERICS
    kind = "numerics error"


class ResourceError(UserError):
    """A lock of an index, a disk or a device that cannot be had, or a rank that is gone."""

    exit_code = EXIT_RESOURCE
    kind = "resource error"
