"""``tools/generate.py``: continue a prompt with a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.cli.tool import ToolParser, natural, positive, quiet_imports, run_tool
from megatron_telechat.device_kinds import DEVICE_CHOICES
from megatron_telechat.errors import EXIT_OK, ConfigError


def build_parser() -> ToolParser:
    """The arguments of tools/generate.py."""
    parser = ToolParser(prog="tools/generate.py", description="Continue a prompt with a Hugging Face folder.")
    parser.add_argument("--hf", type=Path, required=True, help="folder with config.json, weights and tokenizer")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=positive(int), default=64, help="default 64")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most likely token")
    parser.add_argument("--top-k", type=positive(int), help="sample from the k most likely tokens")
    parser.add_argument(
        "--top-p", type=positive(float), help="sample from the most likely tokens with this total probability"
    )
    parser.add_argument("--seed", type=natural, default=0, help="sampling seed (default 0)")
    parser.add_argument("--device", choices=DEVICE_CHOICES, default="auto", help="default auto")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default fp32 on the CPU, else bf16")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done, 2 arguments, 3 tokenizer, 4 weights)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if not 0 <= args.temperature < float("inf"):
        raise ConfigError(f"--temperature {args.temperature} is below 0", "command line", "--temperature 0.8")
    quiet_imports()
    from megatron_telechat.huggingface.generation import Sampling, continue_text

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    added = continue_text(args.hf, args.prompt, args.max_new_tokens, sampling, args.device, args.precision)
    print(args.prompt + added)
    return EXIT_OK
