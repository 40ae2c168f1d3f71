"""Runs whose samples grow longer, and runs over packed documents: on the CPU and on the device, and resumed.

As in `parity`, the CPU takes one step and saves, and all other runs go on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from accelerator.parity import LOSS, NORM, ROUNDED, compare
from accelerator.resume import check_files
from accelerator.section import ROOT, Options, Results
from accelerator.training import pretrain_all

COMMON = "--preset telechat2-tiny --vocab-size 1024 --micro-batch-size 1 --lr-decay-style constant".split()
LENGTHS = (*COMMON, "--mock-data", "--config", str(ROOT / "examples" / "lengths.yaml"), "--train-iters", "16")
"""Stages of 8, 4 and 4 steps."""
STOPS = {"at a switch": 8, "inside a stage": 10}
"""Steps."""
DOCUMENTS, EOD = 400, 2


def run(options: Options) -> Results:
    """One check a case: losses beside the CPU's, checkpoints beside those of a run that did not stop."""
    steps = "4" if options.quick else "11"
    packed = (*COMMON, *_packed_data(options.work), "--train-iters", steps, "--global-batch-size", "4")
    packed = (*packed, *"--seq-length 512 --lr 1e-3 --lr-warmup-iters 0".split())
    lines = {"lengths": LENGTHS, "packed": packed}
    starts = pretrain_all(
        {f"{name}-start": ((*line, "--fp32", "--exit-interval", "1"), "cpu") for name, line in lines.items()}, options
    )
    cases = {name: (*line, "--load", str(starts[f"{name}-start"].checkpoints)) for name, line in lines.items()}
    runs = {f"{name}-cpu": ((*line, "--fp32"), "cpu") for name, line in cases.items()}
    for precision in ("fp32", "bf16"):
        runs |= {f"{name}-{precision}": ((*line, f"--{precision}"), options.device) for name, line in cases.items()}
    saved = (*LENGTHS, "--bf16", "--save-interval", "4")
    runs["whole"] = saved, options.device
    for step in STOPS.values():
        runs[f"cut-{step}"] = (*saved, "--exit-interval", str(step)), options.device
    done = pretrain_all(runs, options)
    for name in lines:
        for precision, loss, norm in (("fp32", LOSS, NORM), ("bf16", ROUNDED, np.inf)):
            yield f"{name} {precision}", compare(done[f"{name}-{precision}"], done[f"{name}-cpu"], loss, norm)
    again = pretrain_all({f"cut-{step}": (saved, options.device) for step in STOPS.values()}, options)
    for name, step in STOPS.items():
        parts = (done["whole"], done[f"cut-{step}"], again[f"cut-{step}"])
        error = next((one.error for one in parts if one.error), None)
        yield f"resumed, {name}", {"ok": False, "error": error} if error else _same(parts[0], parts[2])


def _same(whole: Any, resumed: Any) -> dict[str, Any]:
    last = "iter_0000016"
    return check_files(whole.checkpoints / last, {"differ after the resume": resumed.checkpoints / last})


def _packed_data(work: Path) -> tuple[str, ...]:
    """Random documents, and a tokenizer that knows where one ends; returns the flags."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from megatron_telechat.data.indexed.dataset import IndexedWriter

    folder = work / "packed-data"
    folder.mkdir(exist_ok=True)
    words = {"<unk>": 0, "<pad>": 1, "</s>": EOD} | {f"w{number}": number for number in range(3, 1024)}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    numbers = np.random.default_rng(0)
    with IndexedWriter(str(folder / "documents"), np.uint16) as writer:
        for size in numbers.lognormal(4.5, 1.2, DOCUMENTS).astype(int):
            writer.add_document([*numbers.integers(3, 1024, size + 1), EOD])
    data = ("--data-path", str(folder / "documents"), "--tokenizer-model", str(folder / "tokenizer.json"))
    return (*data, "--split", "100,0,0", "--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss")
