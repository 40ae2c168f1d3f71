"""The learning rate is megatron-core's, step for step."""

import pytest

from megatron_telechat.config import load_run_config, lr_schedules
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.lr_schedules import SCHEDULES, SHAPES
from megatron_telechat.config.run_stages import Position
from megatron_telechat.config.schema import OptimizerConfig
from megatron_telechat.training.learning_rate import StageRates, learning_rate

TRAIN_ITERS = 100


def core_curve(config: OptimizerConfig, train_iters: int) -> list[float]:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    class Groups:
        param_groups = [{"lr": 0.0, "weight_decay": 0.0}]

    decay = config.lr_decay_iters or train_iters
    warmup = int(config.lr_warmup_fraction * decay) if config.lr_warmup_fraction is not None else config.lr_warmup_iters
    scheduler = OptimizerParamScheduler(
        Groups(),
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_iters,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )
    curve = []
    for _ in range(train_iters):
        curve.append(Groups.param_groups[0]["lr"])
        scheduler.step(1)
    return curve


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(lr_decay_style="cosine"),
        OptimizerConfig(lr_decay_style="cosine", lr_warmup_iters=10),
        OptimizerConfig(lr_decay_style="cosine", lr_warmup_fraction=0.05, lr_warmup_init=1e-6),
        OptimizerConfig(lr_decay_style="linear", lr_warmup_iters=3, lr_decay_iters=60),
        OptimizerConfig(lr_decay_style="constant", lr_warmup_iters=7),
        OptimizerConfig(lr_decay_style="inverse-square-root", lr_warmup_iters=9),
        *(
            OptimizerConfig(lr_decay_style="WSD", lr_warmup_iters=5, lr_wsd_decay_iters=20, lr_wsd_decay_style=style)
            for style in SHAPES
        ),
        OptimizerConfig(lr_decay_style="WSD", lr_wsd_decay_iters=30, lr_decay_iters=80),
        OptimizerConfig(lr_decay_style="WSD", lr_wsd_decay_iters=100, lr_wsd_decay_style="linear"),
    ],
    ids=lambda c: f"{c.lr_decay_style}-{c.lr_wsd_decay_style}-{c.lr_warmup_iters}-{c.lr_wsd_decay_iters}",
)
def test_equals_megatron_core(config):
    ours = [learning_rate(config, TRAIN_ITERS, step) for step in range(TRAIN_ITERS)]
    assert ours == pytest.approx(core_curve(config, TRAIN_ITERS), rel=1e-12, abs=1e-18)


def test_published_39b_schedule():
    """3e-4 to 1.5e-5 cosine, 2000 steps of warm-up, 1,000,000 in all (the published 39B-A12B yaml)."""
    config = OptimizerConfig(lr=3e-4, min_lr=1.5e-5, lr_warmup_iters=2000)
    assert learning_rate(config, 1_000_000, 0) == 0.0
    assert learning_rate(config, 1_000_000, 2000) == pytest.approx(3e-4)
    assert learning_rate(config, 1_000_000, 501_000) == pytest.approx((3e-4 + 1.5e-5) / 2)
    assert learning_rate(config, 1_000_000, 999_999) == pytest.approx(1.5e-5, rel=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_a_flag_value_and_stays_between_its_two_rates(name):
    assert name in fields_by_name()["lr_decay_style"].choices
    config = OptimizerConfig(lr_decay_style=name, lr_warmup_iters=5, lr_decay_iters=60, lr_wsd_decay_iters=20)
    curve = [learning_rate(config, TRAIN_ITERS, step) for step in range(5, TRAIN_ITERS)]
    assert curve[0] == config.lr
    assert all(config.min_lr <= rate <= config.lr for rate in curve)
    if SCHEDULES[name].ends:
        assert set(curve[56:]) == {config.min_lr}


def test_two_schedules_cannot_share_a_name():
    with pytest.raises(ValueError, match="two learning-rate schedules are called cosine"):
        lr_schedules.schedule("cosine")(lambda moment: moment.lr)


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
def test_a_schedule_in_samples_is_that_of_megatron(style):
    """megatron-core's scheduler counts the samples of the steps; the warm-up ends within a step here."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    flags = "--train-samples 1000 --global-batch-size 8 --lr-warmup-samples 61 --lr-decay-samples 900 --lr 1e-3"
    flags += " --min-lr 1e-5" + " --lr-wsd-decay-samples 300 --lr-wsd-decay-style linear" * (style == "WSD")
    argv = ["--preset", "telechat2-tiny", "--mock-data", "--dry-run", "--lr-decay-style", style, *flags.split()]
    loaded = load_run_config(argv, {})
    run = loaded.run
    assert run.training.train_iters == 125

    class Groups:
        param_groups = [{"lr": 0.0, "weight_decay": 0.0}]

    core = OptimizerParamScheduler(
        Groups(), init_lr=0.0, max_lr=1e-3, min_lr=1e-5, lr_warmup_steps=61, lr_decay_steps=900, lr_decay_style=style,
        start_wd=0.0, end_wd=0.0, wd_incr_steps=900, wd_incr_style="constant",
        wsd_decay_steps=300 if style == "WSD" else None, lr_wsd_decay_style="linear",
    )  # fmt: skip
    rates = StageRates(loaded.stages, loaded.stages.stages[0], Position())
    for step in range(125):
        ours = rates.at(step, step * 8 * run.training.seq_length)
        assert ours == pytest.approx(Groups.param_groups[0]["lr"], rel=1e-12), step
        core.step(8)
