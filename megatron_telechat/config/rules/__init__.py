"""Every rule a configuration must keep, each a small function that returns problems.

``VALUE_RULES`` look at one value each and run first; a value they complain about is
left in peace by ``ALL_RULES``, which look at values together.
"""

from __future__ import annotations

from megatron_telechat.config.origins import Rule
from megatron_telechat.config.rules import (
    average,
    batch,
    context,
    data,
    experts,
    files,
    fp8,
    learning_rate,
    local_tier,
    meaning,
    model,
    optimizer_state,
    parallel,
    pipeline,
    preference,
    recompute,
    values,
    watch,
)

VALUE_RULES: tuple[Rule, ...] = values.RULES
ALL_RULES: tuple[Rule, ...] = (
    *model.RULES,
    *meaning.RULES,
    *parallel.RULES,
    *context.RULES,
    *experts.RULES,
    *pipeline.RULES,
    *batch.RULES,
    *recompute.RULES,
    *fp8.RULES,
    *learning_rate.RULES,
    *average.RULES,
    *optimizer_state.RULES,
    *data.RULES,
    *preference.RULES,
    *files.RULES,
    *local_tier.RULES,
    *watch.RULES,
)
LENGTH_RULES: tuple[Rule, ...] = (*learning_rate.RULES, experts.names_steps, experts.replay_fits)
"""Those that read the number of steps, which a length in epochs gives only once the data is counted."""
