#!/usr/bin/env python3
"""Text to tokens: our preprocess_data beside Megatron-LM's two tools, in one interleaved run.

    python tools/bench/preprocess.py --work DIR [--mb 180] [--also 140,1400] [--rounds 3] [--megatron CHECKOUT] [--json
    FILE]

Builds a corpus (preprocess_corpus.py) and trains tokenizers in DIR, once. Cases: a byte-level tokenizer of 131,072 ids
with the fast engine and with the fallback, and a sentencepiece model. Each round runs every arm of a case in turn.
Reported are medians of wall time, MB/s, tokens/s, CPU seconds and peak memory of the process with its children (the sum
of their PSS, sampled), and whether the bytes are the same. ``--also`` runs our tool alone on corpora of other sizes:
memory and rate by the size of the input. No document of a corpus is in it twice. Megatron's tools need what their
checkout needs (transformers; triton on its newest commits).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import preprocess_corpus as corpus_of  # noqa: E402
from processes import output_of  # noqa: E402

HERE = Path(__file__).resolve().parent
OURS = HERE.parent / "preprocess_data.py"


@dataclass
class Arm:
    """One tool on one case; lists hold one entry a round."""

    name: str
    command: list[str]
    prefix: Path
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    digest: str = ""
    failed: str = ""


def arms(case: str, source: Path, tokenizer: Path, work: Path, megatron: Path | None, engine: str) -> list[Arm]:
    kind = "SentencePieceTokenizer" if tokenizer.suffix == ".model" else "HuggingFaceTokenizer"
    shared = ["--input", str(source), "--tokenizer-type", kind, "--tokenizer-model", str(tokenizer), "--append-eod"]
    out = work / "out"

    def arm(name: str, *command: str) -> Arm:
        prefix = out / f"{case}-{name}"
        return Arm(name, [sys.executable, "-W", "ignore", *command, *shared, "--output-prefix", str(prefix)], prefix)

    # Megatron's tools take special tokens from a text.
    found = [
        arm("ours", str(OURS), "--workers", "2", "--engine", engine, "--log-interval", "0", "--special-tokens-in-text")
    ]
    if megatron is not None:
        run = (str(HERE / "preprocess_megatron.py"), str(megatron))
        found.append(arm("megatron", *run, "preprocess_data.py", "--workers", "2"))
        if kind == "HuggingFaceTokenizer" and engine == "auto":
            found.append(arm("megatron-fast", *run, "preprocess_data_fast.py", "--use-gigatoken"))
    return found


def run_once(arm: Arm) -> None:
    for path in arm.prefix.parent.glob(f"{arm.prefix.name}_*"):
        path.unlink()
    os.sync()  # no arm pays for what the one before left to be written
    begin = time.monotonic()
    process = subprocess.Popen(arm.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, done = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, done))
    watcher.start()
    output = output_of(process)
    _, status, usage = os.wait4(process.pid, 0)
    arm.wall.append(time.monotonic() - begin)
    done.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        arm.failed = (output.strip().splitlines() or ["no output"])[-1]
        return
    arm.cpu.append(usage.ru_utime + usage.ru_stime)
    arm.peak_mb.append(peak[0])
    digest = hashlib.sha256()
    for suffix in ("bin", "idx"):
        digest.update(Path(f"{arm.prefix}_text_document.{suffix}").read_bytes())
    arm.digest = digest.hexdigest()


def _watch(pid: int, peak: list[float], done: threading.Event) -> None:
    """The largest sum of PSS over a process and its children, in MB."""
    import psutil

    while not done.wait(0.25):  # the kernel walks all pages for a PSS: sampled more often it slows what it measures
        total = 0
        try:
            parent = psutil.Process(pid)
            for process in (parent, *parent.children(recursive=True)):
                total += process.memory_full_info().pss
        except psutil.Error:
            continue  # one of them ended meanwhile
        peak[0] = max(peak[0], total / 1e6)


def measure(case: str, found: Sequence[Arm], source: Path, rounds: int) -> list[dict[str, Any]]:
    for number in range(rounds):
        for arm in found:
            if not arm.failed:
                run_once(arm)
                print(
                    f"  {case} round {number + 1} {arm.name}: "
                    f"{arm.failed or f'{arm.wall[-1]:.1f} s, {arm.cpu[-1]:.1f} CPU s'}",
                    flush=True,
                )
    megabytes, rows = source.stat().st_size / 1e6, []
    base = statistics.median(found[0].wall) if not found[0].failed else float("nan")
    for arm in found:
        row: dict[str, Any] = {
            "case": case,
            "arm": arm.name,
            "failed": arm.failed,
            **{k: v for k, v in asdict(arm).items() if k in ("wall", "cpu")},
        }
        if not arm.failed:
            wall = statistics.median(arm.wall)
            file = Path(f"{arm.prefix}_text_document.bin")
            row |= {
                "wall_s": wall,
                "mb_s": megabytes / wall,
                "cpu_s": statistics.median(arm.cpu),
                "peak_mb": max(arm.peak_mb),
                "tokens_s": file.stat().st_size / _item_bytes(file) / wall,
                "ours_is_faster": wall / base,
                "same_bytes": arm.digest == found[0].digest,
            }
        rows.append(row)
    return rows


def _item_bytes(file: Path) -> int:
    with open(file.with_suffix(".idx"), "rb") as index:
        return {8: 2, 4: 4}[index.read(18)[17]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| case | tool | wall s | MB/s | M tokens/s | CPU s | peak MB | ours is faster | same bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["failed"]:
            lines.append(f"| {row['case']} | {row['arm']} | failed: {row['failed']} | | | | | | |")
            continue
        lines.append(
            f"| {row['case']} | {row['arm']} | {row['wall_s']:.1f} | {row['mb_s']:.1f} | {row['tokens_s'] / 1e6:.2f} | "
            f"{row['cpu_s']:.1f} | {row['peak_mb']:.0f} | {row['ours_is_faster']:.1f}x | "
            f"{'yes' if row['same_bytes'] else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--work", required=True, type=Path, help="folder for the corpus, the tokenizers and the outputs"
    )
    parser.add_argument("--mb", type=float, default=180.0, help="megabytes of the corpus")
    parser.add_argument("--also", default="", help="megabytes of more corpora, with commas, for our tool alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=131072)
    parser.add_argument("--cases", default="fast,fallback,sentencepiece")
    parser.add_argument("--megatron", type=Path, help="a Megatron-LM checkout")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source = corpus_of.build(args.work, args.mb)
    (args.work / "out").mkdir(exist_ok=True)
    print(f"corpus: {source.stat().st_size / 1e6:.0f} MB in {source}", flush=True)
    rows = []
    for case in args.cases.split(","):
        if case == "sentencepiece":
            tokenizer, engine = corpus_of.sentencepiece(source, min(args.vocab_size, 32000), args.work / "sp"), "auto"
        else:
            tokenizer = corpus_of.byte_level(source, args.vocab_size, args.work / f"bpe{args.vocab_size}")
            engine = {"fast": "auto", "fallback": "tiktoken"}[case]
        rows += measure(case, arms(case, source, tokenizer, args.work, args.megatron, engine), source, args.rounds)
        for size in (float(size) for size in args.also.split(",") if size and case == "fast"):
            other = corpus_of.build(args.work, size)
            rows += measure(
                f"fast, {size:g} MB",
                arms(f"fast-{size:g}", other, tokenizer, args.work, None, engine),
                other,
                args.rounds,
            )
    print(table(rows))
    if args.json:
        args.json.write_text(
            json.dumps({"rows": rows, "corpus_bytes": source.stat().st_size, "cores": os.cpu_count()}, indent=1)
        )
    # What megatron-fast writes is gigatoken's, whether or not that is the tokenizer's.
    return 0 if all(not row["failed"] and (row["same_bytes"] or row["arm"] == "megatron-fast") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
