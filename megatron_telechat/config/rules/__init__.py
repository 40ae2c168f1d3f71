"""Every rule a configuration must keep, each a small function that returns problems."""

from __future__ import annotations

from megatron_telechat.config.origins import Rule

ALL_RULES: tuple[Rule, ...] = ()
VALUE_RULES: tuple[Rule, ...] = ()
