"""``tools/generate.py``: continue a prompt with a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.cli.tool import ToolParser, natural, positive, quiet_imports, run_tool
from megatron_telechat.errors import EXIT_OK, ConfigError, DataError


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
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), default="auto", help="default auto")
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
    from megatron_telechat.backend import get_backend
    from megatron_telechat.data.tokenizers import build_tokenizer
    from megatron_telechat.huggingface.files import CONFIG, read_json
    from megatron_telechat.huggingface.generation import Sampling, end_tokens_of, generate
    from megatron_telechat.huggingface.model import hf_model

    config = read_json(args.hf / CONFIG)
    tokenizer = build_tokenizer(None, str(args.hf))
    prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise DataError("the prompt has no tokens", "--prompt", "give some text")
    ends = end_tokens_of(args.hf, config, tokenizer.eod)
    precision = args.precision or ("fp32" if get_backend(args.device).name == "cpu" else "bf16")
    length = len(prompt) + args.max_new_tokens
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    with hf_model(args.hf, device=args.device, precision=precision, seq_length=length) as model:
        vocab_size = model.run.model.vocab_size
        if max(prompt) >= vocab_size:
            raise DataError(
                f"the tokenizer gives ids up to {max(prompt)}, the model has {vocab_size}",
                str(args.hf),
                "put the tokenizer of this model into the folder",
            )
        tokens = generate(model, prompt, args.max_new_tokens, ends, sampling)
    print(args.prompt + tokenizer.decode(tokens))
    return EXIT_OK
