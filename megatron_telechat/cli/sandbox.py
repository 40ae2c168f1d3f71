"""Runs a launch script where it can harm nothing, to see which commands it would start.

The script runs in namespaces of its own (``unshare``): no network, an empty file system in memory with the system's
programs read-only beside the script's folder and the present one, no capabilities, a time limit. Launchers (torchrun,
srun, python, ...) are stubs that write down their words. What is not here is passed over, and told: folders to change
to, files to source, checks that end the script. A variable that the script reads plainly and never sets has a mark in
place of a value, so that what depends on it can be named.

Where the kernel or the machine gives no namespaces, nothing runs; `shell.read_script` reads the script instead.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_telechat.cli.sandbox_files import ENTER, PRELUDE, STUB, STUBS
from megatron_telechat.cli.shell import Command, unknown

LIMIT_S = 10.0
"""Seconds that a script may take."""
GRACE_S = 5.0
"""Seconds beside, to make the file system and to copy what was written down."""
MOST_BYTES = 1 << 20
"""Of what a script writes down, what is read of one file."""
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/dev",
    "/proc",
    "/sys",
    "/etc",
    "/run",
    "/stub",
    "/out",
)
_SHELLS_OWN = frozenset(
    """HOME PATH PWD OLDPWD USER LOGNAME HOSTNAME RANDOM SECONDS EPOCHSECONDS EPOCHREALTIME BASH BASHPID BASH_SOURCE
    BASH_VERSION BASH_REMATCH LINENO UID EUID PPID IFS SHELL SHLVL OSTYPE HOSTTYPE MACHTYPE FUNCNAME PIPESTATUS OPTARG
    OPTIND REPLY TMPDIR LANG TERM PYTHONPATH LD_LIBRARY_PATH LD_PRELOAD CPATH LIBRARY_PATH MANPATH""".split()
)
"""Variables that a shell sets, or whose absence means nothing."""


@dataclass(frozen=True)
class Ran:
    """What a script would have started.

    Attributes:
        commands: in their order, those of jobs that it submits too.
        unset: variables that it reads and nobody set.
        missing: files that it sources and that are not here.
        stops: exit codes with which it would have stopped before its end.
        counts_devices: whether it asks the machine for its number of accelerators.
        job: options of the job that the commands run in, where the script submits one.
        timed_out: whether it was ended by the time limit.
    """

    commands: tuple[Command, ...] = ()
    unset: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    counts_devices: bool = False
    job: tuple[str, ...] = ()
    timed_out: bool = False


@dataclass(frozen=True)
class Script:
    """A script to run.

    Attributes:
        path: its file, for the files beside it; None: it came from elsewhere.
        arguments: its positional parameters.
        environment: variables that are set for it.
        devices: accelerators that it finds on its machine.
    """

    text: str
    path: Path | None = None
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    devices: int = 8


_JOB = {
    **{"SLURM_JOB_ID": "1", "SLURM_JOBID": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"},
    **{"SLURM_JOB_NODELIST": "node0", "SLURM_NODELIST": "node0", "SLURM_JOB_NAME": "job", "SLURM_SUBMIT_DIR": "/tmp"},
}
"""What Slurm sets in each job, whatever its size."""
_MARK = re.compile(r"%([A-Za-z_]\w*|\d+)%")


def run_script(script: Script, limit_s: float = LIMIT_S) -> Ran | None:
    """What a script starts; None where there is no sandbox on this machine.

    Args:
        limit_s: seconds after which it is ended; what it started until then counts.
    """
    if not (shutil.which("unshare") and shutil.which("setpriv") and Path("/bin/bash").exists()):
        return None
    with tempfile.TemporaryDirectory(prefix="telechat-sandbox-") as folder:
        return _run_in(Path(folder), script, limit_s)


def _run_in(folder: Path, script: Script, limit_s: float) -> Ran | None:
    marks = unset_names(script)
    out, shown_as = folder / "out", script.path.resolve() if script.path else Path("/script/run.sh")
    _write_files(folder, script)
    environment = {
        **{name: f"%{name}%" for name in marks if not name.isdigit()},
        "BASH_ENV": "/stub/.prelude", "PATH": f"/stub:{SYSTEM_PATH}",
        **_JOB, **{name: value for name, value in script.environment.items() if name not in ("BASH_ENV", "ENV")},
        "HOME": "/tmp", "USER": "user", "HOSTNAME": "node0", "TELECHAT_DEVICES": str(script.devices),
    }  # fmt: skip
    command = ["unshare", "-r", "-n", "-m", "-p", "-f", "-i", "-u", "--kill-child", "--propagation", "private"]
    command += ["/bin/bash", "-p", str(folder / "enter"), str(folder), f"{limit_s:g}", str(shown_as), os.getcwd()]
    command += _bound(shown_as.parent if script.path else None)
    command += ["--", *script.arguments, *(f"%{name}%" for name in _positions(marks, len(script.arguments)))]
    pairs = [f"{name}={value}" for name, value in environment.items() if "\0" not in name + value]
    (folder / "variables").write_bytes(b"".join(pair.encode("utf-8", "surrogateescape") + b"\0" for pair in pairs))
    _wait(command, limit_s + GRACE_S)
    if not (out / ".started").exists():
        return None
    lines = {name: _lines(out / name) for name in (".missing", ".stops")}
    ran = Ran(
        unset=tuple(marks), missing=lines[".missing"], stops=lines[".stops"],
        counts_devices=(out / ".devices").exists(), timed_out=(out / ".timed-out").exists(),
    )  # fmt: skip
    for record in sorted(path for path in out.iterdir() if not path.name.startswith(".") and _is_plain(path)):
        ran = _with_record(ran, record.read_bytes()[:MOST_BYTES].decode("utf-8", "replace"), script)
    return ran


def _write_files(folder: Path, script: Script) -> None:
    """Everything that the sandbox reads: how it is entered, the stubs, the script without its ``set -e``."""
    (folder / "out").mkdir()
    (folder / "root").mkdir()
    stubs = folder / "stub"
    stubs.mkdir()
    (folder / "enter").write_text(ENTER, encoding="utf-8")
    (stubs / ".prelude").write_text(PRELUDE, encoding="utf-8")
    (stubs / ".stub").write_text(STUB, encoding="utf-8")
    (stubs / ".stub").chmod(0o755)
    for name in STUBS:
        (stubs / name).symlink_to("/stub/.stub")
    (folder / "script").write_text(_as_run(script.text), encoding="utf-8")


def _as_run(text: str) -> str:
    """A script without its ``set -e``: an error that only this machine has would end it."""
    return re.sub(r"(?m)^([ \t]*)set[ \t]+[-+][A-Za-z]+(?:[ \t]+(?:[-+][A-Za-z]+|pipefail))*[ \t]*(?=;|$|#)", r"\1:",
                  text.replace("\r\n", "\n"))  # fmt: skip


def _bound(folder: Path | None) -> list[str]:
    """Folders that the script may read: its own, and the one in which it is started."""
    wanted = {str(one) for one in (folder, Path(os.getcwd())) if one is not None}
    return sorted(
        one for one in wanted if one != "/" and not any(one == top or one.startswith(top + "/") for top in _SYSTEM)
    )


def _is_plain(path: Path) -> bool:
    """Whether it is a file by itself: a script may leave links in the folder that is read."""
    return path.is_file() and not path.is_symlink()


def _wait(command: Sequence[str], limit_s: float) -> None:
    """Run to the end; the sandbox ends itself in time, and is ended where it does not.

    No variable of a script is set outside of the sandbox, where it could name a library or a program to load.
    """
    process = subprocess.Popen(
        command, env={"LC_ALL": "C", "PATH": SYSTEM_PATH}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # --kill-child ends what is in the namespace of processes
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _lines(path: Path) -> tuple[str, ...]:
    if not _is_plain(path):
        return ()
    return tuple(dict.fromkeys(path.read_text(encoding="utf-8", errors="replace")[:MOST_BYTES].splitlines()))


def _with_record(ran: Ran, text: str, script: Script) -> Ran:
    """With what one stub wrote down: a command, or a job that is submitted, whose script runs in its turn."""
    kind, *fields = text.split("\0")[:-1]
    if kind == "command":
        visible = {name: value for name, value in zip(("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"), fields,
                                                      strict=False) if value}  # fmt: skip
        words = tuple(unmarked(word) for word in fields[2:])
        return replace(ran, commands=(*ran.commands, Command(words, visible, {}))) if words else ran
    from megatron_telechat.cli.launcher import slurm_variables
    from megatron_telechat.cli.shell import slurm_lines

    inner, count, *rest = fields
    if inner.strip() == _as_run(script.text).strip():
        return ran  # it submits its successor
    options = (*slurm_lines(inner), *rest[: int(count)])
    kept = dict(pair.split("=", 1) for pair in rest[int(count) :] if "=" in pair)
    variables = {name: str(value) for name, value in slurm_variables(options).items()}
    job = run_script(replace(script, text=inner, arguments=(), environment={**kept, **variables, "TELECHAT_JOB": "1"}))
    if job is None:
        return ran
    return replace(
        ran, commands=(*ran.commands, *job.commands), unset=tuple(dict.fromkeys((*ran.unset, *job.unset))),
        missing=(*ran.missing, *job.missing), stops=(*ran.stops, *job.stops), job=options,
        counts_devices=ran.counts_devices or job.counts_devices, timed_out=ran.timed_out or job.timed_out,
    )  # fmt: skip


def unmarked(text: str) -> str:
    """A word with the marks of unset variables as unknown ones."""
    return _MARK.sub(lambda found: unknown(found[1]), text)


def unset_names(script: Script) -> list[str]:
    """Variables and positional parameters that the script reads plainly and nobody sets.

    One whose absence the script asks about (``${X:-1}``, ``[ -z $X ]``, ``${#X}``) is left unset, as in a fresh shell.
    """
    text = re.sub(r"(?m)^\s*#.*$", "", script.text)
    read = set(re.findall(r"(?<!\\)\$\{?([A-Za-z_]\w*)(?![\w\[:=?+-])", text))
    asked = set(re.findall(r"\$\{#?!?([A-Za-z_]\w*)(?:\[[^\]]*\])?(?::?[-=?+]|\[)", text))
    asked |= set(re.findall(r"-[znv]\s+[\"']?\$?\{?([A-Za-z_]\w*)", text)) | set(re.findall(r"\$\{[#!](\w+)", text))
    made = set(re.findall(r"([A-Za-z_]\w*)(?:\[[^\]]*\])?\+?=", text))
    made |= set(
        re.findall(r"\b(?:for|select|read(?:\s+-\w+)*|getopts\s+\S+|local|declare(?:\s+-\w+)*)\s+([A-Za-z_]\w*)", text)
    )
    made |= set(re.findall(r"\b(?:mapfile|readarray)(?:\s+-\w+)*\s+([A-Za-z_]\w*)", text))
    found = sorted(
        name for name in read - asked - made - _SHELLS_OWN - set(script.environment)
        if not name.startswith(("BASH_", "COMP_", "SLURM_"))
    )  # fmt: skip
    if re.search(r"\$[@*#]|\$\{[@*#]|\bshift\b|\bgetopts\b", text):
        return found
    positions = {int(digits) for pair in re.findall(r"\$(\d)(?!\d)|\$\{(\d+)\}", text) for digits in pair if digits}
    asked_for = {int(digits) for digits in re.findall(r"\$\{(\d+):?[-=?+]|-[zn]\s+[\"']?\$\{?(\d+)", text)
                 for digits in digits if digits}  # fmt: skip
    last = max(positions - asked_for, default=0)
    return [*found, *(str(number) for number in range(len(script.arguments) + 1, last + 1))]


def _positions(names: Sequence[str], given: int) -> list[str]:
    """Of the unset ones, positional parameters behind those that are given."""
    return [name for name in names if name.isdigit() and int(name) > given]
