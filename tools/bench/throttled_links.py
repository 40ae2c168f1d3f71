#!/usr/bin/env python3
"""Ranks of one machine with real, rate-limited links between them.

    python tools/bench/throttled_links.py run -n 2 --mbit 400 [--pin] SCRIPT ARGS     up, run, down
    python tools/bench/throttled_links.py up -n 4 --mbit 1000                         leave it up:
    python tools/bench/throttled_links.py mbit 200                                      reshape every link
    python tools/bench/throttled_links.py show                                          links and what went over them
    python tools/bench/throttled_links.py exec 0 COMMAND                                in the network of rank 0
    python tools/bench/throttled_links.py down

Every rank gets a network namespace with one interface, ``nic0``, shaped on its way out by ``tc tbf``. Two ranks are
joined directly; more meet at a bridge in a namespace of its own, whose ports are shaped too: every rank then has a
full-duplex card of that rate. TCP is told what holds between machines of one rack: no slow start after a pause, and
small socket buffers, so that a short message does not queue behind megabytes. The shaper's bucket is small (64 kB): a
large one would let short messages through at the speed of memory.

A run is killed as a whole when one rank fails, when the time is over, or on Ctrl-C, and its namespaces are removed.
Only namespaces called ``throttled-*`` are ever touched; ``down`` also removes those of runs that were killed the hard
way.

Gloo's all-to-all uses such a link in one direction at a time: count on twice the time of the bytes, or measure the link
alone.

Needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN) and iproute2; benches that use links run without them under any torchrun.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "throttled-"
INTERFACE = "nic0"
SUBNET = "10.90.0"
PORT = 29500
MTU = 9000
BURST = "64kb"
# The namespace's own settings; the host's stay as they are.
SETTINGS = {
    "net/ipv4/tcp_congestion_control": "reno",
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/tcp_wmem": "4096 262144 524288",
}
LINKS_VARIABLE = "THROTTLED_LINKS"
"""Environment variable with ``NAME RANKS`` of the links that a rank runs on; see :meth:`Links.of_this_rank`."""
TIMEOUT_CODE = 124
_PR_SET_PDEATHSIG = 1


class LinksError(Exception):
    """The links cannot be made; the message says what to do."""


def why_not() -> str | None:
    """What is missing on this machine, with the line that fixes it; None if links can be made."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: apt-get install iproute2 (or: dnf install iproute iproute-tc)"
    if os.geteuid() != 0:
        return f"network namespaces need root: sudo {sys.executable} {' '.join(sys.argv)}"
    return None


def _tool(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        hint = ""
        if "not permitted" in done.stderr or "denied" in done.stderr:
            hint = (
                "\n  in a container: docker run --cap-add NET_ADMIN --cap-add SYS_ADMIN --security-opt "
                "apparmor=unconfined ..."
            )
        raise LinksError(f"{' '.join(command)}: {done.stderr.strip()}{hint}")
    return done.stdout


@dataclass(frozen=True)
class Links:
    """One namespace a rank, joined and shaped.

    Args:
        name: keeps several sets of links apart.
        size: ranks.
    """

    name: str
    size: int

    @classmethod
    def of_this_rank(cls) -> Links | None:
        """The links that this process was started on, or None; any rank may reshape them."""
        value = os.environ.get(LINKS_VARIABLE)
        return cls(value.split()[0], int(value.split()[1])) if value else None

    def namespace(self, rank: int) -> str:
        return f"{PREFIX}{self.name}-r{rank}"

    @property
    def switch(self) -> str:
        return f"{PREFIX}{self.name}-switch"

    def address(self, rank: int) -> str:
        return f"{SUBNET}.{rank + 1}"

    def up(self, mbit: float | None = None) -> None:
        """Make the namespaces and join them.

        Raises:
            LinksError: something is missing, or links of this name are there already.
        """
        problem = why_not()
        if problem:
            raise LinksError(problem)
        if self._namespaces():
            raise LinksError(f"links {self.name!r} are up already: {sys.executable} {__file__} down --name {self.name}")
        try:
            self._build()
            self.set_rate(mbit)
        except BaseException:
            self.down()
            raise

    def _build(self) -> None:
        for rank in range(self.size):
            space = self.namespace(rank)
            _tool("ip", "netns", "add", space)
            _tool("ip", "-n", space, "link", "set", "lo", "up")
            script = "; ".join(f"echo '{value}' > /proc/sys/{key}" for key, value in SETTINGS.items())
            _tool("ip", "netns", "exec", space, "sh", "-ec", script)
        end = ("mtu", str(MTU), "type", "veth", "peer", "name")
        if self.size == 2:
            first, second = self.namespace(0), self.namespace(1)
            _tool("ip", "link", "add", INTERFACE, "netns", first, *end, INTERFACE, "netns", second, "mtu", str(MTU))
        else:
            _tool("ip", "netns", "add", self.switch)
            _tool("ip", "-n", self.switch, "link", "add", "bridge", "mtu", str(MTU), "type", "bridge")
            _tool("ip", "-n", self.switch, "link", "set", "bridge", "up")
            for rank in range(self.size):
                port, space = f"port{rank}", self.namespace(rank)
                _tool("ip", "link", "add", INTERFACE, "netns", space, *end, port, "netns", self.switch, "mtu", str(MTU))
                _tool("ip", "-n", self.switch, "link", "set", port, "master", "bridge", "up")
        for rank in range(self.size):
            space = self.namespace(rank)
            _tool("ip", "-n", space, "addr", "add", f"{self.address(rank)}/24", "dev", INTERFACE)
            _tool("ip", "-n", space, "link", "set", INTERFACE, "up")

    def set_rate(self, mbit: float | None) -> None:
        """Reshape every link, also while ranks run; None takes the limit away."""
        ends = [(self.namespace(rank), INTERFACE) for rank in range(self.size)]
        if self.size != 2:
            ends += [(self.switch, f"port{rank}") for rank in range(self.size)]
        for space, device in ends:
            if mbit is None:
                _tool("tc", "-n", space, "qdisc", "del", "dev", device, "root", check=False)  # there may be none
            else:
                rate = f"{mbit:.3f}mbit"
                _tool("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf",
                      "rate", rate, "burst", BURST, "limit", "256mb")  # fmt: skip

    def show(self) -> str:
        return "\n".join(
            f"== {space}\n" + _tool("tc", "-n", space, "-s", "qdisc", "show") for space in self._namespaces()
        )

    def down(self) -> None:
        """Remove the namespaces, and with them the links; none is needed to be there."""
        for space in self._namespaces():
            _tool("ip", "netns", "del", space, check=False)

    def _namespaces(self) -> list[str]:
        return [space for space in _all_namespaces() if space.startswith(f"{PREFIX}{self.name}-")]

    def enter(self, rank: int) -> list[str]:
        """What goes before a command so that it runs in the network of a rank."""
        return ["ip", "netns", "exec", self.namespace(rank)]


def _all_namespaces() -> list[str]:
    return [line.split()[0] for line in _tool("ip", "netns", "list").splitlines() if line.startswith(PREFIX)]


def remove_leftovers() -> None:
    """Namespaces of runs whose process is gone; a run's links are named after its process."""
    for space in _all_namespaces():
        owner = space[len(PREFIX) :].rsplit("-", 1)[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _tool("ip", "netns", "del", space, check=False)


@contextmanager
def links_up(size: int, mbit: float | None = None) -> Iterator[Links]:
    """Links for the length of a block, removed however it ends (SIGTERM included)."""
    links = Links(str(os.getpid()), size)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        links.up(mbit)
        yield links
    finally:
        links.down()
        signal.signal(signal.SIGTERM, before)


def run_ranks(
    command: Sequence[str],
    size: int,
    links: Links | None = None,
    pin: bool = False,
    timeout: float = 1800.0,
    env: Mapping[str, str] | None = None,
) -> int:
    """One process a rank, as torchrun would start them; returns the first exit code that is not 0, or 124 on a timeout.

    Args:
        command: the same for all.
        size: ranks.
        links: the network of each; None: all on the loopback interface.
        pin: rank r on core r, modulo their number.
        timeout: seconds until all are killed.
        env: variables to add.
    """
    store, where = None, {"MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE}
    if links is None:
        import torch.distributed as dist

        # A store in this process, on a port that is bound at once: no two runs can meet.
        # Public, and missing in torch's __all__.
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                 "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    else:
        where |= {"MASTER_ADDR": links.address(0), LINKS_VARIABLE: f"{links.name} {links.size}"}
    cores = sorted(os.sched_getaffinity(0))
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(size):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            core = cores[rank % len(cores)] if pin else None
            processes.append(
                subprocess.Popen(
                    [*(links.enter(rank) if links else []), *command],
                    env={"OMP_NUM_THREADS": "1", **os.environ, **(env or {}), **where, **numbers},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=lambda core=core: _prepare(core),
                )
            )
        return _wait(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        del store


def start_ranks(command: Sequence[str], size: int, links: bool, pin: bool, timeout: float) -> int:
    """The ranks of a bench, over throttled links if these are wanted; see :func:`run_ranks`.

    Args:
        command: python, its options, the script and its arguments.
        links: make links for this run; 2 is returned, with what is missing on stderr, where that is impossible.
    """
    arguments: dict[str, Any] = dict(size=size, pin=pin, timeout=timeout)
    if not links:
        return run_ranks(command, **arguments)
    try:
        with links_up(size) as made:
            return run_ranks(command, links=made, **arguments)
    except LinksError as error:
        script = next(part for part in command if part.endswith(".py"))
        print(
            f"{Path(script).stem}: {error}\nwithout links: torchrun --nproc-per-node {size} {script}", file=sys.stderr
        )
        return 2


def _prepare(core: int | None) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank dies with this process, however that ends
    if core is not None:
        os.sched_setaffinity(0, {core})


def _wait(processes: Sequence[subprocess.Popen], until: float) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed if failed > 0 else 128 - failed
        if None not in codes:
            return 0
        if time.monotonic() > until:
            print("time is over: all ranks are killed", file=sys.stderr)
            return TIMEOUT_CODE
        time.sleep(0.02)


def _rate(text: str) -> float | None:
    return None if text == "none" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {name: commands.add_parser(name) for name in ("run", "up", "mbit", "show", "exec", "down")}
    for name in ("run", "up"):
        parts[name].add_argument("-n", "--ranks", type=int, default=2)
        parts[name].add_argument(
            "--mbit", type=_rate, default=None, metavar="R", help="Mbit/s of every link; none: no limit"
        )
    for name in ("up", "mbit", "show", "exec", "down"):
        parts[name].add_argument("--name", default="bench")
    parts["mbit"].add_argument("mbit", type=_rate)
    parts["exec"].add_argument("rank", type=int)
    parts["exec"].add_argument("rest", nargs=argparse.REMAINDER)
    parts["run"].add_argument("--pin", action="store_true", help="rank r on core r, modulo their number")
    parts["run"].add_argument("--timeout", type=float, default=1800.0)
    parts["run"].add_argument("rest", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        problem = why_not()
        if problem:
            raise LinksError(problem)
        if options.command == "run":
            with links_up(options.ranks, options.mbit) as links:
                command = [sys.executable, "-u", *options.rest]
                return run_ranks(command, options.ranks, links, options.pin, options.timeout)
        if options.command == "up":
            Links(options.name, options.ranks).up(options.mbit)
            return 0
        spaces = [space for space in _all_namespaces() if space.startswith(f"{PREFIX}{options.name}-r")]
        links = Links(options.name, len(spaces))
        if options.command == "down":
            links.down()
            remove_leftovers()
            return 0
        if not spaces:
            raise LinksError(f"no links {options.name!r}: {sys.executable} {__file__} up -n 2 --name {options.name}")
        if options.command == "mbit":
            links.set_rate(options.mbit)
        elif options.command == "show":
            print(links.show())
        else:
            return subprocess.run([*links.enter(options.rank), *options.rest]).returncode
        return 0
    except LinksError as error:
        print(f"throttled_links: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
