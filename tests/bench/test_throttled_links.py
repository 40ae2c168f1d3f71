"""The links of the benches: they are as slow as asked, and nothing of them stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
LINKS = str(BENCH / "throttled_links.py")
WORKER = """
import json, os, sys, time
import torch, torch.distributed as dist
sys.path.insert(0, {bench!r})
from throttled_links import Links
dist.init_process_group("gloo")
data = torch.ones(250_000)
def seconds():
    dist.barrier()
    begin = time.perf_counter()
    dist.broadcast(data, 0)
    dist.barrier()
    return time.perf_counter() - begin
times = [seconds()]
if dist.get_rank() == 0:
    Links.of_this_rank().set_rate(40)
times.append(seconds())
if dist.get_rank() == 0:
    print(json.dumps(times), flush=True)
dist.destroy_process_group()
"""


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("throttled-")}


def can_make_links() -> bool:
    if os.geteuid() != 0:
        return False
    name = f"test{os.getpid()}"
    try:
        made = subprocess.run([sys.executable, LINKS, "up", "--name", name], capture_output=True).returncode == 0
        subprocess.run([sys.executable, LINKS, "down", "--name", name], capture_output=True)
    except OSError:
        return False
    return made


needs_links = pytest.mark.skipif(not can_make_links(), reason="network namespaces need root and iproute2")


@needs_links
@pytest.mark.gloo
def test_rate_and_reshaping(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(bench=str(BENCH)))
    command = [sys.executable, LINKS, "run", "-n", "2", "--mbit", "160", "--timeout", "60", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    fast, slow = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    # 1 MB: 50 ms at 160 Mbit/s, 200 ms at 40; no link is faster than its rate, whatever the machine does.
    assert fast >= 0.045 and slow >= 0.18


@pytest.mark.heavy
@needs_links
def test_a_failing_rank_ends_the_run(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(7)\ntime.sleep(60)\n")
    begin = time.monotonic()
    done = subprocess.run([sys.executable, LINKS, "run", "-n", "3", str(worker)], timeout=50)
    assert done.returncode == 7 and time.monotonic() - begin < 30


@pytest.mark.heavy
@needs_links
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_after_a_signal(tmp_path, number):
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import os, time\nopen({str(tmp_path)!r} + '/' + os.environ['RANK'], "
        f"'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, LINKS, "run", "-n", "2", str(worker)], start_new_session=True)
    until = time.monotonic() + 30
    while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert any(name.startswith(f"throttled-{process.pid}-") for name in namespaces())
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert not any(name.startswith(f"throttled-{process.pid}-") for name in namespaces())
    assert not any(Path("/proc", (tmp_path / rank).read_text()).exists() for rank in "01")


@pytest.mark.heavy
def test_says_what_is_missing(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, LINKS, "up"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "apt-get install iproute2" in done.stderr
