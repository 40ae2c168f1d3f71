"""Eight steps at once against four, a stop, and four more: the checkpoints must be equal, byte for byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerator.section import Options, Results
from accelerator.training import pretrain_all

COMMON = (
    "--mock-data --micro-batch-size 1 --global-batch-size 2 --train-iters 8 --save-interval 4 --lr-warmup-iters 0 "
    "--attention-dropout 0.1 --hidden-dropout 0.1"
).split()
"""Dropout, so that the state of the generators is a part of what must come back."""
PLAIN = ("--attention-dropout", "0", "--hidden-dropout", "0")
LONG = ("--seq-length", "2048")
"""Several blocks of the attention kernels, whose backward sums them: in an order that may change."""
MODELS = {"dense": ("--preset", "telechat2-tiny"), "moe": ("--preset", "telechat2-tiny-moe", "--moe-input-chunks", "4")}
CASES = {
    "bf16": ("--bf16", *LONG, *PLAIN),
    "bf16 dropout": ("--bf16", "--seq-length", "512"),
    "fp32": ("--fp32", "--seq-length", "1024", *PLAIN),
    "fp16": ("--fp16", *LONG, *PLAIN, "--initial-loss-scale", "16"),
}


def run(options: Options) -> Results:
    """One check a case: files that differ."""
    models, cases = (MODELS, CASES)
    if options.quick:
        models, cases = {"moe": MODELS["moe"]}, {"fp32": ("--fp32", "--seq-length", "64", *PLAIN)}
    flags = {
        f"resume-{model}-{case.replace(' ', '-')}": [*start, *COMMON, *more]
        for model, start in models.items()
        for case, more in cases.items()
    }
    first = {f"{name}-{part}": (line, options.device) for name, line in flags.items() for part in ("whole", "again")}
    first |= {f"{name}-cut": ([*line, "--exit-interval", "4"], options.device) for name, line in flags.items()}
    done = pretrain_all(first, options)
    second = pretrain_all({f"{name}-cut": (line, options.device) for name, line in flags.items()}, options)
    for name in flags:
        runs = (done[f"{name}-whole"], done[f"{name}-again"], done[f"{name}-cut"], second[f"{name}-cut"])
        error = next((one.error for one in runs if one.error), None)
        if error is not None:
            yield name, {"ok": False, "error": error}
            continue
        whole, again, _, cut = (one.checkpoints / "iter_0000008" for one in runs)
        yield name, check_files(whole, {"differ between two whole runs": again, "differ after the resume": cut})


def check_files(checkpoint: Path, others: Mapping[str, Path]) -> dict[str, Any]:
    """Files of tensors that differ from those of other checkpoints, under the names given; ok if there are none."""
    files = _digests(checkpoint)
    differ = {}
    for label, other in others.items():
        digests = _digests(other)
        differ[label] = [name for name in files if files[name] != digests.get(name)]
    return {"ok": bool(files) and not any(differ.values()), "files": len(files), **differ}


def _digests(folder: Path) -> dict[str, str]:
    """Of the tensors in each file; its header names the save, and no two saves have one name."""
    return {path.name: _digest(path) for path in sorted(folder.glob("*.safetensors"))}


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while part := stream.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()
