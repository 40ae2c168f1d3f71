#!/usr/bin/env python3
"""Peak memory of a merge at the shapes of a preset, beside the bound: the number of inputs times the largest tensor.

    python tools/bench/merge_memory.py [--preset telechat2-39b-a12b] [--layers 1] [--inputs 2,3] [--json FILE]

The inputs are checkpoints whose files are holes: they have the sizes of real ones and take no room on the disk; the
output is written in full. Each arm is a process of its own. "peak" is what its resident set grew by, from before the
first input was opened to its highest point (VmHWM), pages of mapped files included: what a machine must have beside
torch itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from processes import MB, resident_mb  # noqa: E402

ARMS = ("linear", "slerp", "ties", "dare")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="telechat2-39b-a12b")
    parser.add_argument("--layers", type=int, default=1, help="of the model; the others have the same shapes")
    parser.add_argument("--inputs", default="2,3", help="numbers of inputs of the linear arm (default 2,3)")
    parser.add_argument(
        "--methods", default="linear", help=f"of {', '.join(ARMS)}; all but linear with the first number"
    )
    parser.add_argument("--formats", default="checkpoint,hf")
    parser.add_argument("--folder", type=Path, help="where inputs and outputs lie (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def sparse_checkpoint(root: Path, preset: str, layers: int) -> None:
    """A checkpoint of weights of which only the headers are there; the rest of its files are holes (zeros)."""
    from megatron_telechat.checkpoint import commit
    from megatron_telechat.checkpoint.files import FileEntry
    from megatron_telechat.checkpoint.manifest import Manifest, StoredBox, TensorEntry
    from megatron_telechat.config.presets import preset_text
    from megatron_telechat.config.yaml_io import dump_run_config, run_config_from_yaml
    from megatron_telechat.tensors.boxes import whole
    from megatron_telechat.tensors.table import tensor_table

    run = run_config_from_yaml(preset_text(preset))
    run = replace(run, model=replace(run.model, num_layers=layers))
    attempt = commit.begin(root, 0)
    folder = attempt.temporary
    assert isinstance(folder, Path), "in a file system"
    files, tensors = {}, {}
    for number, (name, spec) in enumerate(tensor_table(run.model).items()):
        key, file = f"model/{name}", f"rank_00000-{number:05d}.safetensors"
        size = 2 * math.prod(spec.shape)
        head = json.dumps({key: {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [0, size]}}).encode()
        head += b" " * (-len(head) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(head)) + head)
            stream.truncate(8 + len(head) + size)
        files[file] = FileEntry(8 + len(head) + size, "00000000")  # checksums are not read here
        tensors[key] = TensorEntry("bfloat16", spec.shape, (StoredBox(file, key, whole(spec.shape)),))
    commit.commit(attempt, Manifest(0, 0, dump_run_config(run), {"world_size": 1}, {}, files, tensors))


def arm(options: argparse.Namespace) -> None:
    """One merge; prints what it took as JSON."""
    import torch

    from megatron_telechat.merging.merge import merge
    from megatron_telechat.merging.request import ON_A_BASE, MergeRequest

    torch.set_num_threads(1)
    said = json.loads(options.arm)
    folders = [Path(path) for path in said["inputs"]]
    base = folders.pop() if said["method"] in ON_A_BASE else None
    before, began = resident_mb("VmRSS"), time.monotonic()
    request = MergeRequest(
        tuple(folders), Path(said["output"]), said["format"], said["method"], base=base, verify=False
    )
    report = merge(request)
    print(
        json.dumps(
            {
                "peak_mb": resident_mb("VmHWM") - before,
                "seconds": time.monotonic() - began,
                "gb": report.size_bytes / 1e9,
            }
        )
    )


def run_arm(folder: Path, options: argparse.Namespace, method: str, form: str, count: int) -> dict[str, Any]:
    """Start an arm and wait for it; its output is removed."""
    import shutil

    inputs = [str(folder / f"input{number}") for number in range(count)]
    output = folder / "output"
    said = json.dumps({"inputs": inputs, "output": str(output), "format": form, "method": method})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--arm", said]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"method": method, "format": form, "inputs": count, **json.loads(done.stdout.splitlines()[-1])}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the arms and print the table; 1 where a peak is above its bound."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.arm:
        arm(options)
        return 0
    from megatron_telechat.config.presets import preset_text
    from megatron_telechat.config.yaml_io import run_config_from_yaml
    from megatron_telechat.tensors.table import tensor_table

    counts = [int(part) for part in options.inputs.split(",")]
    model = replace(run_config_from_yaml(preset_text(options.preset)).model, num_layers=options.layers)
    largest = max(2 * math.prod(spec.shape) for spec in tensor_table(model).values()) / MB
    print(f"{options.preset}, {options.layers} layers; the largest tensor is {largest:,.0f} MB in bf16")
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for number in range(max(counts)):
            sparse_checkpoint(folder / f"input{number}", options.preset, options.layers)
        for method in options.methods.split(","):
            for form in options.formats.split(","):
                for count in counts if method == "linear" else counts[:1]:
                    row = run_arm(folder, options, method, form, count)
                    row["bound_mb"] = count * largest
                    rows.append(row)
                    print(
                        f"{method:16} {form:10}  {count} inputs  peak {row['peak_mb']:6,.0f} MB  bound "
                        f"{row['bound_mb']:6,.0f} MB  {row['gb']:.1f} GB in {row['seconds']:.0f} s",
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps({"largest_mb": largest, "rows": rows}, indent=1))
    return 0 if all(row["peak_mb"] <= row["bound_mb"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
