"""Whether Transformer Engine can do what a run asks of it, told before it is asked."""

from __future__ import annotations

import importlib.util

from megatron_telechat.backend.core_versions import TRANSFORMER_ENGINE
from megatron_telechat.device_kinds import DeviceTraits
from megatron_telechat.errors import ConfigError

_OFF = "drop --fp8-format"


def require_for_fp8(device: DeviceTraits) -> None:
    """That Transformer Engine is here and has kernels for this kind of device. Nothing is imported.

    Raises:
        ConfigError: it has not, or is not.
    """
    _require("FP8 is computed by Transformer Engine, which", "fp8_format", _OFF, device)


def require_for_context(device: DeviceTraits) -> None:
    """The same for its attention over ranks.

    Raises:
        ConfigError: as `require_for_fp8`.
    """
    setting = "cp_implementation"
    _require(f"{setting}=transformer_engine: Transformer Engine", setting, "drop --cp-implementation", device)


def _require(what: str, setting: str, off: str, device: DeviceTraits) -> None:
    if not device.transformer_engine:
        raise ConfigError(f"{what} has no kernels for {device.name}", setting, off)
    # The meta package alone has neither kernels nor this module.
    if importlib.util.find_spec("transformer_engine_torch") is None:
        raise ConfigError(
            f"{what} is not installed",
            setting,
            f'pip install --no-build-isolation "transformer-engine[pytorch]{TRANSFORMER_ENGINE}", or {off}',
        )


def require_recipe(recipe: str) -> None:
    """That the device of this rank, and the CUDA that Transformer Engine was built for, have this recipe.

    Args:
        recipe: a value of ``fp8_recipe``.

    Raises:
        ConfigError: they have not; with Transformer Engine's reason.
    """
    from transformer_engine.pytorch.fp8 import (  # pyright: ignore[reportMissingImports] - optional
        check_fp8_block_scaling_support,
        check_fp8_support,
        check_mxfp8_support,
    )

    checks = {"blockwise": check_fp8_block_scaling_support, "mxfp8": check_mxfp8_support}
    there, reason = checks.get(recipe, check_fp8_support)()
    if not there:
        raise ConfigError(f"this device has no FP8 of fp8_recipe={recipe}: {reason}", "fp8_recipe", _OFF)
