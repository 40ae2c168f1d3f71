"""What a person asks of plan_pipeline: options, and the run out of flags, files, a preset or a Megatron command."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional, Sequence

from megatron_telechat.cli.tool import ToolParser, natural, positive
from megatron_telechat.config import LoadedConfig, load_run_config
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec, device_spec, device_spec_names, read_device_file
from megatron_telechat.errors import ConfigError

DESCRIPTION = """\
The fastest pipeline layout that fits the memory: which layers each stage holds, and what each recomputes.
Proved by an exact solver on a model of memory and time; the training takes the answer as it is (--plan FILE).

  plan_pipeline.py --preset telechat2-115b --world-size 512 --device ascend-910b-64g
  plan_pipeline.py --config run.yaml --micro-batch-size 2 --device h100-80g --recompute-kinds core_attn+mlp,full
  plan_pipeline.py --device h100-80g -- torchrun --nproc-per-node 8 --nnodes 4 pretrain_gpt.py --num-layers 48 ...
  plan_pipeline.py --preset telechat2-35b --world-size 64 --device a100-80g --sweep
  plan_pipeline.py --problem problem.json --json
  torchrun --nproc-per-node 2 tools/plan_pipeline.py --preset telechat2-tiny --calibrate --output mine.yaml

Every other flag is one of the training (pretrain_telechat2.py --help) or of Megatron-LM."""


OTHER_FAMILIES = ("bert", "t5", "mamba", "hybrid", "ict", "realm", "retro", "vision", "vlm", "mimo", "multimodal", "avlm")
"""Words in the names of Megatron-LM's programs for models that are no GPT."""


@dataclass(frozen=True)
class Request:
    """Options of the tool, and the words that describe the run."""

    options: argparse.Namespace
    words: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Recompute kinds allowed next to none."""
        return tuple(filter(None, (kind.strip() for kind in self.options.recompute_kinds.split(",")))) or ("none",)

    def load(self, *more: str) -> LoadedConfig:
        """The run with its layout still open, `more` flags added.

        Raises:
            ConfigError: with all problems of the configuration.
        """
        return load_run_config([*self.words, *more, "--dry-run"], {}, planning=True)

    def as_configured(self) -> Optional[RunConfig]:
        """The run with its own layout and recompute; None where it names none that works."""
        try:
            loaded = load_run_config([*self.words, "--dry-run"], {}, described=True)
        except ConfigError:
            return None
        said = any(
            loaded.origins[name] not in ("default", "derived")
            for name in ("pipeline_model_parallel_layout", "recompute_granularity", "recompute_layout")
        )
        return loaded.run if said else None


def read_request(argv: Sequence[str]) -> Request:
    """Read the arguments behind the program's name.

    Raises:
        ConfigError: an option with a bad value; a command file that cannot be read.
    """
    words = list(argv)
    command: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    options, others = _parser().parse_known(words)
    if options.command:
        command = _read_command(options.command) + command
    options.time_limit = options.time_limit or (60.0 if options.sweep else 30.0)
    return Request(options, (*_flags_of(command), *others))


class _Parser(ToolParser):
    def parse_known(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Own options, and the words of others in their order."""
        own = set(self._option_string_actions)
        parts = (word.partition("=") for word in words)
        plain = [name.replace("_", "-") + eq + value if name.replace("_", "-") in own else name + eq + value for name, eq, value in parts]
        return self.parse_known_args(plain)


def _parser() -> _Parser:
    parser = _Parser(
        prog="plan_pipeline.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="plan_pipeline.py [options] [flags of a run | -- a Megatron command]",
    )  # fmt: skip
    seconds, gib = positive(float), positive(float)
    add = parser.add_argument
    add("--device", metavar="NAME|FILE", help=f"{', '.join(device_spec_names())}, or a device file (--calibrate writes one)")
    add("--command", metavar="FILE", help="shell script with a Megatron command to plan for; - reads stdin")
    add("--recompute-kinds", default="full", metavar="K,K", help="what a layer may recompute: full, modules joined by + such as "
        "core_attn+mlp, or none [full]")  # fmt: skip
    add("--memory-gib", type=gib, metavar="X", help="memory of one device [that of the device file]")
    add("--reserve-gib", type=float, metavar="X", help="of it, held back for context, buffers, fragmentation [3]")
    add("--time-limit", type=seconds, metavar="S", help="seconds of search; then the best so far with its gap [30; of a sweep 60]")
    add("--gap", type=float, default=0.0, metavar="X", help="stop at this proven relative gap, such as 0.01 [0]")
    add("--plain-flags", action="store_true", help="only what Megatron-LM's flags can say: a layout string, one recompute setting")
    add("--sweep", action="store_true", help="rank parallel layouts of --world-size ranks; sizes given as flags stay")
    add("--top", type=natural, default=10, metavar="N", help="rows of the sweep [10]")
    add("--calibrate", action="store_true", help="measure this run's layers on the device at hand (torch, under torchrun) and write "
        "a device file to --output")  # fmt: skip
    add("--rounds", type=natural, default=15, metavar="N", help="rounds of the calibration [15]")
    add("--problem", metavar="FILE", help="solve an abstract balance problem (JSON, see docs/planner.md)")
    add("--json", action="store_true", help="print the answer as JSON")
    add("--output", metavar="FILE", help="write the plan for --plan of the training; with --calibrate the device file")
    add("--plot", metavar="FILE.png", help="draw stage times, memory and the schedule")
    return parser


def _read_command(path: str) -> list[str]:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        return shlex.split(text.replace("\\\n", " "), comments=True)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "--command", "name a file, or - for stdin") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no shell command: {error}", "--command", "paste the command as it is typed") from None


def _flags_of(command: Sequence[str]) -> list[str]:
    """Flags behind the program's name; ranks from the launcher's, where the command says them.

    Raises:
        ConfigError: a shell variable, whose value the command does not say.
    """
    variables = [word for word in command if re.search(r"\$[A-Za-z_{(]", word)]
    if variables:
        raise ConfigError(
            f"shell variables in the command: {' '.join(variables[:5])}", "Megatron command", "write their values in their places"
        )
    program = next((at for at, word in enumerate(command) if word.endswith(".py")), -1)
    _refuse_other_families(command[program] if program >= 0 else "")
    flags = list(command[program + 1 :])
    launcher = {}
    words = list(command[: max(program, 0)])
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        launcher[name.replace("_", "-")] = value if equals else (words[at + 1] if at + 1 < len(words) else "")
    ranks, nodes = launcher.get("--nproc-per-node", ""), launcher.get("--nnodes", "1")
    if ranks.isdigit() and nodes.isdigit():
        return ["--world-size", str(int(ranks) * int(nodes)), "--ranks-per-node", ranks, *flags]
    return flags


def _refuse_other_families(program: str) -> None:
    """The flags of a program that trains another family of models would be read as those of a GPT.

    Raises:
        ConfigError: it does.
    """
    name = Path(program).stem
    family = next((family for family in OTHER_FAMILIES if family in name.split("_")), None)
    if name.startswith(("pretrain_", "finetune_")) and family is not None:
        raise ConfigError(f"{program} does not train a GPT model", "Megatron command", "the command of a pretrain_gpt.py")


def read_device(name: Optional[str], run: RunConfig) -> tuple[DeviceSpec, RunConfig]:
    """The device by name or file, and the run as it is on this device.

    Raises:
        ConfigError: no such device or file.
    """
    known = ", ".join(device_spec_names())
    if name is None:
        raise ConfigError("which device is to be planned for?", "command line", f"--device NAME or FILE: {known}")
    spec = device_spec(name)
    if spec is None:
        if not (name.endswith((".yaml", ".yml")) or Path(name).is_file()):
            fix = f"one of {known}; or a device file, which --calibrate writes"
            raise ConfigError(f"unknown device {name!r}", "--device", fix)
        spec = read_device_file(Path(name))
    # on a CPU an attention keeps a little more: costs/activations.py
    kind = "cpu" if spec.name == "cpu" or spec.name.startswith("cpu-") else run.training.device
    return spec, replace(run, training=replace(run.training, device=kind))
