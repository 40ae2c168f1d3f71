"""What the doors of the command-line tools share: arguments whose mistakes are typed errors, and exit codes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_telechat.errors import EXIT_INTERRUPTED, ConfigError, UserError
from megatron_telechat.locations import is_url


class ToolParser(argparse.ArgumentParser):
    """argparse that raises ConfigError; flags with hyphens or underscores, no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        """Raise a ConfigError (exit code 2) where argparse would print its usage and exit."""
        raise ConfigError(message, "command line", f"{self.prog} --help")

    def parse_args(self, args=None, namespace=None):
        """Parse after replacing underscores in flag names by hyphens, as the training does."""
        return super().parse_args([_hyphens(word) for word in (sys.argv[1:] if args is None else args)], namespace)


def _hyphens(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def purpose(doc: str | None) -> str:
    """What a tool is for, of a module docstring ``file: purpose``."""
    return (doc or "").partition(": ")[2]


def run_tool(tool: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Run a tool on its arguments; a user's mistake becomes one message on stderr and its exit code, Ctrl-C a line and
    130."""
    quiet_imports()
    try:
        return tool(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return interrupted()


def interrupted() -> int:
    """What a tool says and answers after Ctrl-C; a second one then ends it without waiting for its threads."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add ``--overwrite``, which replaces an existing output."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def keep_what_is_there(paths: Iterable[Path], flag: str, overwrite: bool) -> None:
    """Refuse to write over an output that took work to make, before the work for the new one.

    Raises:
        ConfigError: one is there, and --overwrite was not given.
    """
    there = [] if overwrite else [str(path) for path in paths if path.exists()]
    if there:
        raise ConfigError(
            f"{', '.join(there)} {'is' if len(there) == 1 else 'are'} there already",
            flag,
            f"another {flag}, or --overwrite to replace the existing output",
        )


def quiet_imports() -> None:
    """megatron-core warns at import, once a module, that TE and apex are absent; a tool's output is no place for
    that."""
    import warnings

    warnings.filterwarnings("ignore", module=r"megatron\.core.*")


def positive(kind: type) -> Callable[[str], float]:
    """An argparse type: a finite number above 0."""

    def convert(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    convert.__name__ = "number"
    return convert


def folder(text: str) -> Path:
    """An argparse type: a path of this machine."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL: a folder of a file system is meant")
    return Path(text)


def natural(text: str) -> int:
    """An argparse type: an integer from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value
