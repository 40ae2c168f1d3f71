"""An exported folder in transformers, in a process that has no megatron_telechat: what it says goes to stdout as JSON.

    python standalone.py REQUESTS               a JSON file {name: [function, folder, {argument: value}]}

Each function below can be asked for; what it returns is in the output under the name of the request.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def load(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, output_loading_info=True, **more
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


@torch.no_grad()
def logits(folder: Path, ids: str, out: str) -> list[str]:
    """Logits of every tensor of token ids in a file, into another one."""
    model = load(folder)
    found = {name: model(tokens, use_cache=False).logits for name, tokens in load_file(ids).items()}
    save_file(found, out)
    return sorted(found)


def generate(folder: Path, prompt: list[int], new: int, **more: Any) -> list[int]:
    """Greedy tokens; generate() needs no tokenizer."""
    model = load(folder)
    tokens = torch.tensor([prompt])
    out = model.generate(tokens, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=3, **more)
    return out[0, len(prompt) :].tolist()


def generate_batch(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The same of prompts of several lengths, padded on the left."""
    model = load(folder)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[3] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=3
    )
    return out[:, longest:].tolist()


def beams(folder: Path, prompt: list[int], new: int, use_cache: bool) -> list[int]:
    """The best of three beams: the cache is reordered."""
    return generate(folder, prompt, new, num_beams=3, use_cache=use_cache)


def train(folder: Path, prompt: list[int], steps: int, checkpointing: bool) -> list[float]:
    """Losses of plain SGD on one row, and the number of parameters without a gradient."""
    model = load(folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer, tokens, losses = torch.optim.SGD(model.parameters(), lr=0.002), torch.tensor([prompt]), []
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(tokens, labels=tokens, output_router_logits=True)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    return [*losses, float(sum(p.grad is None for p in model.parameters()))]


@torch.no_grad()
def losses(folder: Path, ids: str) -> dict[str, float]:
    """The loss that transformers computes of each tensor of token ids, and of the router's part."""
    model, found = load(folder), {}
    for name, tokens in load_file(ids).items():
        found[name] = model(tokens, labels=tokens, use_cache=False).loss.item()
        out = model(tokens, labels=tokens, use_cache=False, output_router_logits=True)
        found[f"{name} with routers"] = out.loss.item()
    return found


@torch.no_grad()
def half(folder: Path, ids: str, dtype: str, out: str) -> str:
    """Logits in a 16-bit type."""
    model = load(folder, getattr(torch, dtype))
    save_file({name: model(tokens).logits.float() for name, tokens in load_file(ids).items()}, out)
    return str(next(model.parameters()).dtype)


@torch.no_grad()
def packed(folder: Path, rows: list[list[int]]) -> float:
    """Largest difference between sequences in one row, told apart by their positions, and each alone."""
    model = load(folder)
    row = torch.tensor([[token for one in rows for token in one]])
    positions = torch.tensor([[place for one in rows for place in range(len(one))]])
    together = model(row, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(torch.tensor([one]), use_cache=False).logits for one in rows], dim=1)
    return (together - alone).abs().max().item()


@torch.no_grad()
def balance(folder: Path, topk: int) -> list[float]:
    """The balancing loss of one layer, half of whose tokens are padding, by the exported file and by transformers."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    module = sys.modules[type(load(folder)).__module__]
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(40).view(2, 20) % 2
    theirs = load_balancing_loss_func((logits,), 6, topk, mask)
    return [module.balancing_loss([logits], topk, mask).item(), float(theirs)]


def refusals(folder: Path) -> dict[str, str]:
    """What the model says to inputs that it cannot take."""
    model, tokens = load(folder), torch.tensor([[5, 6, 7]])
    asked = {
        "mask": {"attention_mask": torch.ones(1, 4, dtype=torch.long)},
        "positions": {"attention_mask": torch.ones(1, 3, dtype=torch.long), "position_ids": torch.tensor([[4, 5, 6]])},
        "attentions": {"output_attentions": True},
    }
    found = {}
    for name, arguments in asked.items():
        try:
            model(tokens, **arguments)
        except ValueError as error:
            found[name] = str(error)
    return found


def saved_again(folder: Path, out: str) -> list[str]:
    """What transformers writes of it, read again; the architectures and files of the new folder."""
    load(folder).save_pretrained(out)
    again = load(Path(out))
    assert AutoConfig.from_pretrained(out, trust_remote_code=True).num_hidden_layers == again.config.num_hidden_layers
    return sorted(path.name for path in Path(out).iterdir())


def encode(folder: Path, dialogs: list[list[dict[str, str]]], texts: list[str]) -> dict[str, Any]:
    """Token ids of dialogs by the chat template, with and without the opening of an answer; of plain texts, and those
    decoded."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def ids(dialog: list[dict[str, str]], opening: bool) -> list[int]:
        return list(tokenizer.apply_chat_template(dialog, add_generation_prompt=opening, return_dict=False))

    plain = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    rendered = [tokenizer.apply_chat_template(dialog, tokenize=False) for dialog in dialogs] if dialogs else []
    return {
        "dialogs": [ids(dialog, False) for dialog in dialogs],
        "prompts": [ids(dialog[:-1], True) for dialog in dialogs],
        "rendered": [tokenizer(text, add_special_tokens=False).input_ids for text in rendered],
        "texts": plain,
        "decoded": [tokenizer.decode(found) for found in plain],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }


def chat_errors(folder: Path, dialogs: list[list[dict[str, str]]]) -> list[str]:
    """What the chat template says to dialogs that it cannot render."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder, trust_remote_code=True), []
    for dialog in dialogs:
        try:
            found.append(tokenizer.apply_chat_template(dialog, tokenize=False))
        except Exception as error:  # jinja2's
            found.append(f"error: {error}")
    return found


def main() -> None:
    sys.modules["megatron_telechat"] = None  # type: ignore[assignment]  # an import of it fails from here on
    requests = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    print(json.dumps({name: globals()[what](Path(folder), **said) for name, (what, folder, said) in requests.items()}))
    loaded = [name for name in sys.modules if name.startswith("megatron_telechat.")]
    assert not loaded, loaded


if __name__ == "__main__":
    main()
