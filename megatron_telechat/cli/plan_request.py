"""What a person asks of plan_pipeline: options, and the run out of flags, files, a preset or a Megatron command."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_telechat.cli.tool import ToolParser, natural, positive
from megatron_telechat.config import LoadedConfig, load_run_config
from megatron_telechat.config.megatron.meaning import MEGATRON
from megatron_telechat.config.origins import DEFAULT, DERIVED
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec, device_spec, device_spec_names, read_device_file
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.context import KEEP, SPLIT

if TYPE_CHECKING:  # what reads commands, and the solver's libraries, are loaded when there is work: --help is quick
    from megatron_telechat.cli.sandbox import Script
    from megatron_telechat.costs.software import Software
    from megatron_telechat.planner.plan import Question

_GIB = 2**30
DESCRIPTION = """\
The fastest pipeline layout that fits the memory: which layers each stage holds, and what each recomputes.
An exact solver proves it for a model of memory and time. The training reads the result (--plan FILE).

  plan_pipeline.py --preset telechat2-115b --world-size 512 --device ascend-910b-64g
  plan_pipeline.py --config run.yaml --micro-batch-size 2 --device h100-80g --recompute-kinds core_attn+mlp,full
  plan_pipeline.py --device h100-80g -- torchrun --nproc-per-node 8 --nnodes 4 pretrain_gpt.py --num-layers 48 ...
  plan_pipeline.py --preset telechat2-35b --world-size 64 --device a100-80g --sweep
  plan_pipeline.py --problem problem.json --json
  torchrun --nproc-per-node 2 tools/plan_pipeline.py --preset telechat2-tiny --calibrate --output mine.yaml
  plan_pipeline.py --calibrate --from 2950 --preset telechat2-7b --device ascend-910b-64g --output mine.yaml

All other flags are training flags (pretrain_telechat2.py --help) or Megatron-LM flags."""


@dataclass(frozen=True)
class Request:
    """Options of the tool, the words that describe the run, how a pasted command was read, and whether there is one."""

    options: argparse.Namespace
    words: tuple[str, ...]
    notes: tuple[str, ...] = ()
    pasted: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Recompute kinds allowed next to none."""
        return tuple(filter(None, (kind.strip() for kind in self.options.recompute_kinds.split(",")))) or ("none",)

    def load(self, *changes: str) -> LoadedConfig:
        """The run with its layout still open, and with these flags in place of what was said of the same.

        Raises:
            ConfigError: with all problems of the configuration.
        """
        return load_run_config([*self.words, "--dry-run"], {}, planning=True, changes=changes, stage=self.options.stage)

    def as_configured(self) -> tuple[RunConfig | None, str]:
        """The run with its own layout and recompute; None where it names none, or where what it names does not work:
        then with the reason."""
        try:
            loaded = load_run_config([*self.words, "--dry-run"], {}, described=True, stage=self.options.stage)
        except ConfigError as error:
            return None, error.problems[0].what
        said = any(
            loaded.origins[name] not in ("default", "derived")
            for name in ("pipeline_model_parallel_layout", "recompute_granularity", "recompute_layout")
        )
        return (loaded.run, "") if said else (None, "")


def read_request(argv: Sequence[str]) -> Request:
    """Read the arguments behind the program's name.

    Raises:
        ConfigError: an option with a bad value; a command file that cannot be read; see `read_pasted`.
    """
    words = list(argv)
    command: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    options, others = _parser().parse_known(words)
    options.time_limit = options.time_limit or (60.0 if options.sweep else 30.0)
    if not (options.command or command):
        return Request(options, tuple(others))
    from megatron_telechat.cli.pasted import read_launch_script, read_pasted

    if options.command:
        pasted = read_launch_script(_script(options.command, others), command, others)
    else:
        pasted = read_pasted(None, command, others)
    return Request(options, (*pasted.words, *others), pasted.notes, True)


class _Parser(ToolParser):
    def parse_known(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Own options, and the words of others in their order."""
        own = set(self._option_string_actions)
        parts = (word.partition("=") for word in words)
        plain = [
            name.replace("_", "-") + eq + value if name.replace("_", "-") in own else name + eq + value
            for name, eq, value in parts
        ]
        return self.parse_known_args(plain)


def _parser() -> _Parser:
    parser = _Parser(
        prog="plan_pipeline.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="plan_pipeline.py [options] [flags of a run | -- a Megatron command]",
    )
    seconds, gib = positive(float), positive(float)
    add = parser.add_argument
    add(
        "--device",
        metavar="NAME|FILE",
        help=f"{', '.join(device_spec_names())}, or a device file (--calibrate writes one)",
    )
    add(
        "--command",
        metavar="FILE",
        help="launch script of a Megatron run to plan for, with variables before and arguments behind it where it "
        "takes some ('NNODES=4 run.sh 7B 4096'); it runs in a sandbox with stubs for launchers; - reads stdin",
    )
    add(
        "--recompute-kinds",
        default="full",
        metavar="K,K",
        help="what a layer may recompute: full, modules joined by + such as core_attn+mlp, or none [full]",
    )
    add("--memory-gib", type=gib, metavar="X", help="memory of one device [that of the device file]")
    add(
        "--reserve-gib",
        type=float,
        metavar="X",
        help="part of it to keep free for context, buffers, fragmentation [3, and known buffers]",
    )
    add(
        "--time-limit",
        type=seconds,
        metavar="S",
        help="time limit of the search in seconds, then the best plan found with its gap [30; sweep: 60]",
    )
    add(
        "--gap",
        type=float,
        default=0.0,
        metavar="X",
        help="stop at this proven relative gap, such as 0.01 [0; sweep: 0.005]",
    )
    add(
        "--plain-flags",
        action="store_true",
        help="only plans in Megatron-LM's flags: a layout string, one recompute setting",
    )
    add(
        "--moe-imbalance",
        default="1",
        metavar="X,X",
        help="rows of the busiest rank's experts over the mean that the plan must expect [1]; of several, the plan is "
        "the best for the worst",
    )
    add(
        "--slow-stage",
        type=float,
        default=0.0,
        metavar="X",
        help="any one pipeline stage may run slower by this share, such as 0.05: the plan is the best for the worst "
        "case [0]",
    )
    add("--stage", type=natural, metavar="N", help="of a run with stages (--config): the one to plan, from 1")
    add("--sweep", action="store_true", help="rank parallel layouts of --world-size ranks; sizes given as flags stay")
    add(
        "--free",
        default="",
        metavar="S,S",
        help="with --sweep: sizes to vary though they are given: tp, pp, vp, cp, ep, etp, mbs, offload, or all",
    )
    add(
        "--frontier",
        metavar="memory|ranks=N,N",
        help="with --sweep: the fastest step against memory (memory=80,64,48: these GiB), or against the number of "
        "ranks; --plot draws it",
    )
    add(
        "--processes",
        type=natural,
        metavar="N",
        help="processes that search [one for each processor]; what a sweep finds does not depend on it",
    )
    add("--top", type=natural, default=10, metavar="N", help="rows of the sweep [10]")
    add(
        "--calibrate",
        action="store_true",
        help="measure this run's layers on the device at hand (torch, under "
        "torchrun) and write "
        "a device file to --output",
    )
    add(
        "--from",
        dest="from_",
        metavar="RUN_DIR|N",
        help="measure nothing; fit the times of a layer and of both ends to the logged steps of a run folder, for "
        "a plan, or with --calibrate for a device file; with --calibrate also N tokens a second and device, which "
        "fit one factor (efficiency.stack of --device)",
    )
    add("--rounds", type=natural, default=15, metavar="N", help="rounds of the calibration [15]")
    add("--problem", metavar="FILE", help="solve an abstract balance problem (JSON, see docs/planner.md)")
    add("--json", action="store_true", help="print the answer as JSON")
    add("--output", metavar="FILE", help="write the plan for --plan of the training; with --calibrate the device file")
    add("--plot", metavar="FILE.png", help="draw stage times, memory and the schedule")
    return parser


def _script(given: str, others: Sequence[str]) -> Script:
    """The script of --command: a file, or a file with variables before and arguments behind it, as in a shell.

    Raises:
        ConfigError: it cannot be read.
    """
    from megatron_telechat.cli.pasted import last_value
    from megatron_telechat.cli.sandbox import Script

    devices = last_value(others, "--ranks-per-node")
    found = Script("", devices=int(devices) if devices and devices.isdigit() else 8)
    if given == "-":
        return replace(found, text=_read_text(given))
    words = [given] if Path(given).is_file() else _words(given)
    environment: dict[str, str] = {}
    while len(words) > 1 and (name := re.match(r"([A-Za-z_]\w*)=", words[0])):
        environment[name[1]] = words.pop(0)[name.end() :]
    if len(words) > 1 and words[0].rsplit("/", 1)[-1] in ("bash", "sh", "sbatch"):
        words.pop(0)
    file, *arguments = words
    return replace(found, text=_read_text(file), path=Path(file), arguments=tuple(arguments), environment=environment)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text) or [text]
    except ValueError as error:
        raise ConfigError(f"cannot read --command {text}: {error}", "--command", "quote it as in a shell") from None


def _read_text(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}", "--command", "name a file, or - for stdin") from None


def read_device(name: str | None, run: RunConfig) -> tuple[DeviceSpec, RunConfig]:
    """The device by name or file, and the run as it is on this device.

    Raises:
        ConfigError: no such device or file.
    """
    known = ", ".join(device_spec_names())
    if name is None:
        raise ConfigError("no device is given", "command line", f"--device NAME or FILE: {known}")
    spec = device_spec(name)
    if spec is None:
        if not (name.endswith((".yaml", ".yml")) or Path(name).is_file()):
            fix = f"one of {known}; or a device file, which --calibrate writes"
            raise ConfigError(f"unknown device {name!r}", "--device", fix)
        spec = read_device_file(Path(name))
    # what a layer keeps depends on the kind of device: costs/activations.py
    return spec, on_device(run, spec)


def on_device(run: RunConfig, spec: DeviceSpec) -> RunConfig:
    """The run as it is on such a device."""
    return replace(run, training=replace(run.training, device=spec.kind or run.training.device))


def said_ways(loaded: LoadedConfig) -> list[str]:
    """What flags or files say of how context-parallel ranks share a row: the planner leaves it as it is."""
    origins = ((name, loaded.origins[name]) for name in (*SPLIT, KEEP))
    open_ones = (DEFAULT, DERIVED, MEGATRON)
    return [name for name, origin in origins if origin not in open_ones and not origin.startswith("preset ")]


def software_of(loaded: LoadedConfig, run: RunConfig) -> tuple[Software, tuple[str, ...]]:
    """What the program of this run does beyond its shapes, and what of it was said: Megatron-LM's of a pasted command,
    else our own training."""
    from megatron_telechat.costs.software import megatron_software

    return megatron_software(run, loaded.given, own=MEGATRON not in loaded.origins.values())


def question_of(request: Request, loaded: LoadedConfig, run: RunConfig, device: DeviceSpec) -> Question:
    """The planner's question of this run under the tool's options.

    Args:
        loaded: with the flags of Megatron-LM that say what its program overlaps.
        run: the run as it is on the device.
    """
    from megatron_telechat.planner.plan import Question
    from megatron_telechat.planner.worker import processors

    options = request.options
    software, counted = software_of(loaded, run)
    imbalance, said = _imbalance(options.moe_imbalance)
    slow = options.slow_stage
    if not 0 <= slow < float("inf"):
        raise ConfigError(f"--slow-stage {slow:g}", "command line", "a share, at least 0, such as 0.05")
    question = Question(
        run,
        device,
        request.kinds,
        memory_bytes=None if options.memory_gib is None else options.memory_gib * _GIB,
        reserve_bytes=None if options.reserve_gib is None else options.reserve_gib * _GIB,
        time_limit_s=options.time_limit,
        gap=options.gap,
        plain=options.plain_flags,
        software=software,
        counted=(*counted, *(said if run.model.is_moe else ())),
        imbalance=imbalance,
        slow_stage=slow,
        processes=options.processes or processors(),
    )
    return question.of(run)


def _imbalance(text: str) -> tuple[float, tuple[str, ...]]:
    """The largest of --moe-imbalance, and what is said of it.

    Raises:
        ConfigError: numbers that are none, or below 1.
    """
    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = []
    if not found or not all(1 <= number < float("inf") for number in found):
        raise ConfigError(f"--moe-imbalance {text}", "command line", "numbers from 1 on with commas, such as 1,1.2,1.5")
    worst = max(found)
    if worst == 1:
        return 1.0, ()
    best = f"; the plan is the best for the worst of {text}" if len(found) > 1 else ""
    return worst, (f"--moe-imbalance: the experts of the busiest rank get up to {worst:g} times the mean{best}",)
