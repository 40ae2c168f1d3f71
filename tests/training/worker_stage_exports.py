"""What tools/convert_checkpoint.py makes of the checkpoints of a run in stages, held against a plain forward; one
rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402

FOLDER = Path(os.environ.get("STAGES_DIR", "/nonexistent"))
SHORT = 32

cases = Cases()


def exported(step: int, name: str = "") -> Path:
    """The Hugging Face folder of a checkpoint."""
    from megatron_telechat.huggingface import export_hf

    output = FOLDER / f"hf-{step}{name}"
    export_hf(FOLDER / "whole" / "checkpoints", output, step=step)
    return output


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def ids(length: int):
    import torch

    return torch.randint(3, 512, (2, length), generator=torch.Generator().manual_seed(length))


@cases.case
def each_stage() -> dict:
    """config.json, and tools/check_logits.py at the length of the stage, beyond it and below it."""
    from safetensors.torch import save_file

    from megatron_telechat.cli.check_logits import main
    from tests.huggingface.folders import all_tensors
    from tests.huggingface.plain_telechat import forward

    found = {}
    for step, lengths in ((4, (SHORT, 48)), (8, (SHORT, 64, 100)), (10, (SHORT, 128, 200))):
        folder = exported(step)
        config, tensors = config_of(folder), all_tensors(folder)
        golden = {}
        for length in lengths:
            golden |= {f"input_ids_{length}": ids(length), f"logits_{length}": forward(config, tensors, ids(length))}
        save_file(golden, FOLDER / "golden.safetensors")
        code = main(["--hf", str(folder), "--golden", str(FOLDER / "golden.safetensors"), "--tolerance", "2e-4"])
        keys = ("rope_theta", "training_seqlen", "base_seqlen", "seq_length")
        found[str(step)] = {"code": code, **{key: config[key] for key in keys}}
    return found


@cases.case
def short_samples() -> dict:
    """The loss of short samples with the weights of a switch, as the stage before computes them and as the stage behind
    it does: by our forward, and by the plain one."""
    import shutil

    import torch

    from megatron_telechat.huggingface.model import hf_model
    from tests.huggingface.folders import all_tensors
    from tests.huggingface.plain_telechat import forward

    def loss(logits) -> float:
        tokens = ids(SHORT)
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].double().reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
        ).item()

    found = {}
    before, behind = exported(8, "-before"), exported(10, "-behind")
    for name, config in (
        ("before", config_of(before)),
        ("behind", config_of(behind)),
        # The NTK formula as the stage before has it: it acts beyond the trained length only.
        ("formula", {**config_of(behind), **{key: config_of(before)[key] for key in ("rope_theta", "training_seqlen",
                                                                                      "base_seqlen")}}),
    ):  # fmt: skip
        folder = FOLDER / f"switch-{name}"
        shutil.copytree(before, folder)
        (folder / "config.json").write_text(json.dumps(config))
        with hf_model(folder, seq_length=SHORT) as model:
            ours = loss(model.logits(ids(SHORT)).cpu())
        found[name] = [ours, loss(forward(config, all_tensors(folder), ids(SHORT)))]
    return found


if __name__ == "__main__":
    cases.main()
