"""What preset, YAML files, stages, flags and plan files say of a run, in order of precedence, merged to one value a
field."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_telechat.config.derive import SAMPLES
from megatron_telechat.config.fields import did_you_mean, fields_by_name
from megatron_telechat.config.flags import CommandLine
from megatron_telechat.config.megatron.forks import READ, read_forks
from megatron_telechat.config.megatron.meaning import MEGATRON, READ_BY_COSTS, SHAPE, Meaning, padded, read_meaning
from megatron_telechat.config.origins import DEFAULT, DERIVED, Check
from megatron_telechat.config.plan_file import PlanFile, read_plan, same_value
from megatron_telechat.config.presets import preset_names, preset_text
from megatron_telechat.config.rules.learning_rate import ITERS
from megatron_telechat.config.rules.pipeline import working_layout
from megatron_telechat.config.run_stages import SCHEDULE_FIELDS, SCHEDULE_LENGTHS
from megatron_telechat.config.stages import settle_stages
from megatron_telechat.config.vocabulary import ASSUMED
from megatron_telechat.config.yaml_io import Said, StageEntry, YamlFile, read_yaml
from megatron_telechat.errors import ConfigError, Problem

LAYOUTS = ("pipeline_model_parallel_layout", "recompute_layout")

RECORDINGS = ("moe_routing_record", "moe_routing_replay", "moe_routing_steps")
"""Settings about files of a run outside of the sections of data and checkpoints."""

PLANNED = (*LAYOUTS, "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
"""What a planner chooses."""

SUPERSEDES: dict[str, tuple[str, ...]] = {
    "num_layers": LAYOUTS,
    "pipeline_model_parallel_size": LAYOUTS,
    "num_virtual_stages_per_pipeline_rank": LAYOUTS,
    "pipeline_model_parallel_layout": ("recompute_layout",),
    "recompute_granularity": ("recompute_layout",),
    "recompute_layout": ("recompute_granularity", "recompute_method", "recompute_num_layers"),
    "lr_warmup_fraction": ("lr_warmup_iters",),
    "lr_warmup_iters": ("lr_warmup_fraction",),
    "hidden_size": ("kv_channels",),
    "num_attention_heads": ("kv_channels", "num_query_groups"),
}
"""A field a person gives → fields of a preset that speak of the same thing and were made for another value.
A preset's layouts, for one, are for the preset's own pipeline; with another pipeline they say nothing."""


_TOKENIZER = ("tokenizer-type", "tokenizer-model", "vocab-file")
TOKENIZER_FILES = ("--vocab-file", "--merge-file")
"""Flags that our training refuses and that a description reads."""
MODELLED = {
    *("--use-torch-fsdp2", "--use-megatron-fsdp", "--use-custom-fsdp", "--data-parallel-sharding-strategy"),
    "--grad-reduce-in-bf16",
}
"""Flags that the training refuses and the cost model knows (`costs.software`)."""


def _flag_of(problem: Problem) -> str:
    """The flag, and the value it may have, that a refusal is about."""
    return problem.what.split(" (a Megatron")[0].split(" contradicts ")[0]


class Merge:
    """Values in order of precedence, each overwriting the one before."""

    def __init__(
        self,
        line: CommandLine,
        environ: Mapping[str, str],
        planning: bool,
        described: bool,
        changes: Sequence[Said],
        stages: Sequence[StageEntry],
    ):
        self.line = line
        self.stages = stages
        self.entries: tuple[StageEntry, ...] = ()
        self.said_in: dict[str, int] = {}
        self.changes = changes
        self.environ = environ
        self.planning = planning
        self.described = described
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {name: DEFAULT for name in fields_by_name()}
        left_out = (*line.refused, *line.unplanned) if described else ()
        self.problems: list[Problem] = [one for one in line.problems if one not in left_out]
        self.notes: list[str] = list(line.notes)
        if described:
            flags = (_flag_of(one) for one in line.refused)
            flags = [one for one in flags if one not in TOKENIZER_FILES and one.split()[0] not in MODELLED]
            self.notes += [f"{one} is not modelled and was ignored for the plan" for one in flags]
        self.unreadable: set[str] = set(line.unreadable)
        self.preset: str | None = None
        self.plan: PlanFile | None = None
        self.meaning: Meaning | None = None

    def run(self) -> None:
        """Read everything; what is wrong is in ``problems`` afterwards."""
        files = [self.read_file(path) for path in self.line.configs]
        named = [file.preset for file in files if file.preset is not None]
        self.entries = next((file.stages for file in reversed(files) if file.stages is not None), ())
        preset = self.line.preset or (named[-1] if named else None)
        if preset is not None:
            self.read_preset(preset)
        for file in files:
            self.take(file.said)
        self.take(self.line.said)
        self.take_stages()
        self.take(self.changes)
        if self.described:
            self.take_mtp_layout()
        if not any(one.name == "num_virtual_stages_per_pipeline_rank" for one in self.changes):
            settle_stages(self)
        if self.described and self.is_megatrons():
            self.take_forks()
        self.take_plan()
        self.world()
        if self.is_megatrons():
            self.read_as_megatron()
        self.settle()
        if self.described:
            self.drop_files()
        if self.planning:
            self.open_layout()

    @property
    def staged(self) -> bool:
        """Whether the run has several stages."""
        return len(self.entries) > 1

    def take(self, said: Sequence[Said], stage: int = 0) -> None:
        """Values over those before them; ``stage`` says which entry of the stages gives them, 0: none."""
        for one in said:
            self.values[one.name] = one.value
            self.origins[one.name] = one.origin
            self.said_in[one.name] = stage

    def take_stages(self) -> None:
        """What the stages up to this one set, each over those before it."""
        for entry in self.stages:
            said = {one.name for one in entry.said}
            dropped = SCHEDULE_LENGTHS if entry.number > 1 and said & set(SCHEDULE_FIELDS) else ()
            if "rotary_training_seqlen" in said:
                dropped = (*dropped, "rotary_base_seqlen")  # the one of a preset was made for another length
            for name in dropped:
                self.values.pop(name, None)
                self.origins[name] = DEFAULT
            # Of a run a flag holds until a stage sets the same; of the stage that a planner asks for it never does.
            for one in entry.said if entry.number == 1 or self.described else ():
                if self.origins[one.name].startswith("flag") and self.values[one.name] != one.value:
                    given = f"{one.name}={self.values[one.name]} ({self.origins[one.name]})"
                    self.notes.append(f"{given} is not used, because stage {entry.number} sets it ({one.origin})")
            self.take(entry.said, entry.number)

    def read_file(self, path: str) -> YamlFile:
        """What a YAML file says; nothing after a complaint."""
        try:
            with open(path, encoding="utf-8") as stream:
                text = stream.read()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            fix = f"--preset {path}" if path in preset_names() else "give the path of a YAML file"
            self.problems.append(Problem(f"cannot read --config {path}: {reason}", "flag", fix))
            return YamlFile((), None, ())
        read = read_yaml(text, os.path.relpath(path) if not os.path.isabs(path) else path)
        self.problems += read.problems
        self.unreadable |= read.unreadable
        return read

    def read_preset(self, preset: Said) -> None:
        """Take the values of the preset that is named."""
        names = preset_names()
        if preset.value not in names:
            self.problems.append(
                Problem(
                    f"unknown preset {preset.value}{did_you_mean(preset.value, names)}",
                    preset.origin,
                    "the presets are " + ", ".join(names),
                )
            )
            # Without the preset nearly every value is missing; complaints about them would bury the real one.
            self.unreadable |= {name for name, field in fields_by_name().items() if field.section == "model"}
            return
        self.preset = preset.value
        read = read_yaml(preset_text(preset.value), f"{preset.value}.yaml", label=f"preset {preset.value}")
        self.problems += read.problems
        self.take(read.said)

    def is_megatrons(self) -> bool:
        """Whether flags alone describe the model: it is then read as Megatron-LM reads it."""
        model = {
            name for name, info in fields_by_name().items() if info.section == "model" and self.origins[name] != DEFAULT
        }
        by_flag = all(self.origins[name].startswith("flag") for name in model)
        shape = all(isinstance(self.values.get(name), int) and self.values[name] > 0 for name in SHAPE)
        return self.line.preset is None and by_flag and shape and "architecture" not in model

    def read_as_megatron(self) -> None:
        """Absent flags as Megatron-LM means them: what makes another model, and for a planner what makes another
        run."""
        said = frozenset(name for name, origin in self.origins.items() if origin != DEFAULT or name in self.unreadable)
        meaning = self.meaning = read_meaning(self.values, said, self.line.given)
        for what, fix in meaning.asked:
            self.problems.append(Problem(what, "flag", fix))
        taken = dict(meaning.model)
        if self.described:
            taken |= {name: value for name, value in meaning.values.items() if name in READ_BY_COSTS}
            self.take_vocabulary(meaning)
            if "loss_chunk_rows" not in said:  # Megatron-LM's output layer holds all logits
                self.values["loss_chunk_rows"], self.origins["loss_chunk_rows"] = 0, MEGATRON
        for name, value in taken.items():
            self.values[name], self.origins[name] = value, MEGATRON
        if self.described and taken.pop("num_query_groups", None):
            heads = self.values["num_query_groups"]
            self.notes.append(
                "--num-query-groups as Megatron-LM reads it: no effect without --group-query-attention, "
                f"{heads} heads of keys and values"
            )
        if self.described and taken:
            said_as = ", ".join(f"{name}={value}" for name, value in taken.items())
            self.notes.append(f"missing flags as Megatron-LM reads them: {said_as}")

    def take_mtp_layout(self) -> None:
        """A layout string with blocks of multi-token prediction (m): the costs count them with the output layer."""
        name = "pipeline_model_parallel_layout"
        text = self.values.get(name)
        if self.values.get("mtp_num_layers") and isinstance(text, str) and "m" in text and "[" not in text:
            self.values[name] = re.sub(r"m(\*\d+)?", "", text)
            self.notes.append(f"{text}: the multi-token-prediction block (m) is counted with the output layer (L)")

    def take_forks(self) -> None:
        """What flags of other programs say of the model; all others that are not known are left out, in one note."""
        for name, taken in read_forks(self.line.given, self.values).items():
            self.values[name], self.origins[name] = taken.value, f"flag {taken.flag}"
            self.notes.append(f"{taken.flag}, a flag of another program: taken as {name}={taken.value}")
        unknown = [problem for problem, _ in self.line.unknown]
        self.problems = [problem for problem in self.problems if problem not in unknown]
        left_out = [typed for _, typed in self.line.unknown if typed[2:].replace("_", "-") not in READ]
        if left_out:
            self.notes.append(f"not flags of Megatron-LM, not modelled: {' '.join(dict.fromkeys(left_out))}")

    def take_vocabulary(self, meaning: Meaning) -> None:
        """Rows of the embedding: those of --vocab-size or of the tokenizer, padded as Megatron-LM pads them."""
        name = "vocab_size"
        if name in self.unreadable:
            return
        size, source = self.values.get(name), "--vocab-size"
        if size is None and meaning.vocabulary is not None:
            size, source = meaning.vocabulary.size, meaning.vocabulary.source
            self.origins[name] = f"tokenizer {source}"
        if size is None:
            tokenizer = " ".join(word for flag in _TOKENIZER for word in self.line.given.get(flag, ()))
            what = f"the vocabulary size is not given, and no file of the tokenizer {tokenizer} is here".replace(
                "  ", " "
            )
            if not tokenizer:
                what = "neither a vocabulary size nor a tokenizer is given"
            self.notes.append(f"assumed: {ASSUMED:,} tokens, because {what}; --vocab-size N")
            size, source = ASSUMED, "an assumption"
        self.values[name] = padded(size, self.values.get("tensor_model_parallel_size", 1), self.line.given)
        if self.values[name] != size or source != "--vocab-size":
            more = f", padded to {self.values[name]:,} as Megatron-LM pads it" if self.values[name] != size else ""
            self.notes.append(f"vocabulary as Megatron-LM sees it: {size:,} of {source}{more}")

    def take_plan(self) -> None:
        """What the plan file sets, as if flags said so; a flag or file that says otherwise is a slip."""
        path = self.values.get("plan")
        if path is None or (self.described and self.stages):
            return
        try:
            plan = read_plan(path)
        except ConfigError as error:
            self.problems += error.problems
            return
        self.plan = plan
        for name, value in plan.sets.items():
            # A plan of a stage changes what was said for the stages before it.
            said_with_it = self.by_person(name) and self.said_in.get(name, 0) >= self.said_in.get("plan", 0)
            if said_with_it and not self.same(name, self.values.get(name), value):
                what = f"{name}={self.values.get(name)} and {name}={value} of the plan disagree"
                fix = f"drop one of the two, or plan again with {fields_by_name()[name].flag} {self.values.get(name)}"
                self.problems.append(Problem(what, f"{self.origins[name]}; {plan.origin}", fix))
                continue
            self.values[name] = value
            self.origins[name] = plan.origin

    @staticmethod
    def same(name: str, one: Any, other: Any) -> bool:
        """Whether two values of a field say the same."""
        try:
            return same_value(name, one, other)
        except ConfigError:
            return False

    def plan_problems(self, check: Check) -> list[Problem]:
        """What keeps the plan from being one for this model; a note where only its predictions do not hold."""
        if self.plan is None or self.problems:
            return []
        differences = self.plan.differences(check.run)
        if differences:
            fix = "plan again for this run: tools/plan_pipeline.py with the flags of this run"
            return [Problem(f"the plan was made for another run: {'; '.join(differences)}", self.plan.origin, fix)]
        if self.plan.predicted is not None and self.plan.prediction_for(check.run) is None:
            made = ", ".join(f"{name}={value}" for name, value in self.plan.predicted_for.items())
            self.notes.append(f"{self.plan.origin} was made for {made}: its predictions are not used")
        return []

    def drop_files(self) -> None:
        """Drop settings about files, which may be on another machine; of a pasted command also what no plan reads."""
        unread = ("optimizer", "evaluation", "logging") if self.meaning is not None else ()
        for name, info in fields_by_name().items():
            if info.section in ("data", "checkpoint") or name in RECORDINGS or info.section in unread:
                self.values.pop(name, None)
                self.origins[name] = DEFAULT

    def open_layout(self) -> None:
        """Drop layout and recompute, and set an even split for the other rules to check."""
        for name in PLANNED:
            self.values.pop(name, None)
            self.origins[name] = DEFAULT
        self.unreadable -= set(PLANNED)
        stages = self.values.get("pipeline_model_parallel_size", 1)
        virtual_stages = self.values.get("num_virtual_stages_per_pipeline_rank", 1)
        layers = self.values.get("num_layers", 0)
        layout = working_layout(layers, stages, virtual_stages) if min(layers, stages, virtual_stages) >= 1 else None
        if layout is not None:
            self.values["pipeline_model_parallel_layout"] = str(layout)

    def world(self) -> None:
        """Number of ranks: torchrun's, else the flag's (to describe a run), else the fewest that hold the model."""
        asked = self.values.get("world_size") if self.origins["world_size"].startswith("flag") else None
        running = self.environment_number("WORLD_SIZE")
        if running is not None:
            if asked is not None and asked != running and not self.line.actions.starts_nothing:
                what = f"--world-size {asked}, but torchrun started {running} ranks"
                self.problems.append(Problem(what, "flag; torchrun", "leave --world-size out"))
            if asked is None or not self.line.actions.starts_nothing:
                self.values["world_size"] = running
                self.origins["world_size"] = "torchrun"
        elif not self.line.actions.starts_nothing:
            if asked is not None and asked > 1:
                self.problems.append(
                    Problem(
                        f"--world-size {asked}, but this is a single process without torchrun",
                        "flag",
                        f"torchrun --nproc-per-node {asked} pretrain/pretrain_telechat2.py ..., or add --dry-run",
                    )
                )
            else:
                self.values["world_size"] = 1
                self.origins["world_size"] = "no torchrun"
        elif self.origins["world_size"] == DEFAULT and "world_size" not in self.unreadable:
            self.values["world_size"] = self.smallest_world()
            self.origins["world_size"] = "derived"
        if not self.origins["ranks_per_node"].startswith("flag") and asked is None:
            local = self.environment_number("LOCAL_WORLD_SIZE")
            if local is not None:
                self.values["ranks_per_node"] = local
                self.origins["ranks_per_node"] = "torchrun"

    def smallest_world(self) -> int:
        """Fewest ranks that hold one copy of the model and of the experts."""
        sizes = [self.values.get(f"{axis}_parallel_size", 1) for axis in ("tensor_model", "pipeline_model", "context")]
        if min(sizes) < 1:
            return 1
        tensor, pipeline, context = sizes
        experts = self.values.get("expert_model_parallel_size") or 1
        if self.values.get("num_experts") is None or experts < 1:
            experts = 1
        dense = tensor * context
        folds = self.values.get("fold_tensor_into_experts", False)
        expert = experts * (self.values.get("expert_tensor_parallel_size") or (1 if folds else tensor))
        return pipeline * (math.lcm(dense, expert) if expert > 0 else dense)

    def environment_number(self, name: str) -> int | None:
        """A number of ranks that torchrun gives; None where there is none, or after a complaint."""
        text = self.environ.get(name)
        if not text:
            return None
        if not text.isdigit() or int(text) < 1:
            what = f"{name}={text!r} is not a number of ranks"
            self.problems.append(Problem(what, "environment", f"start with torchrun, or unset {name}"))
            return None
        return int(text)

    def settle(self) -> None:
        """Let what a person says take the place of what a preset says in other words."""
        for name, replaced in SUPERSEDES.items():
            if self.by_person(name) and self.values.get(name) is not None:
                for other in replaced:
                    self.drop(other, name)
        self.settle_schedule()
        for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if self.by_person(name) and self.values.get(name) is False:
                self.drop("overlap_param_gather", name)
        if self.values.get("eval_iters") == 0:
            self.notes.append(f"eval_iters=0 ({self.origins['eval_iters']}): no evaluation")
            for name in ("eval_iters", "eval_interval", "valid_data_path"):
                self.values.pop(name, None)
                self.origins[name] = DEFAULT

    def settle_schedule(self) -> None:
        """A preset counts steps; where the schedule counts tokens, its counts say nothing."""
        by_tokens = (*ITERS.values(), "train_samples", *SAMPLES)
        tokens = [name for name in by_tokens if self.values.get(name) is not None]
        if not tokens and not self.staged:
            return
        why = "the learning rate of a run with stages follows tokens" if self.staged else f"{tokens[0]} is given"
        for name, ours in ITERS.items():
            if self.origins[name].startswith("preset "):
                value = self.values.pop(name)
                self.origins[name] = DEFAULT
                if value:
                    ours = fields_by_name()[ours].flag
                    self.notes.append(f"{name}={value} of preset {self.preset} is not used, because {why}: {ours} N")

    def by_person(self, name: str) -> bool:
        """Whether the value comes from a flag or a file."""
        return self.origins[name] not in (DEFAULT, DERIVED) and not self.origins[name].startswith("preset ")

    def drop(self, name: str, because: str) -> None:
        """Take back what a preset says of a field, with a note."""
        if self.origins[name].startswith("preset ") and self.values.get(name) is not None:
            self.notes.append(
                f"{name}={self.values[name]} of preset {self.preset} is not used, "
                f"because {because} is given ({self.origins[because]})"
            )
            del self.values[name]
            self.origins[name] = DEFAULT
