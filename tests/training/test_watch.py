"""A rank that stands, that is slow or that is gone has a name: pulses, the monitor beside the ranks, slow ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import timeit
from pathlib import Path

import pytest

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.host import PULSE_DIR
from megatron_telechat.training.monitor import Job, Standing, Stillness, Verdict, hang_message, judge
from megatron_telechat.training.pulse import Activity, Beat, Phase, Pulse, pulse_path, read_pulses
from megatron_telechat.training.slow_ranks import SlowRanks
from megatron_telechat.training.watch import Watch
from tests.harness import ROOT, launch
from tests.training.runs import DENSE

PRETRAIN = ROOT / "pretrain" / "pretrain_telechat2.py"
IN_MODEL = (
    'Current thread 0x1 (most recent call first):\n  File "/x/megatron_telechat/model/mlp.py", line 9 in forward\n'
)
IN_COLLECTIVE = (
    'Thread 0x2 (most recent call first):\n  File "/usr/lib/python3/threading.py", line 1 in wait\n\n'
    'Current thread 0x1 (most recent call first):\n  File "/x/torch/distributed/distributed_c10d.py", line 2 in '
    'all_reduce\n  File "/x/megatron_telechat/training/step.py", line 3 in _reduce\n'
)


def beat(rank: int, phase: Phase, since_s: float, activity: Activity = Activity.TRAINING) -> Beat:
    return Beat(rank, rank, 100 + rank, "node7", 5, activity, phase, 12, since_s)


def test_a_pulse_says_what_a_rank_is_at(tmp_path):
    pulse = Pulse()
    pulse.enter(Phase.MODEL)
    pulse.open(tmp_path, 3, 1)
    (first,) = read_pulses(tmp_path)
    assert (first.rank, first.local_rank, first.pid, first.phase) == (3, 1, os.getpid(), Phase.MODEL)
    pulse.step = 12
    pulse.turn_to(Activity.TRAINING, Phase.FORWARD)
    with pulse.within(Activity.SAVING, Phase.WRITING):
        assert read_pulses(tmp_path)[0].where == "writing (saving), step 12"
    (last,) = read_pulses(tmp_path)
    assert last.where == "forward (training), step 13" and last.count > first.count
    assert abs(last.since_s - time.monotonic()) < 5
    with pytest.raises(ZeroDivisionError), pulse.within(Activity.SAVING, Phase.WRITING):
        raise ZeroDivisionError
    assert read_pulses(tmp_path)[0].phase is Phase.WRITING, "where it was when the error came"


def test_what_is_no_pulse_is_passed_over(tmp_path):
    pulse_path(tmp_path, 0).write_bytes(b"")
    pulse_path(tmp_path, 1).write_bytes(b"x" * 4096)
    assert read_pulses(tmp_path) == [] and read_pulses(tmp_path / "nowhere") == []


def test_a_change_of_phase_costs_next_to_nothing(tmp_path):
    """0.3 microseconds where nothing else runs; a busy machine gets ten times that."""
    pulse = Pulse()
    pulse.open(tmp_path, 0, 0)
    assert min(timeit.repeat(lambda: pulse.enter(7), number=5000, repeat=5)) / 5000 < 3e-6


@pytest.mark.parametrize(
    "phase, status, stack, standing",
    [
        (Phase.FORWARD, "stopped", IN_MODEL, Standing.STOPPED),
        (Phase.FORWARD, "running", IN_MODEL, Standing.AT_WORK),
        (Phase.FORWARD, "sleeping", IN_COLLECTIVE, Standing.WAITING),
        (Phase.LOSS_REDUCTION, "sleeping", IN_MODEL, Standing.WAITING),
        (Phase.WRITING, "disk-sleep", "", Standing.SILENT),
        (Phase.FORWARD, "zombie", "", Standing.GONE),
        (Phase.FAILED, "running", IN_MODEL, Standing.GONE),
    ],
)
def test_how_a_rank_stands(phase, status, stack, standing):
    assert judge(beat(0, phase, 1.0), status, stack).standing is standing


def test_a_rank_that_reads_a_number_may_wait_for_its_device():
    at = beat(0, Phase.LOSS_REDUCTION, 1.0)
    assert judge(at, "sleeping", IN_MODEL).why == "it waits for other ranks, or for its device"
    assert judge(at, "sleeping", IN_COLLECTIVE).why == "it waits for other ranks"


def test_the_message_names_the_cause_and_not_who_waits_longest():
    verdicts = [
        Verdict(beat(0, Phase.PIPELINE_EXCHANGE, 10.0), Standing.WAITING, "it waits"),
        Verdict(beat(1, Phase.FORWARD, 40.0), Standing.AT_WORK, "it does not wait for another rank"),
        Verdict(beat(2, Phase.FORWARD, 38.0), Standing.STOPPED, "its process is stopped"),
        Verdict(beat(3, Phase.PIPELINE_EXCHANGE, 20.0), Standing.WAITING, "it waits"),
    ]
    message, record = hang_message(verdicts, 100.0, Job("", "", 60, 60), 55.0)
    assert message.startswith(
        "hang: rank 2 (host node7, pid 102) stands in forward (training), step 13 since 62 s: its"
    )
    assert "2 in pipeline exchange (training), step 13; 1 in forward (training), step 13" in message
    assert (record["rank"], record["seconds"], record["on_another_node"]) == (2, 62.0, False)
    assert [one["standing"] for one in record["ranks"]] == ["waiting", "at_work", "stopped", "waiting"]
    waiting = [verdicts[0], verdicts[3]]
    message, record = hang_message(waiting, 100.0, Job("", "", 60, 60, nodes=4), 55.0)
    assert "look for the rank that stands on another node" in message and record["on_another_node"]


def test_only_time_in_which_nobody_moved_counts():
    still = Stillness()
    assert still.observe({0: 1, 1: 1}, 5.0) == 0
    assert still.observe({0: 1, 1: 1}, 5.0) == 5
    assert still.observe({0: 1, 1: 1}, 50.0, suspended=True) == 5, "Ctrl-Z, or a job that the cluster set aside"
    assert still.observe({0: 1, 1: 2}, 5.0) == 0


def test_a_rank_is_slow_against_those_with_the_same_layers():
    """Pipeline rank 1 has more to do than pipeline rank 0: nobody is slow for that."""
    slow = SlowRanks(1.5, [0, 0, 0, 1, 1, 1], [f"node{rank}" for rank in range(6)])
    times = [1.0, 1.1, 1.7, 3.0, 3.1, 2.9]
    fields, named = slow.observe(times, 30.0)
    assert fields["slowest_rank"] == 2 and fields["compute_over_median"] == pytest.approx(1.7 / 1.1)
    assert fields["compute_s_max"] == 1.7 and named == []
    assert slow.observe(times, 30.0)[1] == []
    (found,) = slow.observe(times, 30.0)[1]
    assert (found.rank, found.host, found.median_s, found.slow_s) == (2, "node2", 1.1, 90.0)
    assert found.event(30)["event"] == "slow_rank" and "rank 2 (host node2)" in found.line()
    assert slow.observe(times, 30.0)[1] == [], "named once"
    slow.observe([1.0] * 6, 30.0)
    assert [slow.observe(times, 30.0)[1] for _ in range(2)] == [[], []], "it was well in between"
    assert len(slow.observe(times, 30.0)[1]) == 1


def test_a_moment_a_stage_of_one_rank_and_a_factor_of_zero_name_nobody():
    short = SlowRanks(1.5, [0, 0], ["a", "b"])
    assert [short.observe([1.0, 9.0], 0.1)[1] for _ in range(20)] == [[]] * 20, "two seconds of noise"
    assert SlowRanks(1.5, [0, 1], ["a", "b"]).observe([1.0, 9.0], 60.0) == ({}, []), "no two hold the same layers"
    off = SlowRanks(0, [0, 0], ["a", "b"])
    assert [off.observe([1.0, 9.0], 60.0)[1] for _ in range(4)] == [[]] * 4


RANK = """
import os, sys, time
from megatron_telechat.config.schema import LoggingConfig, ParallelConfig, RunConfig
from megatron_telechat.training.pulse import PULSE, Activity, Phase
from megatron_telechat.training.watch import Watch
parallel = ParallelConfig(hang_timeout_minutes=float(sys.argv[2]))
watch = Watch(RunConfig(parallel=parallel, logging=LoggingConfig(run_dir=sys.argv[3])), os.environ)
PULSE.turn_to(Activity.TRAINING, Phase[sys.argv[1]])
print("up", flush=True)
while True:
    time.sleep(0.05)
    if sys.argv[1] == "OPTIMIZER":
        PULSE.enter(Phase.OPTIMIZER)
"""


def ranks(folder: Path, *phases: str, minutes: str = "0.015") -> list[subprocess.Popen]:
    """Processes with a pulse and no torch; the first one starts the monitor."""
    (folder / "pulse").mkdir()
    found = []
    for rank, phase in enumerate(phases):
        environment = {**os.environ, PULSE_DIR: str(folder / "pulse"), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment |= {"WORLD_SIZE": str(len(phases)), "LOCAL_WORLD_SIZE": str(len(phases))}
        command = [sys.executable, "-c", RANK, phase, minutes, str(folder)]
        errors = open(folder / f"{rank}.err", "w")
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
        found.append(process)
    for process in found:
        assert process.stdout is not None and process.stdout.readline() == b"up\n", (folder / "0.err").read_text()
    return found


@pytest.mark.heavy
def test_a_stopped_process_ends_its_node_with_its_name(tmp_path):
    processes = ranks(tmp_path, "PIPELINE_EXCHANGE", "FORWARD")
    try:
        processes[1].send_signal(signal.SIGSTOP)
        codes = [process.wait(timeout=20) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = (tmp_path / "0.err").read_text()
    assert codes == [-signal.SIGABRT] * 2, errors
    assert (
        errors.startswith("hang: rank 1 (host ")
        and errors.count("hang: ") == 1
        and "its process is stopped (SIGSTOP" in errors
    )
    record = json.loads((tmp_path / "hang.json").read_text())
    assert (record["rank"], record["pid"], record["phase"]) == (1, processes[1].pid, "forward")
    assert record["others"] == {"pipeline exchange (training), step 1": 1}
    stack = (tmp_path / "hang_stacks" / "rank_00000.txt").read_text()
    assert 'File "<string>"' in stack and not (tmp_path / "hang_stacks" / "rank_00001.txt").exists()


@pytest.mark.heavy
def test_ranks_that_move_and_jobs_that_are_suspended_are_left_alone(tmp_path):
    processes = ranks(tmp_path, "OPTIMIZER", "FORWARD")
    try:
        time.sleep(1.6)
        assert [process.poll() for process in processes] == [None, None], "one rank moves"
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(1.6)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        assert [process.poll() for process in processes] == [None, None], "both were stopped: on purpose"
        environment = {PULSE_DIR: str(tmp_path / "pulse"), "RANK": "7", "LOCAL_RANK": "7"}
        survivor = Watch(RunConfig(), environment)
        processes[1].kill()
        said = survivor.who_is_gone()
        survivor.close()
        assert said.startswith("rank 1 (host ") and said.endswith("is gone; it was at forward (training), step 1")
    finally:
        for process in processes:
            process.kill()


def run_and_hurt(tmp_path: Path, number: int, *flags: str) -> tuple:
    """Two real ranks; the second one gets a signal once the run has taken some steps."""
    run, pulse = tmp_path / "run", tmp_path / "pulse"
    pulse.mkdir()
    hurt: list[Beat] = []

    def watch() -> None:
        path, deadline = run / "metrics.jsonl", time.monotonic() + 90
        while time.monotonic() < deadline:
            if path.exists() and path.read_text().count("\n") > 20:
                hurt.append(read_pulses(pulse)[1])
                os.kill(hurt[0].pid, number)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    endless = [*DENSE, "--train-iters", "1000000", "--run-dir", str(run), *flags]
    result = launch(PRETRAIN, 2, *endless, env={PULSE_DIR: str(pulse)}, timeout=110)
    thread.join()
    return result, hurt[0], run


@pytest.mark.gloo
def test_a_stopped_rank_ends_the_job_with_its_name(tmp_path):
    """F5: not a time-out of gloo after ten minutes that names nobody."""
    begin = time.monotonic()
    result, hurt, run = run_and_hurt(tmp_path, signal.SIGSTOP, "--hang-timeout-minutes", "0.08")
    assert [rank.returncode for rank in result.ranks] == [-signal.SIGABRT] * 2, result.tails()
    assert f"hang: rank 1 (host {hurt.host}, pid {hurt.pid}) stands in" in result.ranks[0].stderr, result.tails()
    assert "its process is stopped (SIGSTOP" in result.ranks[0].stderr and time.monotonic() - begin < 90
    record = json.loads((run / "hang.json").read_text())
    assert record["rank"] == 1 and record["seconds"] < 60 and record["step"] >= 10
    assert "torch/distributed" in (run / "hang_stacks" / "rank_00000.txt").read_text()
    assert "compute_over_median" in (run / "metrics.jsonl").read_text().splitlines()[0]


@pytest.mark.gloo
@pytest.mark.slow
def test_a_lost_rank_is_named_by_the_others(tmp_path):
    result, hurt, _ = run_and_hurt(tmp_path, signal.SIGKILL)
    assert [rank.returncode for rank in result.ranks] == [6, -signal.SIGKILL], result.tails()
    assert f"lost contact with another rank: rank 1 (host {hurt.host}, pid {hurt.pid}) is gone; it was at" in (
        result.ranks[0].stderr
    )
