"""Ctrl-C, a closed terminal and SIGTERM in every phase of the real command: one checkpoint, code 75, no traceback."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from megatron_telechat.errors import EXIT_SIGNAL
from megatron_telechat.training.signals import StopRequests
from tests.harness import ROOT
from tests.training.runs import DENSE

PRETRAIN = ROOT / "pretrain" / "pretrain_telechat2.py"
FLAGS = [*DENSE, "--train-iters", "1000000"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1"
}


def saved(run_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in (run_dir / "checkpoints").glob("iter_*/manifest.json"))


def wait_until(there, process: subprocess.Popen, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not there():
        assert time.monotonic() < deadline and process.poll() is None, f"it did not come; exit {process.poll()}"
        time.sleep(0.02)


def steps_in(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.mark.gloo
def test_ctrl_c_under_torchrun_saves_on_all_ranks(tmp_path):
    """The launcher passes SIGINT on; its own code is 1 whatever the ranks' were. The note on a run that saves nothing
    comes before."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(PRETRAIN)]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [*command, *FLAGS, "--run-dir", str(run)], env=ENVIRONMENT, stdout=out, stderr=out, cwd=ROOT
        )
        try:
            wait_until(lambda: steps_in(run) >= 15, process)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        finally:
            process.kill()
    output = (tmp_path / "out").read_text()
    last = max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert saved(run) == [f"iter_{last:07d}"], output
    assert output.count("SIGINT: saving a checkpoint, then the run ends; send it again to exit at once") == 1
    assert f"stop request: stopped after step {last}" in output and "KeyboardInterrupt" not in output
    assert re.search(r"note: the run takes .* \(measured\) and has no save interval.*--save-interval \d+", output)


@pytest.mark.slow
def test_a_closed_terminal_stops_an_evaluation_and_the_run_saves(tmp_path):
    """SIGHUP in the middle of an endless evaluation, with an output that nobody reads any more."""
    run = tmp_path / "run"
    flags = [*FLAGS, "--eval-interval", "3", "--eval-iters", "100000", "--run-dir", str(run)]
    terminal, inner = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, str(PRETRAIN), *flags],
        env=ENVIRONMENT,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        preexec_fn=take_terminal,
    )
    os.close(inner)
    try:
        wait_until(lambda: steps_in(run) >= 3, process)
        time.sleep(0.5)
        os.close(terminal)
        process.wait(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert saved(run) == ["iter_0000003"], "the step before the evaluation, no other one"
    assert "valid_loss" not in (run / "metrics.jsonl").read_text()


@pytest.mark.heavy
def test_ctrl_c_before_the_first_step(tmp_path):
    """While torch is imported, or the model is built: there is nothing to save."""
    run = tmp_path / "run"
    code = (
        "import sys; from megatron_telechat.cli import pretrain; from megatron_telechat.training import loop\n"
        "loop.build_datasets = lambda *a: (print('indexing', flush=True), __import__('time').sleep(60))\n"
        "sys.exit(pretrain.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *FLAGS, "--run-dir", str(run)],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "indexing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert errors.strip().splitlines()[-1].startswith("stopped before the first step") and "Traceback" not in errors
    assert saved(run) == []


def child(body: str) -> subprocess.Popen:
    """A process without torch that has printed "up"."""
    code = f"import os, signal, sys, time\nfrom pathlib import Path\n{body}"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    return process


LISTENS = (
    "from megatron_telechat.training.signals import StopRequests\nrequests = StopRequests(Path('.'), False, "
    "speaks=True)\n"
)
WAITS = "print('up', flush=True)\nfor _ in range(600): time.sleep(0.05)"


@pytest.mark.heavy
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_at_once(second):
    """Under torchrun the second one comes as SIGTERM."""
    process = child(LISTENS + WAITS)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n" and "send it again to exit at once" in process.stderr.readline()
    process.send_signal(second)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -second and errors == ""


@pytest.mark.heavy
def test_sigterm_twice_is_one_request():
    process = child(LISTENS + WAITS.replace("time.sleep(0.05)", "(time.sleep(0.05), requests.asked and sys.exit(9))"))
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 9


@pytest.mark.heavy
def test_a_tool_ends_on_ctrl_c_with_a_line():
    process = child(f"from megatron_telechat.cli.tool import run_tool\ndef tool(argv):\n    "
                    f"{WAITS.replace(chr(10), chr(10) + '    ')}\n"
                    "sys.exit(run_tool(tool, []))")  # fmt: skip
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_what_is_ignored_on_purpose_stays_ignored(tmp_path):
    """nohup and background jobs of a script."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        requests = StopRequests(tmp_path, watch_files=False)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.poll() == (False, False)
        requests.close()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.gloo
def test_a_time_limit_saves_and_ends_the_run(tmp_path):
    run = tmp_path / "run"
    flags = [*FLAGS, "--exit-duration-in-mins", "0.001", "--run-dir", str(run)]
    done = subprocess.run(
        [sys.executable, str(PRETRAIN), *flags], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == EXIT_SIGNAL and saved(run) == ["iter_0000001"], done.stdout + done.stderr
    assert "stopped after step 1; run the same command again to continue" in done.stdout


@pytest.mark.heavy
def test_torchruns_last_lines_hold_our_error(tmp_path):
    """The file that torchrun reads for the cause of a failure, in its form."""
    path = tmp_path / "attempt_0" / "0" / "error.json"
    environment = {**ENVIRONMENT, "TORCHELASTIC_ERROR_FILE": str(path), "RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, str(PRETRAIN), "--preset", "telechat2-tiny", "--data-path", "nowhere"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    message = json.loads(path.read_text())["message"]
    assert done.returncode == 2 and "nowhere.bin" in message["message"] and "nowhere.bin" in done.stderr
    assert int(message["extraInfo"]["timestamp"]) > 0
