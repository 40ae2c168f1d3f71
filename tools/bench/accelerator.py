#!/usr/bin/env python3
"""Everything that can be seen on one accelerator, in order of worth, in about ten minutes.

    python tools/bench/accelerator.py --json FILE [--page FILE] [--sections parity,resume] [--device cpu --quick]

Each section runs in a process of its own with a time limit of its own; the JSON is written after every section. Started
again with the same file, sections that are done with the same code are skipped: it goes on where it was cut off. Exit
code 1 if a check failed or a section did not end. ``--device cpu --quick`` shows that the bench runs, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from accelerator.page import failed_checks, page  # noqa: E402
from accelerator.section import SECTIONS, Options, Section  # noqa: E402

NAMES = [section.name for section in SECTIONS]


def code_digest() -> str:
    """Of the library and of this bench."""
    digest = hashlib.sha256()
    files = [*(ROOT / "megatron_telechat").rglob("*"), *(ROOT / "tools").rglob("*")]
    for path in sorted(path for path in files if path.suffix in (".py", ".yaml")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_section(section: Section, options: Options, limit_s: float) -> dict[str, Any]:
    """Run one section in a process of its own; what it found before it failed or was ended is kept."""
    found, log = options.work / f"{section.name}.results", options.work / f"{section.name}.log"
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "--one", section.name, "--device", options.device]
    command += ["--work", str(options.work), *(["--quick"] if options.quick else [])]
    begin = time.perf_counter()
    with open(log, "w", encoding="utf-8") as output:
        # a session of its own, so that what the section started ends with it
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "done" if process.wait(timeout=limit_s) == 0 else f"failed with code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"cut off after {limit_s:.0f} s"
    results = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    entry = {"status": status, "seconds": time.perf_counter() - begin, "results": dict(results)}
    if status != "done":
        entry["error"] = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    return entry


def run_one(section: Section, options: Options) -> int:
    """The process of a section: a line of JSON for each result, at once."""
    with open(options.work / f"{section.name}.results", "w", encoding="utf-8") as out:
        for name, value in section.run(options):
            out.write(json.dumps([name, value]) + "\n")
            out.flush()
    return 0


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def run_all(options: Options, names: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run what is not done yet; returns the report, which is on disk too."""
    conditions = {"code": code_digest(), "device": device_name(options.device), "quick": options.quick}
    report: dict[str, Any] = {**conditions, "command": shlex.join(["python", *sys.argv]), "sections": {}}
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text())
        if {name: before.get(name) for name in conditions} == conditions:
            report["sections"] = before["sections"]
    begin = time.perf_counter()
    for section in SECTIONS:
        if section.name not in names or report["sections"].get(section.name, {}).get("status") == "done":
            continue
        left = args.limit - (time.perf_counter() - begin)
        if left < 10:
            print(f"{section.name}: not begun, the time is up", flush=True)
            continue
        entry = report["sections"][section.name] = run_section(section, options, min(section.limit_s, left))
        bad = failed_checks(entry)
        wrong = f"; NOT OK: {', '.join(bad)}" if bad else ""
        print(f"{section.name}: {entry['status']} in {entry['seconds']:.0f} s{wrong}", flush=True)
        if args.json:
            _replace(args.json, json.dumps(report, indent=1))
        if args.page:
            _replace(args.page, page(report))
    return report


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, few cases")
    parser.add_argument("--sections", default=",".join(NAMES), help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--limit", type=float, default=600, metavar="S", help="seconds for all sections [600]")
    parser.add_argument("--json", type=Path, help="the report; sections that are done in it are skipped")
    parser.add_argument("--page", type=Path, help="the report as Markdown")
    parser.add_argument("--work", type=Path, help="folder of runs, checkpoints and logs [a temporary one]")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.sections.split(",")
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}: {', '.join(NAMES)}")
    if args.device == "cuda" and not args.one:
        import torch

        if not torch.cuda.is_available():
            print("accelerator: no CUDA device here; --device cpu --quick shows that the bench runs", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        options = Options(args.device, args.quick, work)
        if args.one:
            return run_one(next(section for section in SECTIONS if section.name == args.one), options)
        report = run_all(options, names, args)
    entries = [report["sections"].get(name) for name in names]
    return int(any(entry is None or entry["status"] != "done" or failed_checks(entry) for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
