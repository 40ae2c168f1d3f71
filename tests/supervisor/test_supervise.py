"""The supervisor over plain programs: codes, restarts, signals, ends, nodes. Training under it: test_training.py."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_telechat.supervisor import nodes
from megatron_telechat.supervisor.nodes import free_port
from tests.harness import ROOT

pytestmark = pytest.mark.heavy

LAUNCH = [sys.executable, str(ROOT / "tools" / "launch.py")]
CLUSTER = ("RANK", "WORLD_SIZE", "PET_", "SLURM_", "OMPI_", "TORCHELASTIC")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTER)}


def start(options: Sequence[str], shell: str, **env: str) -> subprocess.Popen[str]:
    """Ranks that run a line of shell."""
    return subprocess.Popen(
        [*LAUNCH, *options, "--no-python", "bash", "-c", shell],
        env={**ENVIRONMENT, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(options: Sequence[str], shell: str, **env: str) -> tuple[int, list[str], str]:
    """(exit code, sorted lines of stdout, stderr)"""
    process = start(options, shell, **env)
    try:
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, sorted(out.splitlines()), errors


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_ranks_get_torchruns_words():
    shell = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $TORCHELASTIC_RESTART_COUNT"
    code, lines, _ = outcome(["--standalone", "--nproc_per_node=2"], shell)
    assert (code, lines) == (0, ["0 2 0 2 127.0.0.1 0", "1 2 1 2 127.0.0.1 0"])


def test_what_would_come_again_is_not_restarted():
    """The others may say it too, before they are ended."""
    shell = "[ $RANK = 1 ] && exit $CODE; sleep 0.3; echo said; exit $CODE"
    jobs = {code: start(["--nproc-per-node", "2"], shell, CODE=str(code)) for code in (2, 3, 4, 5, 75)}
    for code, job in jobs.items():
        out, errors = job.communicate(timeout=30)
        assert (job.returncode, out) == (code, "said\n") and "restart" not in errors


def test_a_lost_rank_ends_the_others_at_once_and_all_start_again(tmp_path):
    """With another port; until it is over, or nothing new was saved for so many times."""
    shell = (
        f"echo $TORCHELASTIC_RESTART_COUNT $MASTER_PORT; [ -e {tmp_path}/done ] && exit 0; "
        f"if [ $RANK = 1 ]; then touch {tmp_path}/done; kill -9 $$; fi; sleep 100"
    )
    began = time.monotonic()
    code, lines, errors = outcome(["--nproc-per-node", "2"], shell)
    assert code == 0 and time.monotonic() - began < 10, errors
    attempts, ports = zip(*(line.split() for line in lines), strict=True)
    assert attempts == ("0", "0", "1", "1") and len(set(ports)) == 2
    assert re.search(r"rank 1 on \S+: killed by SIGKILL; restart 1\n", errors)


def test_it_gives_up_in_words_with_the_code_of_the_rank():
    code, _, errors = outcome(["--nproc-per-node", "2", "--max-restarts-without-progress", "2"], "kill -6 $$")
    assert code == 134 and "restart 1" in errors
    assert "not started again: 2 times in a row without a new checkpoint" in errors
    code, _, errors = outcome(["--max-restarts", "1"], "exit 6")
    assert code == 6 and "not started again: --max-restarts 1" in errors


def test_the_first_cause_is_named_not_those_that_lost_contact():
    shell = "[ $RANK = 0 ] && exit 6; sleep 0.2; [ $RANK = 2 ] && kill -11 $$; sleep 0.1; exit 6"
    code, _, errors = outcome(["--nproc-per-node", "3", "--max-restarts", "0"], shell)
    assert code == 139 and "rank 2" in errors


def test_a_signal_is_passed_on_and_the_save_is_waited_for():
    shell = "trap 'sleep 1; echo saved $RANK; exit 75' TERM USR1; echo up; while :; do sleep 0.05; done"
    jobs = {number: start(["--nproc-per-node", "2"], shell) for number in (signal.SIGTERM, signal.SIGUSR1)}
    for number, job in jobs.items():
        assert [job.stdout.readline() for _ in range(2)] == ["up\n"] * 2
        job.send_signal(number)
    for number, job in jobs.items():
        out, errors = job.communicate(timeout=30)
        assert job.returncode == 75 and sorted(out.splitlines()) == ["saved 0", "saved 1"], errors
        assert f"{number.name}: passed to all ranks" in errors


def test_a_rank_that_does_not_listen_yet_had_nothing_to_save():
    process = start(["--nproc-per-node", "2"], "echo up; exec sleep 100")
    try:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 75
    finally:
        process.kill()


def test_a_stop_between_two_attempts():
    process = start(["--max-restarts-without-progress", "9"], "exit 1")
    try:
        while "in 2 s" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 75
    finally:
        process.kill()


def test_nothing_outlives_a_killed_supervisor():
    process = start(["--nproc-per-node", "2"], "echo $$; trap '' TERM HUP INT; while :; do sleep 0.05; done")
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_rank_has_started_ends_with_it():
    process = start(["--max-restarts", "0"], "sleep 100 & echo $!; kill -9 $$")
    child = int(process.stdout.readline())
    assert process.wait(timeout=20) == 137
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_nodes_are_one_job(tmp_path):
    """Node 1 has more ranks. A rank of it is lost: all start again. Then its supervisor is killed, and comes back."""
    port = free_port()
    shell = (
        f"echo $RANK $WORLD_SIZE $LOCAL_RANK $GROUP_RANK; cd {tmp_path}; n=$TORCHELASTIC_RESTART_COUNT; "
        "[ $n = 0 ] && [ $RANK = 2 ] && kill -9 $$; "
        "[ $n = 1 ] && [ $RANK = 1 ] && echo $PPID > agent.tmp && mv agent.tmp agent; "
        "[ $n = 2 ] && exit 0; exec sleep 100"
    )
    options = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts-without-progress", "9"]
    second = [*options, "--nproc-per-node", "2", "--node-rank", "1"]
    leader, follower = start([*options, "--node-rank", "0"], shell), start(second, shell)
    again = None
    try:
        deadline = time.monotonic() + 40
        while not (tmp_path / "agent").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(int((tmp_path / "agent").read_text()), signal.SIGKILL)
        assert follower.wait(timeout=10) == -9
        again = start(second, shell)
        out, errors = leader.communicate(timeout=30)
        assert leader.returncode == 0 and again.wait(timeout=10) == 0, errors
        assert "restart 2" in errors and "lost contact with" in errors
        assert out.splitlines() == ["0 3 0 0"] * 3
    finally:
        for process in (leader, follower, again):
            if process is not None:
                process.kill()


def test_a_stop_of_one_node_stops_all():
    port = free_port()
    options = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    shell = "trap 'exit 75' TERM; echo up; while :; do sleep 0.05; done"
    nodes = [start([*options, "--node-rank", str(node)], shell) for node in (0, 1)]
    try:
        assert [node.stdout.readline() for node in nodes] == ["up\n"] * 2
        nodes[1].send_signal(signal.SIGTERM)
        assert [node.wait(timeout=20) for node in nodes] == [75, 75]
    finally:
        for node in nodes:
            node.kill()


ALL_OF_A_NODE = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4",
}
NOBODY = "--nnodes 2 --node-rank 1 --master-addr 127.0.0.1 --master-port 9 --join-timeout 0.1"


WRONG = [
    ("--nnodes 2:4", {}, "--nnodes is '2:4'"),
    ("--nproc-per-node gpu", {}, "--nproc-per-node is 'gpu'"),
    ("", {"PET_NPROC_PER_NODE": "auto"}, "environment variable PET_NPROC_PER_NODE"),
    ("--nnodes 2", {}, "none is named to lead"),
    ("--max-restart 1", {}, "unrecognized arguments: --max-restart"),
    ("", ALL_OF_A_NODE, "4 processes of a node"),
    (NOBODY, {}, "node 0 at 127.0.0.1:9 was not there"),
]


def test_a_wrong_command_is_said():
    jobs = [(start(options.split(), "true", **env), message) for options, env, message in WRONG]
    for job, message in jobs:
        _, errors = job.communicate(timeout=30)
        assert job.returncode in (2, 6) and message in errors and "Traceback" not in errors, errors


def test_a_wrong_configuration_is_said_once_and_starts_nothing(tmp_path):
    program = [
        str(ROOT / "pretrain" / "pretrain_telechat2.py"),
        "--preset",
        "telechat2-tiny",
        "--run-dir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*LAUNCH, "--nproc-per-node", "3", *program], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count("no training data") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nodes_and_ranks_of_the_cluster():
    """Kubeflow's variables, and a Slurm step of one task a node."""
    shell = "echo $RANK $WORLD_SIZE"
    pet = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"}
    assert outcome([], shell, **pet)[:2] == (0, ["0 2", "1 2"])
    step = {"SLURM_JOB_ID": "3", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    step |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "MASTER_ADDR": "127.0.0.1"}
    step["MASTER_PORT"] = str(free_port())
    nodes = [start(["--nproc-per-node", "2"], shell, **step, SLURM_PROCID=str(node)) for node in (0, 1)]
    try:
        assert sorted("".join(node.communicate(timeout=20)[0] for node in nodes).split("\n"))[1:] == [
            f"{rank} 4" for rank in range(4)
        ]
    finally:
        for node in nodes:
            node.kill()


@pytest.mark.parametrize("given", ["32768 60999", "1024 60000", "1024 65535", ""])
def test_a_free_port_is_none_that_the_system_gives_to_others(tmp_path, monkeypatch, given):
    """Where it gives all, or does not say which, there is a port all the same."""
    monkeypatch.setattr(nodes, "_SYSTEM_PORTS", tmp_path / "range")
    (tmp_path / "range").write_text(given.replace(" ", "\t"))
    low, high = map(int, (given or "32768 65535").split())
    for _ in range(5):
        port = nodes.free_port()
        assert not low <= port <= high or given == "1024 65535"
        with socket.socket() as taken:
            taken.bind(("", port))
