"""``tools/generate.py``: continue a prompt with a Hugging Face folder, or talk to it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.cli.tool import ToolParser, natural, positive, run_tool
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.device_kinds import DEVICE_CHOICES
from megatron_telechat.errors import EXIT_OK, ConfigError, Problem

_LENGTHS = {False: 64, True: 1024}


def build_parser() -> ToolParser:
    """The arguments of tools/generate.py."""
    parser = ToolParser(
        prog="tools/generate.py",
        description="Continue a prompt with a Hugging Face folder, or talk to it. Ranks of torchrun share the model.",
    )
    parser.add_argument("--hf", type=Path, required=True, help="folder with config.json, weights and tokenizer")
    parser.add_argument("--prompt", help="text to continue")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="questions from the terminal, or line by line from standard input; /clear begins a new dialog, /exit ends",
    )
    parser.add_argument("--system", help="system text of the dialog (with --chat)")
    parser.add_argument(
        "--template",
        choices=fields_by_name()["sft_template"].choices,
        help="template of the dialog (with --chat; default: the one that the folder's tokenizer says)",
    )
    parser.add_argument("--max-new-tokens", type=positive(int), help="longest addition: default 64, with --chat 1024")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most likely token")
    parser.add_argument("--top-k", type=positive(int), help="sample from the k most likely tokens")
    parser.add_argument(
        "--top-p", type=positive(float), help="sample from the most likely tokens with this total probability"
    )
    parser.add_argument("--seed", type=natural, default=0, help="sampling seed (default 0)")
    parser.add_argument(
        "--no-cache", action="store_true", help="compute the whole sequence anew for each token (not with --chat)"
    )
    parser.add_argument("--device", choices=DEVICE_CHOICES, default="auto", help="default auto")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default fp32 on the CPU, else bf16")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done, 2 arguments, 3 tokenizer or input, 4 weights)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    _check(args)
    from megatron_telechat.huggingface.generation import Place, Sampling, continue_text

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    place = Place(args.device, args.precision, int(os.environ.get("WORLD_SIZE", "1")))
    longest = args.max_new_tokens or _LENGTHS[args.chat]
    if args.chat:
        from megatron_telechat.cli.chat import talk

        return talk(args.hf, args.template, args.system, longest, sampling, place)
    added = continue_text(args.hf, args.prompt, longest, sampling, place, not args.no_cache)
    if os.environ.get("RANK", "0") == "0":
        print(args.prompt + added)
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError with every argument that does not go with the others."""
    found = []
    if args.chat == (args.prompt is not None):
        found.append(("one of --prompt and --chat is needed, and not both", "--prompt TEXT, or --chat"))
    if not args.chat and (args.system is not None or args.template is not None):
        found.append(("--system and --template belong to --chat", "add --chat, or leave them out"))
    if args.chat and args.no_cache:
        found.append(("--chat keeps what was said in the cache", "leave --no-cache out"))
    if not 0 <= args.temperature < float("inf"):
        found.append((f"--temperature {args.temperature} is below 0", "--temperature 0.8"))
    if found:
        raise ConfigError([Problem(what, "command line", fix) for what, fix in found])
