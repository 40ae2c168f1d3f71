"""Stages of a run: what a file says, one configuration a stage, all that is wrong at once, and the dry run of it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from megatron_telechat.cli.dry_run import report
from megatron_telechat.config import LoadedConfig, load_run_config
from megatron_telechat.config.plan_file import plan_of
from megatron_telechat.config.rates import curve_of
from megatron_telechat.config.run_stages import Position, RunStages
from megatron_telechat.config.show import config_yaml
from megatron_telechat.errors import ConfigError
from megatron_telechat.training.learning_rate import StageRates, learning_rate
from tests.harness import ROOT

TINY = ("--preset", "telechat2-tiny", "--mock-data", "--seq-length", "512", "--global-batch-size", "8")
THREE = """
stages:
  - from_tokens: 0
  - from_tokens: 20_480
    seq_length: 2048
    rotary_base: 1e6
    rotary_training_seqlen: 2048
    global_batch_size: 4
  - from_samples: 60
    seq_length: 8192
    rotary_base: 4e7
    rotary_training_seqlen: 8192
    recompute_granularity: full
    lr: 1e-4
"""


def load(tmp_path: Path, text: str, *flags: str, **options) -> LoadedConfig:
    path = tmp_path / "stages.yaml"
    path.write_text(textwrap.dedent(text))
    return load_run_config([*TINY, "--config", str(path), "--dry-run", *flags], {}, **options)


def refusal(tmp_path: Path, text: str, *flags: str, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *flags, **options)
    return caught.value.render()


def test_each_stage_is_a_run_and_keeps_what_the_ones_before_it_set(tmp_path):
    stages = load(tmp_path, THREE, "--train-iters", "25").stages
    runs = [stage.run for stage in stages.stages]
    assert [run.training.seq_length for run in runs] == [512, 2048, 8192]
    assert [run.training.global_batch_size for run in runs] == [8, 4, 4], "a batch holds until it is set again"
    assert [run.model.rotary_base for run in runs] == [1e4, 1e6, 4e7]
    assert [run.model.rotary_base_seqlen for run in runs] == [256, 2048, 8192], "derived in each stage"
    assert [run.training.recompute_granularity for run in runs] == [None, None, "full"]
    assert [run.optimizer.lr for run in runs] == [2e-3, 2e-3, 1e-4]
    assert all(run.training.train_iters == 25 for run in runs)
    spans = stages.spans()
    # 5 steps of 4,096 tokens end at the start of stage 2; 60 samples are reached 5 steps of 4 later.
    assert [(span.begin.step, span.end.step) for span in spans] == [(0, 5), (5, 10), (10, 25)]
    assert [span.end.tokens for span in spans] == [20_480, 20_480 + 40_960, 61_440 + 15 * 4 * 8192]
    assert [span.end.samples for span in spans] == [40, 60, 120]


def test_a_stage_begins_with_the_first_step_at_or_behind_its_start(tmp_path):
    stages = load(tmp_path, THREE.replace("20_480", "20_481"), "--train-iters", "25").stages
    second = stages.spans()[1]
    assert (second.begin.step, second.begin.tokens) == (6, 6 * 4096)
    at = Position(6, 48, 6 * 4096)
    assert stages.at(at).number == 2 and stages.before(at).number == 1
    later = at.after(second.stage.run)
    assert stages.at(later).number == stages.before(later).number == 2
    assert stages.at(Position()).number == stages.before(Position()).number == 1
    # From a place that no plan reaches, such as after another batch: the rest is counted from there.
    rest = stages.spans(Position(7, 51, 23_000))
    assert [(span.stage.number, span.begin.step, span.end.step) for span in rest] == [(2, 7, 10), (3, 10, 25)]


def test_the_resolved_yaml_is_read_back_to_the_same_stages(tmp_path):
    loaded = load(tmp_path, THREE, "--train-iters", "25", "--lr-warmup-tokens", "8192")
    written = tmp_path / "config.yaml"
    written.write_text(config_yaml(loaded))
    again = load_run_config(["--config", str(written), "--dry-run"], {})
    assert [stage.run for stage in again.stages.stages] == [stage.run for stage in loaded.stages.stages]
    assert [stage.start for stage in again.stages.stages] == [stage.start for stage in loaded.stages.stages]
    assert again.stages.document == loaded.stages.document == config_yaml(loaded) + "\n"


def test_a_run_without_stages_is_one_stage_and_an_empty_list_takes_them_back(tmp_path):
    loaded = load_run_config([*TINY, "--dry-run"], {})
    assert not loaded.stages.several and loaded.stages.stages[0].run == loaded.run
    (tmp_path / "none.yaml").write_text("stages:\n")
    path = tmp_path / "stages.yaml"
    path.write_text(THREE)
    back = load_run_config([*TINY, "--config", str(path), "--config", str(tmp_path / "none.yaml"), "--dry-run"], {})
    assert not back.stages.several and back.run == loaded.run


BAD = {
    "unknown key": ("- from_tokens: 0\n  seq_lenght: 5", "stage 1: unknown key seq_lenght: did you mean seq_length?"),
    "a section": ("- from_tokens: 0\n  training: {seq_length: 5}", "a stage names its settings directly: seq_length"),
    "not of a stage": ("- from_tokens: 0\n  hidden_size: 64", "stage 1: hidden_size cannot change inside a run"),
    "no start": ("- seq_length: 64", "stage 1: it needs one of from_tokens and from_samples"),
    "two starts": ("- {from_tokens: 0, from_samples: 0}", "stage 1: it needs one of from_tokens and from_samples"),
    "a start in words": ("- from_tokens: soon", "stage 1: from_tokens is 'soon'"),
    "a value": ("- from_tokens: 0\n  seq_length: long", "stage 1: training.seq_length is 'long'"),
    "not a list": ("  from_tokens: 0", "stages is not a list"),
    "begins late": ("- from_tokens: 5", "stage 1 (from 5 tokens): the first stage begins with the run"),
    "no step": (
        "- from_tokens: 0\n- {from_tokens: 9000, seq_length: 64}\n- {from_tokens: 9001, lr: 1e-4}",
        "stage 3 (from 9,001 tokens) begins where stage 2 (from 9,000 tokens) begins, at step 4 (12,288 tokens",
    ),
    "out of order": (
        "- from_tokens: 0\n- {from_tokens: 9000, seq_length: 64}\n- {from_samples: 4, lr: 1e-4}",
        "stage 2 (from 9,000 tokens) has no step",
    ),
    "a size": (
        "- from_tokens: 0\n- {from_tokens: 9000, micro_batch_size: 3}",
        "stage 2 (from 9,000 tokens): global_batch_size=8 does not divide by micro_batch_size=3",
    ),
    "steps of a schedule": (
        "- from_tokens: 0\n- {from_tokens: 9000, seq_length: 64}",
        "lr_warmup_iters=5 counts steps, but the steps of this run's stages differ",
    ),
    "a schedule of its own without its end": (
        "- from_tokens: 0\n- {from_tokens: 9000, lr_decay_style: WSD}",
        "stage 2 (from 9,000 tokens): lr_decay_style WSD needs lr_wsd_decay_tokens",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_stage_is_refused_by_name(tmp_path, name):
    stages, expected = BAD[name]
    flags = ("--lr-warmup-iters", "5") if "steps" in name else ()
    text = refusal(tmp_path, "stages:\n" + textwrap.indent(stages, "  "), *flags)
    assert expected in text and "stages.yaml" in text or "counts steps" in text, text


def test_everything_wrong_with_every_stage_is_said_at_once_and_once(tmp_path):
    text = refusal(
        tmp_path,
        """
        stages:
          - from_tokens: 0
          - from_tokens: 8192
            global_batch_size: 5
            lr: 1e-9
          - from_tokens: 90000
            seq_length: 0
            global_batch_size: 8
        """,
        "--num-query-groups",
        "3",
    )
    assert text.count("num_query_groups=3 does not divide") == 1 and "stage 1" not in text, "of the whole run"
    assert "stage 2 (from 8,192 tokens): global_batch_size=5 does not divide" in text
    assert "stage 2 (from 8,192 tokens): lr=1e-09 is less than min_lr=0.0001" in text
    assert "stage 3 (from 90,000 tokens): seq_length=0 is less than 1" in text
    assert text.startswith("config error: 4 problems")


def test_dialogs_have_one_length_and_recordings_one_stage(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").write_text("{}\n")
    data = ["--sft", "--data-path", str(tmp_path / "d.jsonl"), "--tokenizer-model", __file__]
    monkeypatch.setattr(f"{__name__}.TINY", tuple(flag for flag in TINY if flag != "--mock-data"))
    text = refusal(tmp_path, "stages: [{from_tokens: 0}, {from_tokens: 9000, seq_length: 1024}]", *data)
    assert "stage 2 (from 9,000 tokens): seq_length=1024, but with sft a run has one length of a sample, 512" in text
    load(tmp_path, "stages: [{from_tokens: 0}, {from_tokens: 9000, global_batch_size: 16}]", *data)
    monkeypatch.undo()
    moe = ["--preset", "telechat2-tiny-moe", "--moe-routing-record", str(tmp_path / "r")]
    text = refusal(tmp_path, "stages: [{from_tokens: 0}, {from_tokens: 9000, global_batch_size: 16}]", *moe)
    assert "moe_routing_record is for a run without stages" in text


def test_notes_say_what_is_never_reached_given_in_vain_or_scaled_twice(tmp_path):
    text = THREE.replace("    rotary_training_seqlen: 8192\n", "").replace("from_tokens: 0", "{from_tokens: 0}", 1)
    text = text.replace("- {from_tokens: 0}", "- from_tokens: 0\n    seq_length: 256").replace("les: 60", "les: 90")
    notes = "\n".join(load(tmp_path, text, "--train-iters", "12").notes)
    assert "stage 3 (from 90 samples) is never reached: the run ends with step 12" in notes
    assert "seq_length=512 (flag) is not used, because stage 1 sets it" in notes
    assert "rotary_training_seqlen=2,048 and rotary_base_seqlen=2,048 the NTK formula acts on top of it" in notes
    assert "lr_warmup_iters=20 of preset telechat2-tiny is not used" in notes
    assert not [note for note in load(tmp_path, THREE, "--train-iters", "50").notes if "never" in note or "NTK" in note]


def test_a_plan_file_of_a_stage_sets_it_and_is_held_against_it(tmp_path):
    planned = load(tmp_path, "stages: [{from_tokens: 0, micro_batch_size: 1, recompute_granularity: full}]").run
    import json
    from dataclasses import replace

    for name, length in (("a", 512), ("b", 2048)):
        run = replace(planned, training=replace(planned.training, seq_length=length))
        (tmp_path / f"{name}.json").write_text(json.dumps(plan_of(run, "", None, {}).to_json()))
    text = f"""
    stages:
      - from_tokens: 0
        micro_batch_size: 2
      - from_tokens: 8192
        seq_length: 2048
        plan: {tmp_path}/b.json
    """
    stages = load(tmp_path, text).stages.stages
    assert [stage.run.training.micro_batch_size for stage in stages] == [2, 1], "a later plan sets what was said before"
    assert [stage.run.training.recompute_granularity for stage in stages] == [None, "full"]
    wrong = refusal(tmp_path, text.replace("b.json", "a.json"))
    assert "stage 2 (from 8,192 tokens): the plan was made for another run: seq_length=512, this run 2048" in wrong
    both = refusal(tmp_path, text.replace("        plan:", "        micro_batch_size: 4\n        plan:"))
    assert "micro_batch_size=4 and micro_batch_size=1 of the plan disagree" in both
    gone = refusal(tmp_path, text.replace("b.json", "c.json"))
    assert "stage 2 (from 8,192 tokens): cannot read the plan" in gone


def test_a_planner_plans_the_stage_that_it_is_asked_for(tmp_path):
    text = THREE + "    plan: not_there_yet.json\n"
    assert load(tmp_path, text, planning=True, stage=3).run.training.seq_length == 8192
    assert load(tmp_path, text, planning=True, stage=1).run.training.seq_length == 512
    notes = load(tmp_path, text, planning=True, stage=3).notes
    assert any("global_batch_size=8 (flag) is not used, because stage 2 sets it" in note for note in notes)
    assert "the run has 3 stages, and a plan is for one of them" in refusal(tmp_path, text, planning=True)
    assert "--stage 4: the run has 3 stages" in refusal(tmp_path, text, planning=True, stage=4)


def test_the_dry_run_shows_every_stage(tmp_path):
    text = report(load(tmp_path, THREE, "--train-iters", "25", "--world-size", "2", "--run-dir", str(tmp_path / "run")))
    row = next(line for line in text.splitlines() if "2  from 20,480 tokens" in line)
    for value in ("6-10", "40,960", "20", "2,048", "1e+06", "4 of 2", "DP2"):
        assert value in row, (value, row)
    assert "stage 3 (from 60 samples) changes rotary_base 1000000.0 -> 40000000.0" in text
    for title in ("stage 1 (from 0 tokens)", "stage 2 (from 20,480 tokens)", "stage 3 (from 60 samples)"):
        body = text.split(f"=== {title} ===")[1].split("===")[0]
        for section in ("pipeline layout", "memory of a rank", "steps\n"):
            assert section in body, (title, section)
    assert "4 x 8192 = 32.77k tokens a step" in text and "the stage " in text
    few = report(load(tmp_path, THREE, "--train-iters", "7", "--run-dir", str(tmp_path / "run")))
    assert next(line for line in few.splitlines() if "3  from 60 samples" in line).split()[4:7] == ["-", "-", "-"]


def curve(stages: RunStages) -> list[float]:
    rates = []
    for span in stages.spans():
        of_stage, position = StageRates(stages, span.stage, span.begin), span.begin
        while position.step < span.end.step:
            # A resume anywhere gives the same rate.
            assert StageRates(stages, span.stage, position).at(0, position.tokens) == of_stage.at(0, position.tokens)
            rates.append(of_stage.at(0, position.tokens))
            position = position.after(span.stage.run)
    return rates


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD", "constant", "inverse-square-root"])
def test_by_tokens_the_rate_is_that_by_steps_where_all_steps_are_equal(style):
    steps = ["--lr-decay-style", style, "--train-iters", "40", "--lr-warmup-iters", "7"]
    tokens = ["--lr-decay-style", style, "--train-iters", "40", "--lr-warmup-tokens", str(7 * 4096)]
    if style == "WSD":
        steps, tokens = [*steps, "--lr-wsd-decay-iters", "9"], [*tokens, "--lr-wsd-decay-tokens", str(9 * 4096)]
    by_steps = load_run_config([*TINY, *steps, "--dry-run"], {}).run
    wanted = [learning_rate(by_steps.optimizer, 40, step) for step in range(40)]
    stages = load_run_config([*TINY, *tokens, "--dry-run"], {}).stages
    assert stages.stages[0].run.optimizer.lr_decay_iters is None
    assert curve(stages) == wanted


def test_a_change_of_batch_and_length_does_not_move_the_curve(tmp_path):
    text = THREE.replace("    lr: 1e-4\n", "")
    stages = load(tmp_path, text, "--train-iters", "25", "--lr-warmup-tokens", "8192").stages
    total = stages.spans()[-1].end.tokens
    one = load_run_config([*TINY, "--train-iters", str(-(-total // 4096)), "--lr-warmup-tokens", "8192",
                           "--lr-decay-tokens", str(total), "--dry-run"], {}).stages  # fmt: skip
    whole = curve_of(one, one.stages[0], Position())
    at = [span.begin.after(span.stage.run, n).tokens for span in stages.spans() for n in range(span.steps)]
    assert curve(stages) == [whole.rate(tokens) for tokens in at]


def test_a_stage_with_a_rate_of_its_own_begins_a_schedule(tmp_path):
    text = THREE + "    min_lr: 1e-5\n    lr_warmup_tokens: 65536\n"
    stages = load(tmp_path, text, "--train-iters", "25", "--lr-warmup-tokens", "8192").stages
    rates = curve(stages)
    first = stages.spans()[2].begin
    # The first schedule ends where the other begins: at sample 60, in the middle of the run.
    assert (
        curve_of(stages, stages.stages[1], Position()).end == curve_of(stages, stages.stages[2], first).begin == 61_440
    )
    assert rates[10] == 0.0 and rates[12] == 1e-4 == max(rates[10:]) and rates[9] < rates[5] < rates[2]
    assert curve_of(stages, stages.stages[2], first).end == stages.spans()[-1].end.tokens
    plain = load(tmp_path, THREE, "--train-iters", "25", "--lr-warmup-tokens", "8192").stages
    assert curve(plain)[10] == 1e-4, "a schedule has no warm-up but its own"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--lr-warmup-iters 3 --lr-decay-tokens 9000", "lr_warmup_iters=3 counts steps, but lr_decay_tokens counts"),
        ("--lr-warmup-tokens 9000 --lr-decay-tokens 9000", "lr_warmup_tokens=9000 leaves nothing of lr_decay_tokens"),
        ("--lr-warmup-tokens 5 --lr-warmup-fraction 0.1", "lr_warmup_tokens=5 and lr_warmup_fraction=0.1 both"),
        ("--lr-decay-tokens 0", "lr_decay_tokens=0 is less than 1"),
        ("--lr-decay-style inverse-square-root --lr-decay-tokens 99", "inverse-square-root by tokens needs a warm-up"),
    ],
)
def test_lengths_of_a_schedule_that_do_not_go_together(flags, expected):
    with pytest.raises(ConfigError, match=expected.replace("(", r"\(")):
        load_run_config([*TINY, *flags.split(), "--dry-run"], {})


def test_the_recipe_of_the_docs_is_one(tmp_path):
    page = (ROOT / "docs" / "long_context.md").read_text(encoding="utf-8")
    section = page.split("## Lengths inside a run")[1]
    text = section.split("```yaml\n")[1].split("```")[0]
    text = text.replace("    plan: plan_256k.json\n", "    context_parallel_size: 16\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    loaded = load_run_config(["--config", str(path), "--mock-data", "--dry-run", "--world-size", "128"], {})
    stages = loaded.stages.stages
    assert [stage.run.training.seq_length for stage in stages] == [8192, 32768, 262144]
    assert [stage.run.parallel.context_parallel_size for stage in stages] == [1, 2, 16]
    for stage in stages:
        model, length = stage.run.model, stage.run.training.seq_length
        assert model.rotary_training_seqlen == model.rotary_base_seqlen == length
    assert not [note for note in loaded.notes if "NTK" in note or "never" in note]
