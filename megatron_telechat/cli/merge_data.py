"""``tools/merge_data.py``: join the shards of a preprocess_data run, or any datasets of one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_telechat.cli.tool import ToolParser, add_overwrite, keep_what_is_there, purpose, run_tool
from megatron_telechat.errors import EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done, 2 arguments, 3 an input is damaged or missing, 6 disk)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    parser = ToolParser(prog="tools/merge_data.py", description=purpose(__doc__))
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="prefixes, globs or a folder; shards are put in their order")
    add(
        "--output-prefix",
        required=True,
        help="shards: PREFIX_KEY_document is written, as one run would; others: PREFIX",
    )
    add_overwrite(parser)
    args = parser.parse_args(argv)
    from megatron_telechat.data.indexed.merge import merge_datasets, plan_merge
    from megatron_telechat.data.indexed.verify import find_datasets

    plan = plan_merge(find_datasets(args.input), args.output_prefix)
    new = [
        output for output, prefixes in plan.items() if output not in prefixes
    ]  # an output that is an input is another mistake
    keep_what_is_there([Path(f"{output}.idx") for output in new], "--output-prefix", args.overwrite)
    for output, prefixes in plan.items():
        data = merge_datasets(prefixes, output)
        print(f"{output}: {len(prefixes)} datasets, {data.documents:,} documents, {data.num_tokens:,} tokens")
    return EXIT_OK
