"""Start ranks as real processes, and run many distributed cases in one launch.

A launch of a tiny model costs seconds of imports, so a worker file holds many *cases*::

    # tests/parallel/worker_state.py
    from tests.harness import Cases
    cases = Cases()

    @cases.case
    def dp2():                 # runs on every rank; the return value (JSON) goes back to the test
        ...
        return {"loss": 1.0}

    if __name__ == "__main__":
        cases.main()

    # tests/parallel/test_state.py
    @pytest.fixture(scope="module")
    def report():
        return run_cases(Path(__file__).with_name("worker_state.py"), nproc=2)

    @pytest.mark.gloo
    @pytest.mark.parametrize("name", cases.names)
    def test_case(report, name):
        details = report.check(name)   # list of return values by rank, or AssertionError

The rendezvous store lives in the launching process, on a port that the system picked while it was
bound: no two launches can meet. Every rank is its own session, is killed with its children on a
timeout, and dies with the launcher.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
TAIL_LINES = 40
TIMEOUT_CODE = 124
PR_SET_PDEATHSIG = 1
PATIENCE_S = 120
PATIENCE_AFTER_FAILURE_S = 45
ZYGOTES = 2
"""Two ranks of a launch are forked from different ones: their sets are in different orders."""
_READ_DURING_IMPORTS = ("LD_", "PYTHON", "OMP_", "MKL_", "MALLOC_", "TORCH_", "CUDA_", "NPU_", "ASCEND_", "TRITON_")


@dataclass(frozen=True)
class RankOutput:
    """What one rank left: its exit code (negative: killed by that signal) and its output."""

    rank: int
    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class LaunchResult:
    """All ranks of one launch. `returncode` is 0, the first non-zero one, or 124 on a timeout."""

    returncode: int
    ranks: tuple[RankOutput, ...]
    seconds: float

    @property
    def stdout(self) -> str:
        return "".join(rank.stdout for rank in self.ranks)

    @property
    def stderr(self) -> str:
        return "".join(rank.stderr for rank in self.ranks)

    def tails(self, lines: int = TAIL_LINES) -> str:
        """The last lines of every rank, for a failure message."""
        out = [f"exit {self.returncode} after {self.seconds:.1f} s"]
        for rank in self.ranks:
            for kind, text in (("stdout", rank.stdout), ("stderr", rank.stderr)):
                if text.strip():
                    out.append(f"--- rank {rank.rank} (exit {rank.returncode}) {kind}")
                    out.extend(text.rstrip().splitlines()[-lines:])
        return "\n".join(out)

    def ok(self) -> LaunchResult:
        """Itself; AssertionError with the tails of all ranks unless every rank ended with 0."""
        if self.returncode != 0:
            raise AssertionError(self.tails())
        return self


def launch(
    worker: str | Path,
    nproc: int,
    *args: str,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    grace: float = 20.0,
    fresh: bool = False,
) -> LaunchResult:
    """Run a python file on `nproc` ranks of this machine, as torchrun would.

    The ranks are forked from processes that have imported the framework (`tests/zygote.py`).

    Args:
        worker: the file. The root of the repository is on its path.
        nproc: number of ranks.
        args: its command line.
        timeout: seconds until everything is killed and the return code is 124.
        env: environment variables to add.
        grace: seconds the other ranks are given once one has failed.
        fresh: start every rank as a process anew; so it is also where ``env`` has what is read during imports.
    """
    import torch.distributed as dist

    fresh = fresh or sys.platform != "linux" or any(name.startswith(_READ_DURING_IMPORTS) for name in env or {})

    starts = [_started if fresh else _zygote(rank % ZYGOTES).start for rank in range(nproc)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        begin = time.monotonic()
        processes: list[_Process] = []
        try:
            for rank, start in enumerate(starts):
                environment = _environment(rank, nproc, store.port, env or {})
                outputs = f"{folder}/{rank}.out", f"{folder}/{rank}.err"
                processes.append(start([str(worker), *map(str, args)], environment, *outputs))
            timed_out = _wait(processes, begin + timeout, grace)
        finally:
            for process in processes:
                _kill(process)
        ended = tuple(
            RankOutput(rank, process.wait(), _read(f"{folder}/{rank}.out"), _read(f"{folder}/{rank}.err"))
            for rank, process in enumerate(processes)
        )
    codes = [output.returncode for output in ended if output.returncode != 0]
    code = TIMEOUT_CODE if timed_out else codes[0] if codes else 0
    return LaunchResult(code, ended, time.monotonic() - begin)


class Cases:
    """The named cases of a worker file, in the order they are written."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[[], Any]] = {}

    def case(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Register a function as the case of its name."""
        return self.add(function.__name__, function)

    def add(self, name: str, function: Callable[[], Any]) -> Callable[[], Any]:
        """Register a function under a name of its own (cases made in a loop)."""
        if name in self._functions:
            raise ValueError(f"two cases are called {name}")
        self._functions[name] = function
        return function

    @property
    def names(self) -> list[str]:
        return list(self._functions)

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Run the cases named on the command line, or all; write one JSON line a case and rank.

        After a case the ranks meet at the rendezvous store, outside of torch.distributed: a case that
        failed on some ranks does not stop those that follow, but one that hangs ends the launch.
        """
        names = list(sys.argv[1:] if argv is None else argv) or self.names
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        meeting = _Meeting(rank, world)
        folder = os.environ.get("CASE_REPORTS")
        failed = False
        for name in names:
            begin = time.monotonic()
            ok, detail = _attempt(self._functions[name])
            failed = failed or not ok
            line = {"case": name, "rank": rank, "ok": ok, "detail": detail, "seconds": time.monotonic() - begin}
            text = json.dumps(line)
            if folder is None:
                print(text, flush=True)
            else:
                with open(f"{folder}/{rank}.jsonl", "a") as report:
                    report.write(text + "\n")
            if not meeting.after(name, ok):
                print(f"rank {rank}: other ranks did not end case {name}; giving up", file=sys.stderr, flush=True)
                os._exit(3)
            _reset()
        _leave()
        sys.exit(1 if failed else 0)


@dataclass(frozen=True)
class CaseReport:
    """Results of all cases of a launch."""

    launch: LaunchResult
    results: Mapping[str, Mapping[int, Mapping[str, Any]]]
    nproc: int

    def check(self, name: str) -> list[Any]:
        """Return values of a case by rank.

        Raises:
            AssertionError: it failed or did not end on some rank; with what each rank said.
        """
        found = self.results.get(name, {})
        bad = [f"rank {rank}: {line['detail']}" for rank, line in sorted(found.items()) if not line["ok"]]
        missing = [rank for rank in range(self.nproc) if rank not in found]
        if bad or missing:
            lost = [f"case {name} did not end on ranks {missing}\n{self.launch.tails()}"] if missing else []
            raise AssertionError("\n".join([*bad, *lost]))
        return [found[rank]["detail"] for rank in range(self.nproc)]


def run_cases(
    worker: str | Path,
    nproc: int,
    names: Sequence[str] = (),
    *,
    timeout: float = 300.0,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> CaseReport:
    """Launch a worker file of `Cases` and collect its results; never raises for a failed case."""
    with tempfile.TemporaryDirectory(prefix="cases_") as folder:
        environment = {**(env or {}), "CASE_REPORTS": folder}
        result = launch(worker, nproc, *names, timeout=timeout, env=environment, fresh=fresh)
        results: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted(Path(folder).glob("*.jsonl")):
            for text in path.read_text().splitlines():
                line = json.loads(text)
                results.setdefault(line["case"], {})[line["rank"]] = line
    return CaseReport(result, results, nproc)


def reports_by_ranks(
    worker: str | Path, *, timeout: float = 300.0, env: Mapping[str, str] | None = None
) -> Callable[[int], CaseReport]:
    """The reports of a worker that has cases of its own for each number of ranks; each is launched once, when it is
    asked for."""
    return cache(lambda ranks: run_cases(worker, ranks, timeout=timeout, env=env))


class _Meeting:
    """Ranks tell each other through the store of the launcher that a case has ended."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.store = None
        if world > 1:
            import torch.distributed as dist

            self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def after(self, name: str, ok: bool) -> bool:
        """Whether all ranks ended the case; a rank that failed waits less long for the others."""
        if self.store is None:
            return True
        self.store.set(f"ended/{name}/{self.rank}", "1")
        patience = timedelta(seconds=PATIENCE_S if ok else PATIENCE_AFTER_FAILURE_S)
        try:
            self.store.wait([f"ended/{name}/{rank}" for rank in range(self.world)], patience)
        except RuntimeError:
            return False
        return True


def _attempt(function: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return True, function()
    except BaseException:
        return False, traceback.format_exc()


def _reset() -> None:
    """Take the layout of the last case down, keep the connection of all ranks."""
    if "megatron_telechat.parallel.state" in sys.modules:
        from megatron_telechat import parallel

        parallel.destroy(keep_world=True)


def _leave() -> None:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _environment(rank: int, nproc: int, port: int, extra: Mapping[str, str]) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(nproc),
        LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        # What torchrun sets: rank 0 joins the launcher's store and does not open a server of its own.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    environment.update(extra)
    return environment


class _Process(Protocol):
    """What the harness needs of a rank's process; `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


def _started(command: Sequence[str], environment: Mapping[str, str], out: str, err: str) -> subprocess.Popen[bytes]:
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


class _Zygote:
    """The harness's side of a process of `tests/zygote.py`."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "zygote.py"), str(theirs.fileno())],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                preexec_fn=_die_with_parent,
            )
        self._pending = b""
        self._codes: dict[int, int] = {}
        assert self._answer() == {"ready": True}

    def start(self, command: Sequence[str], environment: Mapping[str, str], out: str, err: str) -> _Forked:
        body = dict(command=command, environment=environment, folder=str(ROOT), stdout=out, stderr=err)
        self._socket.sendall(json.dumps(body).encode() + b"\n")
        while True:
            answer = self._answer()
            if "started" in answer:
                return _Forked(self, answer["started"])

    def code_of(self, pid: int, wait: bool) -> int | None:
        """Exit code of a rank, negative for a signal; None while it runs, unless that is waited for."""
        while pid not in self._codes:
            if not wait and b"\n" not in self._pending and not select.select([self._socket], [], [], 0)[0]:
                return None
            self._answer()
        return self._codes[pid]

    def _answer(self) -> dict[str, Any]:
        while b"\n" not in self._pending:
            data = self._socket.recv(1 << 16)
            if not data:
                raise RuntimeError(f"the process that forks the ranks has ended with {self._process.wait()}")
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        answer = json.loads(line)
        if "code" in answer:
            self._codes[answer["pid"]] = answer["code"]
        return answer


class _Forked:
    """A rank that a zygote has forked."""

    def __init__(self, zygote: _Zygote, pid: int):
        self._zygote, self.pid = zygote, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.code_of(self.pid, wait=False)
        return self.returncode

    def wait(self) -> int:
        self.returncode = self._zygote.code_of(self.pid, wait=True)
        assert self.returncode is not None
        return self.returncode


@cache
def _zygote(number: int) -> _Zygote:
    return _Zygote()


def _wait(processes: Sequence[_Process], deadline: float, grace: float) -> bool:
    """Wait for all to end; True when the deadline passed first."""
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if any(process.returncode not in (None, 0) for process in processes):
            deadline, grace = min(deadline, now + grace), float("inf")
        if now > deadline:
            return True
        time.sleep(0.02)
    return False


def _kill(process: _Process) -> None:
    """End a rank's whole session, children included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(path: str) -> str:
    return Path(path).read_text(errors="replace")
