"""check_logits and generate on many folders in one process; the return value of a case is [exit code, stdout,
stderr]."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness import Cases

cases = Cases()

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SHARED = Path(os.environ.get("CHECKPOINT_TEST_FOLDER", "/nonexistent"))


def run(main: Callable[[list[str]], int], *argv: Any) -> list:
    # The tools are started without torchrun.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return [code, out.getvalue(), err.getvalue()]


def check(hf: Path, golden: Path, *more: Any) -> list:
    from megatron_telechat.cli.check_logits import main

    return run(main, "--hf", hf, "--golden", golden, *more)


def write_golden(name: str, **tensors: Any) -> Path:
    from safetensors.torch import save_file

    path = SHARED / f"{name}.safetensors"
    save_file(tensors, path)
    return path


for _kind in ("gqa", "mha"):
    _folder = GOLDEN / f"telechat2_tiny_{_kind}"
    cases.add(
        f"golden_{_kind}",
        lambda folder=_folder: check(folder, folder / "golden.safetensors", "--rotary-table-dtype", "fp16"),
    )
    cases.add(f"fp32_tables_{_kind}", lambda folder=_folder: check(folder, folder / "golden.safetensors"))
    cases.add(
        f"fp32_tables_strict_{_kind}",
        lambda folder=_folder: check(folder, folder / "golden.safetensors", "--tolerance", "1e-4"),
    )


def _gqa() -> Path:
    return GOLDEN / "telechat2_tiny_gqa"


@cases.case
def mixtral_of_transformers() -> list:
    """Independent truth for the MoE path: transformers' own forward."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(SHARED / "mixtral")
    ids = torch.randint(0, 96, (2, 17))
    with torch.no_grad():
        logits = model(ids).logits
    golden = write_golden("mixtral_golden", input_ids_17=ids, logits_17=logits)
    return check(SHARED / "mixtral", golden, "--tolerance", "1e-4")


@cases.case
def telechat_moe() -> list:
    """The MoE names and the expert bias against a plain loop over experts."""
    import torch

    from tests.huggingface.folders import all_tensors, telechat_config, telechat_shapes, write_folder
    from tests.huggingface.plain_telechat import forward

    config = telechat_config(4, 2, layers=2, head_dim=8, num_experts=6, num_experts_per_tok=3)
    folder = write_folder(SHARED / "telechat_moe", config, telechat_shapes(config))
    tensors = all_tensors(folder)
    ids = torch.randint(0, 64, (2, 19), generator=torch.Generator().manual_seed(1))
    golden = write_golden("telechat_moe_golden", input_ids_19=ids, logits_19=forward(config, tensors, ids))
    return check(folder, golden, "--tolerance", "2e-3")


@cases.case
def swapped_weights() -> list:
    """A conversion mistake (K and V of one layer exchanged) is far above the tolerance."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = SHARED / "swapped"
    shutil.copytree(_gqa(), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.1.self_attention.key_value.weight"
    tensors[name] = torch.cat([tensors[name][8:], tensors[name][:8]])
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    return check(folder, _gqa() / "golden.safetensors")


def odd_files() -> dict[str, Callable[[], Path]]:
    import torch

    ids, logits = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 256)

    def broken(data: bytes) -> Path:
        path = SHARED / f"broken_{len(data)}.safetensors"
        path.write_bytes(data)
        return path

    return {
        "foreign name": lambda: write_golden("o1", input_ids_4=ids, logits_4=logits, extra=ids.clone()),
        "ids missing": lambda: write_golden("o2", logits_4=logits),
        "logits missing": lambda: write_golden("o3", input_ids_4=ids),
        "length": lambda: write_golden("o4", input_ids_5=ids, logits_5=logits),
        "vocabulary": lambda: write_golden("o5", input_ids_4=ids, logits_4=logits[..., :9].clone()),
        "one axis": lambda: write_golden("o6", input_ids_4=ids[0].clone(), logits_4=logits),
        "float ids": lambda: write_golden("o7", input_ids_4=ids.float(), logits_4=logits),
        "id outside": lambda: write_golden("o8", input_ids_4=ids + 256, logits_4=logits),
        "negative id": lambda: write_golden("o9", input_ids_4=ids - 1, logits_4=logits),
        "no batch": lambda: write_golden("o10", input_ids_4=ids[:0].clone(), logits_4=logits[:0].clone()),
        "no entries": lambda: write_golden("o11"),
        "empty file": lambda: broken(b""),
        "not safetensors": lambda: broken(b"\x80\x04" * 50),
        "absent file": lambda: SHARED / "nowhere.safetensors",
        "folder": lambda: SHARED,
    }


@cases.case
def odd_golden_files() -> dict[str, list]:
    return {name: check(_gqa(), make()) for name, make in odd_files().items()}


@cases.case
def nan_reference() -> list:
    import torch

    ids = torch.zeros(1, 4, dtype=torch.int64)
    return check(_gqa(), write_golden("nan", input_ids_4=ids, logits_4=torch.full((1, 4, 256), float("nan"))))


@cases.case
def odd_arguments() -> dict[str, list]:
    golden = _gqa() / "golden.safetensors"
    return {
        "tolerance": check(_gqa(), golden, "--tolerance", "-1"),
        "tolerance word": check(_gqa(), golden, "--tolerance", "small"),
        "table": check(_gqa(), golden, "--rotary-table-dtype", "int8"),
        "unknown": check(_gqa(), golden, "--what"),
    }


def _generation_folder() -> Path:
    """The golden model with a tokenizer of single characters."""
    import shutil

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = SHARED / "generation"
    if not folder.exists():
        shutil.copytree(_gqa(), folder)
        (folder / "golden.safetensors").unlink()
        vocabulary = {"<_unk>": 0, "<_start>": 1, "<_end>": 2, **{chr(29 + i): i for i in range(3, 256)}}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<_unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@cases.case
def generation() -> dict[str, Any]:
    import torch

    from megatron_telechat.cli.generate import main
    from megatron_telechat.huggingface.model import hf_model

    folder = _generation_folder()
    prompt, count = "hello", 12
    common = ["--hf", folder, "--prompt", prompt, "--max-new-tokens", count, "--device", "cpu"]
    with hf_model(folder, seq_length=32) as model:
        tokens = [ord(c) - 29 for c in prompt]
        for _ in range(count):
            tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    greedy = run(main, *common)
    third = tokens[len(prompt) + 2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [third]}))
    stopped = run(main, *common)
    (folder / "generation_config.json").write_text('{"eos_token_id": [')
    damaged = run(main, *common)
    (folder / "generation_config.json").unlink()
    sampled = [run(main, *common, "--temperature", "1.5", "--seed", seed) for seed in (1, 1, 2)]
    return {
        "by_hand": "".join(chr(t + 29) for t in tokens),
        "greedy": greedy,
        "first_end": tokens.index(third, len(prompt)),
        "stopped": stopped,
        "damaged": damaged,
        "sampled": sampled,
        "top_k_1": run(main, *common, "--temperature", "1.5", "--top-k", "1"),
        "top_p_small": run(main, *common, "--temperature", "1.5", "--top-p", "1e-6"),
        "no_tokenizer": run(main, "--hf", _gqa(), "--prompt", "x"),
        "empty_prompt": run(main, "--hf", folder, "--prompt", ""),
    }


if __name__ == "__main__":
    cases.main()
