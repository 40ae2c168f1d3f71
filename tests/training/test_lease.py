"""One job writes in a run folder: who takes its lease, who is refused, and who stops."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_telechat.errors import LeaseError
from megatron_telechat.training import lease as module
from megatron_telechat.training.lease import LEASE_FILE, Claims, Holder, Lease, held
from tests.harness import ROOT
from tests.training.runs import DENSE

WORKER = Path(__file__).with_name("worker_lease.py")
PRETRAIN = ROOT / "pretrain" / "pretrain_telechat2.py"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1"
}


def leave(folder: Path, holder: Holder, age_s: float = 0.0) -> None:
    """A lease that somebody left."""
    path = folder / LEASE_FILE
    path.write_bytes(holder.to_bytes())
    os.utime(path, (time.time() - age_s,) * 2)


def take(folder: Path, steal: bool = False) -> tuple[Lease, list[str]]:
    said: list[str] = []
    lease = Lease(folder, said.append)
    lease.take(steal)
    return lease, said


def require(lease: Lease) -> None:
    Claims((lease.claim,))()


def elsewhere() -> Holder:
    """A process of another host."""
    return replace(Holder.this_process(), host="gpu17", boot="another", namespace="pid:[1]", pid=4711)


def test_a_free_folder_is_taken_and_given_back(tmp_path):
    with held([tmp_path / "run", tmp_path / "run", tmp_path / "run" / "checkpoints"], False, print) as leases:
        files = [tmp_path / "run" / LEASE_FILE, tmp_path / "run" / "checkpoints" / LEASE_FILE]
        assert all(json.loads(file.read_text())["pid"] == os.getpid() for file in files)
        assert not leases.lost
        written_elsewhere = pickle.loads(pickle.dumps(leases.claims))
        written_elsewhere()
    with pytest.raises(LeaseError, match="is gone"):
        written_elsewhere()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_job_that_lives_here_is_named_at_once(tmp_path):
    first, _ = take(tmp_path)
    began = time.monotonic()
    with pytest.raises(LeaseError, match=rf"process {os.getpid()} on host \S+, since (?s:.*)--steal-lock") as refused:
        take(tmp_path)
    assert time.monotonic() - began < 1 and refused.value.exit_code == 4
    require(first)
    assert sorted(os.listdir(tmp_path)) == [LEASE_FILE]


@pytest.mark.parametrize("change", ["pid", "start", "boot"])
def test_a_dead_process_of_this_host_is_succeeded_at_once(tmp_path, change):
    """Gone; its number given to another process; gone with an earlier boot."""
    me = Holder.this_process()
    dead = {"pid": replace(me, pid=2**22 + 1), "start": replace(me, start=me.start + 1), "boot": replace(me, boot="x")}
    leave(tmp_path, dead[change], age_s=11 if change == "boot" else 0)
    lease, said = take(tmp_path)
    assert len(said) == 1 and "its process is gone" in said[0]
    require(lease)
    assert sorted(os.listdir(tmp_path)) == [LEASE_FILE]


def test_a_job_of_another_host_is_refused_once_it_was_seen_to_live(tmp_path):
    leave(tmp_path, elsewhere())
    beating = threading.Timer(0.5, os.utime, [tmp_path / LEASE_FILE])
    beating.start()
    began = time.monotonic()
    with pytest.raises(LeaseError, match="process 4711 on host gpu17"):
        take(tmp_path)
    assert time.monotonic() - began < 2
    assert sorted(os.listdir(tmp_path)) == [LEASE_FILE]


def test_a_silent_job_of_another_host_is_succeeded_after_the_stated_time(tmp_path, monkeypatch):
    """The same for a container of this machine, whose processes have other numbers, and for a file that is no lease.
    This host's clock plays no part: it is two hours off."""
    monkeypatch.setattr(module.time, "time", lambda: 0.0)
    for holder in (elsewhere(), replace(Holder.this_process(), namespace="pid:[1]")):
        leave_at = os.stat(tmp_path).st_mtime
        path = tmp_path / LEASE_FILE
        path.write_bytes(holder.to_bytes())
        os.utime(path, (leave_at - module.STALE_S + 0.5,) * 2)
        began = time.monotonic()
        lease, said = take(tmp_path)
        assert 0.2 < time.monotonic() - began < 3 and "not heard of" in said[0] and "not touched for 60 s" in said[1]
        lease.release()
    (tmp_path / LEASE_FILE).write_text("{")
    os.utime(tmp_path / LEASE_FILE, (leave_at - 100,) * 2)
    assert "an unreadable lease" in take(tmp_path)[1][0]


def attempt_of_another_user(folder: Path, pid: int, view: str) -> dict:
    """What a process says that tries to take the lease, and to which /proc does not show ``pid``."""
    command = [sys.executable, str(WORKER), str(folder), str(pid), view]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=ENVIRONMENT, timeout=60)
    if done.returncode == 77:
        pytest.skip("needs root, and a kernel that gives namespaces")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture()
def open_folder():
    """A folder in which every user of the machine may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.mark.heavy
@pytest.mark.parametrize("view", ["hidden", "noaccess", "made-up", "foreign"])
def test_a_job_that_proc_does_not_show_is_not_taken_for_dead(open_folder, view):
    """That of another user under hidepid. It lives, and is refused once its lease was seen to be touched."""
    with held([open_folder], False, print) as leases:
        found = attempt_of_another_user(open_folder, os.getpid(), view)
        assert f"process {os.getpid()} on host" in found["error"] and found["said"] == [] and found["seconds"] < 5
        assert not leases.lost
        leases.claims()


@pytest.mark.heavy
def test_where_proc_shows_nobody_the_kernel_says_who_is_gone_and_time_the_rest(open_folder):
    """A job of which nothing is left is succeeded at once. A later process may have its number, which only /proc could
    tell: then the time of the lease decides."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leave(open_folder, replace(Holder.this_process(), pid=dead.pid))
    found = attempt_of_another_user(open_folder, os.getpid(), "hidden")
    assert "its process is gone" in found["said"][0] and found["error"] == "" and found["seconds"] < 1
    (open_folder / LEASE_FILE).unlink()
    me = Holder.this_process()
    leave(open_folder, replace(me, start=me.start + 1), age_s=module.STALE_S - 1)
    found = attempt_of_another_user(open_folder, os.getpid(), "hidden")
    assert found["error"] == "" and "not heard of" in found["said"][0] and "not touched for 60 s" in found["said"][1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no boots and namespaces to be told apart")
@pytest.mark.parametrize("unknown", ["boot", "namespace"])
def test_who_does_not_know_where_its_number_counts_is_not_taken_for_dead(tmp_path, unknown):
    """A container that may not read them, and another one of the same name."""
    blind = Holder(**{**asdict(Holder.this_process()), "pid": 2**22 + 1, unknown: ""})
    for holder, mine in ((blind, Holder.this_process()), (replace(blind, **{unknown: "known"}), blind)):
        assert holder.lives(mine, 30.0) is None


def test_a_stolen_lease_stops_its_holder_before_the_next_write(tmp_path):
    first, _ = take(tmp_path)
    second, said = take(tmp_path, steal=True)
    assert "stolen" in said[0] and not first.lost
    first.beat()
    assert first.lost
    with pytest.raises(LeaseError, match=f"was taken by process {os.getpid()}"):
        require(first)
    first.release()
    require(second)
    (tmp_path / LEASE_FILE).unlink()
    with pytest.raises(LeaseError, match="is gone"):
        require(second)


def test_of_many_jobs_that_find_a_dead_lease_one_takes_it(tmp_path):
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        leave(folder, replace(Holder.this_process(), pid=2**22 + 1))
        leases = [Lease(folder) for _ in range(6)]
        won: list[Lease] = []

        def attempt(lease: Lease) -> None:
            try:
                lease.take()
                won.append(lease)
            except LeaseError:
                pass

        threads = [threading.Thread(target=attempt, args=[lease]) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        require(won[0])
        assert sorted(os.listdir(folder)) == [LEASE_FILE]


def test_a_take_over_that_was_cut_off_holds_nobody_up(tmp_path):
    dead = replace(Holder.this_process(), pid=2**22 + 1)
    leave(tmp_path, dead)
    claim = tmp_path / f".{LEASE_FILE}-claim-{dead.identifier}"
    claim.touch()
    os.utime(claim, (time.time() - 20,) * 2)
    require(take(tmp_path)[0])
    assert sorted(os.listdir(tmp_path)) == [LEASE_FILE]


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.os, "link", refuse)
    lease, _ = take(tmp_path)
    require(lease)
    with pytest.raises(LeaseError):
        take(tmp_path)
    before = os.stat(tmp_path / LEASE_FILE).st_mtime_ns
    time.sleep(0.02)
    lease.beat()
    assert os.stat(tmp_path / LEASE_FILE).st_mtime_ns > before


def pretrain(run_dir: Path, *more: str) -> list[str]:
    return [sys.executable, str(PRETRAIN), *DENSE, "--train-iters", "1000000", "--run-dir", str(run_dir), *more]


@pytest.mark.gloo
def test_two_jobs_on_one_folder(tmp_path):
    """The real command: a second job is refused while the first trains; one with --steal-lock stops the first, which
    writes nothing more; the lease of a killed job is taken over by its restart."""
    run = tmp_path / "run"

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            pretrain(run, *more), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def steps() -> int:
        path = run / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def wait_for(count: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 90
        while steps() < count:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    first = start()
    second = None
    try:
        wait_for(3, first)
        leftover = run / "checkpoints" / "iter_0000002.tmp-0123abcd"
        leftover.mkdir()
        began = time.monotonic()
        refused = subprocess.run(pretrain(run), env=ENVIRONMENT, capture_output=True, text=True)
        assert refused.returncode == 4 and time.monotonic() - began < 5, refused.stderr
        assert f"belongs to another job: process {first.pid} on host" in refused.stderr and leftover.exists()
        second = start("--steal-lock", "--save-interval", "5")
        output, _ = first.communicate(timeout=90)
        assert first.returncode == 4, output
        assert f"was taken by process {second.pid} on host" in output and "Traceback" not in output
        count = steps()
        wait_for(count + 1, second)
        second.send_signal(signal.SIGKILL)
        second.wait()
        again = subprocess.run(
            pretrain(run, "--exit-interval", "5"), env=ENVIRONMENT, capture_output=True, text=True, timeout=90
        )
        assert again.returncode == 0 and "its process is gone" in again.stderr, again.stderr
        assert not leftover.exists() and not (run / LEASE_FILE).exists()
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
