"""LM-Cocktail on small models of experts: the tool's weights, and those of a plain forward in fp64."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.harness import Cases

cases = Cases()

SHARED = Path(os.environ.get("MERGING_TEST_FOLDER", "/nonexistent"))
QUESTIONS = (("2+2?", "4"), ("name?", "telechat"), ("long", "abcdefgh" * 6))
TEMPERATURE = 0.05


def _tools() -> Any:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    from megatron_telechat.cli.merge_checkpoints import main

    return main


def _folders() -> tuple[dict, list[Path], Path]:
    import torch

    from tests.data.chat_material import letters_tokenizer, single, write_lines
    from tests.huggingface.folders import telechat_config
    from tests.merging.material import hf_folder

    config = telechat_config(8, 8, layers=2, num_experts=4, num_experts_per_tok=2)
    config["vocab_size"] = 320
    folders = [SHARED / f"model{seed}" for seed in range(3)]
    if not folders[0].exists():
        for seed, folder in enumerate(folders):
            hf_folder(folder, seed, config, lambda name: torch.float32, scale=0.1 + 0.05 * seed)
            letters_tokenizer(folder)
        lines = [single(*question) for question in QUESTIONS]
        write_lines(SHARED / "examples.jsonl", [*lines, {"text": "plain text"}])
    return config, folders, SHARED / "examples.jsonl"


def _plain_losses(config: dict, folders: list[Path]) -> list[float]:
    """The template and its mask written out; every token is a byte (tests/data/chat_material.py)."""
    import torch
    from tokenizers import Tokenizer

    from tests.data.chat_material import SPECIAL
    from tests.huggingface.folders import all_tensors
    from tests.huggingface.plain_telechat import forward

    tokenizer = Tokenizer.from_file(str(folders[0] / "tokenizer.json"))
    user, bot, end = (SPECIAL.index(name) for name in ("<_user>", "<_bot>", "<_end>"))
    rows = []
    for question, answer in QUESTIONS:
        q, a = tokenizer.encode(question).ids, tokenizer.encode(answer).ids
        tokens = [user, *q, bot, *a, end, *tokenizer.encode("\n").ids]
        rows.append((tokens, [False, *[False] * len(q), True, *[True] * len(a), True, False]))
    text = [*tokenizer.encode("plain text").ids, end]
    rows.append((text, [False, *[True] * (len(text) - 1)]))
    losses = []
    for folder in folders:
        weights, total, count = all_tensors(folder), 0.0, 0
        for tokens, counted in rows:
            logits = forward(config, weights, torch.tensor([tokens[:-1]]))[0].double()
            for row, label, yes in zip(logits, tokens[1:], counted[1:], strict=True):
                if yes:
                    total -= float(row.log_softmax(-1)[label])
                    count += 1
        losses.append(total / count)
    return losses


@cases.case
def cocktail() -> dict:
    """Weights by the tool, and by hand."""
    import math

    config, folders, examples = _folders()
    flags = ["--examples", examples, "--temperature", TEMPERATURE, "--output", SHARED / "merged"]
    code = _tools()([str(word) for word in (*folders, *flags)])
    told = json.loads((SHARED / "merged" / "merge_provenance.json").read_text())
    losses = _plain_losses(config, folders)
    powers = [math.exp(-loss / TEMPERATURE) for loss in losses]
    return {
        "code": code,
        "losses": [one["loss"] for one in told["inputs"]],
        "weights": [one["weight"] for one in told["inputs"]],
        "plain_losses": losses,
        "plain_weights": [power / sum(powers) for power in powers],
    }


@cases.case
def of_a_sharded_checkpoint() -> dict:
    """The same losses, whatever layout a model was saved in."""
    from megatron_telechat.checkpoint.format import CheckpointReader
    from megatron_telechat.cli.convert_checkpoint import main as convert
    from megatron_telechat.config.yaml_io import run_config_from_yaml
    from tests.merging.material import SHARDED, checkpoint

    _, folders, examples = _folders()
    convert(["import", "--hf", str(folders[0]), "--output", str(SHARED / "imported")])
    reader = CheckpointReader(SHARED / "imported" / "iter_0000000")
    run = run_config_from_yaml(reader.config, "manifest")
    state = {key: reader.read(key) for key in reader.entries}
    sharded = checkpoint(SHARED / "sharded", state, SHARDED["tp2 ep2"], model=run.model, run=run)
    flags = ["--examples", examples, "--output", SHARED / "of layouts", "--tokenizer", folders[0]]
    code = _tools()([str(word) for word in (sharded, folders[0], *flags)])
    told = json.loads((SHARED / "of layouts" / "merge_provenance.json").read_text())
    return {"code": code, "inputs": [(one["loss"], one["weight"]) for one in told["inputs"]]}


@cases.case
def odd_examples() -> dict:
    """Exit codes and messages by file."""
    import contextlib
    import io

    _, folders, _ = _folders()
    found = {}
    files = {
        "neither": '{"text": "good"}\n{"words": "x"}\n[1]',
        "no json": "{",
        "empty": "\n",
        "nothing learned": '{"text": ""}',
        "absent": None,
    }
    for name, content in files.items():
        path = SHARED / f"{name}.jsonl"
        if content is not None:
            path.write_text(content)
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            flags = ["--examples", path, "--output", SHARED / "no"]
            code = _tools()([str(word) for word in (*folders, *flags)])
        found[name] = (code, err.getvalue(), (SHARED / "no").exists())
    return found


if __name__ == "__main__":
    cases.main()
